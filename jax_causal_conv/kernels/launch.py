"""From an op's arrays to its kernels: grids, records, and what is made of the results.

Each function has an op's name. It yields launches, is sent their results, and returns
those of the op; `record.run` drives it.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..batch import last_runs, runs_of
from ..chunks import ConvMetadata, chunk_metadata
from ..columns import Columns
from ..operands import (
    ConvSpec,
    DenseOperands,
    PackedBackwardOperands,
    PackedOperands,
    RowsBackwardOperands,
    UpdateOperands,
)
from ..slots import final_states
from . import tiles as choice
from .backward import (
    BackwardOutputs,
    PackedBackwardInputs,
    RowsBackwardInputs,
    packed_backward_kernel,
    rows_backward_kernel,
)
from .constants import Constants
from .dense import DenseInputs, DenseOutputs, dense_kernel
from .packed import PackedInputs, PackedOutputs, packed_kernel
from .record import Launch, Launches
from .tiles import Tiles
from .update import UpdateInputs, UpdateOutputs, update_kernel

# An output of more parts is one array to the kernels, and is cut or joined outside:
# each part costs a pointer, and a choice in each program.
_MAX_PARTS = 4

Arrays = tuple[jax.Array, ...]


@dataclass(frozen=True)
class _Layout:
    """Where channels lie in memory, as the kernels see it.

    Attributes:
        sizes: channels of the parts of the output: at most _MAX_PARTS.
        width: elements of a row of x.
        offset: the first of them that is a channel.
        dtype: of x.
        taps: W.
        dilation: tokens from one tap to the next.
    """

    sizes: tuple[int, ...]
    width: int
    offset: int
    dtype: Any
    taps: int
    dilation: int

    @classmethod
    def of(cls, spec: ConvSpec, x: Any, weight: Any) -> "_Layout":
        dim, taps = weight.shape
        sizes, offset = spec.columns.sizes(dim), spec.columns.offset or 0
        if len(sizes) > _MAX_PARTS:
            sizes = (dim,)
        return cls(sizes, x.shape[-1], offset, x.dtype, taps, spec.dilation)

    @property
    def alignment(self) -> int:
        """Elements that divide where rows and parts begin."""
        return math.gcd(self.width, self.offset, *self.sizes)

    @property
    def in_pairs(self) -> bool:
        """Are two neighbouring channels one word, to be widened together?"""
        return self.dtype == jnp.bfloat16 and self.alignment % 2 == 0

    @property
    def filters(self) -> choice.Filters:
        """What tiles are chosen by."""
        return choice.Filters(
            max(self.sizes),
            self.taps,
            self.dtype.itemsize,
            self.alignment,
            self.dilation,
        )

    def constants(self, spec: ConvSpec, tiles: Tiles, **more: Any) -> Constants:
        """The constants that all kernels have, and `more`."""
        return Constants(
            W=self.taps,
            D=sum(self.sizes),
            X=self.width,
            OFFSET=self.offset,
            SPLIT=self.sizes,
            COL_BLOCKS=sum(-(-size // tiles.block_n) for size in self.sizes),
            BLOCK_N=tiles.block_n,
            GROUP=tiles.group,
            WARPS=tiles.num_warps,
            PAIRS=self.in_pairs,
            ACTIVATION=spec.activation,
            DILATION=spec.dilation,
            RESIDUAL=spec.residual,
            AHEAD=tiles.ahead,
            **more,
        )

    def parts(self, x: Any) -> tuple:
        """Shapes and dtypes of the output's parts."""
        rows = x.shape[:-1]
        return tuple(jax.ShapeDtypeStruct((*rows, n), x.dtype) for n in self.sizes)

    def cotangents(self, dy: Arrays, columns: Columns) -> Arrays:
        """The parts of dy, as the kernels see them."""
        return dy if len(dy) == len(self.sizes) else (columns.joined(dy),)


def packed(
    spec: ConvSpec, operands: PackedOperands, tiles: Tiles | None = None
) -> Launches[Arrays]:
    """The packed forward kernel; returns the parts of the output, then the states."""
    x, states = operands.x, operands.states
    num_tokens, num_seqs = x.shape[0], operands.query_start_loc.shape[0] - 1
    layout = _Layout.of(spec, x, operands.weight)
    state_len, batch = states.shape[1], (num_tokens, num_seqs)
    if operands.metadata is not None:
        block_m = operands.metadata.block_m
        default = choice.packed_chunks(layout.filters, state_len, *batch, block_m)
    else:
        default = choice.packed(layout.filters, state_len, *batch)
    tiles = tiles or default
    table = _table(operands, num_tokens, tiles.block_m)
    constants = layout.constants(
        spec,
        tiles,
        SCAN=choice.scan(num_seqs),
        **_slot_constants(spec, operands, tiles),
    )
    *out, states = yield Launch(
        packed_kernel,
        PackedInputs(
            x=x,
            weight=operands.weight,
            bias=operands.bias,
            states=states,
            query_start_loc=operands.query_start_loc,
            slots=operands.slots,
            has_initial_state=operands.has_initial_state,
            num_rejected=operands.num_rejected,
            write_slots=operands.write_slots,
            snapshot_slots=operands.snapshot_slots,
            snapshot_ends=operands.snapshot_ends,
            chunk_seq=table.chunk_seq,
            chunk_offset=table.chunk_offset,
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            num_slots=states.shape[0],
            block_m=table.block_m,
        ),
        PackedOutputs(layout.parts(x)),
        grid=table.chunk_seq.shape[0] * constants.COL_BLOCKS,
        num_warps=tiles.num_warps,
        constants=constants,
        in_place=("states",),
    )
    return *_apart(out, spec.columns), states


def update(
    spec: ConvSpec, operands: UpdateOperands, tiles: Tiles | None = None
) -> Launches[Arrays]:
    """The decode kernel; returns the parts of the output, then the states."""
    x, states = operands.x, operands.states
    batch, num_tokens, _ = x.shape
    layout = _Layout.of(spec, x, operands.weight)
    tiles = tiles or choice.update(layout.filters, states.shape[1], num_tokens, batch)
    constants = layout.constants(
        spec, tiles, Q=num_tokens, **_slot_constants(spec, operands, tiles)
    )
    *out, states = yield Launch(
        update_kernel,
        UpdateInputs(*operands, num_slots=states.shape[0]),
        UpdateOutputs(layout.parts(x)),
        grid=batch * constants.COL_BLOCKS,
        num_warps=tiles.num_warps,
        constants=constants,
        in_place=("states",),
    )
    return *_apart(out, spec.columns), states


def dense(
    spec: ConvSpec, operands: DenseOperands, tiles: Tiles | None = None
) -> Launches[Arrays]:
    """The dense forward kernel; returns the parts of the output.

    Behind them stands the final state, if one is wanted; XLA gathers it from x.
    """
    x, weight, states = operands.x, operands.weight, operands.states
    batch, length, _ = x.shape
    layout = _Layout.of(spec, x, weight)
    tiles = tiles or choice.dense(layout.filters, batch, length)
    chunks = -(-length // tiles.block_m)
    constants = layout.constants(
        spec, tiles, L=0 if states is None else states.shape[1]
    )
    out = yield Launch(
        dense_kernel,
        DenseInputs(
            *operands._replace(segment_ids=_segments(spec, operands)),
            row_len=length,
            chunks=chunks,
            block_m=tiles.block_m,
        ),
        DenseOutputs(layout.parts(x)),
        grid=batch * chunks * constants.COL_BLOCKS,
        num_warps=tiles.num_warps,
        constants=constants,
    )
    parts = _apart(out, spec.columns)
    if spec.final_state_len is None:
        return parts
    x = spec.columns.of(x, weight.shape[0])
    ids = operands.segment_ids
    return *parts, final_states(x, states, ids, spec.final_state_len)


def packed_backward(
    spec: ConvSpec, operands: PackedBackwardOperands, tiles: Tiles | None = None
) -> Launches[Arrays]:
    """The packed backward kernel; returns dx, dweight, dbias and dhistory."""
    x, weight, live = operands.x, operands.weight, operands.live
    num_tokens, num_seqs = x.shape[0], live.shape[0]
    layout = _Layout.of(spec, x, weight)
    if tiles is None:
        if operands.metadata is not None:
            block_m = operands.metadata.block_m
        else:
            block_m = choice.packed_block_m(layout.filters, num_tokens, num_seqs)
        tiles = choice.packed_backward(layout.filters, block_m)
    table = _table(operands, num_tokens, tiles.block_m)
    programs = table.chunk_seq.shape[0]
    constants = layout.constants(
        spec, tiles, L=_rows_of(operands.dslots), SCAN=choice.scan(num_seqs)
    )
    history = _some_rows(operands.history)
    dx, dhistory, partial = yield Launch(
        packed_backward_kernel,
        PackedBackwardInputs(
            x=x,
            weight=weight,
            bias=operands.bias,
            history=history,
            dy=layout.cotangents(operands.dy, spec.columns),
            dslots=operands.dslots,
            query_start_loc=operands.query_start_loc,
            live=live.astype(jnp.int32),
            chunk_seq=table.chunk_seq,
            chunk_offset=table.chunk_offset,
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            block_m=table.block_m,
        ),
        _gradient_shapes(operands, history, programs),
        grid=programs * constants.COL_BLOCKS,
        num_warps=tiles.num_warps,
        constants=constants,
    )
    dhistory = dhistory[:, : spec.reach(layout.taps)]
    dhistory = jnp.where(live[:, None, None], dhistory, 0)
    return dx, *_dweight_and_dbias(partial), dhistory


def rows_backward(
    spec: ConvSpec, operands: RowsBackwardOperands, tiles: Tiles | None = None
) -> Launches[Arrays]:
    """The backward kernel of rows; returns dx, dweight, dbias and dhistory."""
    x, weight, dslots = operands.x, operands.weight, operands.dslots
    live, segment_ids = operands.live, operands.segment_ids
    batch, length, _ = x.shape
    layout = _Layout.of(spec, x, weight)
    tiles = tiles or choice.rows_backward(
        layout.filters,
        weight.shape[0],
        batch,
        length,
        plain=segment_ids is None and dslots is None and layout.in_pairs,
    )
    chunks = -(-length // tiles.block_m)
    constants = layout.constants(spec, tiles, L=_rows_of(dslots))
    state_start = state_end = None
    if segment_ids is not None and dslots is not None:
        last = last_runs(runs_of(segment_ids, batch, length), 0)
        state_start, state_end = last.start, last.start + last.length
    history = _some_rows(operands.history)
    dx, dhistory, partial = yield Launch(
        rows_backward_kernel,
        RowsBackwardInputs(
            x=x,
            weight=weight,
            bias=operands.bias,
            history=history,
            dy=layout.cotangents(operands.dy, spec.columns),
            dslots=dslots,
            live=None if live is None else live.astype(jnp.int32),
            segment_ids=_segments(spec, operands),
            state_start=state_start,
            state_end=state_end,
            row_len=length,
            chunks=chunks,
            block_m=tiles.block_m,
        ),
        _gradient_shapes(operands, history, batch * chunks),
        grid=batch * chunks * constants.COL_BLOCKS,
        num_warps=tiles.num_warps,
        constants=constants,
    )
    dhistory = dhistory[:, : spec.reach(layout.taps)]
    return dx, *_dweight_and_dbias(partial), dhistory


def _table(
    operands: PackedOperands | PackedBackwardOperands, num_tokens: int, block_m: int
) -> ConvMetadata:
    """The caller's metadata as arrays of jax; if there is none, that of the batch."""
    table = operands.metadata
    if table is None:
        table = chunk_metadata(operands.query_start_loc, num_tokens, block_m)
    return jax.tree.map(jnp.asarray, table)


def _slot_constants(
    spec: ConvSpec, operands: PackedOperands | UpdateOperands, tiles: Tiles
) -> dict[str, Any]:
    """What is static about the slots of a forward kernel."""
    x, weight, states = operands.x, operands.weight, operands.states
    # A program holds the rows that it met as float32. float32 and bfloat16 come back
    # from there bit by bit, but a NaN in float16 may not.
    same_bits = x.dtype == states.dtype and x.dtype != jnp.float16
    one_state = getattr(operands, "snapshot_slots", None) is None
    return {
        "L": states.shape[1],
        "L_BLOCK": tiles.l_block,
        "SLOT_N": tiles.slot_n,
        "WINDOW_IS_SLOT": (
            same_bits
            and one_state
            and spec.dilation == 1
            and states.shape[1] == weight.shape[1] - 1
        ),
        "PAD_SLOT_ID": spec.pad_slot_id,
    }


def _apart(out: Any, columns: Columns) -> Arrays:
    """The parts, where the kernel wrote them as one array."""
    return tuple(out) if len(out) == columns.num_parts else columns.parts(out[0])


def _segments(
    spec: ConvSpec, operands: DenseOperands | RowsBackwardOperands
) -> jax.Array | None:
    """Segment ids as the kernels want them: with a dilation, other ones in each run."""
    ids = operands.segment_ids
    if ids is None or spec.dilation == 1:
        return ids
    runs = runs_of(ids, *ids.shape)
    return jnp.where(runs.real, runs.start, -1)


def _rows_of(dslots: Any) -> int:
    return 0 if dslots is None else dslots.shape[1]


def _some_rows(history: jax.Array) -> jax.Array:
    """The history; for W = 1, where it is empty, one row that no kernel reads."""
    if history.shape[1] == 0:
        return jnp.zeros((history.shape[0], 1, history.shape[2]), history.dtype)
    return history


def _gradient_shapes(
    operands: PackedBackwardOperands | RowsBackwardOperands, history: Any, programs: int
) -> BackwardOutputs:
    dim, width = operands.weight.shape
    x, float32 = operands.x, jnp.float32
    return BackwardOutputs(
        dx=jax.ShapeDtypeStruct((*x.shape[:-1], dim), x.dtype),
        dhistory=jax.ShapeDtypeStruct(history.shape, float32),
        partial=jax.ShapeDtypeStruct((programs, width + 1, dim), float32),
    )


def _dweight_and_dbias(partial: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Dweight `(D, W)` and dbias `(D,)`: all chunks' sums, added in a fixed order."""
    sums = partial.sum(axis=0)
    return sums[:-1].T, sums[-1]
