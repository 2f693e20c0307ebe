"""The SSD in plain JAX, by chunks of c tokens.

The recurrence `h[t] = exp(dt[t]·A)·h[t-1] + dt[t]·x[t] ⊗ B[t]`, `y[t] = h[t]·C[t]` is
computed as in Dao and Gu 2024 (arXiv 2405.21060, section 6). With `s(t, r)` the sum of
`dt·A` over the tokens after r up to t,

    y[t] = sum_{r <= t} (C[t]·B[r]) exp(s(t, r)) dt[r] x[r]  +  exp(s(t, before)) C[t]·h

where r goes over the tokens of t's chunk and h is the state that enters the chunk.
Everything inside a chunk is matrix products, batched over all chunks; only the chunks'
states pass through a scan.

Letters as in `ssd`, and: R = H // G heads in a group, M chunks.
"""

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import batch
from ..operands import (
    SSDBackwardOperands,
    SSDOperands,
    SSDPackedOperands,
    SSDSpec,
)
from ..replay import replayed, step_sizes
from ..slots import differentiate_as

_LOWEST_LOG_DECAY = -1000.0
"""The exponential of this, and of anything below, is 0 in every dtype."""

_BLOCK = 32
"""The places of a chunk that `_sums_between` sums up at once."""


SSD_GRADIENTS = ("x", "dt", "A", "B", "C", "dt_bias", "D", "states")
"""The operands of `dense` that have gradients, in the order of `dense_backward`."""


class _Inputs(NamedTuple):
    """What both ops compute from, in the accumulator's dtype and with heads by group.

    Attributes:
        x: `(..., G, R, P)`.
        dt: `(..., G, R)`.
        A: `(G, R)`.
        B: `(..., G, K)`.
        C: `(..., G, K)`.
    """

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array

    def map_tokens(self, function: Callable[[jax.Array], jax.Array]) -> "_Inputs":
        """Applies `function` to each field that has rows of tokens: all but A."""
        x, dt, B, C = map(function, (self.x, self.dt, self.B, self.C))
        return _Inputs(x, dt, self.A, B, C)


class _Chunks(NamedTuple):
    """The inputs cut into chunks of c places; a place without a token holds zeros.

    Attributes:
        x: `(..., c, G, R, P)`, the products dt·x.
        log_decay: `(..., G, R, c)`, the products dt·A.
        total: `(..., G, R, c)`, the sum of dt·A from the chunk's start to each place.
        error: `(..., G, R, c)`, what rounding lost in `total`.
        B: `(..., c, G, K)`.
        C: `(..., c, G, K)`.
    """

    x: jax.Array
    log_decay: jax.Array
    total: jax.Array
    error: jax.Array
    B: jax.Array
    C: jax.Array


class _ChunkRuns(NamedTuple):
    """Which places and states belong to the same run, where runs share chunks.

    Attributes:
        start: `(..., c)`, where the token's run begins in its row, which tells the
            runs of a row apart.
        enters: `(..., c)`, whether the state before the chunk is of the token's run.
        leaves: `(..., c)`, whether the state after the chunk is of the token's run.
        through: `(...)`, whether the state before the chunk is still of use after it,
            as it is if the chunk's last run began before the chunk.
    """

    start: jax.Array
    enters: jax.Array
    leaves: jax.Array
    through: jax.Array


def _einsum(exact: bool, subscripts: str, *operands):
    """An einsum which sums in the dtype of its operands.

    By default a GPU may use TF32, whose 10 bits of mantissa would round decays and
    states in the middle of the computation: `exact` products have full precision.
    """
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return jnp.einsum(subscripts, *operands, precision=precision)


def _past_the_state(D, x):
    """`D·x`, where D is `(H,)` or `(H, P)` and x `(..., H, P)`."""
    return D.astype(x.dtype).reshape(D.shape[0], -1) * x


def _select(mask, values):
    """`values` where the mask of their leading axes is True, and zeros elsewhere.

    A mask of None selects all values.
    """
    if mask is None:
        return values
    return jnp.where(
        mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values, 0
    )


def _running_sum(values):
    """Sums along the last axis, and what rounding lost in each (Knuth's 2Sum).

    With both, the difference of two sums is as exact as a sum of only the terms between
    them, even where a huge term comes before: a step so large that it forgets
    everything, for example.
    """

    def add(first, second):
        a, b = lax.stop_gradient((first[0], second[0]))
        whole = a + b
        of_b = whole - a
        lost = (a - (whole - of_b)) + (b - of_b)
        return first[0] + second[0], first[1] + second[1] + lost

    return lax.associative_scan(add, (values, jnp.zeros_like(values)), axis=-1)


def _chunks(inputs: _Inputs) -> _Chunks:
    """Prepares inputs whose tokens lie in chunks, on an axis c before the groups."""
    x, dt, A, B, C = inputs
    log_decay = jnp.moveaxis(jnp.maximum(dt * A, _LOWEST_LOG_DECAY), -3, -1)
    total, error = _running_sum(log_decay)
    return _Chunks(x * dt[..., None], log_decay, total, error, B, C)


def _sums_to_last(values):
    """The sum of the values after each place of `(..., c)`, in the same shape."""
    axis = values.ndim - 1
    after = jnp.pad(values[..., 1:], [(0, 0)] * axis + [(0, 1)])
    return lax.cumsum(after, axis=axis, reverse=True)


def _sums_between(values):
    """The sum of the values after place r up to t, at `[..., t, r]`; 0 for r >= t.

    The sums are products with triangles of ones, since a product, whose derivative is
    another, is fast on every device. There are two of them, one inside blocks and one
    of whole blocks, because a single triangle `(c, c)` would be much work in a large
    chunk.
    """
    size = values.shape[-1]
    block = math.gcd(size, _BLOCK)

    def sums_after(values):
        triangle = jnp.tri(values.shape[-1], k=-1, dtype=values.dtype)
        return _einsum(True, "...i,ir->...r", values, triangle)

    until = jnp.tril(jnp.broadcast_to(values[..., None, :], (*values.shape, size)))
    blocks = until.reshape(*values.shape, size // block, block)
    sums = sums_after(blocks) + sums_after(blocks.sum(-1))[..., None]
    return sums.reshape(until.shape)


def _decay(chunks: _Chunks, late, early, linear: Callable, mask):
    """`exp(s(late, early))`, where both index the places of a chunk; 0 where masked.

    `linear` computes `s(late, early)` from the log-decays, for the derivative. That of
    differences of running sums is no good: it adds the cotangent of `total[t] -
    total[r]` to one sum and subtracts it from another, and all that a value before r or
    after t gets of it has to cancel. In floating point it cancels up to rounding only,
    and what is left hides the gradient of a head that forgets fast, which is small. The
    derivative of sums of just the values after r up to t has no such terms.

    The exponent is masked as well: an infinite exponential in a masked place would make
    its gradient NaN.
    """
    total, error = chunks.total, chunks.error
    between = (total[late] - total[early]) + (error[late] - error[early])
    between = differentiate_as(between, linear(chunks.log_decay))
    if mask is None:
        return jnp.exp(between)
    return jnp.where(mask, jnp.exp(jnp.where(mask, between, 0)), 0)


def _for_heads(mask):
    """A mask `(..., c)` in a shape that fits `(..., G, R, c)`; None stays None."""
    return None if mask is None else mask[..., None, None, :]


@partial(jax.checkpoint, static_argnums=0)
def _chunk_states(exact: bool, chunks: _Chunks, runs: _ChunkRuns | None):
    """What the tokens of each chunk add to the state, `(..., G, R, P, K)`."""
    leaves = None if runs is None else runs.leaves
    last = (..., slice(-1, None))
    decay = _decay(chunks, last, ..., _sums_to_last, _for_heads(leaves))
    x = _select(leaves, chunks.x) * jnp.moveaxis(decay, -1, -3)[..., None]
    return _einsum(exact, "...sgrp,...sgk->...grpk", x, _select(leaves, chunks.B))


@partial(jax.checkpoint, static_argnums=0)
def _chunk_outputs(exact: bool, chunks: _Chunks, entering, runs: _ChunkRuns | None):
    """Outputs `(..., c, G, R, P)` of the chunks, given the states that enter them.

    The backward pass computes them again, so that no scores `(..., c, c)` are kept.
    """
    size = chunks.total.shape[-1]
    mask = jnp.tril(jnp.ones((size, size), bool))
    if runs is not None:
        same = runs.start[..., :, None] == runs.start[..., None, :]
        mask = (mask & same)[..., None, None, :, :]
    scores = _einsum(exact, "...tgk,...sgk->...gts", chunks.C, chunks.B)[
        ..., None, :, :
    ]
    late, early = (..., slice(None), None), (..., None, slice(None))
    scores = scores * _decay(chunks, late, early, _sums_between, mask)
    y = _einsum(exact, "...grts,...sgrp->...tgrp", scores, chunks.x)
    enters = None if runs is None else runs.enters
    since = _for_heads(enters)
    since = jnp.exp(
        chunks.total if since is None else jnp.where(since, chunks.total, 0)
    )
    read = _einsum(
        exact, "...tgk,...grpk->...tgrp", _select(enters, chunks.C), entering
    )
    return y + _select(enters, read * jnp.moveaxis(since, -1, -3)[..., None])


def _by_group(heads, groups: int, axis: int = -1):
    """Splits an axis of H heads into `(G, R)`."""
    axis = axis % heads.ndim
    shape = (*heads.shape[:axis], groups, heads.shape[axis] // groups)
    return heads.reshape(shape + heads.shape[axis + 1 :])


def dense(spec: SSDSpec, operands: SSDOperands):
    """`ssd` on checked arguments of at least one token."""
    x, dt, A, B, C, D, dt_bias, initial_state, segment_ids = operands
    (rows, length, heads, dim), (_, _, groups, _) = x.shape, B.shape
    dtype, wide = x.dtype, batch.accumulator(x)
    x, dt, A, B, C = (a.astype(wide) for a in (x, dt, A, B, C))
    dt = step_sizes(spec, dt, dt_bias)
    size, count = spec.chunk_size, -(-length // spec.chunk_size)
    row_runs: batch.Runs | None = None
    runs: _ChunkRuns | None = None
    if segment_ids is not None:
        row_runs = batch.runs_of(segment_ids, rows, length)
        x, dt, B, C = (_select(row_runs.real, a) for a in (x, dt, B, C))
        x, dt, B, C, nonfinite = _take_out_nonfinite(x, dt, B, C, row_runs.start)
        runs = _runs_of_chunks(row_runs, size, count)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, count * size - length)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(rows, count, size, *a.shape[2:])

    inputs = _Inputs(
        cut(_by_group(x, groups, 2)),
        cut(_by_group(dt, groups)),
        _by_group(A, groups),
        cut(B),
        cut(C),
    )
    chunks = _chunks(inputs)

    def step(state, chunk):
        added, decay, through = chunk
        entering = state if through is None else _select(through, state)
        return entering * decay[..., None, None] + added, state

    through = None if runs is None else jnp.moveaxis(runs.through, 1, 0)
    added = jnp.moveaxis(_chunk_states(spec.exact, chunks, runs), 1, 0)
    decay = jnp.moveaxis(jnp.exp(chunks.total[..., -1]), 1, 0)
    if initial_state is None:  # zeros that vary over a mesh as the states will
        state = jnp.zeros_like(added[0])
    else:
        state = _by_group(initial_state.astype(wide), groups, 1)
    state, entering = lax.scan(step, state, (added, decay, through))
    y = _chunk_outputs(spec.exact, chunks, jnp.moveaxis(entering, 0, 1), runs)
    y = y.reshape(rows, count * size, heads, dim)[:, :length]
    state = state.reshape(rows, heads, dim, B.shape[-1])
    if D is not None:
        y = y + _past_the_state(D, x)
    if row_runs is not None:
        y, state = _put_back_nonfinite(y, state, nonfinite, row_runs.real)
    y = y.astype(dtype)
    if not spec.final_state:
        return (y,)
    return y, state if initial_state is None else state.astype(initial_state.dtype)


def dense_backward(spec: SSDSpec, operands: SSDBackwardOperands):
    """The gradients of `dense`, in the order of `SSD_GRADIENTS`.

    Those of x and dt have their dtypes. The others are sums and stay wide; that of D is
    `(H, P)`, and those of D and dt_bias are there in any case.
    """
    *inputs, dy, dfinal = operands
    primal = SSDOperands(*inputs)
    x, wide = primal.x, batch.accumulator(primal.x)
    (heads, dim), states = x.shape[2:], primal.states
    D = jnp.zeros((heads, 1), wide) if primal.D is None else primal.D.astype(wide)
    bias = primal.dt_bias
    floats = {
        "x": x,
        "dt": primal.dt,
        "A": primal.A.astype(wide),
        "B": primal.B.astype(wide),
        "C": primal.C.astype(wide),
        "dt_bias": jnp.zeros(heads, wide) if bias is None else bias.astype(wide),
        "D": jnp.broadcast_to(D.reshape(heads, -1), (heads, dim)),
    }
    if states is not None:
        floats["states"] = states.astype(wide)
    spec = dataclasses.replace(spec, final_state=dfinal is not None)

    def results(floats):
        return dense(spec, primal._replace(**floats))

    cotangents = (dy,) if dfinal is None else (dy, dfinal.astype(wide))
    gradients = jax.vjp(results, floats)[1](cotangents)[0]
    return tuple(gradients[name] for name in SSD_GRADIENTS if name in gradients)


def _runs_of_chunks(row_runs: batch.Runs, size: int, count: int) -> _ChunkRuns:
    """The runs of the rows of a dense batch, as seen by their chunks of `size`."""
    rows, length = row_runs.start.shape
    pad = ((0, 0), (0, count * size - length))
    start, real = (
        jnp.pad(a, pad).reshape(rows, count, size)
        for a in (row_runs.start, row_runs.real)
    )
    begin = jnp.arange(count, dtype=jnp.int32)[:, None] * size
    enters = real & ((start < begin) | (start == 0))
    place = jnp.arange(size, dtype=jnp.int32)
    last = jnp.max(jnp.where(real, place, 0), axis=2, keepdims=True)
    leaves = real & (start == jnp.take_along_axis(start, last, axis=2, mode="clip"))
    through = jnp.take_along_axis(enters, last, axis=2, mode="clip") | ~real.any(
        2, keepdims=True
    )
    return _ChunkRuns(start, enters, leaves, through[..., 0])


class _NonFinite(NamedTuple):
    """Where NaN and inf in the inputs of a dense batch have to show again.

    Attributes:
        states: `(B, T, H)`, whether the head's state after the token is NaN.
        outputs: `(B, T, H)`, whether the head's output for the token is NaN.
    """

    states: jax.Array
    outputs: jax.Array


def _take_out_nonfinite(x, dt, B, C, start):
    """Makes x, dt, B and C finite, and says which results must be NaN all the same.

    The score of a token and one of another run is 0, but 0 times NaN is NaN, and a
    product of matrices cannot leave out a term. So NaN and inf are replaced by zeros
    before the products, and `_put_back_nonfinite` puts NaN where they belong: into
    their head's state, from their token to the end of its run.
    """
    per_group = x.shape[2] // B.shape[2]
    fine = jnp.isfinite(x * dt[..., None])
    bad = ~(jnp.isfinite(dt) & fine.all(3))
    bad |= jnp.repeat(~jnp.isfinite(B).all(3), per_group, axis=2)
    position = jnp.arange(x.shape[1], dtype=jnp.int32)[:, None]
    latest = lax.cummax(jnp.where(bad, position, -1), axis=1)
    states = latest >= start[..., None]
    outputs = states | jnp.repeat(~jnp.isfinite(C).all(3), per_group, axis=2)
    dt, B, C = (jnp.where(jnp.isfinite(a), a, 0) for a in (dt, B, C))
    return jnp.where(fine, x, 0), dt, B, C, _NonFinite(states, outputs)


def _put_back_nonfinite(y, state, nonfinite: _NonFinite, real):
    """Puts NaN into y and state where it belongs, and zeros into y's padding."""
    y = _select(real, jnp.where(nonfinite.outputs[..., None], jnp.nan, y))
    position = jnp.arange(real.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(real, position, -1), axis=1)
    at_end = jnp.any(nonfinite.states & (position == last[:, None])[..., None], axis=1)
    return y, jnp.where(at_end[..., None, None], jnp.nan, state)


class _Prefills(NamedTuple):
    """Which rows of `Sequences` are prefills, the live ones of more than one token.

    Attributes:
        here: `(N,)`, whether the sequence is one.
        number: `(N,)`, how many prefills come before it: its own number, if it is one.
    """

    here: jax.Array
    number: jax.Array


class _ChunkTable(NamedTuple):
    """Where the M chunks of packed prefills are.

    Attributes:
        token: `(M, c)`, the token of each place, clamped into `[0, T)`.
        real: `(M, c)`, False for a place without a token.
        prefill: `(M,)`, the number of the chunk's prefill, in `[0, max_prefills)`.
        first: `(N,)`, the first chunk of each prefill.
    """

    token: jax.Array
    real: jax.Array
    prefill: jax.Array
    first: jax.Array


def _chunk_table(
    spec: SSDSpec, seqs: batch.Sequences, prefills: _Prefills, num_tokens: int
) -> _ChunkTable:
    """Lays out the chunks of the prefills in turn, each beginning at its first token.

    T // c + max_prefills chunks are always enough. A prefill of n tokens needs
    ceil(n / c) <= n // c + 1 of them; there are at most `max_prefills` prefills; and
    they have at most T tokens together, so that the terms n // c add up to T // c at
    most.
    """
    size, limit = spec.chunk_size, spec.max_prefills
    count = jnp.where(prefills.here, -(-seqs.length // size), 0)
    end = jnp.cumsum(count, dtype=jnp.int32)
    chunk = jnp.arange(num_tokens // size + limit, dtype=jnp.int32)
    seq = jnp.minimum(batch.first_after(end, chunk), end.shape[0] - 1)
    position = (chunk - (end - count)[seq])[:, None] * size
    position = position + jnp.arange(size, dtype=jnp.int32)
    real = (chunk < end[-1])[:, None] & (position < seqs.length[seq][:, None])
    token = jnp.clip(seqs.start[seq][:, None] + position, 0, num_tokens - 1)
    number = jnp.clip(prefills.number[seq], 0, limit - 1)
    return _ChunkTable(token, real, number, end - count)


def _scan_chunks(spec: SSDSpec, inputs: _Inputs, table: _ChunkTable, initial):
    """Serves prefills.

    Returns:
        Outputs `(M, c, G, R, P)`; final states, like `initial`; and the states
        `(M, G, R, P, K)` that enter the chunks.
    """
    chunks = _chunks(inputs.map_tokens(lambda a: _select(table.real, a[table.token])))

    def step(states, chunk):
        added, decay, number = chunk
        entering = states[number]
        leaving = entering * decay[..., None, None] + added
        return states.at[number].set(leaving), entering

    decay = jnp.exp(chunks.total[..., -1])
    xs = (_chunk_states(spec.exact, chunks, None), decay, table.prefill)
    states, entering = lax.scan(step, initial, xs)
    return _chunk_outputs(spec.exact, chunks, entering, None), states, entering


def packed(  # noqa: PLR0915 (steps in their order)
    spec: SSDSpec, operands: SSDPackedOperands, write_ends: Any = None
):
    """`ssd_packed` on checked arguments: y, and the new states.

    These are after all tokens of a sequence, or after so many of `write_ends` `(N,)`.

    There are at least one token, one sequence and one slot.

    Every sequence takes one step of the recurrence, which is all that those of one
    token need; where there are prefills, their results replace that step's.
    """
    x, dt, A, B, C, D, dt_bias, states, offsets, slots, has_initial_state, *_ = operands
    num_tokens, heads, dim = x.shape
    num_seqs, groups, dtype = offsets.shape[0] - 1, B.shape[1], x.dtype
    x, dt, A, B, C = (a.astype(batch.accumulator(x)) for a in (x, dt, A, B, C))
    dt = step_sizes(spec, dt, dt_bias)
    offsets = batch.sanitize_offsets(offsets, num_tokens)
    num_slots = states.shape[0]
    # `sequences` asks for slots of some rows of history: a state is like a single row.
    seqs = batch.sequences(
        offsets, slots, has_initial_state, None, (num_slots, 1), spec.pad_slot_id
    )
    surplus = batch.surplus_prefills(seqs, spec.max_prefills)
    seqs = seqs._replace(live=seqs.live & ~surplus)
    prefill = seqs.live & (seqs.length > 1)
    # States of another dtype stay out of the single pass over all slots. It would also
    # convert those that no sequence names, and back; on a CPU not all keep their bits.
    in_one_pass = (
        states.dtype == x.dtype
        and _every_slot_may_change(num_slots, num_seqs)
        and not _states_move(operands)
        and write_ends is None
    )
    if in_one_pass:  # From here on, row s of `seqs` is the sequence in slot s.
        tokens, seqs, prefill = _in_slot_order(seqs, prefill, num_slots, num_tokens)
    else:
        tokens = batch.tokens_of(seqs, num_tokens)
    prefills = _Prefills(prefill, jnp.cumsum(prefill, dtype=jnp.int32) - 1)
    single = seqs.live & ~prefill

    inputs = _Inputs(
        _by_group(x, groups, 1), _by_group(dt, groups), _by_group(A, groups), B, C
    )
    stores = batch.stores_of(seqs, operands, spec.pad_slot_id)
    ends: list[Any] = [store.end for store in stores]
    ends[-1] = write_ends
    of_prefills: list[Any] = [None] * len(ends)
    if spec.max_prefills:
        many, of_prefills, states = _run_prefills(
            spec, inputs, states, (seqs, prefills, tokens), ends
        )
    token = jnp.minimum(seqs.start, num_tokens - 1)
    one = inputs.map_tokens(lambda a: _select(single, a[token]))
    decay = jnp.exp(one.dt * one.A)[..., None, None]
    old = states if in_one_pass else states[seqs.slot]
    old = _select(single & (seqs.history > 0), old.astype(x.dtype))
    old = _by_group(old, groups, 1)
    rows = old * decay
    rows = rows + (one.x * one.dt[..., None])[..., None] * one.B[:, :, None, None]
    # A product and a sum, which XLA fuses with what is around them, unlike a dot.
    y = (rows * one.C[:, :, None, None]).sum(-1)[tokens.owner]
    if spec.max_prefills:
        y = jnp.where(prefill[tokens.owner][:, None, None, None], many, y)
    y = y.reshape(num_tokens, heads, dim)
    if D is not None:
        y = y + _past_the_state(D, _select(tokens.live, x))
    y = _select(tokens.live, y).astype(dtype)

    def after(end, many):
        one = rows
        if end is not None:
            one = jnp.where((end > 0)[:, None, None, None, None], rows, old)
        if many is not None:
            one = jnp.where(prefill[:, None, None, None, None], many, one)
        return one.reshape(one.shape[0], *states.shape[1:]).astype(states.dtype)

    stored = list(map(after, ends, of_prefills))
    if in_one_pass:
        return y, jnp.where(seqs.live[:, None, None, None], stored[0], states)
    # All reads of the cache come before the write. A later one, for y for example,
    # would make XLA copy a donated cache.
    y, stored, states = lax.optimization_barrier((y, stored, states))
    for store, new in zip(stores, stored, strict=True):
        slot = jnp.where(store.live, store.slot, num_slots)  # else out of bounds
        states = states.at[slot].set(new, mode="drop", unique_indices=True)
    return y, states


def replay(spec: SSDSpec, operands: SSDPackedOperands):
    """`ssd_packed` with drafts, on checked arguments; see the package's `replay`."""
    spec, longer, ends, results_of = replayed(spec, operands)
    return results_of(*packed(spec, longer, ends))


def _run_prefills(
    spec: SSDSpec,
    inputs: _Inputs,
    states,
    who: tuple[batch.Sequences, _Prefills, batch.Tokens],
    ends: list,
):
    """Serves the prefills of a packed batch by chunks.

    Returns:
        Outputs `(T, G, R, P)`, without meaning for tokens of other sequences; for each
        of `ends`, states `(N, G, R, P, K)` after so many tokens `(N,)`, all if that is
        None, without meaning for other sequences; and `states`, to be used from here
        on.
    """
    seqs, prefills, tokens = who
    num_tokens, groups = inputs.x.shape[:2]
    limit = spec.max_prefills
    table = _chunk_table(spec, seqs, prefills, num_tokens)
    place = jnp.where(prefills.here, prefills.number, limit)  # else out of bounds
    slot, known = (
        jnp.zeros(limit, values.dtype)
        .at[place]
        .set(values, mode="drop", unique_indices=True)
        for values in (seqs.slot, seqs.history > 0)
    )
    initial = _by_group(_select(known, states[slot].astype(inputs.x.dtype)), groups, 1)
    # This read of the cache comes before the write, too.
    initial, states = lax.optimization_barrier((initial, states))
    many, final, entering = _scan_chunks(spec, inputs, table, initial)
    many = many.reshape(-1, *many.shape[2:])
    at = table.first[tokens.owner] * spec.chunk_size + tokens.position
    many = many.at[at].get(mode="clip")

    def after(end):
        if end is None:
            return final.at[prefills.number].get(mode="clip")
        return _state_within(spec, inputs, (entering, table, seqs), prefills.here, end)

    return many, list(map(after, ends)), states


def _state_within(spec: SSDSpec, inputs: _Inputs, chunked: tuple, here, end):
    """States `(N, G, R, P, K)` of prefills after `end` `(N,)` tokens.

    Args:
        spec: of the op.
        inputs: of all tokens.
        chunked: the states that enter the chunks, the table of these, the sequences.
        here: `(N,)`, which of the sequences are prefills.
        end: in `[0, length]`.
    """
    entering, table, seqs = chunked
    # The state that enters the chunk of the last token before the end, and that chunk
    # once more, up to there.
    whole = jnp.maximum(end - 1, 0) // spec.chunk_size
    place = whole[:, None] * spec.chunk_size + jnp.arange(spec.chunk_size)
    real = here[:, None] & (place < end[:, None])
    token = jnp.clip(seqs.start[:, None] + place, 0, inputs.x.shape[0] - 1)
    chunks = _chunks(inputs.map_tokens(lambda a: _select(real, a[token])))
    early = entering.at[table.first + whole].get(mode="clip")
    early = early * jnp.exp(chunks.total[..., -1])[..., None, None]
    return early + _chunk_states(spec.exact, chunks, None)


def _states_move(operands: SSDPackedOperands) -> bool:
    """Whether other states than the last ones, or other slots, are written."""
    what = (operands.write_slots, operands.snapshot_slots)
    return any(field is not None for field in what)


def _every_slot_may_change(num_slots, num_seqs) -> bool:
    """Tells whether there are no more slots than sequences.

    Then XLA for a GPU updates the states in one pass over all slots. To update some of
    the slots it gathers their rows, keeps these, and scatters them, which costs more.
    Where a size is unknown (`jax.export`) there may be more slots.
    """
    sizes = num_slots, num_seqs
    return not any(map(jax.export.is_symbolic_dim, sizes)) and num_slots <= num_seqs


def _in_slot_order(seqs: batch.Sequences, prefill, num_slots: int, num_tokens: int):
    """Puts each sequence into the row of its slot.

    Live sequences must not share a slot. If they do all the same, one of them gets it,
    and the tokens of the others count as tokens that no sequence covers, so that no
    other slot and no other sequence is harmed.

    Returns:
        The tokens, whose owners are now slots; the sequences, one for each slot, which
        is not live where the slot has none; and the mask of prefills among them.
    """
    number = jnp.arange(seqs.slot.shape[0], dtype=jnp.int32)
    place = jnp.where(seqs.live, seqs.slot, num_slots)  # out of bounds, so not written
    seq = jnp.full(num_slots, number.shape[0], jnp.int32)
    seq = seq.at[place].set(number, mode="drop")
    live = seqs.live & (seq[seqs.slot] == number)
    tokens = batch.tokens_of(seqs._replace(live=live), num_tokens)
    tokens = tokens._replace(owner=seqs.slot[tokens.owner])
    taken = seq < number.shape[0]
    seqs, prefill = jax.tree.map(
        lambda field: field.at[seq].get(mode="clip"), (seqs, prefill & live)
    )
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    return tokens, seqs._replace(slot=slot, live=taken), taken & prefill
