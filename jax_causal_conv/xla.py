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


class Sequences(NamedTuple):
    """What a batch's index arguments mean, after clamping; all `(N,)`.

    Attributes:
        start: first token of the sequence.
        length: its number of tokens.
        slot: its slot, clamped into `[0, S)`; only meaningful where `live`.
        history: how many rows at the front of the slot are valid history, the newest
            last: L minus the rejected ones, 0 without initial state.
        live: False for skipped sequences.
    """

    start: jax.Array
    length: jax.Array
    slot: jax.Array
    history: jax.Array
    live: jax.Array


class Tokens(NamedTuple):
    """Where each token stands; all `(T,)`.

    Attributes:
        owner: its sequence, clamped into `[0, N)`.
        position: its index in the sequence.
        live: False where nobody covers it or its sequence is skipped.
    """

    owner: jax.Array
    position: jax.Array
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


def first_after(ends, query):
    """The first index whose entry of sorted `ends` exceeds `query`; N if none does.

    An unrolled binary search: a loop would be a chain of kernels on a GPU, and jax's
    own search fails in a `shard_map` over some of a mesh's axes. The number of steps
    depends on N; where that is symbolic (`jax.export`), every end is counted instead.
    """
    count = ends.shape[0]
    if jax.export.is_symbolic_dim(count):
        return jnp.sum(ends <= query[:, None], axis=1, dtype=jnp.int32)
    found = jnp.zeros_like(query)
    for bit in reversed(range(count.bit_length())):
        further = found + (1 << bit)
        entry = _rows(ends, further - 1)
        found = jnp.where((further <= count) & (entry <= query), further, found)
    return found


def tokens_of(seqs: Sequences, num_tokens: int) -> Tokens:
    """The tokens of packed sequences."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    end = seqs.start + seqs.length
    # The first sequence that ends behind the token; N for an uncovered tail.
    owner = first_after(end, token)
    covered = (owner < end.shape[0]) & (token >= seqs.start[0])
    live = covered & _rows(seqs.live, owner)
    return Tokens(
        jnp.minimum(owner, end.shape[0] - 1), token - _rows(seqs.start, owner), live
    )


def accumulator(x) -> jnp.dtype:
    """The dtype of products and sums: float64 iff x is."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _rows(table, *index):
    """Rows of `table` at (clamped) indices: one gather."""
    return table.at[index].get(mode="clip")


@jax.custom_jvp
def _differentiate_as(value, twin):
    """`value`, with the derivative of its equal `twin`.

    The twin comes from one conversion to the accumulator's dtype, so that gradients
    through several paths are added there and rounded once, while `value` keeps its
    bits. Where no derivative is taken the twin is never computed.
    """
    del twin
    return value


@_differentiate_as.defjvp
def _(primals, tangents):
    # Of higher orders, too, the derivative is that of the twin.
    return _differentiate_as(*primals), tangents[1].astype(primals[0].dtype)


def wide_slots(states, seqs: Sequences, dtype):
    """Each sequence's slot `(N, L, D)` in the accumulator's dtype."""
    return _rows(states, seqs.slot).astype(dtype)


def _slot_rows(states, wide, seqs: Sequences, row, dtype):
    """`states[slot, row]` as `dtype` for `(N, K)` rows, clamped."""
    each = jnp.arange(row.shape[0])[:, None]
    value = _rows(states, seqs.slot[:, None], row).astype(dtype)
    return _differentiate_as(value, _rows(wide, each, row).astype(dtype))


def history_before(states, wide, seqs: Sequences, count: int):
    """The `count` rows before each sequence's first token, `(N, count, D)`.

    Zeros where there are fewer, and for skipped sequences; in the dtype of `wide`,
    which is `wide_slots(states)`.
    """
    row = seqs.history[:, None] - count + jnp.arange(count, dtype=jnp.int32)
    old = _slot_rows(states, wide, seqs, jnp.maximum(row, 0), wide.dtype)
    return jnp.where(((row >= 0) & seqs.live[:, None])[..., None], old, 0)


def ring_before(states, wide, seqs: Sequences, cursor, count: int):
    """`history_before` for circular buffers whose next row is `cursor` `(N,)`."""
    row = cursor[:, None] - count + jnp.arange(count, dtype=jnp.int32)
    row = jnp.mod(row, states.shape[1])
    old = _slot_rows(states, wide, seqs, row, wide.dtype)
    return jnp.where(seqs.live[:, None, None], old, 0)


def _token_rows(x, wide, token, dtype):
    """Rows of x as `dtype`; `wide` is x in the accumulator's dtype."""
    value = _rows(x, token).astype(dtype)
    return _differentiate_as(value, _rows(wide, token).astype(dtype))


def slots_after(x, wide_x, states, wide, seqs, length, state_len: int, dtype):
    """The last `state_len` of `concat(history, x[start:start+length])`, `(N, ·, D)`.

    Zero rows in front of the first known one. `states` None means no history.
    """
    if state_len == 0:
        return jnp.zeros((length.shape[0], 0, x.shape[1]), dtype)
    row = jnp.arange(state_len, dtype=jnp.int32)
    token = length[:, None] - state_len + row  # of the sequence; < 0: history
    new = jnp.maximum(seqs.start[:, None] + token, 0)
    new = _token_rows(x, wide_x, new, dtype)
    if states is None:
        old = jnp.zeros((), dtype)
    else:
        row = seqs.history[:, None] + token
        old = _slot_rows(states, wide, seqs, jnp.maximum(row, 0), dtype)
        old = jnp.where((row >= 0)[..., None], old, 0)
    return jnp.where((token >= 0)[..., None], new, old)


def taps_of(x, history, tokens: Tokens, width: int):
    """Yields what each filter tap meets, newest first: W arrays `(T, D)`.

    x and history are of the accumulator's dtype; tokens that are not live meet zeros.
    """
    token = jnp.arange(x.shape[0], dtype=jnp.int32)
    for d in range(width):
        tap = _rows(x, jnp.maximum(token - d, 0))
        if d:
            row = width - 1 + tokens.position - d
            old = _rows(history, tokens.owner, jnp.maximum(row, 0))
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


def _store(states, seqs: Sequences, row, rows):
    """Writes `rows` `(N, K, D)` to rows `row` of the slots of live sequences."""
    slot = jnp.where(seqs.live, seqs.slot, states.shape[0])  # out of bounds: dropped
    return states.at[slot[:, None], row].set(rows, mode="drop", unique_indices=True)


def _read_before(states, reads):
    """Orders what was read of `states` before an update of the result.

    XLA then updates a donated cache in place instead of copying it.
    """
    return lax.optimization_barrier((states, reads))


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
        kept = _rows(states, seqs.slot) if keeps else None
        states, (rows, kept) = _read_before(states, (rows, kept))
        return _store(states, seqs, row, rows), kept

    # On a CPU a loop that rolls one slot a trip spares an array of all new rows. On a
    # GPU it would be a chain of tiny kernels.
    def loop(states, x, *_):
        kept = states[:1].repeat(num_seqs, axis=0) if keeps else None

        def step(i, carry):
            states, kept = carry
            own = Sequences(*(lax.dynamic_slice_in_dim(a, i, 1) for a in seqs))
            # A slice would gather all of a cache whose slots are sharded.
            old = _rows(states, own.slot)
            if keeps:
                kept = lax.dynamic_update_slice_in_dim(kept, old, i, 0)
                old = lax.dynamic_slice_in_dim(kept, i, 1)
            # Cut out of x before the loop, our columns of it would be a copy.
            behind = own.start + own.length - state_len
            last = columns.of(_rows(x, jnp.maximum(behind + row, 0)), dim)
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
        states, parts = _read_before(states, parts)
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
    return *parts, _differentiate_as(rolled, twin)


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


def own_slots(slots, batch: int, num_slots: int, pad_slot_id: int):
    """For `row_by_row`: each row's slot in a cache of its own (0, or -1 to skip).

    None where rows and slots do not correspond.
    """
    if slots is not None or batch != num_slots:
        return None
    return jnp.where(jnp.arange(batch, dtype=jnp.int32) == pad_slot_id, -1, 0)


def row_by_row(function):
    """`function` of a batch as a vmap over batches of one.

    Gathers then stay inside a row by construction, and a batch sharded over devices
    stays where it is.
    """

    def of_row(*row):
        out = function(*jax.tree.map(lambda a: a[None], row))
        return jax.tree.map(lambda a: a[0], out)

    return jax.vmap(of_row)


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
    tokens = Tokens(owner, position, _rows(seqs.live, owner))
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
    rows = _token_rows(columns.of(flat, dim), wide_x, token, state.dtype)
    state, parts = _read_before(state, convolved(history))
    return *parts, _store(state, seqs, row, rows)


class Runs(NamedTuple):
    """Runs of equal segment ids in the rows of a dense batch; all `(B, T)`.

    Attributes:
        start: position in the row at which the token's run starts.
        real: False for padding.
    """

    start: jax.Array
    real: jax.Array


def runs_of(segment_ids, batch: int, length: int) -> Runs:
    """The contiguous runs of equal ids; without ids each row is one run."""
    if segment_ids is None:
        shape = (batch, length)
        return Runs(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
    position = jnp.arange(length, dtype=jnp.int32)
    before = _rows(segment_ids.T, jnp.maximum(position - 1, 0)).T
    change = jnp.where(segment_ids != before, position, 0)
    return Runs(lax.cummax(change, axis=1), segment_ids >= 0)


def tokens_of_runs(runs: Runs) -> Tokens:
    """Tokens, all `(B, T)`, whose history is entry 0 of their row's, or 1: zeros."""
    owner = jnp.where(runs.start == 0, 0, 1)
    position = jnp.arange(runs.start.shape[1], dtype=jnp.int32) - runs.start
    return Tokens(owner, position, runs.real)


def last_runs(runs: Runs, state_len: int) -> Sequences:
    """The last run of real tokens of each row, as a sequence of the row's tokens.

    An empty one at position 0, with all its history, where a row is only padding.
    """
    batch, length = runs.start.shape
    position = jnp.arange(length, dtype=jnp.int32)
    end = jnp.max(jnp.where(runs.real, position + 1, 0), axis=1)
    last = jnp.maximum(end - 1, 0)[:, None]
    start = jnp.take_along_axis(runs.start, last, axis=1, mode="clip")[:, 0]
    start = jnp.where(end > 0, start, 0)
    history = jnp.where(start == 0, state_len, 0)
    slot, live = jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), bool)
    return Sequences(start, end - start, slot, history, live)


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


def final_states(x, initial_state, segment_ids, state_len: int):
    """What a continuation of each row's last run needs, `(B, state_len, D)`."""
    runs = runs_of(segment_ids, *x.shape[:2])
    return _final_states(x, x, initial_state, initial_state, runs, state_len)


def _final_states(x, wide_x, initial_state, wide, runs: Runs, state_len: int):
    dtype = x.dtype if initial_state is None else initial_state.dtype

    def of_row(x, wide_x, state, wide, last):
        length = last.length
        return slots_after(x[0], wide_x[0], state, wide, last, length, state_len, dtype)

    last = last_runs(runs, state_len)
    return row_by_row(of_row)(x, wide_x, initial_state, wide, last)
