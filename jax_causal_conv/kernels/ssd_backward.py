"""The main kernels of the SSD's gradient. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ssd_backward_states import (
    decay_of,
    dot_state,
    load_channels,
    load_planes,
    load_sizes,
    load_starts,
    pair_of,
    scores_at,
    sums_of,
    tile_of,
)
from .ssd_device import (
    add_up,
    are_finite,
    dot_left,
    dot_narrow,
    enters,
    finite,
    largest,
    load_bias,
    load_skip,
    softplus,
    step_size,
    store_tile,
)


class Part(NamedTuple):
    """A tile of a group, for one head.

    Attributes:
        tile: its tokens; `sums`, a pointer to theirs.
        number: of the tile among all rows'.
        offset: its first token's place in the row.
    """

    tile: Any
    sums: Any
    number: Any
    offset: Any


@triton.jit
def _part(inputs, group, i, head, C: tl.constexpr):
    """Tile i of a group of this number among all rows'."""
    row = group // inputs.groups
    i += group % inputs.groups * C.TILES
    number = row * inputs.tiles + i
    sums = sums_of(inputs.sums, number, head, C)
    return Part(tile_of(inputs, row, i, C), sums, number, i * C.CHUNK)


@triton.jit
def _tiles_in(inputs, group, C: tl.constexpr):
    """How many tiles a group has."""
    return tl.minimum(inputs.tiles - group % inputs.groups * C.TILES, C.TILES)


@triton.jit
def _last_run(inputs, group, C: tl.constexpr):
    """Where the last run in a group begins; -1 if it is all padding."""
    row = group // inputs.groups
    offset = group % inputs.groups * (C.TILES * C.CHUNK)
    last = row * 0 - 1
    for i in tl.static_range(C.TILES):
        tile = tile_of(inputs, row, offset // C.CHUNK + i, C)
        last = tl.maximum(last, largest(load_starts(inputs, tile, C), 0))
    return last


@triton.jit
def _decay_between(inputs, group, low, high, head, C: tl.constexpr):
    """The decay through tiles `[low, high)` of a group."""
    decay = 1.0
    for i in tl.static_range(C.TILES):
        row = group // inputs.groups
        number = row * inputs.tiles + group % inputs.groups * C.TILES + i
        sums = sums_of(inputs.sums, number, head, C)
        here = (i >= low) & (i < high)
        decay *= tl.load(sums + 3 * C.CHUNK - 1, mask=here, other=1.0)
    return decay


@triton.jit
def _decays(early, late, C: tl.constexpr):
    """The decays from r to t in one tile, `[r, t]`; anything for r > t."""
    lanes = tl.arange(0, C.CHUNK)
    total = tl.load(early + lanes)
    fine = tl.load(early + 4 * C.CHUNK + lanes)
    between = tl.load(late + lanes)[None, :] - total[:, None]
    seen = lanes[:, None] <= lanes[None, :]
    between = tl.where(seen, between, float("-inf"))
    late_fine = tl.load(late + 4 * C.CHUNK + lanes)
    return tl.exp2(between) * (1.0 / fine)[:, None] * late_fine[None, :]


@triton.jit
def _same_run(early, late):
    """Of `[r, t]`, whether both are of one run."""
    return (early[:, None] == late[None, :]) & (early >= 0)[:, None]


@triton.jit
def _add_product(acc, mixed, seen, dy, C: tl.constexpr):
    """`acc + mixed @ dy`, where only those `seen` see each other; None: all do.

    NaN or inf in dy makes NaN of what sees it, and reaches nothing else.
    """
    FAST: tl.constexpr = C.FAST
    Y_PARTS: tl.constexpr = C.Y_PARTS
    if seen is None:
        return dot_left(mixed, dy, acc, Y_PARTS, FAST)
    else:
        bad = are_finite(dy) == 0
        poisoned = largest(tl.where(seen & bad[None, :], 1, 0), 1) > 0
        mixed = tl.where(seen, mixed, 0.0)
        dy = tl.where(finite(dy), dy, 0.0)
        acc = dot_left(mixed, dy, acc, Y_PARTS, FAST)
        return tl.where(poisoned[:, None], float("nan"), acc)


# The gradient of x, and what of that of dt comes with it. One program: a tile of tokens
# and an item (B·V x I x n, tiles fastest, which read the same dy and state).
#
# Here as in the kernels below a matrix of scores or decays is `[r, t]`: r is a token
# that writes, t one that reads, not before r.
@triton.jit
def backward_tokens_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    P_BLOCK: tl.constexpr = C.P_BLOCK
    CHUNK: tl.constexpr = C.CHUNK
    lanes = tl.arange(0, CHUNK)
    j = program % C.TILES
    item = program // C.TILES % ITEMS
    group = program // (C.TILES * ITEMS)
    head = item // C.P_BLOCKS
    channels = item % C.P_BLOCKS * P_BLOCK + tl.arange(0, P_BLOCK)
    its_group = head // (C.H // C.G)
    count = _tiles_in(inputs, group, C)
    if j < count:
        own = _part(inputs, group, j, head, C)
        if inputs.run_start is not None:
            start = load_starts(inputs, own.tile, C)
        # What later tiles of the group have of these tokens, at the tile's end.
        later = tl.full([CHUNK, P_BLOCK], 0, tl.float32)
        between = 1.0
        for i in tl.range(j + 1, count, num_stages=C.STAGES):
            part = _part(inputs, group, i, head, C)
            dy = load_channels(inputs.dy, part.tile, head, channels, C)
            at = scores_at(group, i * (i + 1) // 2 + j, its_group, C)
            since = tl.load(part.sums + 2 * CHUNK + lanes) * between
            mixed = tl.load(inputs.scores + at) * since[None, :]
            if inputs.run_start is None:
                later = _add_product(later, mixed, None, dy, C)
            else:
                alike = _same_run(start, load_starts(inputs, part.tile, C))
                later = _add_product(later, mixed, alike, dy, C)
            between *= decay_of(part.sums, C)
        B = load_sizes(inputs.B, own.tile, its_group, C)
        behind = dot_state(B, inputs.leaving, group, head, channels, C, True)
        behind *= between
        if inputs.run_start is not None:
            last = _last_run(inputs, group, C)
            leaves = (start >= 0) & (start == last)
            behind = tl.where(leaves[:, None], behind, 0.0)
        x = load_channels(inputs.x, own.tile, head, channels, C)
        wide_x = x.to(tl.float32)
        dt = tl.load(own.sums + CHUNK + lanes)
        after = tl.load(own.sums + 3 * CHUNK + lanes)
        weight = dt * after
        dropped = weight * add_up(wide_x * behind, 1)
        acc = later + behind
        onward = weight * add_up(wide_x * acc, 1)
        acc *= after[:, None]
        # What the tile's own tokens have of each other.
        dy = load_channels(inputs.dy, own.tile, head, channels, C)
        at = scores_at(group, j * (j + 1) // 2 + j, its_group, C)
        mixed = tl.load(inputs.scores + at) * _decays(own.sums, own.sums, C)
        if inputs.run_start is None:
            mixed = tl.where(lanes[:, None] <= lanes[None, :], mixed, 0.0)
            acc = _add_product(acc, mixed, None, dy, C)
        else:
            seen = _same_run(start, start) & (lanes[:, None] <= lanes[None, :])
            acc = _add_product(acc, mixed, seen, dy, C)
        direct = add_up(wide_x * acc, 1)
        wide_dy = dy.to(tl.float32)
        dx = acc * dt[:, None]
        if inputs.D is not None:
            dx += load_skip(inputs, head, channels, C) * wide_dy
        both = wide_dy * wide_x
        real = own.tile.real
        if inputs.run_start is not None:
            real = real & (start >= 0)
            dx = tl.where(real[:, None], dx, 0.0)
            both = tl.where(real[:, None], both, 0.0)
            # What comes through `direct` shows NaN; here it would reach other runs.
            dropped = tl.where(real & finite(dropped), dropped, 0.0)
            onward = tl.where(real & finite(onward), onward, 0.0)
            direct = tl.where(real, direct, 0.0)
        number = own.number.to(tl.int64)
        if outputs.dD is not None:
            at = (number * C.H + head) * C.P + channels
            tl.store(outputs.dD + at, add_up(both, 0), mask=channels < C.P)
        PART: tl.constexpr = C.PART or C.P_BLOCKS * P_BLOCK != C.P
        ptr = outputs.dx + (own.tile.first * (C.H * C.P) + head * C.P)
        at = lanes[:, None] * (C.H * C.P) + channels[None, :]
        mask = own.tile.real[:, None] & (channels < C.P)[None, :]
        store_tile(ptr + at, dx.to(outputs.dx.dtype.element_ty), mask, PART)
        at = number * ITEMS + item
        tl.store(outputs.dropped + at, add_up(dropped, 0))
        tl.store(outputs.onward + at * CHUNK + lanes, onward)
        tl.store(outputs.direct + at * CHUNK + lanes, direct)


class Block(NamedTuple):
    """What a program of sums over heads works at.

    Attributes:
        group: the number of the group of tiles among all rows'.
        heads: the group of heads.
        low, high: the items.
        block: the number of this block of items among the group's.
    """

    group: Any
    heads: Any
    low: Any
    high: Any
    block: Any


@triton.jit
def _block(number, C: tl.constexpr):
    """The block of items of this number: B·V x ITEM_BLOCKS x G."""
    ITEMS: tl.constexpr = C.H // C.G * C.P_BLOCKS
    heads = number % C.G
    block = number // C.G % C.ITEM_BLOCKS
    low = block * C.ITEM_BLOCK
    high = tl.minimum(low + C.ITEM_BLOCK, ITEMS)
    group = number // (C.G * C.ITEM_BLOCKS)
    return Block(group, heads, heads * ITEMS + low, heads * ITEMS + high, block)


@triton.jit
def _passing(flow, C: tl.constexpr):
    """Of flows `[r, t]` the sums of those with r before and t not before each token.

    A product with a triangle of ones sums up what is later, for each r; then no sum has
    a term in it that must cancel.
    """
    FAST: tl.constexpr = C.FAST
    PARTS: tl.constexpr = C.Y_PARTS
    lanes = tl.arange(0, C.CHUNK)
    later = tl.where(lanes[:, None] >= lanes[None, :], 1.0, 0.0).to(tl.bfloat16)
    acc = tl.full([C.CHUNK, C.CHUNK], 0, tl.float32)
    sums = dot_left(flow, later, acc, PARTS, FAST)
    return add_up(tl.where(lanes[:, None] < lanes[None, :], sums, 0.0), 0)


# The cotangent of scores, summed over heads, and the flows within a group. One program:
# a pair of tiles and a block of items (B·V x blocks x G x pairs, pairs fastest).
@triton.jit
def backward_pairs_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    PAIRS: tl.constexpr = C.TILES * (C.TILES + 1) // 2
    CHUNK: tl.constexpr = C.CHUNK
    lanes = tl.arange(0, CHUNK)
    p = tl.arange(0, C.P_BLOCK)
    pair = program % PAIRS
    block = _block(program // PAIRS, C)
    group = block.group
    i, j = pair_of(pair)
    if i < _tiles_in(inputs, group, C):
        scores = tl.load(inputs.scores + scores_at(group, pair, block.heads, C))
        acc = tl.full([CHUNK, CHUNK], 0, tl.float32)
        out = outputs.flows + (group.to(tl.int64) * PAIRS + pair) * (ITEMS * CHUNK)
        if inputs.run_start is not None:
            row = group // inputs.groups
            place = group % inputs.groups * C.TILES
            seen = _same_run(
                load_starts(inputs, tile_of(inputs, row, place + j, C), C),
                load_starts(inputs, tile_of(inputs, row, place + i, C), C),
            )
        if i == j:
            ahead = lanes[:, None] <= lanes[None, :]
            if inputs.run_start is not None:
                ahead = ahead & seen
            for item in tl.range(block.low, block.high, num_stages=C.STAGES):
                head = item // C.P_BLOCKS
                channels = item % C.P_BLOCKS * C.P_BLOCK + p
                part = _part(inputs, group, i, head, C)
                x = load_channels(inputs.x, part.tile, head, channels, C)
                dy = load_channels(inputs.dy, part.tile, head, channels, C)
                product = dot_narrow(x, tl.trans(dy), C)
                dt = tl.load(part.sums + CHUNK + lanes)
                product *= _decays(part.sums, part.sums, C) * dt[:, None]
                product = tl.where(ahead, product, 0.0)
                acc += product
                # The diagonal passes no token.
                flow = tl.where(lanes[:, None] == lanes[None, :], 0.0, product * scores)
                if inputs.run_start is not None:
                    flow = tl.where(seen & finite(flow), flow, 0.0)
                tl.store(out + item * CHUNK + lanes, _passing(flow, C))
        else:
            for item in tl.range(block.low, block.high, num_stages=C.STAGES):
                head = item // C.P_BLOCKS
                channels = item % C.P_BLOCKS * C.P_BLOCK + p
                early = _part(inputs, group, j, head, C)
                late = _part(inputs, group, i, head, C)
                x = load_channels(inputs.x, early.tile, head, channels, C)
                dy = load_channels(inputs.dy, late.tile, head, channels, C)
                product = dot_narrow(x, tl.trans(dy), C)
                weight = tl.load(early.sums + CHUNK + lanes)
                weight *= tl.load(early.sums + 3 * CHUNK + lanes)
                weight *= _decay_between(inputs, group, j + 1, i, head, C)
                since = tl.load(late.sums + 2 * CHUNK + lanes)
                product *= weight[:, None] * since[None, :]
                flow = product * scores
                if inputs.run_start is not None:
                    product = tl.where(seen, product, 0.0)
                    flow = tl.where(seen & finite(flow), flow, 0.0)
                acc += product
                tl.store(out + item * CHUNK + lanes, add_up(flow, 0))
        ptr = outputs.dscores + block.block * (
            (inputs.rows * inputs.groups).to(tl.int64) * (C.G * PAIRS * CHUNK * CHUNK)
        )
        tl.store(ptr + scores_at(group, pair, block.heads, C), acc)


@triton.jit
def _write_read(inputs, outputs, block, i, C: tl.constexpr):
    """What dC of tile i has through the states before its group; and the flows."""
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    CHUNK: tl.constexpr = C.CHUNK
    lanes = tl.arange(0, CHUNK)
    own = _part(inputs, block.group, i, 0, C)
    read = load_sizes(inputs.C, own.tile, block.heads, C).to(tl.float32)
    acc = tl.full([CHUNK, C.K_BLOCK], 0, tl.float32)
    taken = None
    if inputs.run_start is not None:
        offset = block.group % inputs.groups * (C.TILES * CHUNK)
        taken = enters(load_starts(inputs, own.tile, C), offset)
    for item in tl.range(block.low, block.high, num_stages=C.STATE_STAGES):
        head = item // C.P_BLOCKS
        channels = item % C.P_BLOCKS * C.P_BLOCK + tl.arange(0, C.P_BLOCK)
        dy = load_channels(inputs.dy, own.tile, head, channels, C)
        product = dot_state(dy, inputs.entering, block.group, head, channels, C, False)
        since = tl.load(sums_of(inputs.sums, own.number, head, C) + 2 * CHUNK + lanes)
        since *= _decay_between(inputs, block.group, 0, i, head, C)
        product *= since[:, None]
        flow = add_up(product * read, 1)
        if taken is not None:
            product = tl.where(taken[:, None], product, 0.0)
            flow = tl.where(taken & finite(flow), flow, 0.0)
        acc += product
        at = own.number.to(tl.int64) * ITEMS + item
        tl.store(outputs.arriving + at * CHUNK + lanes, flow)
    _store_sizes(outputs.dC, inputs, own, block, acc, C)


@triton.jit
def _write_written(inputs, outputs, block, j, C: tl.constexpr):
    """What dB of tile j has through the states behind its group."""
    CHUNK: tl.constexpr = C.CHUNK
    count = _tiles_in(inputs, block.group, C)
    lanes = tl.arange(0, CHUNK)
    own = _part(inputs, block.group, j, 0, C)
    acc = tl.full([CHUNK, C.K_BLOCK], 0, tl.float32)
    taken = None
    if inputs.run_start is not None:
        start = load_starts(inputs, own.tile, C)
        taken = (start >= 0) & (start == _last_run(inputs, block.group, C))
    for item in tl.range(block.low, block.high, num_stages=C.STATE_STAGES):
        head = item // C.P_BLOCKS
        channels = item % C.P_BLOCKS * C.P_BLOCK + tl.arange(0, C.P_BLOCK)
        x = load_channels(inputs.x, own.tile, head, channels, C)
        product = dot_state(x, inputs.leaving, block.group, head, channels, C, False)
        sums = sums_of(inputs.sums, own.number, head, C)
        weight = tl.load(sums + CHUNK + lanes) * tl.load(sums + 3 * CHUNK + lanes)
        weight *= _decay_between(inputs, block.group, j + 1, count, head, C)
        product *= weight[:, None]
        if taken is not None:
            product = tl.where(taken[:, None], product, 0.0)
        acc += product
    _store_sizes(outputs.dB, inputs, own, block, acc, C)


@triton.jit
def _store_sizes(ptr, inputs, own, block, values, C: tl.constexpr):
    """Writes `[c, K_BLOCK]` of a block's dB or dC."""
    k = tl.arange(0, C.K_BLOCK)
    tokens = (inputs.rows * inputs.row_len).to(tl.int64)
    first = block.block * tokens + own.tile.first
    at = (first + tl.arange(0, C.CHUNK))[:, None] * (C.G * C.K)
    at += (block.heads * C.K + k)[None, :]
    mask = own.tile.real[:, None] & (k < C.K)[None, :]
    tl.store(ptr + at, values, mask=mask)


@triton.jit
def _write_through(inputs, outputs, block, C: tl.constexpr):
    """The flow from the state before a group to that behind it."""
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    count = _tiles_in(inputs, block.group, C)
    through = block.group == block.group
    if inputs.run_start is not None:
        last = _last_run(inputs, block.group, C)
        offset = block.group % inputs.groups * (C.TILES * C.CHUNK)
        through = (last < 0) | enters(last, offset)
    for item in tl.range(block.low, block.high):
        head = item // C.P_BLOCKS
        channels = item % C.P_BLOCKS * C.P_BLOCK + tl.arange(0, C.P_BLOCK)
        state = load_planes(inputs.entering, block.group, head, channels, C)
        state *= load_planes(inputs.leaving, block.group, head, channels, C)
        flow = add_up(add_up(state, 1), 0)
        flow *= _decay_between(inputs, block.group, 0, count, head, C)
        at = block.group.to(tl.int64) * ITEMS + item
        tl.store(outputs.through + at, tl.where(through, flow, 0.0))


# What goes through the states before and behind a group, summed over heads. One
# program: dC or dB of a tile, or the flow through the group, for a block of items
# (B·V x blocks x G x (2n + 1), these fastest, which read the same states).
@triton.jit
def backward_heads_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    kind = program % (2 * C.TILES + 1)
    block = _block(program // (2 * C.TILES + 1), C)
    count = _tiles_in(inputs, block.group, C)
    if kind < C.TILES:
        if kind < count:
            _write_read(inputs, outputs, block, kind, C)
    elif kind < 2 * C.TILES:
        if kind - C.TILES < count:
            _write_written(inputs, outputs, block, kind - C.TILES, C)
    else:
        _write_through(inputs, outputs, block, C)


@triton.jit
def _finish_sizes(inputs, outputs, group, heads, i, C: tl.constexpr, READ: tl.constexpr):
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
    step = (inputs.rows * inputs.row_len).to(tl.int64) * (C.G * C.K)
    acc = tl.full([CHUNK, C.K_BLOCK], 0, tl.float32)
    for block in range(C.ITEM_BLOCKS):
        acc += tl.load(ptr + block * step + at, mask=mask, other=0.0)
    low = 0 if READ else i
    high = i + 1 if READ else _tiles_in(inputs, group, C)
    step = (inputs.rows * inputs.groups).to(tl.int64) * (C.G * PAIRS * CHUNK * CHUNK)
    for other in range(low, high):
        pair = i * (i + 1) // 2 + other if READ else other * (other + 1) // 2 + i
        tile = scores_at(group, pair, heads, C)
        if READ:
            tile = tl.trans(tile)
        cotangent = tl.full([CHUNK, CHUNK], 0, tl.float32)
        for block in range(C.ITEM_BLOCKS):
            cotangent += tl.load(inputs.dscores + block * step + tile)
        sizes = load_sizes(
            inputs.B if READ else inputs.C,
            tile_of(inputs, row, place + other, C),
            heads,
            C,
        )
        if inputs.run_start is not None:
            sizes = tl.where(finite(sizes), sizes, 0.0)
        acc = dot_left(cotangent, sizes, acc, Y_PARTS, FAST)
    if inputs.run_start is not None:
        acc = tl.where((load_starts(inputs, own, C) >= 0)[:, None], acc, 0.0)
    tl.store(out + at, acc, mask=mask)


@triton.jit
def _sum_later(values):
    """Sums from each value on, along axis 1."""
    return tl.associative_scan(values, 1, tl.standard._sum_combine, reverse=True)


@triton.jit
def _finish_steps(inputs, outputs, group, i, block, C: tl.constexpr):
    """The gradient of dt of a tile, for a block of heads; dA and that of the bias.

    Nothing that does not pass a token is in the sum of its decay's derivative: that of
    a head which forgets fast is small, and would be lost in what cancels.
    """
    PAIRS: tl.constexpr = C.TILES * (C.TILES + 1) // 2
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    CHUNK: tl.constexpr = C.CHUNK
    lanes = tl.arange(0, CHUNK)[None, :]
    heads = block * C.FINISH_HEADS + tl.arange(0, C.FINISH_HEADS)
    in_h = heads < C.H
    row = group // inputs.groups
    place = group % inputs.groups * C.TILES
    count = _tiles_in(inputs, group, C)
    first = (row * inputs.tiles + place).to(tl.int64)
    flows = inputs.flows + group.to(tl.int64) * (PAIRS * ITEMS * CHUNK)
    whole = in_h[:, None] & (lanes >= 0)
    inside = tl.full([C.FINISH_HEADS, CHUNK], 0, tl.float32)
    arriving = inside
    before = inside  # of the tokens before each
    direct = inside
    passed = tl.full([C.FINISH_HEADS], 0, tl.float32)
    for p_block in range(C.P_BLOCKS):
        item = heads * C.P_BLOCKS + p_block
        at = ((first + i) * ITEMS + item[:, None]) * CHUNK + lanes
        direct += tl.load(inputs.direct + at, mask=whole, other=0.0)
        before += tl.load(inputs.onward + at - 1, mask=whole & (lanes > 0), other=0.0)
        arriving += tl.load(inputs.arriving + at, mask=whole, other=0.0)
        at = item[:, None] * CHUNK + lanes
        for j in range(0, i):
            pair = (i * (i + 1) // 2 + j) * (ITEMS * CHUNK)
            arriving += tl.load(flows + pair + at, mask=whole, other=0.0)
        pair = (i * (i + 1) // 2 + i) * (ITEMS * CHUNK)
        inside += tl.load(flows + pair + at, mask=whole, other=0.0)
        passed += tl.load(inputs.through + group.to(tl.int64) * ITEMS + item, in_h, 0.0)
        for j in range(0, i):
            at_j = (first + j) * ITEMS + item
            passed += tl.load(inputs.dropped + at_j, mask=in_h, other=0.0)
        for late in range(i + 1, count):
            at_late = ((first + late) * ITEMS + item[:, None]) * CHUNK + lanes
            flow = tl.load(inputs.arriving + at_late, mask=whole, other=0.0)
            for j in range(0, i):
                pair = (late * (late + 1) // 2 + j) * (ITEMS * CHUNK)
                flow += tl.load(flows + pair + at, mask=whole, other=0.0)
            passed += add_up(flow, 1)
    slope = inside + _sum_later(arriving) + tl.associative_scan(
        before, 1, tl.standard._sum_combine
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
    if inputs.run_start is not None:
        counted = real & (load_starts(inputs, own, C) >= 0)[None, :]
    dt, inner = step_and_slope(given, bias, C)
    dA = tl.where(counted, slope * dt, 0.0)
    ddt = tl.where(counted, (slope * A[:, None] + direct) * inner, 0.0)
    tl.store(outputs.ddt + at, ddt.to(outputs.ddt.dtype.element_ty), mask=real)
    at = (first + i) * C.H + heads
    tl.store(outputs.dA + at, add_up(dA, 1), mask=in_h)
    tl.store(outputs.ddt_bias + at, add_up(ddt, 1), mask=in_h)


@triton.jit
def step_and_slope(dt, bias, C: tl.constexpr):
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
        if i < _tiles_in(inputs, group, C):
            if program % 2 == 0:
                _finish_sizes(inputs, outputs, group, heads, i, C, True)
            else:
                _finish_sizes(inputs, outputs, group, heads, i, C, False)
    else:
        program -= sizes
        i = program // BLOCKS % C.TILES
        group = program // (BLOCKS * C.TILES)
        if i < _tiles_in(inputs, group, C):
            _finish_steps(inputs, outputs, group, i, program % BLOCKS, C)
