"""The XLA implementation: the readable truth, and the path for CPU and TPU.

Everything is a gather of rows: token p of a sequence needs rows p-1 … p-(W-1) of
x, or, before the sequence's first token, rows of its history. A select picks one of
the two, so that what a token must not see is never multiplied with anything. The
loop over taps is static and XLA fuses it into one pass over the output.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .checks import PAD_SLOT_ID
from .columns import ALL, Columns

# XLA:CPU of older jax copies a cache that is read before a loop updates it: what is
# needed of it must be kept by that loop. In bfloat16 any loop copies it, at every trip.
_READS_BEFORE_LOOP = jax.__version_info__ >= (0, 11)


def taps_of(x, history, tokens: Tokens, width: int):
    """Yields what each filter tap meets, newest first: W arrays `(T, D)`.

    x and history are of the accumulator's dtype; tokens that are not live meet zeros.
    """
    token = jnp.arange(x.shape[0], dtype=jnp.int32)
    for d in range(width):
        tap = take_rows(x, jnp.maximum(token - d, 0))
        if d:
            row = width - 1 + tokens.position - d
            old = take_rows(history, tokens.owner, jnp.maximum(row, 0))
            tap = jnp.where((tokens.position >= d)[:, None], tap, old)
        yield jnp.where(tokens.live[:, None], tap, 0)


def convolve(x, weight, bias, history, tokens: Tokens, silu: bool, dtype):
    """`act(bias + Σ w·u)` for each row of x `(T, D)`; zeros where not live.

    x and history are of the accumulator's dtype; the result is rounded to `dtype`.
    """
    width = weight.shape[1]
    # Each tap a vector, made before the loop over tokens: inside of it XLA:CPU would
    # gather and convert W numbers that lie side by side for each output again.
    filter_taps = lax.optimization_barrier(
        [weight[:, k].astype(x.dtype) for k in range(width)]
    )
    acc = jnp.zeros(x.shape, x.dtype) if bias is None else bias.astype(x.dtype)
    for d, tap in enumerate(taps_of(x, history, tokens, width)):
        acc = acc + tap * filter_taps[width - 1 - d]
    if silu:
        acc = jax.nn.silu(acc)
    return jnp.where(tokens.live[:, None], acc, 0).astype(dtype)


def convolve_parts(
    x, weight, bias, history, tokens: Tokens, silu: bool, dtype, columns: Columns
):
    """The parts of `convolve`'s result, each a loop of its own.

    Cutting one result apart is slower: XLA:CPU then loses its vectorised loop, or
    copies.
    """
    each = zip(
        columns.parts(x),
        columns.parts(weight.T),
        [None] * columns.num_parts if bias is None else columns.parts(bias),
        columns.parts(history),
        strict=True,
    )
    return tuple(convolve(x, w.T, b, h, tokens, silu, dtype) for x, w, b, h in each)


def _advance(states, seqs: Sequences, x, wide_x, columns, count: int, convolved):
    """Convolves, and makes each live sequence's slot its last inputs.

    Args:
        states: `(S, L, D)` cache.
        seqs: the sequences in the rows of x.
        x, wide_x: as given to the op, and its `columns` in the accumulator's dtype.
        count: W-1.
        convolved: from history `(N, W-1, D)` to the parts of the output.

    Returns:
        The parts of the output, then the states.
    """
    num_seqs, (num_slots, state_len, dim) = seqs.slot.shape[0], states.shape
    wide = wide_slots(states, seqs, wide_x.dtype)
    roll = functools.partial(slots_after, state_len=state_len, dtype=states.dtype)
    row = jnp.arange(state_len, dtype=jnp.int32)
    # A row of its own (`row_by_row`) is one of many: no loop for each.
    looped = not num_seqs == num_slots == 1
    if not _READS_BEFORE_LOOP:
        looped = looped and states.dtype != jnp.bfloat16
    keeps = looped and not _READS_BEFORE_LOOP

    def scatter(states, x, wide_x, wide):
        x = columns.of(x, dim)
        rows = roll(x, wide_x, states, wide, seqs, seqs.length)
        kept = take_rows(states, seqs.slot) if keeps else None
        states, (rows, kept) = read_before(states, (rows, kept))
        return store_rows(states, seqs, row, rows), kept

    # On a CPU a loop that rolls one slot a trip spares an array of all new rows. On a
    # GPU it would be a chain of tiny kernels.
    def loop(states, x, *_):
        kept = states[:1].repeat(num_seqs, axis=0) if keeps else None

        def step(i, carry):
            states, kept = carry
            own = Sequences(*(lax.dynamic_slice_in_dim(a, i, 1) for a in seqs))
            # A slice would gather all of a cache whose slots are sharded.
            old = take_rows(states, own.slot)
            if keeps:
                kept = lax.dynamic_update_slice_in_dim(kept, old, i, 0)
                old = lax.dynamic_slice_in_dim(kept, i, 1)
            # Cut out of x before the loop, our columns of it would be a copy.
            behind = own.start + own.length - state_len
            last = columns.of(take_rows(x, jnp.maximum(behind + row, 0)), dim)
            here = own._replace(
                start=state_len - own.length, slot=jnp.zeros_like(own.slot)
            )
            new = roll(last, last, old, old, here, own.length)
            new = jnp.where(own.live[:, None, None], new, old)
            return lax.dynamic_update_slice_in_dim(states, new, own.slot[0], 0), kept

        # A number that XLA does not know: it would unroll a loop of one trip, and copy.
        trips = lax.optimization_barrier(jnp.int32(num_seqs))
        return lax.fori_loop(0, trips, step, (states, kept))

    if not keeps:
        parts = convolved(history_before(states, wide, seqs, count))
        states, parts = read_before(states, parts)
    given = states, x, wide_x, wide
    twin, _ = scatter(*given)
    if not looped:
        return *parts, twin
    rolled, kept = lax.platform_dependent(
        *lax.stop_gradient(given), cpu=loop, default=scatter
    )
    if keeps:
        own = seqs._replace(slot=jnp.arange(num_seqs, dtype=jnp.int32))
        parts = convolved(history_before(kept, wide, own, count))
    return *parts, differentiate_as(rolled, twin)


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
    columns: Columns = ALL,
):
    """`causal_conv1d_fn` on checked arguments; `metadata` is not needed here."""
    del metadata
    num_tokens, (dim, width), state_len = x.shape[0], weight.shape, states.shape[1]
    offsets = sanitize_offsets(query_start_loc, num_tokens)
    seqs = sequences(
        offsets, slots, has_initial_state, num_rejected, states.shape, pad_slot_id
    )
    wide_x = columns.of(x, dim).astype(accumulator(x))
    tokens = tokens_of(seqs, num_tokens)

    def convolved(history):
        return convolve_parts(
            wide_x, weight, bias, history, tokens, silu, x.dtype, columns
        )

    if state_len == 0:  # W = 1
        no_rows = jnp.zeros((seqs.slot.shape[0], 0, dim), wide_x.dtype)
        return *convolved(no_rows), states
    return _advance(states, seqs, x, wide_x, columns, width - 1, convolved)


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
    columns: Columns = ALL,
):
    """`causal_conv1d_update` on checked arguments; x is `(B, Q, D)`."""
    own = own_slots(slots, x.shape[0], state.shape[0], pad_slot_id)
    if own is None:
        index = cache_seqlens, slots, num_rejected
        return _update(weight, bias, silu, columns, pad_slot_id, x, state, *index)
    function = functools.partial(_update, weight, bias, silu, columns, PAD_SLOT_ID)
    return row_by_row(function)(x, state, cache_seqlens, own, num_rejected)


def _update(
    weight,
    bias,
    silu,
    columns,
    pad_slot_id,
    x,
    state,
    cache_seqlens,
    slots,
    num_rejected,
):
    (batch, query, _), (dim, width), state_len = x.shape, weight.shape, state.shape[1]
    flat = x.reshape(batch * query, -1)
    offsets = jnp.arange(batch + 1, dtype=jnp.int32) * query
    seqs = sequences(offsets, slots, True, num_rejected, state.shape, pad_slot_id)
    owner, position = jnp.divmod(jnp.arange(batch * query, dtype=jnp.int32), query)
    tokens = Tokens(owner, position, take_rows(seqs.live, owner))
    wide_x = columns.of(flat, dim).astype(accumulator(x))

    def convolved(history):
        parts = convolve_parts(
            wide_x, weight, bias, history, tokens, silu, x.dtype, columns
        )
        return tuple(part.reshape(batch, query, -1) for part in parts)

    if state_len == 0:  # W = 1
        return *convolved(jnp.zeros((batch, 0, dim), wide_x.dtype)), state
    if cache_seqlens is None:
        return _advance(state, seqs, flat, wide_x, columns, width - 1, convolved)
    wide = wide_slots(state, seqs, wide_x.dtype)
    cursor = jnp.mod(cache_seqlens, state_len)  # reduced first: cannot overflow
    history = ring_before(state, wide, seqs, cursor, width - 1)
    kept = min(query, state_len)  # each row is written once
    kept_from = jnp.arange(query - kept, query)
    row = (cursor[:, None] + kept_from) % state_len
    token = jnp.arange(batch)[:, None] * query + kept_from
    rows = token_rows(columns.of(flat, dim), wide_x, token, state.dtype)
    state, parts = read_before(state, convolved(history))
    return *parts, store_rows(state, seqs, row, rows)


def with_zeros(history):
    """`(B, 2, W-1, D)`: each row's history, and one of zeros for its later runs."""
    return jnp.stack([history, jnp.zeros_like(history)], axis=1)


def dense(
    x,
    weight,
    bias,
    initial_state,
    segment_ids,
    *,
    silu: bool,
    state_len: int | None = None,
    columns: Columns = ALL,
):
    """`causal_conv1d` on checked arguments; `state_len` None is without final state."""
    x = columns.of(x, weight.shape[0])
    (batch, length, dim), width, dtype = x.shape, weight.shape[1], x.dtype
    wide_x = x.astype(accumulator(x))
    if initial_state is None:
        wide = None
        history = jnp.zeros((batch, width - 1, dim), wide_x.dtype)
    else:
        wide = initial_state.astype(wide_x.dtype)
        history = wide[:, initial_state.shape[1] - (width - 1) :]
    runs = runs_of(segment_ids, batch, length)

    def convolve_row(x, history, tokens):
        return convolve_parts(x, weight, bias, history, tokens, silu, dtype, columns)

    parts = jax.vmap(convolve_row)(wide_x, with_zeros(history), tokens_of_runs(runs))
    if state_len is None:
        return parts
    return *parts, _final_states(x, wide_x, initial_state, wide, runs, state_len)
