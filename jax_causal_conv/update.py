"""`causal_conv1d_update`: the decode op, Q tokens for each of B requests."""

from __future__ import annotations

import dataclasses
from typing import Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import checks
from .arguments import Activation, Implementation, UpdateArguments
from .columns import Output
from .op import gradients
from .op.ops import UPDATE
from .operands import PAD_SLOT_ID, UpdateOperands
from .promotion import promoting

__all__ = ["causal_conv1d_update"]


@overload
def causal_conv1d_update(
    x: ArrayLike,
    conv_state: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    activation: Activation = None,
    *,
    split: None = None,
    **arguments: Unpack[UpdateArguments],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def causal_conv1d_update(
    x: ArrayLike,
    conv_state: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    activation: Activation = None,
    *,
    split: tuple[int, ...],
    **arguments: Unpack[UpdateArguments],
) -> tuple[tuple[jax.Array, ...], jax.Array]: ...
@overload
def causal_conv1d_update(
    x: ArrayLike,
    conv_state: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    activation: Activation = None,
    *,
    split: tuple[int, ...] | None = None,
    **arguments: Unpack[UpdateArguments],
) -> tuple[Output, jax.Array]: ...
@promoting
def causal_conv1d_update(
    x: ArrayLike,
    conv_state: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    activation: Activation = None,
    *,
    cache_seqlens: ArrayLike | None = None,
    conv_state_indices: ArrayLike | None = None,
    conv_state_write_indices: ArrayLike | None = None,
    num_rejected_tokens: ArrayLike | None = None,
    pad_slot_id: int = PAD_SLOT_ID,
    channel_offset: int | None = None,
    split: tuple[int, ...] | None = None,
    dilation: int = 1,
    residual: bool = False,
    implementation: Implementation = None,
) -> tuple[Output, jax.Array]:
    """Advances B requests by Q tokens each, and their conv states with them.

    The function of `causal_conv1d_fn` for rows of equal length whose slots always hold
    history. A row whose slot is `pad_slot_id` or outside `[0, S)` is skipped: exact
    zeros, no slot changes. The states are functional, and updated in place where the
    caller donates them.

    Sharded channels stay local under jit; so do sharded rows if there are no slot
    numbers and S == B. With slot numbers, or S > B, sharded rows or slots are right but
    may be gathered: `jax.shard_map` is the form for data parallelism, as for
    `causal_conv1d_fn`.

    Args:
        x: `(B, D)`, or `(B, Q, D)` for Q tokens a row.
        conv_state: `(S, L, D)` cache, L >= (W-1) * dilation, oldest input first.
        weight: `(D, W)`; `weight[:, W-1]` meets the current token.
        bias: `(D,)` or None.
        activation: as for `causal_conv1d_fn`.
        cache_seqlens: `(B,)` integers c: the slot is a *circular buffer*. History is
            the rows before position c mod L; input q goes to row `(c + q) mod L`;
            only those rows are written, and of Q > L inputs the last L survive. The
            caller advances c by Q, or by less to roll back. In a slot that was not read
            the other rows of the buffer are written too.
        conv_state_indices: `(B,)` integers, the slot of each row. None is `arange(B)`.
        conv_state_write_indices: `(B,)` integers, the slot that each row's new state
            goes to, as `write_indices` of `causal_conv1d_fn`. None is
            `conv_state_indices`.
        num_rejected_tokens: `(B,)` integers r, clamped into `[0, L]`: the last r rows
            of the slot were rejected drafts and are forgotten. Not together with
            `cache_seqlens`.
        pad_slot_id: static int, the slot number that means "skip".
        channel_offset: the first column of an x wider than D, and
        split: sizes of the parts of `out`, both as for `causal_conv1d_fn`.
        dilation: static int >= 1, tokens from one tap to the next.
        residual: add the op's columns of x to the output, before it is rounded.
        implementation: as for `causal_conv1d_fn`.

    Returns:
        `out`, like x with D channels (with `split` a tuple of its parts), and the new
        conv state, like `conv_state`.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape, size, option or combination of options is wrong.

    Example:
        >>> step = jax.jit(causal_conv1d_update, donate_argnames="conv_state")
        >>> out, state = step(x, state, weight, bias, conv_state_indices=slots)
    """
    inputs = checks.float_array("x", x, None, "(B, D) or (B, Q, D)")
    shape = inputs.shape
    if len(shape) not in (2, 3):
        raise ValueError(f"x must have shape (B, D) or (B, Q, D), got {shape}")
    batch = shape[0]
    query = shape[1] if len(shape) == 3 else 1
    dim, columns = checks.columns(channel_offset, split, inputs, weight)
    implementation = checks.implementation_for(implementation, inputs)
    taps, bias = checks.filters(weight, bias, inputs, dim)
    spec = checks.conv_spec(activation, columns, dilation, residual, taps)
    reach = spec.reach(taps.shape[1])
    state = checks.state_array("conv_state", conv_state, dim, reach)
    num_slots, state_len = state.shape[:2]
    slots = checks.slots_array(
        "conv_state_indices", conv_state_indices, state, "conv_state", batch, "B"
    )
    if cache_seqlens is not None:
        if num_rejected_tokens is not None:
            raise ValueError(
                "num_rejected_tokens must be None with cache_seqlens, got both; roll a "
                "circular buffer back by passing a smaller cache_seqlens"
            )
        cache_seqlens = checks.ring_position(
            "cache_seqlens", cache_seqlens, batch, state_len
        )
    num_rejected = checks.num_rejected_tokens(
        num_rejected_tokens, batch, "B", state_len
    )
    write_slots = checks.write_slots(
        "conv_state_write_indices", conv_state_write_indices, batch, "B", state
    )
    pad = checks.pad_slot(pad_slot_id, num_slots)
    spec = dataclasses.replace(spec, pad_slot_id=pad)
    checks.token_count("B * Q", batch * query, 1)

    if 0 in (batch, query, dim, num_slots):
        zeros = jnp.zeros((*shape[:-1], dim), inputs.dtype)
        return columns.output(columns.parts(zeros)), state
    if state_len == 0:  # W = 1: there is no state that a kernel could update in place
        implementation = "xla"
    operands = UpdateOperands(
        inputs.reshape(batch, query, shape[-1]),
        taps,
        bias,
        state,
        slots=slots,
        cache_seqlens=cache_seqlens,
        num_rejected=num_rejected,
        write_slots=write_slots,
    )
    *out, state = gradients.call(UPDATE, implementation, spec, operands)
    out = [part.reshape(*shape[:-1], part.shape[-1]) for part in out]
    return columns.output(out), state
