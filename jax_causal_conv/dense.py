"""`causal_conv1d`: the dense op, for training and plain prefill."""

from __future__ import annotations

import dataclasses
from typing import Literal, Unpack, overload

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import checks
from .arguments import Activation, DenseArguments, Implementation
from .columns import Output
from .op import gradients
from .op.ops import DENSE
from .operands import DenseOperands
from .promotion import promoting

__all__ = ["causal_conv1d"]


@overload
def causal_conv1d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_final_state: Literal[False] = False,
    split: None = None,
    **arguments: Unpack[DenseArguments],
) -> jax.Array: ...
@overload
def causal_conv1d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_final_state: Literal[True],
    split: None = None,
    **arguments: Unpack[DenseArguments],
) -> tuple[jax.Array, jax.Array]: ...
@overload
def causal_conv1d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_final_state: Literal[False] = False,
    split: tuple[int, ...],
    **arguments: Unpack[DenseArguments],
) -> tuple[jax.Array, ...]: ...
@overload
def causal_conv1d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    return_final_state: bool = False,
    split: tuple[int, ...] | None = None,
    **arguments: Unpack[DenseArguments],
) -> Output | tuple[Output, jax.Array]: ...
@promoting
def causal_conv1d(
    x: ArrayLike,
    weight: ArrayLike,
    bias: ArrayLike | None = None,
    *,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    activation: Activation = None,
    return_final_state: bool = False,
    channel_offset: int | None = None,
    split: tuple[int, ...] | None = None,
    dilation: int = 1,
    residual: bool = False,
    implementation: Implementation = None,
) -> Output | tuple[Output, jax.Array]:
    """Causal depthwise conv of B rows of T tokens.

    Token t of a row becomes

        act(bias + sum_k weight[:, k] * u[t - (W-1-k) * dilation])

    where `u[j >= 0]` is the row's input and `u[j < 0]` its initial state, zeros without
    one; plus x where `residual` says so, summed in float32 from exact products and
    rounded once.

    With `segment_ids` several documents are packed into a row: a token sees only
    tokens of its own *contiguous run* of equal ids. A negative id is padding: zero
    output, zero gradient, seen by nobody. The initial state belongs to the run at
    position 0, and to nobody if that is padding.

    Differentiable in x, weight, bias and initial_state, the final state's cotangent
    included: reverse mode, first order; `implementation="xla"` in any mode and order.
    Gradients are accumulated in float32, returned in the primal's dtype, and are
    bit-identical from run to run.

    Sharded channels and rows stay local under jit, on auto and explicit mesh axes; the
    one communication is the sum of the filter's gradients over the rows' axis. A
    sharded time axis is right but may communicate: use `halo_state` in `jax.shard_map`.

    Args:
        x: `(B, T, D)` inputs; float32, bfloat16 or float16 (float64: XLA only).
        weight: `(D, W)`, any W >= 1; `weight[:, W-1]` meets the current token.
        bias: `(D,)` or None.
        initial_state: `(B, L, D)`, the last L >= (W-1) * dilation inputs before the
            row, oldest first. None is zeros.
        segment_ids: `(B, T)` integers. None is one document a row.
        activation: as for `causal_conv1d_fn`.
        return_final_state: also return what a continuation of each row's last run
            that is not padding needs.
        channel_offset: the first column of an x wider than D, and
        split: sizes of the parts of `out`, both as for `causal_conv1d_fn`.
        dilation: static int >= 1, tokens from one tap to the next.
        residual: add the op's columns of x to the output, before it is rounded.
        implementation: as for `causal_conv1d_fn`.

    Returns:
        `out` `(B, T, D)` in x's dtype; with `split` a tuple of its parts. With
        `return_final_state` a pair of it and the final state `(B, L, D)`: L and dtype
        of `initial_state`, else (W-1) * dilation and x's dtype. A row of nothing but
        padding returns its initial state, or zeros.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape, size or option is wrong.

    Example:
        >>> out = causal_conv1d(x, weight, bias, segment_ids=ids, activation="silu")
    """
    inputs = checks.float_array("x", x, (None, None, None), "(B, T, D)")
    batch, length = inputs.shape[:2]
    dim, columns = checks.columns(channel_offset, split, inputs, weight)
    implementation = checks.implementation_for(implementation, inputs)
    taps, bias = checks.filters(weight, bias, inputs, dim)
    out = jax.ShapeDtypeStruct((batch, length, dim), inputs.dtype)
    spec = checks.conv_spec(activation, columns, dilation, residual, taps)
    state, state_len = None, spec.reach(taps.shape[1])
    if initial_state is not None:
        state = checks.row_states("initial_state", initial_state, out, state_len)
        state_len = state.shape[1]
    if segment_ids is not None:
        segment_ids = checks.segments("segment_ids", segment_ids, (batch, length))
    wanted = checks.static_bool("return_final_state", return_final_state)
    checks.token_count("B * T", batch * length, 1)

    if 0 in (batch, length, dim):
        parts = columns.parts(jnp.zeros(out.shape, out.dtype))
        if state is None:
            state = jnp.zeros((batch, state_len, dim), out.dtype)
        results = (*parts, state)
    else:
        final_state_len = state_len if wanted else None
        spec = dataclasses.replace(spec, final_state_len=final_state_len)
        operands = DenseOperands(inputs, taps, bias, state, segment_ids)
        results = gradients.call(DENSE, implementation, spec, operands)
    whole = columns.output(results[: columns.num_parts])
    return (whole, results[-1]) if wanted else whole
