"""Grids and argument lists: from an op's arrays to a kernel call.

The functions here have the signature of their twins in `xla.py` plus `call`, which
runs a kernel: `bridge.call` for a chosen compute capability, or `interpreter.call`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from .. import xla
from ..columns import ALL, Columns, Output
from ..metadata import build_metadata
from . import tiles
from .backward import packed_backward_kernel, rows_backward_kernel
from .dense import dense_kernel
from .packed import packed_kernel
from .update import update_kernel

_MAX_PARTS = 4  # pointers of a kernel to the parts of its output


@dataclasses.dataclass(frozen=True)
class _Layout:
    """Where channels lie in memory, as the kernels see it.

    Attributes:
        sizes: channels of the parts of the output: at most _MAX_PARTS. What is split
            further is one array to the kernels, and cut or joined outside.
        width: elements of a row of x.
        offset: the first of them that is a channel.
    """

    sizes: tuple[int, ...]
    width: int
    offset: int

    @classmethod
    def of(cls, columns: Columns, x, weight) -> "_Layout":
        sizes = columns.sizes(weight.shape[0])
        if len(sizes) > _MAX_PARTS:
            sizes = weight.shape[:1]
        return cls(sizes, x.shape[-1], columns.offset or 0)

    @property
    def alignment(self) -> int:
        """Elements that divide where rows and parts begin."""
        return math.gcd(self.width, self.offset, *self.sizes)

    def tile(
        self,
        width: int,
        state_len: int,
        rows: int,
        itemsize: int,
        num_warps: int = 1,
    ) -> tiles.Tiles:
        """Tiles of a forward kernel."""
        return tiles.choose(
            max(self.sizes),
            width,
            state_len,
            rows,
            itemsize,
            self.alignment,
            num_warps,
        )

    def blocks(self, tile: tiles.Tiles) -> int:
        """Blocks of channels, none of which spans two parts."""
        return sum(-(-size // tile.block_n) for size in self.sizes)

    def outputs(self, x) -> list:
        """Shapes and dtypes of the parts."""
        rows = x.shape[:-1]
        return [jax.ShapeDtypeStruct((*rows, size), x.dtype) for size in self.sizes]

    def parts(self, dy: Output, columns: Columns) -> list:
        """_MAX_PARTS pointers for the cotangents of the parts."""
        parts = dy if isinstance(dy, tuple) else (dy,)
        if len(parts) != len(self.sizes):
            parts = (columns.joined(dy),)
        return [*parts, *[parts[0]] * (_MAX_PARTS - len(parts))]

    def in_pairs(self, x) -> bool:
        """Are two neighbouring channels one word, to be widened together?"""
        return x.dtype == jnp.bfloat16 and self.alignment % 2 == 0

    def constants(self, tile: tiles.Tiles, x) -> dict:
        return {
            "BLOCK_N": tile.block_n,
            "GROUP": tile.group,
            "PAIRS": self.in_pairs(x),
            "X": self.width,
            "OFFSET": self.offset,
            "SPLIT": self.sizes,
            "COL_BLOCKS": self.blocks(tile),
            "D": sum(self.sizes),
        }


def _apart(out, columns: Columns) -> tuple:
    """The parts, where the kernel wrote them as one array."""
    return tuple(out) if len(out) == columns.num_parts else columns.parts(out[0])


def _or(array, stand_in):
    """A kernel pointer for an absent argument, which the kernel never follows."""
    return stand_in if array is None else array


def packed(
    call,
    x,
    weight,
    bias,
    states,
    query_start_loc,
    slots,
    has_initial_state,
    num_rejected,
    metadata,
    *,
    silu: bool,
    pad_slot_id: int,
    columns: Columns = ALL,
):
    """Launches the packed forward kernel, see `xla.packed`."""
    num_tokens, width = x.shape[0], weight.shape[1]
    num_slots, state_len, _ = states.shape
    num_seqs = query_start_loc.shape[0] - 1
    metadata = _metadata_or_default(metadata, query_start_loc, num_tokens, width)
    layout = _Layout.of(columns, x, weight)
    if tiles.few_rows(num_tokens, num_seqs):
        tile = layout.tile(width, state_len, 1, x.dtype.itemsize, num_warps=2)
    else:
        tile = layout.tile(width, state_len, metadata.block_m, x.dtype.itemsize)
    chunk_seq = jnp.asarray(metadata.chunk_seq)
    arrays = [
        x,
        weight,
        _or(bias, weight),
        states,
        query_start_loc,
        _or(slots, query_start_loc),
        _or(has_initial_state, query_start_loc),
        _or(num_rejected, query_start_loc),
        chunk_seq,
        jnp.asarray(metadata.chunk_offset),
    ]
    *out, states = call(
        packed_kernel,
        arrays,
        [num_tokens, num_seqs, num_slots, metadata.block_m],
        layout.outputs(x),
        in_place=3,
        grid=chunk_seq.shape[0] * layout.blocks(tile),
        num_warps=tile.num_warps,
        constants=dict(
            W=width,
            L=state_len,
            PAD_SLOT_ID=pad_slot_id,
            SILU=silu,
            HAS_BIAS=bias is not None,
            HAS_SLOTS=slots is not None,
            HAS_INITIAL_STATE=has_initial_state is not None,
            HAS_REJECTED=num_rejected is not None,
            SCAN=tiles.scan(num_seqs),
            **layout.constants(tile, x),
            **_slot_constants(tile, x, weight, states),
        ),
    )
    return *_apart(out, columns), states


def update(
    call,
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
    """Launches the decode kernel, see `xla.update`."""
    (batch, query, _), width = x.shape, weight.shape[1]
    num_slots, state_len, _ = state.shape
    layout = _Layout.of(columns, x, weight)
    tile = layout.tile(width, state_len, query, x.dtype.itemsize)
    # A pointer of the right kind for absent indices.
    unused = next((a for a in (slots, cache_seqlens, num_rejected) if a is not None), x)
    *out, state = call(
        update_kernel,
        [
            x,
            weight,
            _or(bias, weight),
            state,
            _or(cache_seqlens, unused),
            _or(slots, unused),
            _or(num_rejected, unused),
        ],
        [num_slots],
        layout.outputs(x),
        in_place=3,
        grid=batch * layout.blocks(tile),
        num_warps=tile.num_warps,
        constants=dict(
            Q=query,
            W=width,
            L=state_len,
            PAD_SLOT_ID=pad_slot_id,
            SILU=silu,
            HAS_BIAS=bias is not None,
            CIRCULAR=cache_seqlens is not None,
            HAS_SLOTS=slots is not None,
            HAS_REJECTED=num_rejected is not None,
            **layout.constants(tile, x),
            **_slot_constants(tile, x, weight, state),
        ),
    )
    return *_apart(out, columns), state


def dense(
    call,
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
    """Launches the dense forward kernel, see `xla.dense`."""
    (batch, length, _), (dim, width) = x.shape, weight.shape
    block_m = max(tiles.default_block_m(batch * length, batch), width - 1)
    chunks = -(-length // block_m)
    layout = _Layout.of(columns, x, weight)
    tile = layout.tile(width, width - 1, block_m, x.dtype.itemsize)
    out = call(
        dense_kernel,
        [
            x,
            weight,
            _or(bias, weight),
            _or(initial_state, x),
            _or(segment_ids, x),
        ],
        [length, chunks, block_m],
        layout.outputs(x),
        grid=batch * chunks * layout.blocks(tile),
        num_warps=tile.num_warps,
        constants={
            "W": width,
            "L": 0 if initial_state is None else initial_state.shape[1],
            "SILU": silu,
            "HAS_BIAS": bias is not None,
            "HAS_INITIAL_STATE": initial_state is not None,
            "HAS_SEGMENTS": segment_ids is not None,
            **layout.constants(tile, x),
        },
    )
    parts = _apart(out, columns)
    if state_len is None:
        return parts
    x = columns.of(x, dim)
    return *parts, xla.final_states(x, initial_state, segment_ids, state_len)


def packed_backward(
    call,
    x,
    weight,
    bias,
    history,
    dy,
    dslots,
    query_start_loc,
    live,
    metadata,
    *,
    silu: bool,
    columns: Columns = ALL,
):
    """Launches the packed backward kernel, see `xla_backward.packed_backward`."""
    num_tokens, width = x.shape[0], weight.shape[1]
    num_seqs = live.shape[0]
    metadata = _metadata_or_default(metadata, query_start_loc, num_tokens, width)
    layout = _Layout.of(columns, x, weight)
    tile = tiles.choose_backward(max(layout.sizes), width, metadata.block_m)
    chunk_seq = jnp.asarray(metadata.chunk_seq)
    history, dhistory = _kernel_history(history)
    dx, dhistory, partial = call(
        packed_backward_kernel,
        [
            x,
            weight,
            _or(bias, weight),
            history,
            *layout.parts(dy, columns),
            _or(dslots, x),
            query_start_loc,
            live.astype(jnp.int32),
            chunk_seq,
            jnp.asarray(metadata.chunk_offset),
        ],
        [num_tokens, num_seqs, metadata.block_m],
        _gradient_shapes(x, weight, dhistory, chunk_seq.shape[0]),
        grid=chunk_seq.shape[0] * layout.blocks(tile),
        num_warps=tile.num_warps,
        constants={
            "SCAN": tiles.scan(num_seqs),
            **_backward_constants(layout, tile, x, weight, bias, dslots, silu),
        },
    )
    dhistory = jnp.where(live[:, None, None], dhistory[:, : width - 1], 0)
    return dx, *_filter_sums(partial), dhistory


def rows_backward(
    call,
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
    """Launches the backward kernel of rows, see `xla_backward.rows_backward`."""
    (batch, length, _), (dim, width) = x.shape, weight.shape
    layout = _Layout.of(columns, x, weight)
    plain = segment_ids is None and dslots is None
    tile = tiles.choose_backward(
        max(layout.sizes), width, length, spare_registers=plain and layout.in_pairs(x)
    )
    block_m = tiles.backward_block_m(batch * length, dim, tile.block_n)
    block_m = max(block_m, width - 1)
    chunks = -(-length // block_m)
    unused = weight  # a pointer that is never followed
    state_start = state_end = unused
    if segment_ids is not None and dslots is not None:
        last = xla.last_runs(xla.runs_of(segment_ids, batch, length), 0)
        state_start, state_end = last.start, last.start + last.length
    history, dhistory = _kernel_history(history)
    dx, dhistory, partial = call(
        rows_backward_kernel,
        [
            x,
            weight,
            _or(bias, weight),
            history,
            *layout.parts(dy, columns),
            _or(dslots, unused),
            unused if live is None else live.astype(jnp.int32),
            _or(segment_ids, unused),
            state_start,
            state_end,
        ],
        [length, chunks, block_m],
        _gradient_shapes(x, weight, dhistory, batch * chunks),
        grid=batch * chunks * layout.blocks(tile),
        num_warps=tile.num_warps,
        constants={
            "HAS_LIVE": live is not None,
            "HAS_SEGMENTS": segment_ids is not None,
            **_backward_constants(layout, tile, x, weight, bias, dslots, silu),
        },
    )
    return dx, *_filter_sums(partial), dhistory[:, : width - 1]


def _metadata_or_default(metadata, query_start_loc, num_tokens: int, width: int):
    if metadata is not None:
        return metadata
    num_seqs = query_start_loc.shape[0] - 1
    block_m = max(tiles.default_block_m(num_tokens, num_seqs), width - 1)
    return build_metadata(query_start_loc, num_tokens, block_m=block_m)


def _kernel_history(history):
    """History and its gradient's shape; W = 1 has none, but a buffer needs rows."""
    if history.shape[1] == 0:
        history = jnp.zeros((history.shape[0], 1, history.shape[2]), history.dtype)
    return history, jax.ShapeDtypeStruct(history.shape, jnp.float32)


def _gradient_shapes(x, weight, dhistory, programs: int):
    dim, width = weight.shape
    partial = (programs, width + 1, dim)
    return [
        jax.ShapeDtypeStruct((*x.shape[:-1], dim), x.dtype),
        dhistory,
        jax.ShapeDtypeStruct(partial, jnp.float32),
    ]


def _filter_sums(partial):
    """Dweight `(D, W)` and dbias `(D,)`: the second, deterministic reduction."""
    sums = partial.sum(axis=0)
    return sums[:-1].T, sums[-1]


def _backward_constants(layout, tile, x, weight, bias, dslots, silu) -> dict:
    return {
        "W": weight.shape[1],
        "L": 0 if dslots is None else dslots.shape[1],
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "HAS_SLOTS": dslots is not None,
        **layout.constants(tile, x),
    }


def _slot_constants(tile: tiles.Tiles, x, weight, states) -> dict:
    # Are the last W-1 rows that a program met, as float32, the new slot to the bit?
    same_bits = x.dtype == states.dtype and x.dtype != jnp.float16
    return {
        "L_BLOCK": tile.l_block,
        "SLOT_N": tile.slot_n,
        "WARPS": tile.num_warps,
        "WINDOW_IS_SLOT": same_bits and states.shape[1] == weight.shape[1] - 1,
    }
