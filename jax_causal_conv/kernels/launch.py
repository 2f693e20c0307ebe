"""Grids and argument lists: from an op's arrays to a kernel call.

The functions here have the signature of their twins in `xla.py` plus `call`, which
runs a kernel: `bridge.call` for a chosen compute capability, or `interpreter.call`.
"""

import jax
import jax.numpy as jnp

from .. import xla
from ..metadata import build_metadata
from . import tiles
from .backward import packed_backward_kernel, rows_backward_kernel
from .dense import dense_kernel
from .packed import packed_kernel
from .update import update_kernel


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
):
    """Launches the packed forward kernel, see `xla.packed`."""
    (num_tokens, dim), width = x.shape, weight.shape[1]
    num_slots, state_len, _ = states.shape
    num_seqs = query_start_loc.shape[0] - 1
    metadata = _metadata_or_default(metadata, query_start_loc, num_tokens, width)
    tile = tiles.choose(dim, width, state_len, metadata.block_m, x.dtype.itemsize)
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
    return call(
        packed_kernel,
        arrays,
        [num_tokens, num_seqs, num_slots, metadata.block_m],
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        in_place=3,
        grid=chunk_seq.shape[0] * -(-dim // tile.block_n),
        num_warps=tile.num_warps,
        constants=dict(
            D=dim,
            W=width,
            L=state_len,
            PAD_SLOT_ID=pad_slot_id,
            SILU=silu,
            HAS_BIAS=bias is not None,
            HAS_SLOTS=slots is not None,
            HAS_INITIAL_STATE=has_initial_state is not None,
            HAS_REJECTED=num_rejected is not None,
            **_tile_constants(tile),
        ),
    )


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
):
    """Launches the decode kernel, see `xla.update`."""
    (batch, query, dim), width = x.shape, weight.shape[1]
    num_slots, state_len, _ = state.shape
    tile = tiles.choose(dim, width, state_len, query, x.dtype.itemsize)
    # A pointer of the right kind for absent indices.
    unused = next((a for a in (slots, cache_seqlens, num_rejected) if a is not None), x)
    return call(
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
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        in_place=3,
        grid=batch * -(-dim // tile.block_n),
        num_warps=tile.num_warps,
        constants=dict(
            Q=query,
            D=dim,
            W=width,
            L=state_len,
            PAD_SLOT_ID=pad_slot_id,
            SILU=silu,
            HAS_BIAS=bias is not None,
            CIRCULAR=cache_seqlens is not None,
            HAS_SLOTS=slots is not None,
            HAS_REJECTED=num_rejected is not None,
            **_tile_constants(tile),
        ),
    )


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
):
    """Launches the dense forward kernel, see `xla.dense`."""
    (batch, length, dim), width = x.shape, weight.shape[1]
    block_m = max(tiles.default_block_m(batch * length, batch), width - 1)
    chunks = -(-length // block_m)
    tile = tiles.choose(dim, width, width - 1, block_m, x.dtype.itemsize)
    (out,) = call(
        dense_kernel,
        [
            x,
            weight,
            _or(bias, weight),
            _or(initial_state, x),
            _or(segment_ids, x),
        ],
        [length, chunks, block_m],
        [jax.ShapeDtypeStruct(x.shape, x.dtype)],
        grid=batch * chunks * -(-dim // tile.block_n),
        num_warps=tile.num_warps,
        constants={
            "D": dim,
            "W": width,
            "L": 0 if initial_state is None else initial_state.shape[1],
            "SILU": silu,
            "HAS_BIAS": bias is not None,
            "HAS_INITIAL_STATE": initial_state is not None,
            "HAS_SEGMENTS": segment_ids is not None,
            "BLOCK_N": tile.block_n,
            "GROUP": tile.group,
        },
    )
    if state_len is None:
        return (out,)
    return out, xla.final_states(x, initial_state, segment_ids, state_len)


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
):
    """Launches the packed backward kernel, see `xla_backward.packed_backward`."""
    (num_tokens, dim), width = x.shape, weight.shape[1]
    num_seqs = live.shape[0]
    metadata = _metadata_or_default(metadata, query_start_loc, num_tokens, width)
    tile = tiles.choose_backward(dim, width, metadata.block_m)
    chunk_seq = jnp.asarray(metadata.chunk_seq)
    history, dhistory = _kernel_history(history)
    dx, dhistory, partial = call(
        packed_backward_kernel,
        [
            x,
            weight,
            _or(bias, weight),
            history,
            dy,
            _or(dslots, x),
            query_start_loc,
            live.astype(jnp.int32),
            chunk_seq,
            jnp.asarray(metadata.chunk_offset),
        ],
        [num_tokens, num_seqs, metadata.block_m],
        _gradient_shapes(x, dhistory, chunk_seq.shape[0], width),
        grid=chunk_seq.shape[0] * -(-dim // tile.block_n),
        num_warps=tile.num_warps,
        constants=_backward_constants(tile, weight, bias, dslots, silu),
    )
    dhistory = jnp.where(live[:, None, None], dhistory[:, : width - 1], 0)
    return dx, *_filter_sums(partial), dhistory


def rows_backward(
    call, x, weight, bias, history, dy, dslots, live, segment_ids, *, silu: bool
):
    """Launches the backward kernel of rows, see `xla_backward.rows_backward`."""
    (batch, length, dim), width = x.shape, weight.shape[1]
    block_m = max(tiles.default_block_m(batch * length, batch), width - 1)
    chunks = -(-length // block_m)
    tile = tiles.choose_backward(dim, width, block_m)
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
            dy,
            _or(dslots, unused),
            unused if live is None else live.astype(jnp.int32),
            _or(segment_ids, unused),
            state_start,
            state_end,
        ],
        [length, chunks, block_m],
        _gradient_shapes(x, dhistory, batch * chunks, width),
        grid=batch * chunks * -(-dim // tile.block_n),
        num_warps=tile.num_warps,
        constants={
            "HAS_LIVE": live is not None,
            "HAS_SEGMENTS": segment_ids is not None,
            **_backward_constants(tile, weight, bias, dslots, silu),
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


def _gradient_shapes(x, dhistory, programs: int, width: int):
    partial = (programs, width + 1, x.shape[-1])
    return [
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        dhistory,
        jax.ShapeDtypeStruct(partial, jnp.float32),
    ]


def _filter_sums(partial):
    """Dweight `(D, W)` and dbias `(D,)`: the second, deterministic reduction."""
    sums = partial.sum(axis=0)
    return sums[:-1].T, sums[-1]


def _backward_constants(tile: tiles.Tiles, weight, bias, dslots, silu: bool) -> dict:
    dim, width = weight.shape
    return {
        "D": dim,
        "W": width,
        "L": 0 if dslots is None else dslots.shape[1],
        "SILU": silu,
        "HAS_BIAS": bias is not None,
        "HAS_SLOTS": dslots is not None,
        "BLOCK_N": tile.block_n,
        "GROUP": tile.group,
    }


def _tile_constants(tile: tiles.Tiles) -> dict:
    return {
        "BLOCK_N": tile.block_n,
        "GROUP": tile.group,
        "L_BLOCK": tile.l_block,
        "SLOT_N": tile.slot_n,
    }
