"""The last kernel of the SSD's gradient: sums of what others have left. No JAX here."""

import triton
import triton.language as tl

from .ssd_backward_states import (
    load_sizes,
    load_starts,
    pair_of,
    scores_at,
    tile_of,
    tiles_in,
)
from .ssd_device import add_up, dot_left, finite, load_bias, softplus, step_size


@triton.jit
def _finish_sizes(
    inputs, outputs, group, heads, i, C: tl.constexpr, READ: tl.constexpr
):
    """All of dC (READ) or dB of a tile."""
    FAST: tl.constexpr = C.FAST
    Y_PARTS: tl.constexpr = C.Y_PARTS
    PAIRS: tl.constexpr = C.TILES * (C.TILES + 1) // 2
    CHUNK: tl.constexpr = C.CHUNK
    lanes = tl.arange(0, CHUNK)
    k = tl.arange(0, C.K_BLOCK)
    row = group // inputs.groups
    place = group % inputs.groups * C.TILES
    own = tile_of(inputs, row, place + i, C)
    mask = own.real[:, None] & (k < C.K)[None, :]
    ptr = inputs.dC if READ else inputs.dB
    out = outputs.dC if READ else outputs.dB
    at = (own.first + lanes)[:, None] * (C.G * C.K) + (heads * C.K + k)[None, :]
    wide = group.to(tl.int64) * 0  # what is 1 is no tensor
    step = (wide + inputs.rows * inputs.row_len) * (C.G * C.K)
    acc = tl.full([CHUNK, C.K_BLOCK], 0, tl.float32)
    for block in range(C.ITEM_BLOCKS):
        acc += tl.load(ptr + block * step + at, mask=mask, other=0.0)
    low = 0 if READ else i
    high = i + 1 if READ else tiles_in(inputs, group, C)
    step = (wide + inputs.rows * inputs.groups) * (C.G * PAIRS * CHUNK * CHUNK)
    for other in range(low, high):
        pair = i * (i + 1) // 2 + other if READ else other * (other + 1) // 2 + i
        tile = scores_at(group, pair, heads, C)
        if not READ:
            tile = tl.trans(tile)
        cotangent = tl.full([CHUNK, CHUNK], 0, tl.float32)
        for block in range(C.ITEM_BLOCKS):
            cotangent += tl.load(inputs.dscores + block * step + tile)
        sizes = load_sizes(
            inputs,
            inputs.B if READ else inputs.C,
            tile_of(inputs, row, place + other, C),
            heads,
            C,
        )
        acc = dot_left(cotangent, sizes, acc, Y_PARTS, FAST)
    if inputs.run_start is not None:
        acc = tl.where((load_starts(inputs, own, C) >= 0)[:, None], acc, 0.0)
    tl.store(out + at, acc, mask=mask)


@triton.jit
def _sum_later(values):
    """Sums from each value on, along axis 1."""
    return tl.associative_scan(values, 1, tl.standard._sum_combine, reverse=True)


@triton.jit
def _finish_steps(inputs, outputs, group, i, block, C: tl.constexpr):  # noqa: PLR0915 (steps of one kernel)
    """The gradient of dt of a tile, for a block of heads; dA and that of the bias.

    Nothing that does not pass a token is in the sum of its decay's derivative: that of
    a head which forgets fast is small, and would be lost in what cancels.
    """
    TILES: tl.constexpr = C.TILES
    PAIRS: tl.constexpr = TILES * (TILES + 1) // 2
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    CHUNK: tl.constexpr = C.CHUNK
    lanes = tl.arange(0, CHUNK)[None, :]
    heads = block * C.FINISH_HEADS + tl.arange(0, C.FINISH_HEADS)
    in_h = heads < C.H
    row = group // inputs.groups
    place = group % inputs.groups * C.TILES
    count = tiles_in(inputs, group, C)
    first = (row * inputs.tiles + place).to(tl.int64)
    flows = inputs.flows + group.to(tl.int64) * (PAIRS * ITEMS * CHUNK)
    whole = in_h[:, None] & (lanes >= 0)
    inside = tl.full([C.FINISH_HEADS, CHUNK], 0, tl.float32)
    arriving = inside
    before = inside  # of the tokens before each
    direct = inside
    passed = tl.full([C.FINISH_HEADS], 0, tl.float32)
    pairs = tl.arange(0, 16)[None, :]
    late, early = pair_of(pairs)
    tiles = tl.arange(0, 4)[None, :]
    for p_block in range(C.P_BLOCKS):
        item = heads * C.P_BLOCKS + p_block
        at = ((first + i) * ITEMS + item[:, None]) * CHUNK + lanes
        direct += tl.load(inputs.direct + at, mask=whole, other=0.0)
        before += tl.load(inputs.onward + at - 1, mask=whole & (lanes > 0), other=0.0)
        arriving += tl.load(inputs.arriving + at, mask=whole, other=0.0)
        at = item[:, None] * CHUNK + lanes
        own_pair = (i * (i + 1) // 2 + i) * (ITEMS * CHUNK)
        inside += tl.load(flows + own_pair + at, mask=whole, other=0.0)
        for j in tl.static_range(TILES):
            pair = (i * (i + 1) // 2 + j) * (ITEMS * CHUNK)
            arriving += tl.load(
                flows + pair + at, mask=whole & (lanes * 0 + i > j), other=0.0
            )
        passed += tl.load(inputs.through + group.to(tl.int64) * ITEMS + item, in_h, 0.0)
        of_pair = (group.to(tl.int64) * PAIRS + pairs) * ITEMS + item[:, None]
        over = in_h[:, None] & (early < i) & (late > i) & (late < count)
        flow = tl.load(inputs.flow_totals + of_pair, mask=over, other=0.0)
        passed += add_up(flow, 1)
        of_tile = (first + tiles) * ITEMS + item[:, None]
        over = in_h[:, None] & (tiles < i)
        passed += add_up(tl.load(inputs.dropped + of_tile, mask=over, other=0.0), 1)
        over = in_h[:, None] & (tiles > i) & (tiles < count)
        flow = tl.load(inputs.arriving_totals + of_tile, mask=over, other=0.0)
        passed += add_up(flow, 1)
    slope = (
        inside
        + _sum_later(arriving)
        + tl.associative_scan(before, 1, tl.standard._sum_combine)
    )
    slope += passed[:, None]
    # From here on the chain rule, for one token after another.
    A = tl.load(inputs.A + heads, mask=in_h, other=0.0).to(tl.float32)
    bias = load_bias(inputs, heads, C)
    own = tile_of(inputs, row, place + i, C)
    real = own.real[None, :] & in_h[:, None]
    at = (own.first + lanes) * C.H + heads[:, None]
    given = tl.load(inputs.dt + at, mask=real, other=0.0)
    if inputs.dt_bias is not None:
        bias = bias[:, None]
    counted = real
    dt, inner = _step_and_slope(given, bias, C)
    if inputs.run_start is not None:
        counted = real & (load_starts(inputs, own, C) >= 0)[None, :] & finite(dt)
    dA = tl.where(counted, slope * dt, 0.0)
    ddt = tl.where(counted, (slope * A[:, None] + direct) * inner, 0.0)
    tl.store(outputs.ddt + at, ddt.to(outputs.ddt.dtype.element_ty), mask=real)
    at = (first + i) * C.H + heads
    tl.store(outputs.dA + at, add_up(dA, 1), mask=in_h)
    tl.store(outputs.ddt_bias + at, add_up(ddt, 1), mask=in_h)


@triton.jit
def _step_and_slope(dt, bias, C: tl.constexpr):
    """A step size, and its derivative in what was given."""
    given = dt.to(tl.float32) + bias
    slope = given * 0.0 + 1.0
    free = given
    if C.SOFTPLUS:
        small = tl.exp(-tl.abs(given))
        slope = tl.where(given > 0, 1.0, small) / (1.0 + small)
        free = softplus(given)
    # At a limit the derivative is that of both sides, by halves.
    if C.LOW is not None:
        slope = tl.where(free < C.LOW, 0.0, tl.where(free == C.LOW, slope / 2, slope))
    if C.HIGH is not None:
        slope = tl.where(free > C.HIGH, 0.0, tl.where(free == C.HIGH, slope / 2, slope))
    return step_size(dt, bias, C), slope


# Sums of blocks, and all of dB and dC of a tile (B·V x G x n x 2 programs); or ddt of
# one for a block of heads (B·V x n x blocks).
@triton.jit
def backward_finish_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    GROUPS: tl.constexpr = C.G * C.TILES * 2
    BLOCKS: tl.constexpr = (C.H + C.FINISH_HEADS - 1) // C.FINISH_HEADS
    sizes = inputs.rows * inputs.groups * GROUPS
    if program < sizes:
        group = program // GROUPS
        i = program // 2 % C.TILES
        heads = program // (2 * C.TILES) % C.G
        if i < tiles_in(inputs, group, C):
            if program % 2 == 0:
                _finish_sizes(inputs, outputs, group, heads, i, C, True)
            else:
                _finish_sizes(inputs, outputs, group, heads, i, C, False)
    else:
        program -= sizes
        i = program // BLOCKS % C.TILES
        group = program // (BLOCKS * C.TILES)
        if i < tiles_in(inputs, group, C):
            _finish_steps(inputs, outputs, group, i, program % BLOCKS, C)
