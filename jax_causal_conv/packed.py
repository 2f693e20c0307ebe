"""`causal_conv1d_fn`: the packed op, prefill and decode mixed in one call."""

from __future__ import annotations

import dataclasses
from typing import Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import checks
from .arguments import Activation, Implementation, PackedArguments
from .chunks import ConvMetadata, num_programs
from .columns import Output
from .op import gradients
from .op.ops import PACKED
from .operands import PAD_SLOT_ID, PackedOperands
from .promotion import promoting

__all__ = ["causal_conv1d_fn"]


@overload
def causal_conv1d_fn(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike,
    query_start_loc: ArrayLike,
    *,
    split: None = None,
    **arguments: Unpack[PackedArguments],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def causal_conv1d_fn(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike,
    query_start_loc: ArrayLike,
    *,
    split: tuple[int, ...],
    **arguments: Unpack[PackedArguments],
) -> tuple[tuple[jax.Array, ...], jax.Array]: ...
@overload
def causal_conv1d_fn(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike,
    query_start_loc: ArrayLike,
    *,
    split: tuple[int, ...] | None = None,
    **arguments: Unpack[PackedArguments],
) -> tuple[Output, jax.Array]: ...
@promoting
def causal_conv1d_fn(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None,
    conv_states: ArrayLike,
    query_start_loc: ArrayLike,
    *,
    cache_indices: ArrayLike | None = None,
    has_initial_state: ArrayLike | None = None,
    num_rejected_tokens: ArrayLike | None = None,
    write_indices: ArrayLike | None = None,
    snapshot_ends: ArrayLike | None = None,
    snapshot_indices: ArrayLike | None = None,
    activation: Activation = "silu",
    metadata: ConvMetadata | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
    channel_offset: int | None = None,
    split: tuple[int, ...] | None = None,
    dilation: int = 1,
    residual: bool = False,
    implementation: Implementation = None,
) -> tuple[Output, jax.Array]:
    """Causal depthwise conv of a packed batch, with its conv states updated.

    Sequence i owns tokens `[q[i], q[i+1])` of the flat token axis; prefills, chunks of
    prefills, single decode steps and rows of draft tokens may be mixed at will. With
    `u[j >= 0]` the sequence's own input and `u[j < 0]` its history, the newest row of
    its slot being `u[-1]`, token p becomes

        out = act(bias + sum_k weight[:, k] * u[p - (W-1-k) * dilation])

    plus x where `residual` says so, summed in float32 from exact products and rounded
    once. Afterwards the slot holds
    the last L inputs of the request, oldest first, zeros before the first.

    A sequence is *skipped* if it is empty or its slot is `pad_slot_id` or outside
    `[0, S)`: its tokens come back as exact zeros, as do tokens that no sequence
    covers, and no slot changes. Offsets mean `cummax(clip(q, 0, T))`, so any integers
    are safe; only two live sequences that write one slot, and one that reads a slot
    which another writes, are unspecified, for themselves and these slots. Several may
    read one slot and write others: forks, and hits of a prefix cache.

    The states are functional: the result is a new array and `conv_states` stays as it
    is. Where the caller donates it to jit (or carries it through scan), the update
    happens in place, without a copy.

    Sharded channels stay local under jit, on auto and explicit mesh axes, gradients
    too; a filter may be sharded like them or replicated. Sharded tokens or slots are
    right, but may be gathered: slot numbers and offsets are global. For data
    parallelism use `jax.shard_map`, each device with its own requests, offsets and
    slots, numbered within the device; nothing is communicated but the sum of the
    filter's gradients. (Channels may stay on an auto axis outside of it; on an explicit
    one jax allows that for the forward pass only.)

    The algorithm, programs mapped to chunks of sequences, is that of vLLM's Triton
    kernel (vLLM pull request 18218).

    Args:
        x: `(T, D)` inputs; float32, bfloat16 or float16 (float64: XLA only).
        weight: `(D, W)`, any W >= 1; `weight[:, W-1]` meets the current token.
        bias: `(D,)` or None.
        conv_states: `(S, L, D)` cache, L >= (W-1) * dilation. Dtypes may be mixed
            freely.
        query_start_loc: `(N+1,)` integers.
        cache_indices: `(N,)` integers, the slot of each sequence. None is `arange(N)`.
        has_initial_state: `(N,)` bool: does the slot hold history? None is all False.
        num_rejected_tokens: `(N,)` integers r, clamped into `[0, L]`: the last r rows
            of the slot were rejected drafts and are forgotten. Ignored without initial
            state, and by skipped sequences: pass it again with their next tokens.
            Keep L >= (W-1) * dilation + max(r). None is 0.
        write_indices: `(N,)` integers, the slot that each sequence's new state goes to,
            while its history comes from that in `cache_indices`, by which it is live or
            skipped. `pad_slot_id` or a number outside `[0, S)`: outputs are computed,
            nothing is stored. None is `cache_indices`.
        snapshot_ends: `(N,)` integers, clamped into `[0, length]`: live sequences also
            leave their state after so many of their tokens, to the bit what a call
            that ended there would have left; 0 is the state that they start from.
        snapshot_indices: `(N,)` integers, the slots that these go to; as above, and
            none where it is the slot of the sequence's new state. Both or neither.
        activation: None, "silu" or "swish", "gelu" (its form with tanh, as
            `jax.nn.gelu`), "relu", "sigmoid" or "tanh"; True is silu, False is None.
            Static, as all options: under jit fix it (`jax.jit(functools.partial(
            causal_conv1d_fn, activation=None))`) or name it in `static_argnames`.
        metadata: from `build_metadata`, to share it between layers. None builds it.
        pad_slot_id: static int, the slot number that means "skip".
        channel_offset: static int; x may then be wider than D, and the conv reads its
            columns `[channel_offset, channel_offset + D)` where they lie, say in the
            output of Mamba2's in-projection. The gradient of the others is exactly 0.
            None: x has D channels.
        split: static sizes > 0 that sum to D; `out` is then a tuple with the channels
            of each, say x, B, C or q, k, v, written as separate arrays (by the kernels
            up to four). None: one array. With `channel_offset` or `split`, plain jit
            gathers channels that are sharded, since parts and shards need not
            coincide; under `shard_map` they are per shard.
        dilation: static int >= 1, tokens from one tap to the next: token p meets
            tokens p, p - dilation, …, p - (W-1) * dilation.
        residual: whether the op's own columns of x are added to the output, in
            float32, before its one rounding. Padding and skipped tokens stay zeros.
        implementation: None (Triton on CUDA, XLA elsewhere, chosen at lowering),
            "triton", "xla", or "interpret" (the Triton kernels in Triton's
            interpreter on the host, for debugging). A state without rows (L = 0, for
            W = 1) leaves kernels nothing to do in place: XLA runs whatever is asked.

    Returns:
        `out` `(T, D)` in x's dtype (with `split` a tuple of `(T, d_i)`), and the new
        conv states, like `conv_states`.
        Slots that no live sequence writes are bit-for-bit unchanged. Sizes of 0 give
        naturally shaped results and launch nothing.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape, size or option is wrong, or `metadata` is for other sizes.

    Example:
        >>> step = jax.jit(causal_conv1d_fn, donate_argnames="conv_states")
        >>> out, states = step(x, weight, bias, states, query_start_loc,
        ...                    cache_indices=slots, has_initial_state=seen)

        Between Mamba2's projections, without a copy:

        >>> (x, B, C), states = causal_conv1d_fn(
        ...     zxbcdt, weight, bias, states, query_start_loc,
        ...     channel_offset=d_inner, split=(d_inner, d_state, d_state))
    """
    inputs = checks.float_array("x", x, (None, None), "(T, D)")
    num_tokens = inputs.shape[0]
    dim, columns = checks.columns(channel_offset, split, inputs, weight)
    implementation = checks.implementation_for(implementation, inputs)
    taps, bias = checks.filters(weight, bias, inputs, dim)
    spec = checks.conv_spec(activation, columns, dilation, residual, taps)
    reach = spec.reach(taps.shape[1])
    states = checks.state_array("conv_states", conv_states, dim, reach)
    num_slots, state_len = states.shape[:2]
    offsets = checks.offsets(query_start_loc, num_tokens)
    num_seqs = offsets.shape[0] - 1
    slots = checks.slots_array(
        "cache_indices", cache_indices, states, "conv_states", num_seqs, "N"
    )
    has_initial_state = checks.has_initial_state(has_initial_state, num_seqs)
    num_rejected = checks.num_rejected_tokens(
        num_rejected_tokens, num_seqs, "N", state_len
    )
    write_slots = checks.write_slots(
        "write_indices", write_indices, num_seqs, "N", states
    )
    snapshot_ends, snapshot_slots = checks.snapshots(
        snapshot_ends, snapshot_indices, num_seqs, num_tokens, states
    )
    pad = checks.pad_slot(pad_slot_id, num_slots)
    spec = dataclasses.replace(spec, pad_slot_id=pad)
    block_m = 1
    if metadata is not None:
        block_m = _checked_block_m(metadata, num_tokens, num_seqs, reach)
    checks.token_count("T", num_tokens, block_m)

    if 0 in (num_tokens, dim, num_seqs, num_slots):
        zeros = jnp.zeros((num_tokens, dim), inputs.dtype)
        return columns.output(columns.parts(zeros)), states
    if state_len == 0:  # W = 1: there is no state that a kernel could update in place
        implementation = "xla"
    operands = PackedOperands(
        inputs,
        taps,
        bias,
        states,
        offsets,
        slots=slots,
        has_initial_state=has_initial_state,
        num_rejected=num_rejected,
        metadata=metadata,
        write_slots=write_slots,
        snapshot_slots=snapshot_slots,
        snapshot_ends=snapshot_ends,
    )
    *out, states = gradients.call(PACKED, implementation, spec, operands)
    return columns.output(out), states


def _checked_block_m(metadata, num_tokens: int, num_seqs: int, reach: int) -> int:
    """The `block_m` of metadata that fits the batch's sizes, or an error."""
    if not isinstance(metadata, ConvMetadata):
        raise TypeError(
            f"metadata must be a ConvMetadata or None, got {type(metadata).__name__}"
        )
    block_m = checks.static_int("metadata.block_m", metadata.block_m, minimum=1)
    if block_m < reach:
        raise ValueError(
            f"metadata.block_m must be at least (W-1) * dilation = {reach}, got "
            f"{block_m}: pass block_m to build_metadata"
        )
    programs = num_programs(num_tokens, num_seqs, block_m)
    for name in ("chunk_seq", "chunk_offset"):
        array = getattr(metadata, name)
        if not hasattr(array, "shape"):
            raise TypeError(f"metadata.{name} must be an array, got {array!r}")
        if array.shape != (programs,):
            raise ValueError(
                f"metadata.{name} must have shape (P,) = ({programs},) for "
                f"T = {num_tokens}, N = {num_seqs}, block_m = {block_m}, got "
                f"{array.shape}; build it from this batch's query_start_loc"
            )
        if array.dtype != jnp.int32:
            raise TypeError(f"metadata.{name} must be int32, got {array.dtype}")
    return block_m
