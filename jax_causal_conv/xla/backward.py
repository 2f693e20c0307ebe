"""The gradients of the ops in XLA, as gathers like the forward.

Nothing of the forward is kept but its inputs: the pre-activation is computed again.
With z the pre-activation and u what the taps met,

    dz = dy · act'(z)        dw[k] = Σ_t dz[t] · u[t-(W-1)+k]
    dx[t] = Σ_d w[W-1-d] · dz[t+d]  over tokens t+d of the same sequence

(steps of one token are so many with a dilation), and what reaches behind a sequence's
first token is the gradient of its history.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..batch import (
    Tokens,
    accumulator,
    last_runs,
    runs_of,
    sanitize_offsets,
    sequences,
    tokens_of,
    tokens_of_runs,
)
from ..compat import CPU_CONVERTS_IN_EVERY_LOOP
from ..operands import ConvSpec, PackedBackwardOperands, RowsBackwardOperands
from .activations import ACTIVATIONS
from .forward import taps_of, with_zeros


class _Rows(NamedTuple):
    """Rows of tokens on their way back through the conv.

    Attributes:
        x: `(T, D)`, the op's own columns.
        dy: `(T, D)`, the cotangent of the output.
        history: `(·, R, D)`, the histories that the tokens' owners are numbers of.
        copied: `(T, D)` cotangent of the slot row that each token became, or 0.
        tokens: where each token stands.
        start: `(N,)` first token of each sequence.
    """

    x: Any
    dy: Any
    history: Any
    copied: Any
    tokens: Tokens
    start: Any


def _column_sums(rows):
    """Σ over all axes but the last, in blocks of 64 rows so that XLA:CPU vectorises."""
    *lead, num_tokens, dim = rows.shape
    whole = num_tokens // 64 * 64
    blocks = rows[..., :whole, :].reshape(*lead, whole // 64, 64, dim).sum(axis=-2)
    axes = tuple(range(rows.ndim - 1))
    return blocks.sum(axis=axes) + rows[..., whole:, :].sum(axis=axes)


def _dweight_and_dbias(dz, products):
    """Dweight `(D, W)` and dbias `(D,)`: `_backward`'s terms summed over the tokens."""
    return jnp.stack(list(map(_column_sums, products)), axis=1), _column_sums(dz)


def _backward(spec: ConvSpec, weight, bias, rows: _Rows):
    """Gradients of the conv, and of rows of x copied into slots.

    Returns:
        dx `(T, D)` in x's dtype; in the accumulator's dtype dz `(T, D)`, its products
        with each tap `(T, D)`, oldest first, and dhistory `(N, R, D)`.
    """
    x, dy, history, copied, tokens, start = rows
    dtype, width = accumulator(x), weight.shape[1]
    num_tokens, num_seqs = x.shape[0], start.shape[0]
    weight = weight.astype(dtype)
    wide_x = x.astype(dtype)
    if x.dtype != dtype and CPU_CONVERTS_IN_EVERY_LOOP:
        wide_x = jax.lax.optimization_barrier(wide_x)
    taps = list(taps_of(spec, wide_x, history, tokens, width))
    dy = dy.astype(dtype)
    dz = dy
    if spec.activation is not None:
        z = jnp.zeros(x.shape, dtype) if bias is None else bias.astype(dtype)
        for k, tap in enumerate(taps):
            z = z + tap * weight[:, width - 1 - k]
        dz = ACTIVATIONS[spec.activation].pull_back(dz, z)
    dz = jnp.where(tokens.live[:, None], dz, 0)

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    dx = dy if spec.residual else jnp.zeros(x.shape, dtype)
    for k in range(width):
        ahead = spec.reach(k + 1)
        later = jnp.minimum(token + ahead, num_tokens - 1)
        same = (token + ahead < num_tokens) & (tokens.position[later] >= ahead)
        back = dz[later] * weight[:, width - 1 - k]
        dx = dx + jnp.where(same[:, None], back, 0)
    dx = jnp.where(tokens.live[:, None], dx + copied, 0)

    products = tuple(dz * tap for tap in reversed(taps))
    row = jnp.arange(spec.reach(width), dtype=jnp.int32)
    dhistory = jnp.zeros((num_seqs, row.size, x.shape[1]), dtype)
    for k in range(1, width):
        position = row - row.size + spec.reach(k + 1)  # of the token that met the row
        token = jnp.clip(start[:, None] + position, 0, num_tokens - 1)
        meets = (tokens.owner[token] == jnp.arange(num_seqs)[:, None]) & (
            (tokens.position[token] == position) & (position >= 0)
        )
        back = dz[token] * weight[:, width - 1 - k]
        dhistory = dhistory + jnp.where(meets[..., None], back, 0)
    return dx.astype(x.dtype), dz, products, dhistory


def _state_len(dslots) -> int:
    """L, or 0 where the state has no cotangent."""
    return 0 if dslots is None else dslots.shape[1]


def _copied(dslots, owner, row, dtype):
    """`dslots[owner, row]` where row >= 0, else 0."""
    if dslots is None:
        return jnp.zeros((), dtype)
    rows = dslots.at[owner, jnp.maximum(row, 0)].get(mode="clip").astype(dtype)
    return jnp.where((row >= 0)[:, None], rows, 0)


def packed_backward(
    spec: ConvSpec, operands: PackedBackwardOperands
) -> tuple[jax.Array, ...]:
    """Gradients of a packed batch.

    Returns:
        dx `(T, D)` of the conv's own columns, in x's dtype; dweight `(D, W)`, dbias
        `(D,)` and dhistory `(N, R, D)` in the accumulator's dtype.
    """
    weight, bias, dslots = operands.weight, operands.bias, operands.dslots
    x = spec.columns.of(operands.x, weight.shape[0])
    num_tokens, num_seqs = x.shape[0], operands.live.shape[0]
    offsets = sanitize_offsets(operands.query_start_loc, num_tokens)
    seqs = sequences(offsets, None, None, None, (num_seqs, 0), -1)
    seqs = seqs._replace(live=operands.live & seqs.live)
    tokens = tokens_of(seqs, num_tokens)
    row = _state_len(dslots) - seqs.length[tokens.owner] + tokens.position
    copied = _copied(dslots, tokens.owner, row, accumulator(x))
    if operands.dsnapshots is not None:
        row = _state_len(dslots) - operands.snapshot_ends[tokens.owner]
        row = row + tokens.position
        row = jnp.where(row < _state_len(dslots), row, -1)  # the snapshot was before
        copied = copied + _copied(
            operands.dsnapshots, tokens.owner, row, accumulator(x)
        )
    dy = spec.columns.joined(operands.dy)
    rows = _Rows(x, dy, operands.history, copied, tokens, seqs.start)
    dx, dz, products, dhistory = _backward(spec, weight, bias, rows)
    return dx, *_dweight_and_dbias(dz, products), dhistory


def rows_backward(
    spec: ConvSpec, operands: RowsBackwardOperands
) -> tuple[jax.Array, ...]:
    """Gradients of B rows of equal length.

    Returns:
        dx `(B, T, D)` of the conv's own columns, in x's dtype; dweight `(D, W)`, dbias
        `(D,)` and dhistory `(B, R, D)` in the accumulator's dtype.
    """
    weight, bias, dslots = operands.weight, operands.bias, operands.dslots
    x, dy = spec.columns.of(operands.x, weight.shape[0]), operands.dy
    batch, length, _ = x.shape
    runs = runs_of(operands.segment_ids, batch, length)
    if operands.live is not None:
        runs = runs._replace(real=runs.real & operands.live[:, None])
    last = last_runs(runs, 0)
    token = jnp.arange(length, dtype=jnp.int32)
    row = _state_len(dslots) - last.length[:, None] + (token - last.start[:, None])
    kept = (token >= last.start[:, None]) & (row < _state_len(dslots))
    row = jnp.where(kept, row, -1)

    def of_row(x, dy, history, dslots, row, tokens):
        dslots = None if dslots is None else dslots[None]
        copied = _copied(dslots, 0, row, accumulator(x))
        start = jnp.zeros((1,), jnp.int32)
        rows = _Rows(x, dy, history, copied, tokens, start)
        return _backward(spec, weight, bias, rows)

    dx, dz, products, dhistory = jax.vmap(of_row)(
        x,
        spec.columns.joined(dy),
        with_zeros(operands.history),
        dslots,
        row,
        tokens_of_runs(runs),
    )
    return dx, *_dweight_and_dbias(dz, products), dhistory[:, 0]
