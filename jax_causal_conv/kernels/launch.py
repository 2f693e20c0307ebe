"""Grids and argument lists: from an op's arrays to a kernel call.

The functions here have the signature of their twins in `xla.py` plus `call`, which
runs a kernel: `bridge.call` for a chosen compute capability, or `interpreter.call`.
"""

import jax
import jax.numpy as jnp

from ..metadata import build_metadata
from . import tiles
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
    if metadata is None:
        block_m = max(tiles.default_block_m(num_tokens, num_seqs), width - 1)
        metadata = build_metadata(query_start_loc, num_tokens, block_m=block_m)
    tile = tiles.choose(dim, width, state_len, metadata.block_m)
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
        jax.ShapeDtypeStruct(x.shape, x.dtype),
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
    tile = tiles.choose(dim, width, state_len, query)
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
        jax.ShapeDtypeStruct(x.shape, x.dtype),
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


def _tile_constants(tile: tiles.Tiles) -> dict:
    return {
        "BLOCK_N": tile.block_n,
        "GROUP": tile.group,
        "L_BLOCK": tile.l_block,
        "SLOT_N": tile.slot_n,
    }
