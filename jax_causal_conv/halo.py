"""`halo_state` and `ssd_halo_state`: dense ops with time sharded over devices."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import batch as batches
from . import checks
from .operands import SSDSpec
from .promotion import promoting
from .replay import step_sizes

__all__ = ["halo_state", "ssd_halo_state"]


@promoting
def halo_state(
    x: ArrayLike,
    axis_name: str,
    state_len: int,
    *,
    segment_ids: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
) -> jax.Array:
    """The tokens before this device's part of a sequence, for `causal_conv1d`.

    For sequence (context) parallelism: inside `jax.shard_map`, each device holds a
    contiguous part of the time axis and receives the last `state_len` tokens of its
    left neighbour: one collective-permute of them (and one of their ids), one of
    cotangents backward. Given as `initial_state`, they make the sharded op equal to the
    unsharded one, but for how a compiler rounds sums. Documents may begin and end
    anywhere, at the edge of a part too: what belongs to another run of `segment_ids`
    than this part's first token comes as zeros, whatever it holds.

    Args:
        x: `(B, T, D)`, this device's tokens; `T >= state_len`.
        axis_name: the mesh axis over which time is sharded, in order.
        state_len: tokens to receive: (W-1) * dilation, what the filter spans before a
            token.
        segment_ids: `(B, T)` integers as for `causal_conv1d`, or None.
        initial_state: `(B, L, D)` with `L >= state_len`, the state before the whole
            sequence, the same on all devices of the axis. None is zeros.

    Returns:
        `(B, state_len, D)` in x's dtype, promoted with that of `initial_state`.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape is wrong, or x has fewer than `state_len` tokens.

    Example:
        >>> def layer(x, ids):  # inside shard_map, specs P("batch", "time")
        ...     before = halo_state(x, "time", weight.shape[1] - 1, segment_ids=ids)
        ...     return causal_conv1d(
        ...         x, weight, initial_state=before, segment_ids=ids
        ...     )
    """
    inputs = checks.float_array("x", x, (None, None, None), "(B, T, D)")
    batch, length, _ = inputs.shape
    count = checks.static_int("state_len", state_len, minimum=0)
    if length < count:
        raise ValueError(
            f"x must have at least state_len = {count} tokens on every device, "
            f"got {length}"
        )
    if initial_state is not None:
        initial_state = checks.row_states(
            "initial_state", initial_state, inputs, count, "state_len"
        )
    if segment_ids is not None:
        segment_ids = checks.integer_array(
            "segment_ids", segment_ids, (batch, length), "(B, T)"
        )

    def from_left(array):
        return _from_left(array, axis_name)

    last = slice(length - count, length)
    halo = from_left(inputs[:, last])
    if segment_ids is not None:
        differs = from_left(segment_ids[:, last]) != segment_ids[:, :1]
        # A row is of the same run if all rows from it to the halo's end have its id.
        hidden = jax.lax.cummax(differs.astype(jnp.int32), axis=1, reverse=True)
        halo = jnp.where((hidden == 0)[..., None], halo, 0)
    if initial_state is not None:
        first = jax.lax.axis_index(axis_name) == 0
        rows = initial_state[:, initial_state.shape[1] - count :]
        halo = jnp.where(first, rows, halo)
    return halo


@promoting
def ssd_halo_state(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    axis_name: str,
    *,
    segment_ids: ArrayLike | None = None,
    initial_state: ArrayLike | None = None,
    dt_bias: ArrayLike | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
) -> jax.Array:
    """The state before this device's part of a sequence, for `ssd`.

    For sequence (context) parallelism, as `halo_state` is for the conv: inside
    `jax.shard_map`, each device holds a contiguous part of the time axis. It computes
    what its part does to the state, which is a decay and a contribution, and n devices
    combine these in ceil(log2(n)) + 1 collective-permutes of one state each, and as
    many backward. Given to `ssd` as `initial_state`, the result makes the sharded op
    equal to the unsharded one, to rounding, and so are the gradients; with
    `return_final_state` the last device has the state after the whole row.

    Documents may begin and end anywhere: what belongs to another run of `segment_ids`
    than this part's first token comes as zeros, whatever it holds.

    Args:
        x: `(B, T, H, P)`, this device's tokens, and
        dt: `(B, T, H)`, and
        A: `(H,)`, and
        B: `(B, T, G, K)`, all as for `ssd`.
        axis_name: the mesh axis over which time is sharded, in order.
        segment_ids: `(B, T)` integers as for `ssd`, or None.
        initial_state: `(B, H, P, K)`, the state before the whole sequence, the same on
            all devices of the axis. None is zeros.
        dt_bias: `(H,)` or None, and
        dt_softplus: static bool, and
        dt_limit: static floats, all as for `ssd`.

    Returns:
        `(B, H, P, K)` in float32 (float64 if x is). A part of nothing but padding gets
        the state of the last run before it, so that its final state is the row's.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape is wrong.

    Example:
        >>> def part(x, dt, A, B, C, ids):  # inside shard_map, specs P("batch", "time")
        ...     before = ssd_halo_state(x, dt, A, B, "time", segment_ids=ids)
        ...     return ssd(x, dt, A, B, C, initial_state=before, segment_ids=ids)
    """
    x = checks.float_array("x", x, (None,) * 4, "(B, T, H, P)")
    rows, length, heads, dim = x.shape
    dt = checks.float_array("dt", dt, (rows, length, heads), "(B, T, H)")
    A = checks.float_array("A", A, (heads,), "(H,)")
    B = checks.float_array("B", B, (rows, length, None, None), "(B, T, G, K)")
    groups, size = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"B must have shape (B, T, G, K) where G divides H = {heads}, got {B.shape}"
        )
    if dt_bias is not None:
        dt_bias = checks.float_array("dt_bias", dt_bias, (heads,), "(H,)")
    shape = (rows, heads, dim, size)
    if initial_state is not None:
        initial_state = checks.float_array(
            "initial_state", initial_state, shape, "(B, H, P, K)"
        )
    limits = checks.limits("dt_limit", dt_limit)
    softplus = checks.static_bool("dt_softplus", dt_softplus)
    if segment_ids is not None:
        segment_ids = checks.integer_array(
            "segment_ids", segment_ids, (rows, length), "(B, T)"
        )
    wide = batches.accumulator(x)
    x, dt, A, B = (array.astype(wide) for array in (x, dt, A, B))
    dt = step_sizes(SSDSpec(1, dt_softplus=softplus, dt_limit=limits), dt, dt_bias)

    joins = _Joins(None, None)
    if segment_ids is not None:
        ours, joins = _joins(jnp.asarray(segment_ids), axis_name)
        x, dt, B = (_select(ours, array) for array in (x, dt, B))

    log_decay = dt * A
    # The sum of what comes after each token.
    later = jnp.pad(log_decay[:, 1:], ((0, 0), (0, 1), (0, 0)))
    after = jax.lax.cumsum(later, axis=1, reverse=True)
    written = x * (dt * jnp.exp(after))[..., None]
    written = written.reshape(rows, length, groups, heads // groups, dim)
    state = jnp.einsum(
        "btgrp,btgk->bgrpk", written, B, precision=jax.lax.Precision.HIGHEST
    ).reshape(shape)
    decay = jnp.exp(log_decay.sum(axis=1))[..., None, None]
    if initial_state is not None:
        initial_state = initial_state.astype(wide)
    return _state_before(state, decay, joins, initial_state, axis_name)


class _Joins(NamedTuple):
    """What the state before each row of a part is of use for; None is always.

    Attributes:
        enters: `(B,)`, whether the part's first token goes on from it.
        passes: `(B,)`, whether it is of use after the part.
    """

    enters: jax.Array | None
    passes: jax.Array | None


def _joins(segment_ids: jax.Array, axis_name: str) -> tuple[jax.Array, _Joins]:
    """Which tokens `(B, T)` are of each row's last run, and how the part joins on."""
    rows, length = segment_ids.shape
    runs = batches.runs_of(segment_ids, rows, length)
    place = jnp.arange(length, dtype=jnp.int32)
    last = jnp.max(jnp.where(runs.real, place, 0), axis=1, keepdims=True)
    start = jnp.take_along_axis(runs.start, last, axis=1, mode="clip")
    first, empty = segment_ids[:, 0], ~runs.real.any(axis=1)
    same = _from_left(segment_ids[:, -1], axis_name) == first
    joined = (same | (jax.lax.axis_index(axis_name) == 0)) & (first >= 0)
    enters = joined | empty
    passes = empty | (joined & (start[:, 0] == 0))
    return runs.real & (runs.start == start), _Joins(enters, passes)


def _state_before(state, decay, joins: _Joins, initial_state, axis_name: str):
    """The state before each part, from the parts' contributions and decays.

    Each step doubles how many parts a device has combined, until it has all of those
    to its left. What comes from beyond the first part is zeros.
    """
    enters, passes = joins
    is_first = jax.lax.axis_index(axis_name) == 0
    if initial_state is not None:
        kept = _select(passes, initial_state * decay)
        state = state + jnp.where(is_first, kept, 0)
    step, parts = 1, jax.lax.axis_size(axis_name)
    while step < parts:
        earlier, its_decay, its_passes = (
            _from_left(array, axis_name, step) for array in (state, decay, passes)
        )
        state = state + _select(passes, earlier * decay)
        decay = decay * its_decay
        passes = None if passes is None else passes & its_passes
        step *= 2
    before = _from_left(state, axis_name)
    if initial_state is not None:
        before = jnp.where(is_first, initial_state, before)
    return _select(enters, before)


def _from_left(array, axis_name: str, distance: int = 1):
    """The array of the device so many places to the left; zeros if there is none."""
    if array is None:
        return None
    parts = jax.lax.axis_size(axis_name)
    moves = [(i, i + distance) for i in range(parts - distance)]
    if array.dtype == bool:
        return jax.lax.ppermute(array.astype(jnp.int32), axis_name, moves) > 0
    return jax.lax.ppermute(array, axis_name, moves)


def _select(mask, array):
    """The array where a mask of its leading axes is True (None: all), else zeros."""
    if mask is None:
        return array
    mask = mask.reshape(mask.shape + (1,) * (array.ndim - mask.ndim))
    return jnp.where(mask, array, 0)
