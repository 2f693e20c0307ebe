"""`ssd` and `ssd_packed`: the state-space-duality op of Mamba2, in plain JAX.

The recurrence `h[t] = exp(dt[t]·A)·h[t-1] + dt[t]·x[t] ⊗ B[t]`, `y[t] = h[t]·C[t]` is
computed by chunks of c tokens (Dao and Gu 2024, arXiv 2405.21060, section 6). With
`s(t, r)` the sum of `dt·A` over the tokens after r up to t,

    y[t] = sum_{r <= t} (C[t]·B[r]) exp(s(t, r)) dt[r] x[r]  +  exp(s(t, before)) C[t]·h

where h is the state that enters the chunk. Everything inside a chunk is matrix
products, batched over all chunks; only the chunks' states pass through a scan.

Letters as elsewhere, and: H heads of P channels, G groups of H // G heads, R heads in
a group, K state size, c tokens in a chunk, M chunks.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from . import batch as xla
from . import checks
from .operands import PAD_SLOT_ID

_LOWEST = -1000.0
"""exp of it, and of anything below, is 0 in every dtype."""


def ssd(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None = None,
    *,
    initial_state: ArrayLike | None = None,
    segment_ids: ArrayLike | None = None,
    chunk_size: int = 64,
    return_final_state: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """State-space duality over B rows of T tokens, for training and plain prefill.

    Each head h of a row, with `n` a token's place and `g = h // (H // G)`, computes

        state = exp(dt[n] * A) * state + dt[n] * outer(x[n], B[n, g])
        y[n]  = state @ C[n, g] + D * x[n]

    by chunks of tokens (Dao and Gu 2024, arXiv 2405.21060, section 6): matrix products
    inside all chunks at once and a scan over the chunks' states. Products and sums are
    float32 whatever the dtypes (float64 if x is), also on GPUs with TF32, and rounded
    once. Memory is O(B·T·H·(P + chunk_size)), and one state per chunk: no state per
    token, and no score is kept for the backward pass.

    With `segment_ids` several documents are packed into a row: the state starts from
    zero with each *contiguous run* of equal ids. A negative id is padding: zero output,
    zero gradient, and it changes no state. The initial state belongs to the run at
    position 0, and to nobody if that is padding. NaN and inf in padding reach nothing;
    in a run they make the outputs of their head NaN from their token to the run's end,
    which let no gradient through, and reach no other run. (Without `segment_ids` they
    may reach tokens before theirs as well, in its chunk.)

    Differentiable in all float arguments, in any mode and order.

    Args:
        x: `(B, T, H, P)`; float32, bfloat16, float16 or float64. Dtypes may be mixed.
        dt: `(B, T, H)` positive step sizes: softplus and limits are already applied.
        A: `(H,)`, negative.
        B: `(B, T, G, K)`, where G divides H: what heads of a group write with.
        C: `(B, T, G, K)`: what they read with.
        D: `(H,)` or None: how much of x passes by the state.
        initial_state: `(B, H, P, K)`. None is zeros.
        segment_ids: `(B, T)` integers. None is one document a row.
        chunk_size: static int c >= 1, the tokens of a chunk. It changes the work and
            memory, not the meaning: work per token is O(H·(c·P + P·K)).
        return_final_state: also return the state after each row's last token that is
            not padding.

    Returns:
        `y` `(B, T, H, P)` in x's dtype. With `return_final_state` a pair of it and the
        state `(B, H, P, K)`, in the dtype of `initial_state`, else float32 (float64 if
        x is). A row of nothing but padding returns its initial state, or zeros.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape, size or option is wrong.

    Example:
        >>> y = ssd(x, jax.nn.softplus(dt + dt_bias), -jnp.exp(A_log), B, C, D)
    """
    inputs = checks.float_array("x", x, (None,) * 4, "(B, T, H, P)")
    batch, length, heads, dim = inputs.shape
    parameters = _parameters(inputs, dt, A, B, C, D, "B, T")
    shape = (batch, heads, dim, parameters[2].shape[3])
    if initial_state is None:
        state = jnp.zeros(shape, xla.accumulator(inputs))
    else:
        state = checks.float_array(
            "initial_state", initial_state, shape, "(B, H, P, K)"
        )
    if segment_ids is not None:
        segment_ids = checks.segments("segment_ids", segment_ids, (batch, length))
    chunk_size = checks.static_int("chunk_size", chunk_size, minimum=1)
    wanted = checks.static_bool("return_final_state", return_final_state)
    checks.token_count("B * T", batch * length, 1)
    if 0 in inputs.shape:
        y = jnp.zeros_like(inputs)
    else:
        y, state = _dense(
            inputs,
            *parameters,
            state,
            segment_ids,
            chunk_size=min(chunk_size, length),
        )
    return (y, state) if wanted else y


def ssd_packed(
    x: ArrayLike,
    dt: ArrayLike,
    A: ArrayLike,
    B: ArrayLike,
    C: ArrayLike,
    D: ArrayLike | None,
    ssm_states: ArrayLike,
    query_start_loc: ArrayLike,
    *,
    cache_indices: ArrayLike | None = None,
    has_initial_state: ArrayLike | None = None,
    max_prefills: int | None = None,
    chunk_size: int = 64,
    pad_slot_id: int = PAD_SLOT_ID,
) -> tuple[jax.Array, jax.Array]:
    """State-space duality of a packed batch, with its states updated.

    Computes what `ssd` does, for sequences packed and cached as in `causal_conv1d_fn`:
    sequence i owns tokens `[q[i], q[i+1])`, starts from the state in its slot, and
    leaves there the state after its last token. Sequences of one token take one step
    of the recurrence, longer ones go by chunks that begin at their first token; both
    may be mixed at will, and one compilation serves every batch of the same sizes.

    Skipped sequences, offsets and slots are those of `causal_conv1d_fn`: any integers
    are safe; tokens of skipped sequences and uncovered tokens come back as exact zeros;
    NaN or inf there, in unused slots, or in slots without initial state reach nothing.
    Within one sequence a NaN may also reach the tokens before it in its chunk.

    The states are functional, and updated in place where the caller donates them to
    jit or carries them through scan. Numerics are those of `ssd`; a state is rounded
    once, to its own dtype, at the end of a call. Memory beyond the arguments is
    O(T·H·(P + chunk_size)) and, in float32, a few states for each sequence and one for
    each of the `T // chunk_size + max_prefills` chunks.

    Differentiable in all float arguments, in any mode and order.

    Args:
        x: `(T, H, P)`; float32, bfloat16, float16 or float64. Dtypes may be mixed.
        dt: `(T, H)` positive step sizes: softplus and limits are already applied.
        A: `(H,)`, negative.
        B: `(T, G, K)`, where G divides H.
        C: `(T, G, K)`.
        D: `(H,)` or None.
        ssm_states: `(S, H, P, K)` cache.
        query_start_loc: `(N+1,)` integers.
        cache_indices: `(N,)` integers, the slot of each sequence. None is `arange(N)`.
        has_initial_state: `(N,)` bool: does the slot hold a state, or does the sequence
            start from zero? None is all False.
        max_prefills: static int: how many live sequences may have more than one token.
            Surplus ones, in order, are skipped. 0 compiles a decode step, without any
            work for chunks. None is `min(N, T // 2)`: no batch has more.
        chunk_size: static int c >= 1, the tokens of a chunk.
        pad_slot_id: static int, the slot number that means "skip".

    Returns:
        `y` `(T, H, P)` in x's dtype, and the new states, like `ssm_states`. Slots that
        no live sequence names are bit-for-bit unchanged. Sizes of 0 give naturally
        shaped results.

    Raises:
        TypeError: a dtype or the type of a static argument is wrong.
        ValueError: a shape, size or option is wrong.

    Example:
        >>> step = jax.jit(ssd_packed, donate_argnames="ssm_states",
        ...                static_argnames="max_prefills")
        >>> y, states = step(x, dt, A, B, C, D, states, query_start_loc,
        ...                  cache_indices=slots, has_initial_state=seen,
        ...                  max_prefills=4)
    """
    inputs = checks.float_array("x", x, (None,) * 3, "(T, H, P)")
    num_tokens, heads, dim = inputs.shape
    parameters = _parameters(inputs, dt, A, B, C, D, "T")
    shape = (None, heads, dim, parameters[2].shape[2])
    states = checks.float_array("ssm_states", ssm_states, shape, "(S, H, P, K)")
    offsets = checks.index_array(
        "query_start_loc", query_start_loc, (None,), "(N+1,)", 0, num_tokens
    )
    checks.at_least_one_offset(offsets)
    num_seqs, num_slots = offsets.shape[0] - 1, states.shape[0]
    slots = checks.slots_array(
        "cache_indices", cache_indices, states, "ssm_states", num_seqs, "N"
    )
    if has_initial_state is not None:
        has_initial_state = checks.bool_array(
            "has_initial_state", has_initial_state, (num_seqs,), "(N,)"
        )
    most = min(num_seqs, num_tokens // 2)  # more prefills do not fit
    if max_prefills is not None:
        most = min(most, checks.static_int("max_prefills", max_prefills, minimum=0))
    chunk_size = checks.static_int("chunk_size", chunk_size, minimum=1)
    pad_slot_id = checks.pad_slot(pad_slot_id, num_slots)
    checks.token_count("T", num_tokens, 1)
    if 0 in inputs.shape or 0 in (num_seqs, num_slots):
        return jnp.zeros_like(inputs), states
    return _packed(
        inputs,
        *parameters,
        states,
        offsets,
        slots,
        has_initial_state,
        max_prefills=most,
        chunk_size=min(chunk_size, num_tokens),
        pad_slot_id=pad_slot_id,
    )


def _parameters(x, dt, A, B, C, D, rows: str):
    """Checked dt, A, B, C, D for x `(*rows, H, P)`, `rows` naming its leading axes."""
    lead, heads = x.shape[:-2], x.shape[-2]
    dt = checks.float_array("dt", dt, (*lead, heads), f"({rows}, H)")
    A = checks.float_array("A", A, (heads,), "(H,)")
    B = checks.float_array("B", B, (*lead, None, None), f"({rows}, G, K)")
    groups = B.shape[-2]
    if groups == 0 or heads % groups:
        raise ValueError(
            f"B must have shape ({rows}, G, K) where G divides H = {heads}, "
            f"got {B.shape}"
        )
    C = checks.float_array("C", C, B.shape, f"({rows}, G, K)")
    if D is not None:
        D = checks.float_array("D", D, (heads,), "(H,)")
    return dt, A, B, C, D


class _Chunks(NamedTuple):
    """Tokens in chunks of c, in the accumulator's dtype; a place without one is 0.

    Attributes:
        x: `(..., c, G, R, P)`, dt·x.
        total: `(..., G, R, c)`, the sum of dt·A from the chunk's start.
        error: what rounding lost in `total`.
        B: `(..., c, G, K)`.
        C: `(..., c, G, K)`.
    """

    x: jax.Array
    total: jax.Array
    error: jax.Array
    B: jax.Array
    C: jax.Array


class _Runs(NamedTuple):
    """Which places of chunks belong together, where segments share chunks.

    Attributes:
        start: `(..., c)`, where the token's run begins: its name within the row.
        enters: `(..., c)`, the state before the chunk is of the token's run.
        leaves: `(..., c)`, the state after the chunk is of the token's run.
        through: `(...)`, the state before the chunk takes part in the one after it.
    """

    start: jax.Array
    enters: jax.Array
    leaves: jax.Array
    through: jax.Array


def _einsum(spec: str, *operands):
    """Sums in the operands' dtype: HIGHEST, since a GPU may otherwise use TF32.

    Its 10 bits would round decays and states in the middle of the computation.
    """
    return jnp.einsum(spec, *operands, precision=lax.Precision.HIGHEST)


def _select(mask, values):
    """Zeros where the mask, of leading axes of `values`, is False; None is all True."""
    if mask is None:
        return values
    return jnp.where(
        mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim)), values, 0
    )


def _running_sum(values):
    """Sums along the last axis and what rounding lost in them (Knuth's 2Sum).

    A difference of two sums is then as exact as the sum of the few terms between, even
    behind a huge one: a step large enough to forget everything, say.
    """

    def add(first, second):
        a, b = lax.stop_gradient((first[0], second[0]))
        whole = a + b
        of_b = whole - a
        lost = (a - (whole - of_b)) + (b - of_b)
        return first[0] + second[0], first[1] + second[1] + lost

    return lax.associative_scan(add, (values, jnp.zeros_like(values)), axis=-1)


def _chunks(x, dt, A, B, C) -> _Chunks:
    """From x `(..., c, G, R, P)`, dt `(..., c, G, R)`, A `(G, R)`; B, C as they are."""
    log_decay = jnp.moveaxis(jnp.maximum(dt * A, _LOWEST), -3, -1)
    total, error = _running_sum(log_decay)
    return _Chunks(x * dt[..., None], total, error, B, C)


def _decay(chunks: _Chunks, late, early, mask):
    """`exp(s(late, early))` for index expressions on the last axis; 0 where masked.

    Masked before exp, whose infinity would else turn gradients into NaN.
    """
    total, error = chunks.total, chunks.error
    between = (total[late] - total[early]) + (error[late] - error[early])
    if mask is None:
        return jnp.exp(between)
    return jnp.where(mask, jnp.exp(jnp.where(mask, between, 0)), 0)


def _of_heads(mask):
    """A mask `(..., c)` against `(..., G, R, c)`."""
    return None if mask is None else mask[..., None, None, :]


@jax.checkpoint
def _chunk_states(chunks: _Chunks, runs: _Runs | None):
    """What each chunk adds to the state, `(..., G, R, P, K)`."""
    leaves = None if runs is None else runs.leaves
    decay = _decay(chunks, (..., slice(-1, None)), ..., _of_heads(leaves))
    x = _select(leaves, chunks.x) * jnp.moveaxis(decay, -1, -3)[..., None]
    return _einsum("...sgrp,...sgk->...grpk", x, _select(leaves, chunks.B))


@jax.checkpoint
def _chunk_outputs(chunks: _Chunks, entering, runs: _Runs | None):
    """Outputs `(..., c, G, R, P)` of the chunks, given the states that enter them.

    Rematerialised in the backward pass, so that no `(..., c, c)` score is kept.
    """
    size = chunks.total.shape[-1]
    mask = jnp.tril(jnp.ones((size, size), bool))
    if runs is not None:
        same = runs.start[..., :, None] == runs.start[..., None, :]
        mask = (mask & same)[..., None, None, :, :]
    scores = _einsum("...tgk,...sgk->...gts", chunks.C, chunks.B)[..., None, :, :]
    scores = scores * _decay(
        chunks, (..., slice(None), None), (..., None, slice(None)), mask
    )
    y = _einsum("...grts,...sgrp->...tgrp", scores, chunks.x)
    enters = None if runs is None else runs.enters
    since = _of_heads(enters)
    since = jnp.exp(
        chunks.total if since is None else jnp.where(since, chunks.total, 0)
    )
    read = _einsum("...tgk,...grpk->...tgrp", _select(enters, chunks.C), entering)
    return y + _select(enters, read * jnp.moveaxis(since, -1, -3)[..., None])


def _grouped(heads, groups: int, axis: int = -1):
    """Splits an axis of H heads into `(G, R)`."""
    axis = axis % heads.ndim
    shape = (*heads.shape[:axis], groups, heads.shape[axis] // groups)
    return heads.reshape(shape + heads.shape[axis + 1 :])


@partial(jax.jit, static_argnames="chunk_size")
def _dense(x, dt, A, B, C, D, initial_state, segment_ids, *, chunk_size: int):
    """`ssd` on checked arguments of at least one token."""
    (batch, length, heads, dim), (_, _, groups, _) = x.shape, B.shape
    dtype, wide = x.dtype, xla.accumulator(x)
    x, dt, A, B, C = (a.astype(wide) for a in (x, dt, A, B, C))
    size, count = chunk_size, -(-length // chunk_size)
    found: xla.Runs | None = None
    runs = poisoned = None
    if segment_ids is not None:
        found = xla.runs_of(segment_ids, batch, length)
        x, dt, B, C = (_select(found.real, a) for a in (x, dt, B, C))
        x, dt, B, C, poisoned = _without_poison(x, dt, B, C, found.start)
        runs = _runs_of_chunks(found, size, count)

    def cut(a):
        a = jnp.pad(a, ((0, 0), (0, count * size - length)) + ((0, 0),) * (a.ndim - 2))
        return a.reshape(batch, count, size, *a.shape[2:])

    chunks = _chunks(
        cut(_grouped(x, groups, 2)),
        cut(_grouped(dt, groups)),
        _grouped(A, groups),
        cut(B),
        cut(C),
    )
    state = _grouped(initial_state.astype(wide), groups, 1)

    def step(state, chunk):
        added, decay, through = chunk
        entering = state if through is None else _select(through, state)
        return entering * decay[..., None, None] + added, state

    through = None if runs is None else jnp.moveaxis(runs.through, 1, 0)
    added = jnp.moveaxis(_chunk_states(chunks, runs), 1, 0)
    decay = jnp.moveaxis(jnp.exp(chunks.total[..., -1]), 1, 0)
    state, entering = lax.scan(step, state, (added, decay, through))
    y = _chunk_outputs(chunks, jnp.moveaxis(entering, 0, 1), runs)
    y = y.reshape(batch, count * size, heads, dim)[:, :length]
    state = state.reshape(initial_state.shape)
    if D is not None:
        y = y + D.astype(wide)[:, None] * x
    if found is not None:
        y, state = _with_poison(y, state, poisoned, found.real)
    return y.astype(dtype), state.astype(initial_state.dtype)


def _runs_of_chunks(found: xla.Runs, size: int, count: int) -> _Runs:
    """The masks of chunks of `size` in the rows of a dense batch."""
    batch, length = found.start.shape
    pad = ((0, 0), (0, count * size - length))
    start, real = (
        jnp.pad(a, pad).reshape(batch, count, size) for a in (found.start, found.real)
    )
    begin = jnp.arange(count, dtype=jnp.int32)[:, None] * size
    enters = real & ((start < begin) | (start == 0))
    place = jnp.arange(size, dtype=jnp.int32)
    last = jnp.max(jnp.where(real, place, 0), axis=2, keepdims=True)
    leaves = real & (start == jnp.take_along_axis(start, last, axis=2))
    through = jnp.take_along_axis(enters, last, axis=2) | ~real.any(2, keepdims=True)
    return _Runs(start, enters, leaves, through[..., 0])


def _without_poison(x, dt, B, C, start):
    """Finite x, dt, B, C, and which states and outputs are not: two `(B, T, H)`.

    A score of a token and a foreign one is 0, but 0 times NaN is NaN, and a product
    of matrices selects no terms. So NaN and inf are taken out before, and put where
    they belong after: into their head's state from their token to the end of its run.
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
    return jnp.where(fine, x, 0), dt, B, C, (states, outputs)


def _with_poison(y, state, poisoned, real):
    """Puts back what `_without_poison` took out of y and state; zeroes padding."""
    states, outputs = poisoned
    y = _select(real, jnp.where(outputs[..., None], jnp.nan, y))
    position = jnp.arange(real.shape[1], dtype=jnp.int32)
    last = jnp.max(jnp.where(real, position, -1), axis=1)
    at_end = jnp.any(states & (position == last[:, None])[..., None], axis=1)
    return y, jnp.where(at_end[..., None, None], jnp.nan, state)


class _Table(NamedTuple):
    """Where the chunks of packed prefills are.

    Attributes:
        token: `(M, c)`, the token of each place, clamped.
        real: `(M, c)`, False for a place without token.
        prefill: `(M,)`, the number of the chunk's prefill, in `[0, max_prefills)`.
        first: `(N,)`, the first chunk of each prefill.
    """

    token: jax.Array
    real: jax.Array
    prefill: jax.Array
    first: jax.Array


def _table(seqs: xla.Sequences, prefill, number, num_tokens, size, limit) -> _Table:
    """Chunks in the order of the prefills, each beginning at its first token.

    T // c + limit of them suffice: n tokens need ceil(n / c) <= n // c + 1 chunks, the
    at most `limit` prefills have at most T tokens, and the sum of floors is at most
    the floor of the sum.
    """
    count = jnp.where(prefill, -(-seqs.length // size), 0)
    end = jnp.cumsum(count, dtype=jnp.int32)
    chunk = jnp.arange(num_tokens // size + limit, dtype=jnp.int32)
    seq = jnp.minimum(xla.first_after(end, chunk), end.shape[0] - 1)
    position = (chunk - (end - count)[seq])[:, None] * size
    position = position + jnp.arange(size, dtype=jnp.int32)
    real = (chunk < end[-1])[:, None] & (position < seqs.length[seq][:, None])
    token = jnp.clip(seqs.start[seq][:, None] + position, 0, num_tokens - 1)
    return _Table(token, real, jnp.clip(number[seq], 0, limit - 1), end - count)


def _prefill(x, dt, A, B, C, table: _Table, initial):
    """Outputs `(M, c, G, R, P)` of prefills and their final states, like `initial`."""
    x, dt, B, C = (_select(table.real, a[table.token]) for a in (x, dt, B, C))
    chunks = _chunks(x, dt, A, B, C)

    def step(states, chunk):
        added, decay, number = chunk
        entering = states[number]
        leaving = entering * decay[..., None, None] + added
        return states.at[number].set(leaving), entering

    decay = jnp.exp(chunks.total[..., -1])
    xs = (_chunk_states(chunks, None), decay, table.prefill)
    states, entering = lax.scan(step, initial, xs)
    return _chunk_outputs(chunks, entering, None), states


@partial(jax.jit, static_argnames=("max_prefills", "chunk_size", "pad_slot_id"))
def _packed(
    x,
    dt,
    A,
    B,
    C,
    D,
    states,
    offsets,
    slots,
    has_initial_state,
    *,
    max_prefills: int,
    chunk_size: int,
    pad_slot_id: int,
):
    """`ssd_packed` on checked arguments of at least one token, sequence and slot."""
    num_tokens, heads, dim = x.shape
    num_seqs, groups, dtype = offsets.shape[0] - 1, B.shape[1], x.dtype
    x, dt, A, B, C = (a.astype(xla.accumulator(x)) for a in (x, dt, A, B, C))
    offsets = xla.sanitize_offsets(offsets, num_tokens)
    shape = (states.shape[0], 1)  # to `sequences` a state is a history of one row
    seqs = xla.sequences(offsets, slots, has_initial_state, None, shape, pad_slot_id)
    prefill = seqs.live & (seqs.length > 1)
    surplus = prefill & (jnp.cumsum(prefill) > max_prefills)
    prefill, seqs = prefill & ~surplus, seqs._replace(live=seqs.live & ~surplus)
    num_slots = states.shape[0]
    # Not where unnamed states would be converted: on a CPU not all keep their bits.
    by_slot = states.dtype == x.dtype and _no_more(num_slots, num_seqs)
    if by_slot:  # then a row of `seqs` is a slot
        tokens, seqs, prefill = _by_slot(seqs, prefill, num_slots, num_tokens)
    else:
        tokens = xla.tokens_of(seqs, num_tokens)
    number = jnp.cumsum(prefill, dtype=jnp.int32) - 1
    single = seqs.live & ~prefill

    grouped_x, grouped_dt = _grouped(x, groups, 1), _grouped(dt, groups)
    A = _grouped(A, groups)
    if max_prefills:
        table = _table(seqs, prefill, number, num_tokens, chunk_size, max_prefills)
        place = jnp.where(prefill, number, max_prefills)  # out of bounds: dropped
        slot, known = (
            jnp.zeros(max_prefills, values.dtype)
            .at[place]
            .set(values, mode="drop", unique_indices=True)
            for values in (seqs.slot, seqs.history > 0)
        )
        initial = _grouped(_select(known, states[slot].astype(x.dtype)), groups, 1)
        # A read of the cache by itself: before the write, as below.
        initial, states = lax.optimization_barrier((initial, states))
        many, final = _prefill(grouped_x, grouped_dt, A, B, C, table, initial)
        many = many.reshape(-1, *many.shape[2:])
        at = table.first[tokens.owner] * chunk_size + tokens.position
        many = many.at[at].get(mode="clip")
        last = final.at[number].get(mode="clip")
    # One step of the recurrence for each sequence; of use to those of one token.
    token = jnp.minimum(seqs.start, num_tokens - 1)
    x1, dt1, B1, C1 = (_select(single, a[token]) for a in (grouped_x, grouped_dt, B, C))
    decay = jnp.exp(dt1 * A)[..., None, None]
    old = states if by_slot else states[seqs.slot]
    old = _select(single & (seqs.history > 0), old.astype(x.dtype))
    rows = _grouped(old, groups, 1) * decay
    rows = rows + (x1 * dt1[..., None])[..., None] * B1[:, :, None, None]
    y = (rows * C1[:, :, None, None]).sum(-1)[tokens.owner]  # fuses; a dot would not
    if max_prefills:
        y = jnp.where(prefill[tokens.owner][:, None, None, None], many, y)
        rows = jnp.where(prefill[:, None, None, None, None], last, rows)
    y = y.reshape(num_tokens, heads, dim)
    if D is not None:
        y = y + D.astype(x.dtype)[:, None] * _select(tokens.live, x)
    y = _select(tokens.live, y).astype(dtype)
    rows = rows.reshape(rows.shape[0], *states.shape[1:]).astype(states.dtype)
    if by_slot:
        return y, jnp.where(seqs.live[:, None, None, None], rows, states)
    # Every read of the cache before the write: one behind it, y's own say, would make
    # XLA copy a donated cache.
    y, rows, states = lax.optimization_barrier((y, rows, states))
    slot = jnp.where(seqs.live, seqs.slot, num_slots)  # out of bounds: dropped
    return y, states.at[slot].set(rows, mode="drop", unique_indices=True)


def _no_more(num_slots, num_seqs) -> bool:
    """Are there no more slots than sequences?

    Then XLA for a GPU updates the states in one pass over all slots; of some, it would
    gather the rows, keep them, and scatter them. Unknown sizes (`jax.export`) are more.
    """
    sizes = num_slots, num_seqs
    return not any(map(jax.export.is_symbolic_dim, sizes)) and num_slots <= num_seqs


def _by_slot(seqs: xla.Sequences, prefill, num_slots: int, num_tokens: int):
    """Tokens, and sequences in the order of slots: a dead one where a slot has none.

    Of several that name one slot, which none may do, one is left, and others' tokens
    are nobody's.
    """
    number = jnp.arange(seqs.slot.shape[0], dtype=jnp.int32)
    place = jnp.where(seqs.live, seqs.slot, num_slots)  # out of bounds: dropped
    seq = jnp.full(num_slots, number.shape[0], jnp.int32)
    seq = seq.at[place].set(number, mode="drop")
    live = seqs.live & (seq[seqs.slot] == number)
    tokens = xla.tokens_of(seqs._replace(live=live), num_tokens)
    tokens = tokens._replace(owner=seqs.slot[tokens.owner])
    taken = seq < number.shape[0]
    seqs, prefill = jax.tree.map(
        lambda field: field.at[seq].get(mode="clip"), (seqs, prefill & live)
    )
    slot = jnp.arange(num_slots, dtype=jnp.int32)
    return tokens, seqs._replace(slot=slot, live=taken), taken & prefill
