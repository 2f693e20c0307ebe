"""The XLA implementation: the readable truth, and the path for CPU and TPU.

Everything is a gather of rows: token p of a sequence needs rows p-1 … p-(W-1) of
x, or, before the sequence's first token, rows of its slot. A select picks one of
the two, so that what a token must not see is never multiplied with anything. The
loop over taps is static and XLA fuses it into one pass over the output.

Slots are `(S, L, D)`; `history` is the number of rows at a slot's *end* that a
sequence may use, minus the rejected ones at the very end (see `SlotView`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Sequences(NamedTuple):
    """What the packed batch's index arguments mean, after clamping; all `(N,)`.

    Attributes:
        start: first token of the sequence.
        length: its number of tokens.
        slot: its slot, clamped into `[0, S)`; only meaningful where `live`.
        history: rows of the slot that hold valid history: rows
            `[0, history)`, newest last. 0 without initial state.
        live: False for skipped sequences.
    """

    start: jax.Array
    length: jax.Array
    slot: jax.Array
    history: jax.Array
    live: jax.Array


def sanitize_offsets(query_start_loc, num_tokens: int):
    """`cummax(clip(q, 0, T))`: the one meaning of any vector of offsets."""
    return lax.cummax(jnp.clip(query_start_loc, 0, num_tokens))


def sequences(
    offsets, slots, has_initial_state, num_rejected, shape, pad_slot_id: int
) -> Sequences:
    """Resolves sanitised offsets and optional index arrays for slots of `shape`."""
    num_slots, state_len = shape[:2]
    start, length = offsets[:-1], offsets[1:] - offsets[:-1]
    if slots is None:
        slots = jnp.arange(start.shape[0], dtype=jnp.int32)
    slots = jnp.asarray(slots)
    named = (slots >= 0) & (slots < num_slots) & (slots != pad_slot_id)
    live = named & (length > 0)
    history = jnp.full_like(start, state_len)
    if num_rejected is not None:
        history = history - jnp.clip(num_rejected, 0, state_len)
    has_initial_state = False if has_initial_state is None else has_initial_state
    history = jnp.where(has_initial_state, history, 0)
    slot = jnp.clip(slots, 0, max(num_slots - 1, 0))
    return Sequences(start, length, slot, history, live)


def _rows(table, *index):
    """Rows of `table` at (clamped) indices: one gather."""
    return table.at[index].get(mode="clip")


def _convolve(x, weight, bias, states, slot, position, history_row, live, silu):
    """`act(bias + Σ w·u)` for each row of x `(T, D)`; zeros where not `live`.

    Args:
        slot: `(T,)` slot of the token's sequence.
        position: `(T,)` index of the token within its sequence.
        history_row: maps j `(T,)` (1 = newest) to `(row, valid)` in the slot.
        live: `(T,)` bool.
        silu: whether to apply silu.
    """
    width = weight.shape[1]
    dtype = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    token = jnp.arange(x.shape[0], dtype=jnp.int32)
    weight = weight.astype(dtype)
    acc = jnp.zeros(x.shape, dtype) if bias is None else bias.astype(dtype)
    for d in range(width):
        tap = _rows(x, jnp.maximum(token - d, 0)).astype(dtype)
        if d:
            row, valid = history_row(d - position)
            old = _rows(states, slot, jnp.maximum(row, 0)).astype(dtype)
            old = jnp.where(valid[:, None], old, 0)
            tap = jnp.where((position >= d)[:, None], tap, old)
        acc = acc + tap * weight[:, width - 1 - d]
    if silu:
        acc = jax.nn.silu(acc)
    return jnp.where(live[:, None], acc, 0).astype(x.dtype)


def slots_after(x, states, seqs: Sequences, length, state_len: int, dtype):
    """The last `state_len` of `concat(history, x[start:start+length])`, `(N, ·, D)`.

    Zero rows in front of the first known one. `states` None means no history.
    """
    row = jnp.arange(state_len, dtype=jnp.int32)
    token = length[:, None] - state_len + row  # of the sequence; < 0: history
    new = _rows(x, jnp.maximum(seqs.start[:, None] + token, 0)).astype(dtype)
    if states is None:
        old = jnp.zeros((), dtype)
    else:
        row = seqs.history[:, None] + token
        old = _rows(states, seqs.slot[:, None], jnp.maximum(row, 0)).astype(dtype)
        old = jnp.where((row >= 0)[..., None], old, 0)
    return jnp.where((token >= 0)[..., None], new, old)


def _store(states, out, slot, row, rows, live):
    """Writes `rows` `(N, K, D)` to `states[slot, row]` of live sequences.

    The barrier orders every read of `states` before the write, so that XLA updates
    a donated cache in place instead of copying it.
    """
    out, rows, states = lax.optimization_barrier((out, rows, states))
    slot = jnp.where(live, slot, states.shape[0])  # out of bounds: dropped
    return out, states.at[slot[:, None], row].set(rows, mode="drop")


def packed(
    x,
    weight,
    bias,
    states,
    query_start_loc,
    slots,
    has_initial_state,
    num_rejected,
    metadata=None,
    *,
    silu: bool,
    pad_slot_id: int,
):
    """`causal_conv1d_fn` on checked arguments; `metadata` is not needed here."""
    del metadata
    num_tokens, state_len = x.shape[0], states.shape[1]
    offsets = sanitize_offsets(query_start_loc, num_tokens)
    seqs = sequences(
        offsets, slots, has_initial_state, num_rejected, states.shape, pad_slot_id
    )
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    # The first sequence that ends behind the token; N for an uncovered tail.
    owner = jnp.searchsorted(offsets[1:], token, side="right").astype(jnp.int32)
    covered = (owner < seqs.start.shape[0]) & (token >= offsets[0])
    start, _, slot, history, live = (_rows(a, owner) for a in seqs)

    def history_row(j):
        return history - j, history >= j

    out = _convolve(
        x, weight, bias, states, slot, token - start, history_row, covered & live, silu
    )
    if state_len == 0:
        return out, states
    rows = slots_after(x, states, seqs, seqs.length, state_len, states.dtype)
    row = jnp.arange(state_len, dtype=jnp.int32)
    return _store(states, out, seqs.slot, row, rows, seqs.live)


def update(
    x,
    weight,
    bias,
    state,
    cache_seqlens,
    slots,
    num_rejected,
    *,
    silu: bool,
    pad_slot_id: int,
):
    """`causal_conv1d_update` on checked arguments; x is `(B, Q, D)`."""
    batch, query, dim = x.shape
    state_len = state.shape[1]
    flat = x.reshape(batch * query, dim)
    offsets = jnp.arange(batch + 1, dtype=jnp.int32) * query
    seqs = sequences(offsets, slots, True, num_rejected, state.shape, pad_slot_id)
    owner = jnp.arange(batch * query, dtype=jnp.int32) // query
    position = jnp.arange(batch * query, dtype=jnp.int32) % query

    if cache_seqlens is None or state_len == 0:
        history = _rows(seqs.history, owner)
        row = jnp.arange(state_len, dtype=jnp.int32)
        rows = slots_after(flat, state, seqs, seqs.length, state_len, state.dtype)

        def history_row(j):
            return history - j, history >= j
    else:
        cursor = jnp.mod(cache_seqlens, state_len)  # reduced first: cannot overflow
        kept = min(query, state_len)  # each row is written once
        row = (cursor[:, None] + jnp.arange(query - kept, query)) % state_len
        rows = x[:, query - kept :].astype(state.dtype)

        def history_row(j):
            return jnp.mod(_rows(cursor, owner) - j, state_len), jnp.full_like(j, True)

    slot, live = _rows(seqs.slot, owner), _rows(seqs.live, owner)
    out = _convolve(flat, weight, bias, state, slot, position, history_row, live, silu)
    if state_len == 0:
        return out.reshape(x.shape), state
    out, state = _store(state, out, seqs.slot, row, rows, seqs.live)
    return out.reshape(x.shape), state
