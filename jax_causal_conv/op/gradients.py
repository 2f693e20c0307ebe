"""Reverse-mode rules of the ops, for every implementation but "xla".

XLA's own differentiation of `xla/forward.py` is right too, in any mode and order; the
rules here are faster, and the only ones that Triton kernels can have. Those of the conv
keep the inputs and the gathered history (as many rows a sequence as the filter reaches
back), never the cache, so that a donated cache can be updated in place. Those of the
SSD keep all operands.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..batch import (
    Sequences,
    Stores,
    accumulator,
    last_runs,
    row_by_row,
    runs_of,
    sanitize_offsets,
    sequences,
    slots_one_by_one,
    stores_of,
)
from ..operands import (
    PAD_SLOT_ID,
    DenseOperands,
    PackedBackwardOperands,
    PackedOperands,
    RowsBackwardOperands,
    SSDBackwardOperands,
    SSDOperands,
    UpdateOperands,
)
from ..promotion import promoting
from ..slots import history_before, read_before, ring_before, wide_slots
from ..xla.ssd import SSD_GRADIENTS
from . import forward_mode, primitive, sharding
from .ops import (
    DENSE,
    PACKED,
    PACKED_BACKWARD,
    ROWS_BACKWARD,
    SSD,
    SSD_BACKWARD,
    SSD_PACKED,
    SSD_REPLAY,
    UPDATE,
)
from .record import Op


def call(
    op: Op, implementation: str | None, spec: Any, operands: Any
) -> tuple[jax.Array, ...]:
    """A public op on checked operands, differentiable, on any mesh.

    Returns:
        The output, or its parts (see `Columns`), then the states if there are any.
    """
    operands = jax.tree.map(jnp.asarray, operands)
    if implementation == "xla":
        function: Callable = functools.partial(primitive.run, op, "xla", spec)
    else:
        function = functools.partial(_RULES[op], implementation, spec)
        operands = forward_mode.without(op, implementation, operands)
    return sharding.on_mesh(function, op, spec, operands)


def _conv_cotangents(implementation, spec, op: Op, operands):
    """Runs a backward op.

    Returns:
        The cotangents of x, weight and bias, in their dtypes and as a dict; and that of
        the history, in the accumulator's dtype.
    """
    x, weight, bias, *_ = operands
    # Only what the backward ops read, so that calls which differ in the rest are one.
    spec = dataclasses.replace(spec, pad_slot_id=PAD_SLOT_ID, final_state_len=None)
    dx, dweight, dbias, dhistory = primitive.run(op, implementation, spec, operands)
    gradients = {
        "x": spec.columns.widen(dx, x.shape[-1]),
        "weight": dweight.astype(weight.dtype),
        "bias": None if bias is None else dbias.astype(bias.dtype),
    }
    return gradients, dhistory


def _record_of_cotangents(operands, **gradients):
    """A record like `operands`, of the cotangents that there are, else None."""
    return type(operands)(*[None] * len(operands))._replace(**gradients)


def _state_cotangent(
    dstates, dslots, dhistory, seqs: Sequences, source, stores: tuple[Stores, ...] = ()
):
    """The cotangent of a cache, from that of the updated cache.

    Args:
        dstates: `(S, L, D)` cotangent of the updated cache.
        dslots: `(N, L, D)` cotangent of each live sequence's old slot through the rows
            that survived in it.
        dhistory: `(N, R, D)` the same through the convolution.
        seqs: the sequences.
        source: `(N, R)` the row of the slot that each history row was; out of
            bounds if it was a row of zeros.
        stores: what was written where; nothing stands for the slots of `seqs`.
    """
    row = jnp.arange(dslots.shape[0])[:, None]
    # By NumPy, since jax refuses where its users want strict promotion.
    dtype = np.promote_types(dslots.dtype, dhistory.dtype)
    dslots = dslots.astype(dtype).at[row, source].add(dhistory, mode="drop")
    slot = jnp.where(seqs.live, seqs.slot, dstates.shape[0])
    if not stores:
        rows = dslots.astype(dstates.dtype)
        return dstates.at[slot].set(rows, mode="drop", unique_indices=True)
    for store in stores:
        written = jnp.where(store.live, store.slot, dstates.shape[0])
        dstates = dstates.at[written].set(0, mode="drop", unique_indices=True)
    # Several sequences may have read one slot. Their cotangents are added in a fixed
    # order, that of a scan: a scatter may add them in any.
    order = jnp.argsort(slot, stable=True)
    slot, dslots = slot[order], dslots[order]

    def add(first, second):
        same = (first[0] == second[0])[:, None, None]
        return second[0], jnp.where(same, first[1], 0) + second[1]

    _, sums = jax.lax.associative_scan(add, (slot, dslots))
    last = jnp.append(slot[1:] != slot[:-1], True)
    old = dstates.at[slot].get(mode="clip").astype(dtype)
    rows = (old + sums).astype(dstates.dtype)
    slot = jnp.where(last, slot, dstates.shape[0])
    return dstates.at[slot].set(rows, mode="drop", unique_indices=True)


def _slots_of(dstates, store: Sequences | Stores):
    """The cotangent of each slot, zeros where they are not live."""
    rows = dstates.at[store.slot].get(mode="clip")
    return jnp.where(store.live[:, None, None], rows, 0)


def _through_roll(dslots, seqs: Sequences, end=None):
    """The cotangent of old slots, from that of what `slots_after` made of them.

    Of an old slot only the rows survive that have not moved out in front. `end` says
    after how many tokens; None is all.
    """
    state_len = dslots.shape[1]
    end = seqs.length if end is None else end
    old = jnp.arange(state_len)
    row = old - seqs.history[:, None] + state_len - end[:, None]
    moved = jnp.take_along_axis(
        dslots, jnp.maximum(row, 0)[..., None], axis=1, mode="clip"
    )
    kept = (row >= 0) & (old < seqs.history[:, None])
    return jnp.where(kept[..., None], moved, 0)


def _history_rows(seqs: Sequences, count: int, state_len: int):
    """The `source` that `_state_cotangent` wants, of slots that are no rings."""
    row = seqs.history[:, None] - count + jnp.arange(count)
    return jnp.where(row >= 0, row, state_len)


def _packed_forward(implementation, spec, operands: PackedOperands):
    states = operands.states
    seqs = sequences(
        sanitize_offsets(operands.query_start_loc, operands.x.shape[0]),
        operands.slots,
        operands.has_initial_state,
        operands.num_rejected,
        states.shape,
        spec.pad_slot_id,
    )
    wide = wide_slots(states, seqs, states.dtype)  # as stored
    history = history_before(states, wide, seqs, spec.reach(operands.weight.shape[1]))
    states, history = read_before(states, history)
    operands = operands._replace(states=states)
    results = primitive.run(PACKED, implementation, spec, operands)
    stores: tuple[Stores, ...] = ()
    if operands.write_slots is not None or operands.snapshot_slots is not None:
        stores = stores_of(seqs, operands, spec.pad_slot_id)
    return results, (operands._replace(states=None), history, seqs, stores)


def _packed_backward(implementation, spec, residuals, cotangents):
    operands, history, seqs, stores = residuals
    *dy, dstates = cotangents
    dslots = _slots_of(dstates, stores[-1] if stores else seqs)
    through = _through_roll(dslots, seqs)
    dsnapshots = snapshot_ends = None
    if len(stores) > 1:
        snapshot_ends = stores[0].end
        dsnapshots = _slots_of(dstates, stores[0])
        wide = accumulator(dstates)
        through = through.astype(wide)
        through += _through_roll(dsnapshots.astype(wide), seqs, snapshot_ends)
        implementation = "xla"
    gradients, dhistory = _conv_cotangents(
        implementation,
        spec,
        PACKED_BACKWARD,
        PackedBackwardOperands(
            operands.x,
            operands.weight,
            operands.bias,
            history=history,
            dy=tuple(dy),
            dslots=dslots,
            query_start_loc=operands.query_start_loc,
            live=seqs.live,
            metadata=operands.metadata,
            dsnapshots=dsnapshots,
            snapshot_ends=snapshot_ends,
        ),
    )
    dstates = _state_cotangent(
        dstates,
        through,
        dhistory,
        seqs,
        _history_rows(seqs, history.shape[1], dslots.shape[1]),
        stores,
    )
    return (_record_of_cotangents(operands, states=dstates, **gradients),)


def _update_history(count: int, query: int, pad_slot_id: int, operands: UpdateOperands):
    """What the gradient of an update has to keep of its states.

    Args:
        count: R, the filter's reach.
        query: Q.
        pad_slot_id: the slot number that means "skip".
        operands: their x and filter are not looked at; slots are given.

    Returns:
        The sequences, their positions in circular buffers or None, and their history
        `(B, R, D)` in the dtype of the states.
    """
    offsets = jnp.arange(operands.slots.shape[0] + 1, dtype=jnp.int32) * query
    states, cursor = operands.states, operands.cache_seqlens
    seqs = sequences(
        offsets, operands.slots, True, operands.num_rejected, states.shape, pad_slot_id
    )
    wide = wide_slots(states, seqs, states.dtype)
    if cursor is None:
        return seqs, cursor, history_before(states, wide, seqs, count)
    cursor = jnp.mod(cursor, states.shape[1])
    return seqs, cursor, ring_before(states, wide, seqs, cursor, count)


def _update_forward(implementation, spec, operands: UpdateOperands):
    (batch, query, _), states = operands.x.shape, operands.states
    slots = slots_one_by_one(operands, spec.pad_slot_id)
    reach = spec.reach(operands.weight.shape[1])
    gather = functools.partial(_update_history, reach, query)
    read = operands._replace(x=None, weight=None, bias=None)
    if slots is not None:
        of_row = row_by_row(functools.partial(gather, PAD_SLOT_ID))
        seqs, cursor, history = of_row(read._replace(slots=slots))
    else:
        if read.slots is None:
            read = read._replace(slots=jnp.arange(batch, dtype=jnp.int32))
        seqs, cursor, history = gather(spec.pad_slot_id, read)
    states, history = read_before(states, history)
    operands = operands._replace(states=states)
    results = primitive.run(UPDATE, implementation, spec, operands)
    stores: tuple[Stores, ...] = ()
    if operands.write_slots is not None:
        stores = stores_of(seqs, operands, spec.pad_slot_id)
    return results, (operands._replace(states=None), history, seqs, cursor, stores)


def _update_backward(implementation, spec, residuals, cotangents):
    operands, history, seqs, cursor, stores = residuals
    *dy, dstates = cotangents
    (batch, query, _), state_len = operands.x.shape, dstates.shape[1]
    count = history.shape[1]
    one_by_one = operands.slots is None and batch == dstates.shape[0] and not stores
    by_row = row_by_row if one_by_one else lambda function: function
    dslots = by_row(_slots_of)(dstates, stores[-1] if stores else seqs)
    if cursor is None:
        into_tokens, through = dslots, _through_roll(dslots, seqs)
        source = _history_rows(seqs, count, state_len)
    else:
        # Rows in the order of the tokens that were written to them, newest last.
        row = jnp.arange(state_len)
        order = jnp.mod(cursor[:, None] + query - state_len + row, state_len)
        into_tokens = jnp.take_along_axis(dslots, order[..., None], axis=1, mode="clip")
        written = jnp.mod(row - cursor[:, None], state_len) < query
        through = jnp.where(written[..., None], 0, dslots)
        source = jnp.mod(cursor[:, None] - count + jnp.arange(count), state_len)
    gradients, dhistory = _conv_cotangents(
        implementation,
        spec,
        ROWS_BACKWARD,
        RowsBackwardOperands(
            operands.x,
            operands.weight,
            operands.bias,
            history=history,
            dy=tuple(dy),
            dslots=into_tokens,
            live=seqs.live,
        ),
    )
    dstates = by_row(_state_cotangent)(dstates, through, dhistory, seqs, source, stores)
    return (_record_of_cotangents(operands, states=dstates, **gradients),)


def _dense_forward(implementation, spec, operands: DenseOperands):
    return primitive.run(DENSE, implementation, spec, operands), operands


def _dense_backward(implementation, spec, operands: DenseOperands, cotangents):
    x, weight, bias, states, segment_ids = operands
    parts = spec.columns.num_parts
    dy, dfinal = cotangents[:parts], (*cotangents[parts:], None)[0]
    if dfinal is not None and dfinal.shape[1] == 0:  # without rows, as for W = 1
        dfinal = None
    (batch, length, _), (dim, width) = x.shape, weight.shape
    count = spec.reach(width)
    if states is None:
        history = jnp.zeros((batch, count, dim), x.dtype)
    else:
        history = states[:, states.shape[1] - count :]
    gradients, dhistory = _conv_cotangents(
        implementation,
        spec,
        ROWS_BACKWARD,
        RowsBackwardOperands(
            x,
            weight,
            bias,
            history=history,
            dy=tuple(dy),
            dslots=dfinal,
            segment_ids=segment_ids,
        ),
    )
    dstates = None
    if states is not None:
        unread = states.shape[1] - count
        dstates = jnp.pad(dhistory, ((0, 0), (unread, 0), (0, 0)))
        if dfinal is not None:
            last = last_runs(runs_of(segment_ids, batch, length), states.shape[1])
            dstates = dstates + _through_roll(dfinal.astype(dhistory.dtype), last)
        dstates = dstates.astype(states.dtype)
    return (_record_of_cotangents(operands, states=dstates, **gradients),)


def _ssd_forward(implementation, spec, operands: SSDOperands):
    return primitive.run(SSD, implementation, spec, operands), operands


def _ssd_backward(implementation, spec, operands: SSDOperands, cotangents):
    """The gradients by the backward op, each in the dtype of its operand."""
    dy, dfinal = (*cotangents, None)[:2]
    given = SSDBackwardOperands(*operands, dy=dy, dfinal=dfinal)
    results = primitive.run(SSD_BACKWARD, implementation, spec, given)
    gradients = dict(zip(SSD_GRADIENTS, results, strict=False))
    if operands.D is not None and operands.D.ndim == 1:
        gradients["D"] = gradients["D"].sum(1)
    for name, gradient in gradients.items():
        operand = getattr(operands, name)
        gradients[name] = None if operand is None else gradient.astype(operand.dtype)
    return (_record_of_cotangents(operands, **gradients),)


def _through_xla(op: Op) -> tuple[Callable, Callable]:
    """The rule of an op without a backward op: XLA differentiates its implementation.

    Only the operands are kept; the backward pass runs the forward again, in XLA.
    """

    def forward(implementation, spec, operands):
        return primitive.run(op, implementation, spec, operands), operands

    def backward(implementation, spec, operands, cotangents):
        del implementation
        function = functools.partial(primitive.run, op, "xla", spec)
        _, pull_back = jax.vjp(function, operands)
        return pull_back(tuple(cotangents))

    return forward, backward


def _rule(op: Op, forward: Callable, backward: Callable) -> Callable:
    """The op as a function of implementation, spec and operands, with its rule."""
    function = jax.custom_vjp(
        functools.partial(primitive.run, op), nondiff_argnums=(0, 1)
    )
    function.defvjp(promoting(forward), promoting(backward))
    return function


_RULES = {
    PACKED: _rule(PACKED, _packed_forward, _packed_backward),
    UPDATE: _rule(UPDATE, _update_forward, _update_backward),
    DENSE: _rule(DENSE, _dense_forward, _dense_backward),
    SSD: _rule(SSD, _ssd_forward, _ssd_backward),
    SSD_PACKED: _rule(SSD_PACKED, *_through_xla(SSD_PACKED)),
    SSD_REPLAY: _rule(SSD_REPLAY, *_through_xla(SSD_REPLAY)),
}
