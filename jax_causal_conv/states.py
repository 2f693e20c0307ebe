"""Helpers around the conv-state cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import checks
from .batch import accumulator, sanitize_offsets, sequences
from .operands import PAD_SLOT_ID
from .promotion import promoting
from .slots import slots_after, wide_slots

__all__ = ["layer_slots", "varlen_conv_states"]


@promoting
def varlen_conv_states(
    x: ArrayLike,
    query_start_loc: ArrayLike,
    state_len: int,
    *,
    conv_states: ArrayLike | None = None,
    cache_indices: ArrayLike | None = None,
    has_initial_state: ArrayLike | None = None,
    num_rejected_tokens: ArrayLike | None = None,
    ends: ArrayLike | None = None,
) -> jax.Array:
    """The slot that each sequence would leave after some of its tokens.

    For snapshots and prefix caching: no filter is applied and no cache is changed.
    Arguments as for `causal_conv1d_fn`; without `conv_states` history is zeros and
    any non-negative slot number is valid.

    Args:
        x: `(T, D)` packed inputs.
        query_start_loc: `(N+1,)` integers.
        state_len: rows of the result (static, >= 0; need not be the cache's L).
        conv_states: `(S, L, D)` or None.
        cache_indices: `(N,)` integers or None = `arange(N)`.
        has_initial_state: `(N,)` bool or None = all False.
        num_rejected_tokens: `(N,)` integers or None = 0.
        ends: `(N,)` integers, how many tokens of each sequence to take, clamped into
            `[0, its length]`. None is all of them.

    Returns:
        `(N, state_len, D)` in the dtype of `conv_states`, else of x: the last
        `state_len` of `concat(history, tokens)`, zero rows in front where there are
        fewer. Skipped sequences give zeros.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or size is wrong.
    """
    inputs = checks.float_array("x", x, (None, None), "(T, D)")
    num_tokens, dim = inputs.shape
    state_len = checks.static_int("state_len", state_len, minimum=0)
    offsets = checks.offsets(query_start_loc, num_tokens)
    num_seqs = offsets.shape[0] - 1
    if conv_states is None:
        states, dtype = None, inputs.dtype
        num_slots, history_len = 2**31 - 1, 0  # any slot, no rows in it
        if cache_indices is not None:
            cache_indices = checks.index_array(
                "cache_indices", cache_indices, (num_seqs,), "(N,)", -1, 2**31 - 2
            ).clip(max=2**31 - 2)
    else:
        states = checks.state_array("conv_states", conv_states, dim, 0)
        dtype, (num_slots, history_len) = states.dtype, states.shape[:2]
        cache_indices = checks.slots_array(
            "cache_indices", cache_indices, states, "conv_states", num_seqs, "N"
        )
    has_initial_state = checks.has_initial_state(has_initial_state, num_seqs)
    num_rejected = checks.num_rejected_tokens(
        num_rejected_tokens, num_seqs, "N", history_len
    )
    if ends is not None:
        ends = checks.index_array("ends", ends, (num_seqs,), "(N,)", 0, num_tokens)

    if 0 in (num_tokens, dim, num_seqs, num_slots) or state_len == 0:
        return jnp.zeros((num_seqs, state_len, dim), dtype)
    offsets = sanitize_offsets(jnp.asarray(offsets), num_tokens)
    seqs = sequences(
        offsets,
        cache_indices,
        has_initial_state,
        num_rejected,
        (num_slots, history_len),
        PAD_SLOT_ID,
    )
    length = seqs.length if ends is None else jnp.clip(ends, 0, seqs.length)
    if history_len == 0:
        states = None
    wide_x = inputs.astype(accumulator(inputs))
    wide = None if states is None else wide_slots(states, seqs, wide_x.dtype)
    rows = slots_after(
        (inputs, wide_x), (states, wide), seqs, state_len, dtype, length=length
    )
    return jnp.where(seqs.live[:, None, None], rows, 0)


@promoting
def layer_slots(
    slots: ArrayLike,
    layer: ArrayLike | int,
    num_slots: int,
    *,
    pad_slot_id: int = PAD_SLOT_ID,
) -> jax.Array:
    """Slot numbers in a cache `(layers * S, L, D)` flattened over its layers.

    `layer * S + slot`; slots that are `pad_slot_id` or outside `[0, S)` become
    PAD_SLOT_ID, as adding alone would turn padding into another layer's slot.

    Args:
        slots: `(N,)` (or any shape) integers, slot numbers within a layer.
        layer: the layer's number; an int, or a traced integer such as scan's.
        num_slots: S, the slots of one layer (static).
        pad_slot_id: static int, the slot number that means "skip".

    Returns:
        int32 slot numbers of the flattened cache, in the shape of `slots`.

    Raises:
        TypeError: slots or layer are not integers.

    A layer that is negative, or too large for slot numbers in int32, gives PAD_SLOT_ID.

    Example:
        >>> layer_slots(jnp.array([0, 3, -1, 9]), layer=2, num_slots=4).tolist()
        [8, 11, -1, -1]
    """
    num_slots = checks.static_int("num_slots", num_slots, minimum=0)
    pad = checks.pad_slot(pad_slot_id, num_slots)
    slots = checks.index_array("slots", slots, jnp.shape(slots), "(...)", -1, num_slots)
    layer = checks.index_array("layer", layer, (), "()", -1, 2**31 - 1)
    slots, layer = jnp.asarray(slots), jnp.asarray(layer)
    valid = (slots >= 0) & (slots < num_slots) & (slots != pad)
    valid &= (layer >= 0) & (layer <= (2**31 - 1) // max(num_slots, 1) - 1)
    return jnp.where(valid, layer * num_slots + slots, PAD_SLOT_ID)
