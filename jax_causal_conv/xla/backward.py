"""The XLA implementation of the gradients, as gathers like the forward.

Nothing of the forward is kept but its inputs: the pre-activation is computed again.
With z the pre-activation and u what the taps met,

    dz = dy · silu'(z)        dw[k] = Σ_t dz[t] · u[t-(W-1)+k]
    dx[t] = Σ_d w[W-1-d] · dz[t+d]  over tokens t+d of the same sequence,

and what reaches behind a sequence's first token is the gradient of its history.
"""

import jax
import jax.numpy as jnp

from . import xla
from .columns import ALL, Columns
from .xla import Tokens


def _column_sums(rows):
    """Σ over all axes but the last, in blocks of 64 rows so that XLA:CPU vectorises."""
    *lead, num_tokens, dim = rows.shape
    whole = num_tokens // 64 * 64
    blocks = rows[..., :whole, :].reshape(*lead, whole // 64, 64, dim).sum(axis=-2)
    axes = tuple(range(rows.ndim - 1))
    return blocks.sum(axis=axes) + rows[..., whole:, :].sum(axis=axes)


def _filter_sums(dz, products):
    """Dweight `(D, W)` and dbias `(D,)` from `_backward`'s terms."""
    return jnp.stack(list(map(_column_sums, products)), axis=1), _column_sums(dz)


def _backward(x, weight, bias, history, dy, copied, tokens: Tokens, start, silu):
    """Gradients of `xla.convolve`, and of rows of x copied into slots.

    Args:
        x, dy: `(T, D)`.
        history: `(N or more, W-1, D)`, rows that tokens own.
        copied: `(T, D)` cotangent of the slot row that each token became, or 0.
        tokens: where each token stands.
        start: `(N,)` first token of each sequence.
        silu: whether the activation was silu.

    Returns:
        dx `(T, D)` in x's dtype; in the accumulator's dtype dz `(T, D)`, its products
        with each tap `(T, D)`, oldest first, and dhistory `(N, W-1, D)`.
    """
    dtype, width = xla.accumulator(x), weight.shape[1]
    num_tokens, num_seqs = x.shape[0], start.shape[0]
    weight = weight.astype(dtype)
    wide_x = x.astype(dtype)
    # XLA:CPU of jax 0.11 and 0.12 would convert x again in each loop over it.
    if x.dtype != dtype and jax.__version_info__ >= (0, 11):
        wide_x = jax.lax.optimization_barrier(wide_x)
    taps = list(xla.taps_of(wide_x, history, tokens, width))
    dz = dy.astype(dtype)
    if silu:
        z = jnp.zeros(x.shape, dtype) if bias is None else bias.astype(dtype)
        for d, tap in enumerate(taps):
            z = z + tap * weight[:, width - 1 - d]
        sigmoid = jax.nn.sigmoid(z)
        dz = dz * sigmoid * (1 + z * (1 - sigmoid))
    dz = jnp.where(tokens.live[:, None], dz, 0)

    token = jnp.arange(num_tokens, dtype=jnp.int32)
    dx = jnp.zeros(x.shape, dtype)
    for d in range(width):
        later = jnp.minimum(token + d, num_tokens - 1)
        same = (token + d < num_tokens) & (tokens.position[later] >= d)
        back = dz[later] * weight[:, width - 1 - d]
        dx = dx + jnp.where(same[:, None], back, 0)
    dx = jnp.where(tokens.live[:, None], dx + copied, 0)

    products = tuple(dz * tap for tap in reversed(taps))
    dhistory = jnp.zeros((num_seqs, width - 1, x.shape[1]), dtype)
    for p in range(width - 1):
        token = jnp.minimum(start + p, num_tokens - 1)
        reaches = (tokens.owner[token] == jnp.arange(num_seqs)) & (
            tokens.position[token] == p
        )
        back = dz[token][:, None] * weight.T[: width - 1 - p]
        back = jnp.where(reaches[:, None, None], back, 0)
        dhistory = dhistory + jnp.pad(back, ((0, 0), (p, 0), (0, 0)))
    return dx.astype(x.dtype), dz, products, dhistory


def state_rows(dslots) -> int:
    """L, or 0 where the state has no cotangent."""
    return 0 if dslots is None else dslots.shape[1]


def _copied(dslots, owner, row, dtype):
    """`dslots[owner, row]` where row >= 0, else 0."""
    if dslots is None:
        return jnp.zeros((), dtype)
    rows = dslots.at[owner, jnp.maximum(row, 0)].get(mode="clip").astype(dtype)
    return jnp.where((row >= 0)[:, None], rows, 0)


def packed_backward(
    x,
    weight,
    bias,
    history,
    dy,
    dslots,
    query_start_loc,
    live,
    metadata=None,
    *,
    silu: bool,
    columns: Columns = ALL,
):
    """Gradients of a packed batch: dx, dweight, dbias and dhistory.

    Args:
        x: as wide as that of the op; dx has the conv's D columns alone.
        dy: the cotangent of the op's output, with `split` a tuple of parts.
        dslots: `(N, L, D)` cotangent of what each sequence left in its slot, or None.
        live: `(N,)` bool, sequences that were not skipped.
    """
    del metadata
    x, dy = columns.of(x, weight.shape[0]), columns.joined(dy)
    num_tokens = x.shape[0]
    offsets = xla.sanitize_offsets(query_start_loc, num_tokens)
    seqs = xla.sequences(offsets, None, None, None, (live.shape[0], 0), -1)
    seqs = seqs._replace(live=live & seqs.live)
    tokens = xla.tokens_of(seqs, num_tokens)
    row = state_rows(dslots) - seqs.length[tokens.owner] + tokens.position
    copied = _copied(dslots, tokens.owner, row, xla.accumulator(x))
    dx, dz, products, dhistory = _backward(
        x, weight, bias, history, dy, copied, tokens, seqs.start, silu
    )
    return dx, *_filter_sums(dz, products), dhistory


def rows_backward(
    x,
    weight,
    bias,
    history,
    dy,
    dslots,
    live,
    segment_ids,
    *,
    silu: bool,
    columns: Columns = ALL,
):
    """Gradients of B rows of equal length, `x` and `dy` `(B, T, D)`.

    Args:
        x: as wide as that of the op; dx has the conv's D columns alone.
        dy: the cotangent of the op's output, with `split` a tuple of parts.
        dslots: `(B, L, D)` cotangent of what the last run of real tokens of each row
            left in its slot, or None.
        live: `(B,)` bool, rows that were not skipped; None is all.
        segment_ids: `(B, T)`; None is one run a row.

    Returns:
        dx `(B, T, D)` in x's dtype; dweight `(D, W)`, dbias `(D,)` and dhistory
        `(B, W-1, D)` in the accumulator's dtype.
    """
    x, dy = columns.of(x, weight.shape[0]), columns.joined(dy)
    batch, length, _ = x.shape
    runs = xla.runs_of(segment_ids, batch, length)
    if live is not None:
        runs = runs._replace(real=runs.real & live[:, None])
    last = xla.last_runs(runs, 0)
    token = jnp.arange(length, dtype=jnp.int32)
    row = state_rows(dslots) - last.length[:, None] + (token - last.start[:, None])
    kept = (token >= last.start[:, None]) & (row < state_rows(dslots))
    row = jnp.where(kept, row, -1)

    def of_row(x, history, dy, dslots, tokens, row):
        dslots = None if dslots is None else dslots[None]
        copied = _copied(dslots, 0, row, xla.accumulator(x))
        start = jnp.zeros((1,), jnp.int32)
        return _backward(x, weight, bias, history, dy, copied, tokens, start, silu)

    dx, dz, products, dhistory = jax.vmap(of_row)(
        x, xla.with_zeros(history), dy, dslots, xla.tokens_of_runs(runs), row
    )
    return dx, *_filter_sums(dz, products), dhistory[:, 0]
