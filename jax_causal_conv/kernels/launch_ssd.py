"""Launches of the state-space duality: tables, grids, and what the kernels are given.

Each launcher yields its launches one after another, is sent the outputs of each, and
returns the op's results; see `record.run`.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..batch import first_after, runs_of, sanitize_offsets, sequences
from ..operands import SSDOperands, SSDPackedOperands, SSDSpec
from . import tiles
from .record import Launch, Launches
from .ssd_chunks import chunks_kernel
from .ssd_decode import decode_kernel
from .ssd_prepare import prepare_kernel
from .ssd_recent import recent_kernel
from .ssd_record import DECODE, SKIP, SsdConstants, SsdInputs, SsdOutputs
from .tiles import SsdTiles


class _Table(NamedTuple):
    """Who is served how, in the fields of `SsdInputs` of the same names."""

    offsets: Any
    role: Any
    prefills: Any
    chunks: Any
    stretches: Any


class _Prefills(NamedTuple):
    """Prefills one after another, all `(J,)`; behind the last their length is 0."""

    begin: Any
    length: Any
    slot: Any
    known: Any


def _cut(prefills: _Prefills, num_tokens: int, tile: SsdTiles):
    """`prefills`, `chunks` and `stretches` of `SsdInputs`.

    T // c + J chunks are always enough: a prefill of n tokens needs at most n // c + 1,
    and these terms add up to T // c at most. So with stretches.
    """
    limit = prefills.begin.shape[0]
    size = tile.chunk
    first, owner, place = _deal_out(prefills.length, size, num_tokens // size + limit)
    begin, length = (_take(a, owner) for a in (prefills.begin, prefills.length))
    offset = place * size
    count = jnp.where(owner < limit, jnp.minimum(length - offset, size), 0)
    chunks = jnp.stack([begin + offset, count], 1)
    stretches = None
    if tile.stretch:
        size *= tile.stretch
        _, owner, place = _deal_out(prefills.length, size, num_tokens // size + limit)
        exists = (owner < limit)[:, None]
        stretches = jnp.where(exists, jnp.stack([owner, place], 1), -1)
    return jnp.stack([*prefills, first], 1), chunks, stretches


def _deal_out(lengths: Any, size: int, pieces: int):
    """Pieces of `size` tokens for prefills of these lengths, consecutively.

    Returns:
        The first piece of each prefill `(J,)`; the prefill of each piece `(pieces,)`,
        J behind the last; and which one it is of the prefill.
    """
    counts = -(-lengths // size)
    end = jnp.cumsum(counts, dtype=jnp.int32)
    piece = jnp.arange(pieces, dtype=jnp.int32)
    owner = first_after(end, piece)
    first = end - counts
    return first, owner, piece - _take(first, owner)


def _take(values: Any, index: Any):
    return values.at[index].get(mode="clip")


def _packed_table(spec: SSDSpec, operands: SSDPackedOperands, tile: SsdTiles) -> _Table:
    """The table of a packed batch, which is the same in all layers of a step.

    It is made of operations that XLA knows, so that a program in which it stands once
    a layer computes it once.
    """
    num_tokens, limit = operands.x.shape[0], spec.max_prefills
    offsets = sanitize_offsets(operands.query_start_loc, num_tokens)
    shape = (operands.states.shape[0], 1)  # a state is like a history of one row
    seqs = sequences(
        offsets,
        operands.slots,
        operands.has_initial_state,
        None,
        shape,
        spec.pad_slot_id,
    )
    long = seqs.live & (seqs.length > 1 + operands.num_drafts)
    many = jnp.cumsum(long, dtype=jnp.int32)
    served = long & (many <= limit)
    role = jnp.where(seqs.live & ~long, DECODE, SKIP)
    role = jnp.where(served, many - 1, role)
    seq = first_after(many, jnp.arange(limit, dtype=jnp.int32))
    exists = seq < many.shape[0]
    prefills = _Prefills(
        _take(seqs.start, seq),
        jnp.where(exists, _take(seqs.length, seq), 0),
        _take(seqs.slot, seq),
        _take(seqs.history, seq),
    )
    prefills_of, chunks, stretches = _cut(prefills, num_tokens, tile)
    if _num_stores(operands):
        number = jnp.minimum(seq, many.shape[0] - 1)[:, None]
        prefills_of = jnp.concatenate([prefills_of, number], 1)
    return _Table(offsets, role, prefills_of, chunks, stretches)


def _num_stores(operands: SSDPackedOperands) -> int:
    """`SsdConstants.STORES`."""
    if operands.snapshot_slots is not None:
        return 2
    return int(operands.write_slots is not None or operands.num_drafts > 0)


def _dense_table(rows: int, length: int, tile: SsdTiles) -> _Table:
    """The table of rows of equal length, each of which is a prefill."""

    def deal_out(size: int):
        each = -(-length // size)
        return jnp.divmod(jnp.arange(rows * each, dtype=jnp.int32), each)

    row = jnp.arange(rows, dtype=jnp.int32)
    owner, place = deal_out(tile.chunk)
    offset = place * tile.chunk
    chunks = jnp.stack(
        [owner * length + offset, jnp.minimum(length - offset, tile.chunk)], 1
    )
    first = row * (chunks.shape[0] // rows)
    all_of, known = jnp.full_like(row, length), jnp.ones_like(row)
    prefills = jnp.stack([row * length, all_of, row, known, first], 1)
    stretches = None
    if tile.stretch:
        stretches = jnp.stack(deal_out(tile.chunk * tile.stretch), 1)
    return _Table(None, None, prefills, chunks, stretches)


def _constants(
    spec: SSDSpec, operands: SSDOperands | SSDPackedOperands, tile: SsdTiles
) -> SsdConstants:
    """What is static in all launches of a call."""
    x, D, states = operands.x, operands.D, operands.states
    (heads, dim), (groups, size) = x.shape[-2:], operands.B.shape[-2:]
    low, high = spec.dt_limit
    # A float32 is three terms of 8 bits; where a result is rounded to 16 bits in the
    # end, two have bits to spare.
    wide_state = states is None or states.dtype == jnp.float32
    return SsdConstants(
        H=heads,
        P=dim,
        G=groups,
        K=size,
        SOFTPLUS=spec.dt_softplus,
        LOW=low if spec.limits_dt and low != -math.inf else None,
        HIGH=high if spec.limits_dt and high != math.inf else None,
        D_BY_CHANNEL=D is not None and D.ndim == 2,
        PAD_SLOT_ID=spec.pad_slot_id,
        EXACT=spec.exact,
        Y_PARTS=(3 if x.dtype == jnp.float32 else 2) if spec.exact else 1,
        STATE_PARTS=(3 if wide_state else 2) if spec.exact else 1,
        CHUNK=tile.chunk,
        STRETCH=tile.stretch,
        SUM_BLOCK=tile.sum_block,
        SUMS=4 if x.dtype == jnp.bfloat16 else 5,
        P_BLOCK=tile.p_block,
        P_BLOCKS=-(-dim // tile.p_block),
        K_BLOCK=tile.k_block,
        H_BLOCK=tile.h_block,
        STAGES=tile.num_stages,
        STATE_STAGES=tile.state_stages,
        SCAN=tile.scan,
    )


def packed(
    spec: SSDSpec, operands: SSDPackedOperands, tile: SsdTiles | None = None
) -> Launches[tuple[jax.Array, ...]]:
    """Launches of `ssd_packed`: one for a batch without prefills, else two.

    One more renews what a cache with drafts knows of the last tokens.
    """
    x, states, size = operands.x, operands.states, operands.B.shape[-1]
    num_tokens, num_seqs = x.shape[0], operands.query_start_loc.shape[0] - 1
    inputs = SsdInputs(
        x=x,
        dt=operands.dt,
        A=operands.A,
        B=operands.B,
        C=operands.C,
        D=operands.D,
        dt_bias=operands.dt_bias,
        states=states,
        slots=operands.slots,
        known=operands.has_initial_state,
        write_slots=operands.write_slots,
        snapshot_slots=operands.snapshot_slots,
        snapshot_ends=operands.snapshot_ends,
        recent_x=operands.recent_x,
        recent_dt=operands.recent_dt,
        recent_B=operands.recent_B,
        rejected=operands.num_rejected,
        offsets=operands.query_start_loc,
        num_tokens=num_tokens,
        num_seqs=num_seqs,
        num_slots=states.shape[0],
    )
    outputs = SsdOutputs(y=jax.ShapeDtypeStruct(x.shape, x.dtype))
    if spec.max_prefills == 0 and operands.num_drafts:
        tile = tile or tiles.ssd_few_tokens(x.shape[1:], size, num_seqs)
    elif spec.max_prefills == 0:
        itemsize = states.dtype.itemsize
        tile = tile or tiles.ssd_decode(x.shape[1:], size, itemsize, num_seqs)
    else:
        itemsize, most = _itemsize(operands), spec.max_prefills
        tile = tile or tiles.ssd_chunks(x.shape[1:], size, itemsize, num_tokens, most)
        table = _packed_table(spec, operands, tile)
        inputs = _with_table(inputs, table)
    C = _constants(spec, operands, tile)
    C = dataclasses.replace(C, STORES=_num_stores(operands), DRAFTS=operands.num_drafts)
    if spec.max_prefills == 0:
        y, states = yield Launch(
            decode_kernel,
            inputs,
            outputs,
            grid=num_seqs * C.H * C.P_BLOCKS,
            num_warps=tile.num_warps,
            constants=C,
            in_place=("states",),
        )
    else:
        outputs = _intermediates(table, C)._replace(y=outputs.y)
        *left, states = yield Launch(
            prepare_kernel,
            inputs,
            outputs,
            grid=_prepare_grid(table, C) + num_seqs * C.H * C.P_BLOCKS,
            num_warps=tile.num_warps,
            constants=C,
            in_place=("states",),
        )
        y, states = yield Launch(
            chunks_kernel,
            _with_intermediates(inputs, outputs, left)._replace(states=states),
            SsdOutputs(),
            grid=_chunks_grid(table, C),
            num_warps=tile.num_warps,
            older_num_warps=tile.older_num_warps,
            constants=dataclasses.replace(C, IN_PLACE=True),
            in_place=("y", "states"),
        )
    if not operands.num_drafts:
        return y, states
    columns, widest = tiles.ssd_recent(operands.num_drafts), max(C.H * C.P, C.G * C.K)
    recent = yield Launch(
        recent_kernel,
        # It takes the states as the other launches left them, so it runs last.
        inputs._replace(states=states),
        SsdOutputs(),
        grid=num_seqs * -(-widest // columns),
        num_warps=4,
        constants=dataclasses.replace(
            C,
            COLUMNS=columns,
            RECENT_BLOCK=tiles.power_of_two(operands.num_drafts),
        ),
        in_place=("recent_x", "recent_dt", "recent_B"),
    )
    return y, states, *recent


def dense(
    spec: SSDSpec, operands: SSDOperands, tile: SsdTiles | None = None
) -> Launches[tuple[jax.Array, ...]]:
    """Launches of `ssd`: two."""
    x, states = operands.x, operands.states
    (rows, length, heads, dim), size = x.shape, operands.B.shape[-1]
    tile = tile or tiles.ssd_chunks(
        (heads, dim), size, _itemsize(operands), rows * length, rows
    )
    C = _constants(spec, operands, tile)
    table = _dense_table(rows, length, tile)

    def of_tokens(array):
        return array.reshape(rows * length, *array.shape[2:])

    run_start = None
    if operands.segment_ids is not None:
        runs = runs_of(operands.segment_ids, rows, length)
        run_start = of_tokens(jnp.where(runs.real, runs.start, -1))
    inputs = SsdInputs(
        x=of_tokens(x),
        dt=of_tokens(operands.dt),
        A=operands.A,
        B=of_tokens(operands.B),
        C=of_tokens(operands.C),
        D=operands.D,
        dt_bias=operands.dt_bias,
        states=states,
        run_start=run_start,
        num_tokens=rows * length,
        num_seqs=rows,
        num_slots=rows,
    )
    inputs = _with_table(inputs, table)
    outputs = _intermediates(table, C)
    left = yield Launch(
        prepare_kernel,
        inputs,
        outputs,
        grid=_prepare_grid(table, C),
        num_warps=tile.num_warps,
        constants=C,
    )
    final = None
    if spec.final_state:
        dtype = jnp.float32 if states is None else states.dtype
        final = jax.ShapeDtypeStruct((rows, heads, dim, size), dtype)
    y, *final_states = yield Launch(
        chunks_kernel,
        _with_intermediates(inputs, outputs, left),
        SsdOutputs(y=jax.ShapeDtypeStruct(inputs.x.shape, x.dtype), states=final),
        grid=_chunks_grid(table, C),
        num_warps=tile.num_warps,
        older_num_warps=tile.older_num_warps,
        constants=C,
    )
    return y.reshape(x.shape), *final_states


def _itemsize(operands: SSDOperands | SSDPackedOperands) -> int:
    """Bytes of the widest elements of matrices."""
    return max(a.dtype.itemsize for a in (operands.x, operands.B, operands.C))


def _with_table(inputs: SsdInputs, table: _Table) -> SsdInputs:
    return inputs._replace(
        **table._asdict(),
        num_prefills=table.prefills.shape[0],
        num_chunks=table.chunks.shape[0],
        num_stretches=_count(table.stretches),
    )


def _count(rows: Any) -> int:
    return 0 if rows is None else rows.shape[0]


def _intermediates(table: _Table, C: SsdConstants) -> SsdOutputs:
    """What the first launch leaves to the second."""

    def floats(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    outputs = SsdOutputs(sums=floats(_count(table.chunks), C.H, C.SUMS, C.CHUNK))
    if table.stretches is None:
        return outputs
    stretches = _count(table.stretches)
    return outputs._replace(
        carried=floats(stretches, C.H, C.P, C.K),
        forget=floats(stretches, C.H),
        weights=floats(stretches, C.H * C.P_BLOCKS, C.STRETCH * C.CHUNK),
    )


def _with_intermediates(
    inputs: SsdInputs, outputs: SsdOutputs, arrays: Any
) -> SsdInputs:
    """The second launch's inputs: what the first has written, field by field."""
    written = [name for name, out in outputs._asdict().items() if out is not None]
    fields = dict(zip(written, arrays, strict=True))
    fields.pop("weights", None)  # the first launch's own
    return inputs._replace(**fields)


def _prepare_grid(table: _Table, C: SsdConstants) -> int:
    """Programs of stretches and of sums."""
    sums = _count(table.chunks) * -(-C.H // C.H_BLOCK)
    return _count(table.stretches) * C.H * C.P_BLOCKS + sums


def _chunks_grid(table: _Table, C: SsdConstants) -> int:
    pieces = table.prefills if table.stretches is None else table.stretches
    return _count(pieces) * C.H * C.P_BLOCKS
