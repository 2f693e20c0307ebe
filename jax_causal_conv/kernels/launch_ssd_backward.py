"""Launches of the SSD's gradient: grids, and what the kernels are given.

As in `launch_ssd`: a generator of launches that is sent the outputs of each.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..batch import runs_of
from ..operands import SSDBackwardOperands, SSDSpec
from . import tiles
from .record import Launch, Launches
from .ssd_backward import (
    backward_heads_kernel,
    backward_pairs_kernel,
    backward_tokens_kernel,
)
from .ssd_backward_finish import backward_finish_kernel
from .ssd_backward_record import (
    SsdBackwardConstants,
    SsdBackwardInputs,
    SsdBackwardOutputs,
)
from .ssd_backward_states import backward_prepare_kernel, backward_states_kernel
from .tiles import SsdBackwardTiles

_SIZES = ("row_len", "tiles", "groups", "rows")


class _Step(NamedTuple):
    """A launch: its kernel, the names of what it reads and writes, and its sizes."""

    kernel: Any
    reads: str
    writes: str
    grid: int
    num_warps: int
    constants: SsdBackwardConstants
    older_num_warps: int | None = None


def _all_bfloat16(operands: SSDBackwardOperands) -> bool:
    matrices = (operands.x, operands.B, operands.C)
    return all(a.dtype == jnp.bfloat16 for a in matrices)


def _constants(
    spec: SSDSpec, operands: SSDBackwardOperands, tile: SsdBackwardTiles
) -> SsdBackwardConstants:
    x, D, states = operands.x, operands.D, operands.states
    length, heads, dim = x.shape[1:]
    groups, size = operands.B.shape[-2:]
    low, high = spec.dt_limit
    matrices = [a.dtype for a in (x, operands.B, operands.C)]
    # As in the forward pass: gradients of 16 bits have bits to spare.
    narrow = all(dtype.itemsize == 2 for dtype in matrices)
    wide_state = not narrow or (states is not None and states.dtype == jnp.float32)
    terms = (2 if spec.exact else 1) if _all_bfloat16(operands) else 0
    p_blocks = -(-dim // tile.p_block)
    items = heads // groups * p_blocks
    return SsdBackwardConstants(
        H=heads,
        P=dim,
        G=groups,
        K=size,
        SOFTPLUS=spec.dt_softplus,
        LOW=low if spec.limits_dt and low != -math.inf else None,
        HIGH=high if spec.limits_dt and high != math.inf else None,
        D_BY_CHANNEL=D is not None and D.ndim == 2,
        EXACT=spec.exact,
        Y_PARTS=(2 if narrow else 3) if spec.exact else 1,
        STATE_PARTS=(3 if wide_state else 2) if spec.exact else 1,
        CHUNK=tile.chunk,
        P_BLOCK=tile.p_block,
        P_BLOCKS=p_blocks,
        K_BLOCK=tile.k_block,
        H_BLOCK=tile.h_block,
        TILES=tile.tiles,
        PLANES=max(terms, 1),
        TERMS=terms,
        PART=length % tile.chunk != 0,
        ITEM_BLOCK=tile.item_block,
        ITEM_BLOCKS=-(-items // tile.item_block),
        HEAD_TILES=tile.head_tiles,
        FINISH_HEADS=min(8, tiles.power_of_two(heads)),
    )


def _outputs(
    operands: SSDBackwardOperands, C: SsdBackwardConstants, tiles: int, groups: int
) -> SsdBackwardOutputs:
    """Shapes of all that the kernels leave; tiles and groups are those of all rows."""
    x, wide = operands.x, jnp.float32
    rows, length = x.shape[:2]
    items, pairs = C.H * C.P_BLOCKS, C.TILES * (C.TILES + 1) // 2
    shape = jax.ShapeDtypeStruct
    kept = jnp.bfloat16 if C.TERMS else wide
    states = shape((groups * C.PLANES, C.H, C.P, C.K), kept)
    square = (C.CHUNK, C.CHUNK)
    of_sizes = shape((C.ITEM_BLOCKS, rows * length, C.G, C.K), wide)
    of_tokens = shape((tiles, items, C.CHUNK), wide)
    of_heads = shape((tiles, C.H), wide)
    of_D = (C.H, C.P) if C.D_BY_CHANNEL else (items,)
    dstates = shape((rows, C.H, C.P, C.K), wide)
    return SsdBackwardOutputs(
        sums=shape((tiles, C.H, 6, C.CHUNK), wide),
        scores=shape((groups, C.G, pairs, *square), wide),
        entering=states,
        leaving=states,
        dstates=None if operands.states is None else dstates,
        dx=shape((rows * length, C.H, C.P), x.dtype),
        direct=of_tokens,
        onward=of_tokens,
        dropped=shape((tiles, items), wide),
        dD=None if operands.D is None else shape((tiles, *of_D), wide),
        flows=shape((groups, pairs, items, C.CHUNK), wide),
        flow_totals=shape((groups, pairs, items), wide),
        dscores=shape((C.ITEM_BLOCKS, groups, C.G, pairs, *square), wide),
        dC=of_sizes,
        dB=of_sizes,
        arriving=of_tokens,
        arriving_totals=shape((tiles, items), wide),
        through=shape((groups, items), wide),
        ddt=shape((rows * length, C.H), operands.dt.dtype),
        dA=of_heads,
        ddt_bias=of_heads,
    )


def backward(
    spec: SSDSpec,
    operands: SSDBackwardOperands,
    tile: SsdBackwardTiles | None = None,
) -> Launches[tuple[jax.Array, ...]]:
    """Launches of the gradient of `ssd`: six."""
    x, states = operands.x, operands.states
    rows, length, heads, dim = x.shape
    sizes = jnp.promote_types(operands.B.dtype, operands.C.dtype)
    tile = tile or tiles.ssd_backward(
        (heads, dim),
        operands.B.shape[-2:],
        max(x.dtype.itemsize, sizes.itemsize),
        rows,
        length,
        _all_bfloat16(operands),
    )
    C = _constants(spec, operands, tile)
    count = -(-length // C.CHUNK)
    groups = -(-count // C.TILES)

    def of_tokens(array):
        return array.reshape(rows * length, *array.shape[2:])

    def of_sizes(array):
        array = of_tokens(array)
        return array if array.dtype == sizes else array.astype(sizes)

    run_start = None
    if operands.segment_ids is not None:
        runs = runs_of(operands.segment_ids, rows, length)
        run_start = of_tokens(jnp.where(runs.real, runs.start, -1))
    inputs = SsdBackwardInputs(
        x=of_tokens(x),
        dt=of_tokens(operands.dt),
        A=operands.A,
        B=of_sizes(operands.B),
        C=of_sizes(operands.C),
        D=operands.D,
        dt_bias=operands.dt_bias,
        states=states,
        run_start=run_start,
        dy=of_tokens(operands.dy),
        dfinal=operands.dfinal,
        row_len=length,
        tiles=count,
        groups=groups,
        rows=rows,
    )
    outputs = _outputs(operands, C, rows * count, rows * groups)
    pairs = C.TILES * (C.TILES + 1) // 2
    items, blocks = C.H * C.P_BLOCKS, rows * groups * C.ITEM_BLOCKS * C.G
    sums = rows * count * -(-C.H // C.H_BLOCK)
    finish = rows * groups * C.TILES * -(-C.H // C.FINISH_HEADS)
    spans = -(-C.TILES // C.HEAD_TILES)
    of_states = dataclasses.replace(C, STAGES=tile.state_stages, K_BLOCK=tile.state_k)
    part = length % (C.CHUNK * C.HEAD_TILES) != 0
    of_heads = dataclasses.replace(C, STAGES=tile.head_stages, PART=part)
    given = (
        _Step(
            backward_prepare_kernel,
            "dt A dt_bias B C run_start",
            "sums scores",
            sums + rows * groups * C.G * pairs,
            4,
            C,
        ),
        _Step(
            backward_states_kernel,
            "x dy B C sums states dfinal run_start",
            "entering leaving dstates",
            rows * 2 * items * -(-C.K // tile.state_k),
            tile.state_warps,
            of_states,
        ),
        _Step(
            backward_tokens_kernel,
            "x dy B D sums scores leaving run_start",
            "dx direct onward dD",
            rows * groups * items * C.TILES,
            tile.token_warps,
            dataclasses.replace(C, STAGES=tile.token_stages),
        ),
        _Step(
            backward_pairs_kernel,
            "x dy sums scores run_start",
            "flows flow_totals dscores",
            blocks * pairs,
            tile.pair_warps,
            dataclasses.replace(C, STAGES=tile.pair_stages),
        ),
        _Step(
            backward_heads_kernel,
            "x dy B C sums entering leaving states dfinal run_start",
            "dropped dC dB arriving arriving_totals through",
            blocks * (2 * spans + 1),
            tile.head_warps,
            of_heads,
            tile.older_head_warps,
        ),
        _Step(
            backward_finish_kernel,
            "dt A dt_bias B C dC dB dscores direct onward dropped flows flow_totals "
            "arriving arriving_totals through run_start",
            "dC dB ddt dA ddt_bias",
            rows * groups * C.G * C.TILES * 2 + finish,
            4,
            C,
        ),
    )
    known = inputs._asdict()
    every = jax.ShapeDtypeStruct(outputs.dC.shape[1:], jnp.float32)
    for step in given:
        if step.kernel is backward_finish_kernel:
            outputs = outputs._replace(dC=every, dB=every)
        written = [n for n in outputs._fields if n in step.writes.split()]
        written = [n for n in written if getattr(outputs, n) is not None]
        read = {n: known[n] for n in (*_SIZES, *step.reads.split())}
        results = yield Launch(
            step.kernel,
            SsdBackwardInputs(**read),
            SsdBackwardOutputs(**{name: getattr(outputs, name) for name in written}),
            grid=step.grid,
            num_warps=step.num_warps,
            older_num_warps=step.older_num_warps,
            constants=step.constants,
        )
        known |= dict(zip(written, results, strict=True))
    dD = jnp.zeros((heads, dim), jnp.float32)
    if operands.D is not None:
        dD = known["dD"].sum(0)
        if not C.D_BY_CHANNEL:  # one channel has the gradient of all
            dD = jnp.pad(
                dD.reshape(heads, -1).sum(1, keepdims=True), ((0, 0), (0, dim - 1))
            )
    gradients = [
        known["dx"].reshape(x.shape),
        known["ddt"].reshape(operands.dt.shape),
        known["dA"].sum(0),
        known["dB"].reshape(operands.B.shape),
        known["dC"].reshape(operands.B.shape),
        known["ddt_bias"].sum(0),
        dD,
    ]
    return *gradients, *([known["dstates"]] if states is not None else [])
