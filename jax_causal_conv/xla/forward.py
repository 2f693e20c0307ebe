"""The forward ops in XLA.

Everything is a gather of rows: token p of a sequence needs rows p-1 … p-(W-1) of x (in
steps of the dilation), or, before the sequence's first token, rows of its history. A
select picks one of the two, so that what a token must not see is never multiplied with
anything. The loop over taps is static and XLA fuses it into one pass over the output.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ..batch import (
    Sequences,
    Stores,
    Tokens,
    accumulator,
    row_by_row,
    runs_of,
    sanitize_offsets,
    sequences,
    slots_one_by_one,
    stores_of,
    take_rows,
    tokens_of,
    tokens_of_runs,
)
from ..columns import Columns
from ..compat import CPU_LOOPS_UPDATE_IN_PLACE
from ..operands import (
    PAD_SLOT_ID,
    ConvSpec,
    DenseOperands,
    PackedOperands,
    UpdateOperands,
)
from ..slots import (
    differentiate_as,
    final_states_of,
    history_before,
    read_before,
    ring_before,
    slot_rows,
    slots_after,
    store_rows,
    token_rows,
    wide_slots,
)
from .activations import ACTIVATIONS


def taps_of(spec: ConvSpec, x, history, tokens: Tokens, width: int):
    """Yields what each filter tap meets, newest first: W arrays `(T, D)`.

    x and history are of the accumulator's dtype; tokens that are not live meet zeros.
    """
    token = jnp.arange(x.shape[0], dtype=jnp.int32)
    for k in range(width):
        back = spec.reach(k + 1)
        tap = take_rows(x, jnp.maximum(token - back, 0))
        if back:
            row = spec.reach(width) + tokens.position - back
            old = take_rows(history, tokens.owner, jnp.maximum(row, 0))
            tap = jnp.where((tokens.position >= back)[:, None], tap, old)
        yield jnp.where(tokens.live[:, None], tap, 0)


def _convolve(spec: ConvSpec, x, weight, bias, history, tokens: Tokens):
    """`act(bias + Σ w·u)` for each row of x `(T, D)`; zeros where not live.

    x, history and the result are of the accumulator's dtype.
    """
    width = weight.shape[1]
    # The barrier makes each tap a vector before the loop over tokens. Inside the loop
    # XLA:CPU would gather and convert the W neighbouring numbers again for each output.
    filter_taps = lax.optimization_barrier(
        [weight[:, k].astype(x.dtype) for k in range(width)]
    )
    acc = jnp.zeros(x.shape, x.dtype) if bias is None else bias.astype(x.dtype)
    for k, tap in enumerate(taps_of(spec, x, history, tokens, width)):
        acc = acc + tap * filter_taps[width - 1 - k]
    out = ACTIVATIONS[spec.activation].of(acc)
    if spec.residual:
        out = out + x
    return jnp.where(tokens.live[:, None], out, 0)


def _convolve_parts(spec: ConvSpec, x, filters, history, tokens: Tokens, dtype):
    """The parts of the output, rounded to `dtype`, each by a loop of its own.

    Cutting one result apart is slower: XLA:CPU then loses its vectorised loop, or
    copies. `filters` are weight and bias.
    """
    columns, (weight, bias) = spec.columns, filters
    each = zip(
        columns.parts(x),
        columns.parts(weight.T),
        [None] * columns.num_parts if bias is None else columns.parts(bias),
        columns.parts(history),
        strict=True,
    )
    return tuple(
        _convolve(spec, x, w.T, b, h, tokens).astype(dtype) for x, w, b, h in each
    )


class _SlotSources(NamedTuple):
    """What the new rows of slots come from.

    Attributes:
        states: `(S, L, D)` cache.
        x: rows of tokens as the op was given them, with all their columns.
        wide_x: `(T, D)`, the op's own columns in the accumulator's dtype.
        wide: `(N, L, D)`, each sequence's slot in the accumulator's dtype.
        stores: what goes where.
    """

    states: Any
    x: Any
    wide_x: Any
    wide: Any
    stores: tuple[Stores, ...]


def _advance(sources: _SlotSources, seqs: Sequences, columns: Columns, outputs_of):
    """Convolves, and stores the last inputs of live sequences.

    `outputs_of(states, wide, seqs)` are the parts of the output, given a cache, its
    sequences' slots in the accumulator's dtype, and which slot is whose.

    Returns:
        The parts of the output, then the states.
    """
    num_seqs, num_slots = seqs.slot.shape[0], sources.states.shape[0]
    # A batch of one row and one slot comes from `row_by_row`, which maps over many of
    # them; a loop inside each would only be in the way.
    looped = not num_seqs == num_slots == 1
    if not CPU_LOOPS_UPDATE_IN_PLACE:
        looped = looped and sources.states.dtype != jnp.bfloat16
    # Where a read before the loop would cost a copy of the cache, the loop keeps the
    # old slots, and the outputs are computed from these, after it.
    keeps_old = looped and not CPU_LOOPS_UPDATE_IN_PLACE
    scatter = functools.partial(_scatter_slots, seqs, columns, keeps_old)
    if not keeps_old:
        parts = outputs_of(sources.states, sources.wide, seqs)
        states, parts = read_before(sources.states, parts)
        sources = sources._replace(states=states)
    scattered, _ = scatter(*sources)
    if not looped:
        return *parts, scattered
    # On a CPU a loop that rolls one slot a trip spares an array of all new rows. On a
    # GPU it would be a chain of tiny kernels. Derivatives are those of the scatter.
    rolled, old_slots = lax.platform_dependent(
        *lax.stop_gradient(sources),
        cpu=functools.partial(_roll_slots, seqs, columns, keeps_old),
        default=scatter,
    )
    if keeps_old:
        of_old = seqs._replace(slot=jnp.arange(num_seqs, dtype=jnp.int32))
        parts = outputs_of(old_slots, sources.wide, of_old)
    return *parts, differentiate_as(rolled, scattered)


def _scatter_slots(seqs: Sequences, columns: Columns, keeps_old: bool, *sources):
    """The states with all that is stored, at once.

    Also, if `keeps_old`, each sequence's old slot, else None.
    """
    states, x, wide_x, wide, stores = sources
    state_len, dim = states.shape[1:]
    given = (columns.of(x, dim), wide_x), (states, wide), seqs, state_len, states.dtype
    rows = [slots_after(*given, length=store.end) for store in stores]
    old_slots = take_rows(states, seqs.slot) if keeps_old else None
    states, (rows, old_slots) = read_before(states, (rows, old_slots))
    row = jnp.arange(state_len, dtype=jnp.int32)
    for store, new in zip(stores, rows, strict=True):
        if seqs.slot.shape[0] == states.shape[0] == 1:
            # A row and its own slot, of which `row_by_row` makes all: XLA fuses a
            # select into one loop over them, but not a scatter.
            states = jnp.where(store.live[:, None, None], new, states)
        else:
            states = store_rows(states, store, row, new)
    return states, old_slots


def _bits(array):
    """An array as unsigned integers, whose loops XLA:CPU vectorises.

    Of bfloat16 it moves one number at a time.
    """
    return lax.bitcast_convert_type(array, f"uint{8 * array.dtype.itemsize}")


def _roll_slots(seqs: Sequences, columns: Columns, keeps_old: bool, *sources):
    """`_scatter_slots` by a loop over the sequences."""
    states, x, _, _, stores = sources
    num_seqs, (_, state_len, dim) = seqs.slot.shape[0], states.shape
    row = jnp.arange(state_len, dtype=jnp.int32)
    old_slots = states[:1].repeat(num_seqs, axis=0) if keeps_old else None

    def step(i, carry):
        states, old_slots = carry
        one, to = jax.tree.map(
            lambda a: lax.dynamic_slice_in_dim(a, i, 1), (seqs, stores)
        )
        # Not a slice, for which XLA gathers all of a cache whose slots are sharded.
        old = take_rows(states, one.slot)
        if keeps_old:
            old_slots = lax.dynamic_update_slice_in_dim(old_slots, old, i, 0)
            old = lax.dynamic_slice_in_dim(old_slots, i, 1)
        # The barrier has XLA copy bits, rather than bfloat16 that are bits to others.
        states, old = read_before(states, _bits(old))
        target, kept, writes = one.slot, old, []
        for store in to:
            # The last rows of the sequence that the slot has room for. The op's columns
            # are cut out of them here: out of x before the loop they would be a copy.
            token = one.start + store.end - state_len + row
            last = columns.of(take_rows(x, jnp.maximum(token, 0)), dim)
            last = _bits(last.astype(states.dtype))
            # In `last` the sequence ends at row L, in `old` its slot is number 0.
            here = one._replace(
                start=state_len - store.end, slot=jnp.zeros_like(one.slot)
            )
            new = slots_after(
                (last, last),
                (old, old),
                here,
                state_len,
                old.dtype,
                length=store.end,
            )
            # What is not stored is written by what stands there already: the slot that
            # was read, or, once a snapshot is stored, perhaps to that very slot, it.
            kept = jnp.where(store.live[:, None, None], new, kept)
            target = jnp.where(store.live, store.slot, target)
            writes.append((target[0], lax.bitcast_convert_type(kept, states.dtype)))
        if len(writes) > 1:
            states, writes = read_before(states, writes)
        for slot, rows in writes:
            states = lax.dynamic_update_slice_in_dim(states, rows, slot, 0)
        return states, old_slots

    # A single trip is no loop, which would wait for all that it carries. But a loop
    # keeps the old slots, where to read them before would cost a copy of the cache.
    if num_seqs == 1 and not keeps_old:
        return step(0, (states, old_slots))
    # The barrier hides the number from XLA, which would unroll a loop of one trip.
    trips = lax.optimization_barrier(jnp.int32(num_seqs))
    return lax.fori_loop(0, trips, step, (states, old_slots))


def packed(spec: ConvSpec, operands: PackedOperands) -> tuple[jax.Array, ...]:
    """`causal_conv1d_fn` on checked arguments; its metadata is not needed here."""
    x, weight, bias, states, *_ = operands
    num_tokens, (dim, width), state_len = x.shape[0], weight.shape, states.shape[1]
    seqs = sequences(
        sanitize_offsets(operands.query_start_loc, num_tokens),
        operands.slots,
        operands.has_initial_state,
        operands.num_rejected,
        states.shape,
        spec.pad_slot_id,
    )
    wide_x = spec.columns.of(x, dim).astype(accumulator(x))
    tokens = tokens_of(seqs, num_tokens)

    def outputs(history):
        return _convolve_parts(spec, wide_x, (weight, bias), history, tokens, x.dtype)

    if state_len == 0:  # W = 1
        return *outputs(jnp.zeros((seqs.slot.shape[0], 0, dim), wide_x.dtype)), states
    return _advance(
        _SlotSources(
            states,
            x,
            wide_x,
            wide_slots(states, seqs, wide_x.dtype),
            stores_of(seqs, operands, spec.pad_slot_id),
        ),
        seqs,
        spec.columns,
        lambda states, wide, seqs: outputs(
            history_before(states, wide, seqs, spec.reach(width))
        ),
    )


def update(spec: ConvSpec, operands: UpdateOperands) -> tuple[jax.Array, ...]:
    """`causal_conv1d_update` on checked arguments; x is `(B, Q, D)`."""
    slots = slots_one_by_one(operands, spec.pad_slot_id)
    if slots is None:
        return _update(spec, operands)
    weight, bias = operands.weight, operands.bias
    own = dataclasses.replace(spec, pad_slot_id=PAD_SLOT_ID)

    def of_row(row):
        return _update(own, row._replace(weight=weight, bias=bias))

    def apart(operands):
        rows = operands._replace(weight=None, bias=None, slots=slots)
        return row_by_row(of_row)(rows)

    if not (CPU_LOOPS_UPDATE_IN_PLACE and _one_cpu()):
        return apart(operands)
    # One CPU device has no mesh to divide the rows, so they may as well have slot
    # numbers: a loop that moves one slot a trip is faster there. (In a program that is
    # exported from there for several CPU devices, XLA gathers rows that are divided.)
    together = functools.partial(_update, spec)
    return lax.platform_dependent(operands, cpu=together, default=apart)


def _one_cpu() -> bool:
    try:
        return jax.device_count("cpu") == 1
    except RuntimeError:  # jax was told of other platforms alone
        return False


def _update(spec: ConvSpec, operands: UpdateOperands) -> tuple[jax.Array, ...]:
    x, weight, bias, states, *_ = operands
    (batch, query, _), (dim, width), state_len = x.shape, weight.shape, states.shape[1]
    flat = x.reshape(batch * query, -1)
    seqs = sequences(
        jnp.arange(batch + 1, dtype=jnp.int32) * query,
        operands.slots,
        True,
        operands.num_rejected,
        states.shape,
        spec.pad_slot_id,
    )
    owner, position = jnp.divmod(jnp.arange(batch * query, dtype=jnp.int32), query)
    tokens = Tokens(owner, position, take_rows(seqs.live, owner))
    wide_x = spec.columns.of(flat, dim).astype(accumulator(x))

    def outputs(history):
        parts = _convolve_parts(spec, wide_x, (weight, bias), history, tokens, x.dtype)
        return tuple(part.reshape(batch, query, -1) for part in parts)

    if state_len == 0:  # W = 1
        return *outputs(jnp.zeros((batch, 0, dim), wide_x.dtype)), states
    wide = wide_slots(states, seqs, wide_x.dtype)
    stores = stores_of(seqs, operands, spec.pad_slot_id)
    if operands.cache_seqlens is None:
        return _advance(
            _SlotSources(states, flat, wide_x, wide, stores),
            seqs,
            spec.columns,
            lambda states, wide, seqs: outputs(
                history_before(states, wide, seqs, spec.reach(width))
            ),
        )
    # Reduced before anything is added to it, so that no sum overflows.
    cursor = jnp.mod(operands.cache_seqlens, state_len)
    history = ring_before(states, wide, seqs, cursor, spec.reach(width))
    # Of more than L inputs only the last L are stored, so that none of the buffer's
    # rows is written twice.
    stored = jnp.arange(query - min(query, state_len), query)
    row = (cursor[:, None] + stored) % state_len
    token = jnp.arange(batch)[:, None] * query + stored
    rows = token_rows(spec.columns.of(flat, dim), wide_x, token, states.dtype)
    (store,), every = stores, jnp.arange(state_len, dtype=jnp.int32)
    if operands.write_slots is not None:  # the other rows come along
        old = slot_rows(
            states,
            wide,
            seqs,
            jnp.broadcast_to(every, (batch, state_len)),
            states.dtype,
        )
        rows = old.at[jnp.arange(batch)[:, None], row].set(rows, unique_indices=True)
        row = every
    states, (parts, rows) = read_before(states, (outputs(history), rows))
    return *parts, store_rows(states, store, row, rows)


def with_zeros(history):
    """Each row's two histories, `(B, 2, R, D)`; see `tokens_of_runs`."""
    return jnp.stack([history, jnp.zeros_like(history)], axis=1)


def dense(spec: ConvSpec, operands: DenseOperands) -> tuple[jax.Array, ...]:
    """`causal_conv1d` on checked arguments."""
    x, weight, bias, states, segment_ids = operands
    x = spec.columns.of(x, weight.shape[0])
    (batch, length, dim), dtype = x.shape, x.dtype
    reach = spec.reach(weight.shape[1])
    wide_x = x.astype(accumulator(x))
    if states is None:
        wide = None
        history = jnp.zeros((batch, reach, dim), wide_x.dtype)
    else:
        wide = states.astype(wide_x.dtype)
        history = wide[:, states.shape[1] - reach :]
    runs = runs_of(segment_ids, batch, length)

    def convolve_row(x, history, tokens):
        return _convolve_parts(spec, x, (weight, bias), history, tokens, dtype)

    parts = jax.vmap(convolve_row)(wide_x, with_zeros(history), tokens_of_runs(runs))
    if spec.final_state_len is None:
        return parts
    given = (x, wide_x), (states, wide)
    return *parts, final_states_of(*given, runs, spec.final_state_len)
