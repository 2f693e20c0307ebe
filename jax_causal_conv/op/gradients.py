"""Reverse-mode rules of the ops, for every implementation but "xla".

XLA's own differentiation of `xla.py` is right too, in any mode and order; the rules
here are faster, and the only ones that Triton kernels can have. They keep the inputs
and the gathered history (W-1 rows a sequence), never the cache, so that a donated
cache can be updated in place.

Results are flat: the parts of the output (see `Columns`), then the states.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from . import dispatch, sharding, xla
from .checks import PAD_SLOT_ID
from .columns import ALL, Columns


class _Static(NamedTuple):
    """An op's static arguments; `option` is its own: pad slot, or length of a state."""

    implementation: str | None
    silu: bool
    columns: Columns
    option: int | None


def packed(implementation, *args, silu: bool, pad_slot_id: int, columns: Columns = ALL):
    """`causal_conv1d_fn` on checked arguments, differentiable."""
    static = _Static(implementation, silu, columns, pad_slot_id)
    function = _run_packed if implementation == "xla" else _packed
    return _on_mesh(function, static, True, args)


def update(implementation, *args, silu: bool, pad_slot_id: int, columns: Columns = ALL):
    """`causal_conv1d_update` on checked arguments, differentiable."""
    static = _Static(implementation, silu, columns, pad_slot_id)
    function = _run_update if implementation == "xla" else _update
    return _on_mesh(function, static, True, args)


def dense(
    implementation, *args, silu: bool, state_len: int | None, columns: Columns = ALL
):
    """`causal_conv1d` on checked arguments, differentiable.

    `state_len` None is without a final state.
    """
    static = _Static(implementation, silu, columns, state_len)
    function = _run_dense if implementation == "xla" else _dense
    return _on_mesh(function, static, state_len is not None, args)


def _on_mesh(function, static, with_states, args):
    args = jax.tree.map(jnp.asarray, args)
    function = functools.partial(function, static)
    return sharding.on_mesh(function, static.columns, with_states, *args)


def _run_packed(static, *args):
    return _run("packed", static, *args, pad_slot_id=static.option)


def _run_update(static, *args):
    return _run("update", static, *args, pad_slot_id=static.option)


def _run_dense(static, *args):
    return _run("dense", static, *args, state_len=static.option)


def _run(op, static, *args, **options):
    options.update(silu=static.silu, columns=static.columns)
    return dispatch.run(op, static.implementation, *args, **options)


def _run_backward(op, static, x, weight, bias, history, dy, *rest):
    """Cotangents of x, weight, bias and history, from those of the parts."""
    columns = static.columns
    args = (x, weight, bias, history, columns.output(dy), *rest)
    dx, dweight, dbias, dhistory = _run(op, static, *args)
    dweight = dweight.astype(weight.dtype)
    dbias = None if bias is None else dbias.astype(bias.dtype)
    return columns.widen(dx, x.shape[-1]), dweight, dbias, dhistory


_packed = jax.custom_vjp(_run_packed, nondiff_argnums=(0,))
_update = jax.custom_vjp(_run_update, nondiff_argnums=(0,))
_dense = jax.custom_vjp(_run_dense, nondiff_argnums=(0,))


def _keep_before_update(history, states):
    """Orders the gather of `history` before an in-place update of `states`."""
    return jax.lax.optimization_barrier((history, states))


def _state_cotangent(dstates, dslots, dhistory, seqs: xla.Sequences, source):
    """The cotangent of a cache, from that of the updated cache.

    Args:
        dstates: `(S, L, D)` cotangent of the updated cache.
        dslots: `(N, L, D)` cotangent of each live sequence's old slot through the rows
            that survived in it.
        dhistory: `(N, W-1, D)` the same through the convolution.
        seqs: the sequences.
        source: `(N, W-1)` the row of the slot that each history row was; out of
            bounds where it was none.
    """
    row = jnp.arange(dslots.shape[0])[:, None]
    dtype = jnp.promote_types(dslots.dtype, dhistory.dtype)
    dslots = dslots.astype(dtype).at[row, source].add(dhistory, mode="drop")
    slot = jnp.where(seqs.live, seqs.slot, dstates.shape[0])
    rows = dslots.astype(dstates.dtype)
    return dstates.at[slot].set(rows, mode="drop", unique_indices=True)


def _slots_of(dstates, seqs: xla.Sequences):
    rows = dstates.at[seqs.slot].get(mode="clip")
    return jnp.where(seqs.live[:, None, None], rows, 0)


def _shifted(dslots, seqs: xla.Sequences):
    """Cotangent of old slot rows through `xla.slots_after`: row m went to row l."""
    state_len = dslots.shape[1]
    old = jnp.arange(state_len)
    row = old - seqs.history[:, None] + state_len - seqs.length[:, None]
    moved = jnp.take_along_axis(dslots, jnp.maximum(row, 0)[..., None], axis=1)
    kept = (row >= 0) & (old < seqs.history[:, None])
    return jnp.where(kept[..., None], moved, 0)


def _history_rows(seqs: xla.Sequences, count: int, state_len: int):
    """The slot row of each history row; out of bounds where there is none."""
    row = seqs.history[:, None] - count + jnp.arange(count)
    return jnp.where(row >= 0, row, state_len)


def _packed_sequences(static, x, states, offsets, slots, has_initial_state, rejected):
    offsets = xla.sanitize_offsets(offsets, x.shape[0])
    return xla.sequences(
        offsets, slots, has_initial_state, rejected, states.shape, static.option
    )


def _packed_fwd(static, x, weight, bias, states, *rest):
    *index, metadata = rest
    seqs = _packed_sequences(static, x, states, *index)
    wide = xla.wide_slots(states, seqs, states.dtype)  # as stored
    history = xla.history_before(states, wide, seqs, weight.shape[1] - 1)
    history, states = _keep_before_update(history, states)
    results = _run_packed(static, x, weight, bias, states, *index, metadata)
    return results, (x, weight, bias, history, seqs, index[0], metadata)


def _packed_bwd(static, residuals, cotangents):
    x, weight, bias, history, seqs, offsets, metadata = residuals
    *dy, dstates = cotangents
    dslots = _slots_of(dstates, seqs)
    dx, dweight, dbias, dhistory = _run_backward(
        "packed_backward",
        static,
        x,
        weight,
        bias,
        history,
        dy,
        dslots,
        offsets,
        seqs.live,
        metadata,
    )
    dstates = _state_cotangent(
        dstates,
        _shifted(dslots, seqs),
        dhistory,
        seqs,
        _history_rows(seqs, history.shape[1], dslots.shape[1]),
    )
    return dx, dweight, dbias, dstates, None, None, None, None, None


_packed.defvjp(_packed_fwd, _packed_bwd)


def _update_history(count, query, pad_slot_id, state, cursor, slots, rejected):
    """The sequences of an update, their ring positions, and history as stored."""
    offsets = jnp.arange(slots.shape[0] + 1, dtype=jnp.int32) * query
    seqs = xla.sequences(offsets, slots, True, rejected, state.shape, pad_slot_id)
    wide = xla.wide_slots(state, seqs, state.dtype)
    if cursor is None:
        return seqs, cursor, xla.history_before(state, wide, seqs, count)
    cursor = jnp.mod(cursor, state.shape[1])
    return seqs, cursor, xla.ring_before(state, wide, seqs, cursor, count)


def _update_fwd(static, x, weight, bias, state, cursor, slots, rejected):
    (batch, query, _), pad_slot_id = x.shape, static.option
    own = xla.own_slots(slots, batch, state.shape[0], pad_slot_id)
    gather = functools.partial(_update_history, weight.shape[1] - 1, query)
    if own is not None:
        seqs, place, history = xla.row_by_row(functools.partial(gather, PAD_SLOT_ID))(
            state, cursor, own, rejected
        )
    else:
        numbers = jnp.arange(batch, dtype=jnp.int32) if slots is None else slots
        seqs, place, history = gather(pad_slot_id, state, cursor, numbers, rejected)
    history, state = _keep_before_update(history, state)
    results = _run_update(static, x, weight, bias, state, cursor, slots, rejected)
    return results, (x, weight, bias, history, seqs, place, slots)


def _update_bwd(static, residuals, cotangents):
    x, weight, bias, history, seqs, cursor, slots = residuals
    *dy, dstate = cotangents
    (batch, query, _), state_len, count = x.shape, dstate.shape[1], history.shape[1]
    own = slots is None and batch == dstate.shape[0]
    by_row = xla.row_by_row if own else lambda function: function
    dslots = by_row(_slots_of)(dstate, seqs)
    if cursor is None:
        into_tokens, through = dslots, _shifted(dslots, seqs)
        source = _history_rows(seqs, count, state_len)
    else:
        # Rows in the order of the tokens that were written to them, newest last.
        row = jnp.arange(state_len)
        order = jnp.mod(cursor[:, None] + query - state_len + row, state_len)
        into_tokens = jnp.take_along_axis(dslots, order[..., None], axis=1)
        written = jnp.mod(row - cursor[:, None], state_len) < query
        through = jnp.where(written[..., None], 0, dslots)
        source = jnp.mod(cursor[:, None] - count + jnp.arange(count), state_len)
    dx, dweight, dbias, dhistory = _run_backward(
        "rows_backward",
        static,
        x,
        weight,
        bias,
        history,
        dy,
        into_tokens,
        seqs.live,
        None,
    )
    dstate = by_row(_state_cotangent)(dstate, through, dhistory, seqs, source)
    return dx, dweight, dbias, dstate, None, None, None


_update.defvjp(_update_fwd, _update_bwd)


def _dense_fwd(static, *args):
    return _run_dense(static, *args), args


def _dense_bwd(static, residuals, cotangents):
    x, weight, bias, initial_state, segment_ids = residuals
    parts = static.columns.num_parts
    dy, dfinal = cotangents[:parts], (*cotangents[parts:], None)[0]
    if dfinal is not None and dfinal.shape[1] == 0:  # W = 1
        dfinal = None
    (batch, length, _), (dim, width) = x.shape, weight.shape
    count = width - 1
    if initial_state is None:
        history = jnp.zeros((batch, count, dim), x.dtype)
    else:
        history = initial_state[:, initial_state.shape[1] - count :]
    dx, dweight, dbias, dhistory = _run_backward(
        "rows_backward",
        static,
        x,
        weight,
        bias,
        history,
        dy,
        dfinal,
        None,
        segment_ids,
    )
    dinitial = None
    if initial_state is not None:
        unread = initial_state.shape[1] - count
        dinitial = jnp.pad(dhistory, ((0, 0), (unread, 0), (0, 0)))
        if dfinal is not None:
            runs = xla.runs_of(segment_ids, batch, length)
            last = xla.last_runs(runs, initial_state.shape[1])
            dinitial = dinitial + _shifted(dfinal.astype(dhistory.dtype), last)
        dinitial = dinitial.astype(initial_state.dtype)
    return dx, dweight, dbias, dinitial, None


_dense.defvjp(_dense_fwd, _dense_bwd)
