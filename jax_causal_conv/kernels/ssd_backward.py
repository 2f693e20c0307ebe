"""The main kernels of the SSD's gradient: what is made for each head. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ssd_backward_states import (
    Tile,
    decay_of,
    dot_state,
    load_channels,
    load_planes,
    load_sizes,
    load_starts,
    load_x,
    pair_of,
    scores_at,
    sums_of,
    tile_of,
    tiles_in,
)
from .ssd_device import (
    add_up,
    are_finite,
    dot_left,
    dot_narrow,
    dot_right,
    enters,
    finite,
    largest,
    load_skip,
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
def _last_run(inputs, group, C: tl.constexpr):
    """Where the last run in a group begins; -1 if it is all padding."""
    row = group // inputs.groups
    offset = group % inputs.groups * (C.TILES * C.CHUNK)
    last = row * 0 - 1
    for i in range(C.TILES):
        tile = tile_of(inputs, row, offset // C.CHUNK + i, C)
        last = tl.maximum(last, largest(load_starts(inputs, tile, C), 0))
    return last


@triton.jit
def _decay_between(inputs, group, low, high, head, C: tl.constexpr):
    """The decay through tiles `[low, high)` of a group."""
    TILES: tl.constexpr = C.TILES
    decay = 1.0
    for i in tl.static_range(TILES):
        place = group % inputs.groups * C.TILES
        number = group // inputs.groups * inputs.tiles + place + i
        sums = sums_of(inputs.sums, number, head, C)
        here = (place + i >= place + low) & (place + i < place + high)
        decay *= tl.load(sums + 3 * C.CHUNK - 1, mask=here, other=1.0)
    return decay


@triton.jit
def _decays(sums, C: tl.constexpr, READERS_FIRST: tl.constexpr):
    """The decays from r to t in a tile, `[t, r]` or `[r, t]`, but for a factor of r.

    Returns:
        The decays, anything and perhaps inf for r > t; and what r multiplies them by,
        which products of matrices need not see: one over what its sum has lost.
    """
    lanes = tl.arange(0, C.CHUNK)
    total = tl.load(sums + lanes)
    fine = tl.load(sums + 4 * C.CHUNK + lanes)
    rest = 2.0 - fine  # fine is so near 1 that this is its inverse
    if READERS_FIRST:
        return tl.exp2(total[:, None] - total[None, :]) * fine[:, None], rest
    else:
        return tl.exp2(total[None, :] - total[:, None]) * fine[None, :], rest


@triton.jit
def _same_run(one, other):
    """Of a matrix of tokens, whether both are of one run."""
    return (one[:, None] == other[None, :]) & (one >= 0)[:, None]


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
def backward_tokens_kernel(inputs, outputs, C: tl.constexpr):  # noqa: PLR0915 (steps of one kernel)
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
    count = tiles_in(inputs, group, C)
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
        B = load_sizes(inputs, inputs.B, own.tile, its_group, C)
        behind = dot_state(B, inputs.leaving, group, head, channels, C, True)
        behind *= between
        if inputs.run_start is not None:
            last = _last_run(inputs, group, C)
            leaves = (start >= 0) & (start == last)
            behind = tl.where(leaves[:, None], behind, 0.0)
        x = load_x(inputs, own.tile, head, channels, C)
        wide_x = x.to(tl.float32)
        dt = tl.load(own.sums + CHUNK + lanes)
        after = tl.load(own.sums + 3 * CHUNK + lanes)
        acc = later + behind
        onward = dt * after * add_up(wide_x * acc, 1)
        acc *= (after * tl.load(own.sums + 4 * CHUNK + lanes))[:, None]
        # What the tile's own tokens have of each other.
        dy = load_channels(inputs.dy, own.tile, head, channels, C)
        at = scores_at(group, j * (j + 1) // 2 + j, its_group, C)
        decays, rest = _decays(own.sums, C, False)
        mixed = tl.load(inputs.scores + at) * decays
        if inputs.run_start is None:
            mixed = tl.where(lanes[:, None] <= lanes[None, :], mixed, 0.0)
            acc = _add_product(acc, mixed, None, dy, C)
        else:
            seen = _same_run(start, start) & (lanes[:, None] <= lanes[None, :])
            acc = _add_product(acc, mixed, seen, dy, C)
        direct = rest * add_up(wide_x * acc, 1)
        wide_dy = dy.to(tl.float32)
        dx = acc * (rest * dt)[:, None]
        if inputs.D is not None:
            dx += load_skip(inputs, head, channels, C) * wide_dy
        real = own.tile.real
        if inputs.run_start is not None:
            real = real & (start >= 0)
            dx = tl.where(real[:, None], dx, 0.0)
            # What shows in `direct` would reach other runs from here.
            onward = tl.where(real & finite(onward), onward, 0.0)
            direct = tl.where(real, direct, 0.0)
        number = own.number.to(tl.int64)
        if outputs.dD is not None:
            if C.D_BY_CHANNEL:
                both = tl.where(real[:, None], wide_dy * wide_x, 0.0)
                at = (number * C.H + head) * C.P + channels
                tl.store(outputs.dD + at, add_up(both, 0), mask=channels < C.P)
            else:
                both = add_up(wide_dy * wide_x, 1)
                both = add_up(tl.where(real, both, 0.0), 0)
                tl.store(outputs.dD + number * ITEMS + item, both)
        PART: tl.constexpr = C.PART or C.P_BLOCKS * P_BLOCK != C.P
        ptr = outputs.dx + (own.tile.first * (C.H * C.P) + head * C.P)
        at = lanes[:, None] * (C.H * C.P) + channels[None, :]
        mask = own.tile.real[:, None] & (channels < C.P)[None, :]
        store_tile(ptr + at, dx.to(outputs.dx.dtype.element_ty), mask, PART)
        at = number * ITEMS + item
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
    """Of flows `[t, r]` the sums of those with r before and t not before each token.

    A product with a triangle of ones sums up what is later, for each r; then no sum has
    a term in it that must cancel.
    """
    FAST: tl.constexpr = C.FAST
    PARTS: tl.constexpr = C.Y_PARTS
    lanes = tl.arange(0, C.CHUNK)
    later = tl.where(lanes[:, None] <= lanes[None, :], 1.0, 0.0).to(tl.bfloat16)
    acc = tl.full([C.CHUNK, C.CHUNK], 0, tl.float32)
    sums = dot_right(later, flow, acc, PARTS, FAST)
    return add_up(tl.where(lanes[:, None] > lanes[None, :], sums, 0.0), 1)


@triton.jit
def _pair_scales(inputs, group, i, j, item, C: tl.constexpr):
    """For tiles j < i what scales an item's flow: by t, and by r, with dt."""
    lanes = tl.arange(0, C.CHUNK)
    head = item // C.P_BLOCKS
    first = group // inputs.groups * inputs.tiles + group % inputs.groups * C.TILES
    early = sums_of(inputs.sums, first + j, head, C)
    late = sums_of(inputs.sums, first + i, head, C)
    weight = tl.load(early + 5 * C.CHUNK + lanes)
    weight *= _decay_between(inputs, group, j + 1, i, head, C)
    return tl.load(late + 2 * C.CHUNK + lanes), weight


# The cotangent of scores, summed over heads, and the flows within a group. One program:
# a pair of tiles and a block of items (B·V x blocks x G x pairs, pairs fastest).
#
# Here a matrix of tokens is `[t, r]`, so that sums over r stay within few threads.
@triton.jit
def backward_pairs_kernel(inputs, outputs, C: tl.constexpr):  # noqa: PLR0915 (steps of one kernel)
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
    if i < tiles_in(inputs, group, C):
        at = scores_at(group, pair, block.heads, C)
        scores = tl.load(inputs.scores + tl.trans(at))
        acc = tl.full([CHUNK, CHUNK], 0, tl.float32)
        out = outputs.flows + (group.to(tl.int64) * PAIRS + pair) * (ITEMS * CHUNK)
        totals = outputs.flow_totals + (group.to(tl.int64) * PAIRS + pair) * ITEMS
        row = group // inputs.groups
        place = group % inputs.groups * C.TILES
        early = tile_of(inputs, row, place + j, C)
        late = tile_of(inputs, row, place + i, C)
        if inputs.run_start is not None:
            seen = _same_run(
                load_starts(inputs, late, C), load_starts(inputs, early, C)
            )
        if i == j:
            ahead = lanes[:, None] >= lanes[None, :]
            if inputs.run_start is not None:
                ahead = ahead & seen
            for item in tl.range(block.low, block.high, num_stages=C.STAGES):
                head = item // C.P_BLOCKS
                channels = item % C.P_BLOCKS * C.P_BLOCK + p
                sums = sums_of(inputs.sums, row * inputs.tiles + place + i, head, C)
                x = load_x(inputs, early, head, channels, C)
                dy = load_channels(inputs.dy, late, head, channels, C)
                product = dot_narrow(dy, tl.trans(x), C)
                dt = tl.load(sums + CHUNK + lanes)
                decays, rest = _decays(sums, C, True)
                product *= decays * (rest * dt)[None, :]
                product = tl.where(ahead, product, 0.0)
                acc += product
                # The diagonal passes no token.
                flow = tl.where(lanes[:, None] == lanes[None, :], 0.0, product * scores)
                if inputs.run_start is not None:
                    flow = tl.where(seen & finite(flow), flow, 0.0)
                tl.store(out + item * CHUNK + lanes, _passing(flow, C))
                tl.store(totals + item, 0.0)  # nothing passes the tile
        else:
            # What is needed next is on its way while this is worked on.
            since, weight = _pair_scales(inputs, group, i, j, block.low, C)
            for item in tl.range(block.low, block.high, num_stages=C.STAGES):
                following = tl.minimum(item + 1, block.high - 1)
                scales = _pair_scales(inputs, group, i, j, following, C)
                head = item // C.P_BLOCKS
                channels = item % C.P_BLOCKS * C.P_BLOCK + p
                x = load_x(inputs, early, head, channels, C)
                dy = load_channels(inputs.dy, late, head, channels, C)
                product = dot_narrow(dy, tl.trans(x), C)
                product *= since[:, None] * weight[None, :]
                flow = product * scores
                if inputs.run_start is not None:
                    product = tl.where(seen, product, 0.0)
                    flow = tl.where(seen & finite(flow), flow, 0.0)
                acc += product
                flows = add_up(flow, 1)
                tl.store(out + item * CHUNK + lanes, flows)
                tl.store(totals + item, add_up(flows, 0))
                since, weight = scales
        # The program's number first, since what is 1 is no tensor.
        step = block.block.to(tl.int64) * (inputs.rows * inputs.groups)
        step *= C.G * PAIRS * CHUNK * CHUNK
        tl.store(outputs.dscores + step + at, acc)


class Span(NamedTuple):
    """HEAD_TILES tiles of a group, one behind the other.

    Attributes:
        tile: their tokens; those of tiles that the group has not are not real.
        number: of the first tile among all rows'; `first`, in its group.
        inner: `[HEAD_TILES·c]`, the tile of each token, from the first one on.
        lane: likewise, the token's place in its tile.
        there: likewise, whether the group has this tile.
    """

    tile: Any
    number: Any
    first: Any
    inner: Any
    lane: Any
    there: Any


@triton.jit
def _span(inputs, group, first, C: tl.constexpr):
    """The `Span` that begins at this tile of a group."""
    lanes = tl.arange(0, C.HEAD_TILES * C.CHUNK)
    inner = lanes // C.CHUNK
    row = group // inputs.groups
    place = group % inputs.groups * C.TILES + first
    there = first + inner < tiles_in(inputs, group, C)
    tile = tile_of(inputs, row, place, C, C.HEAD_TILES)
    tile = Tile(tile.first, tile.real & there)
    number = row * inputs.tiles + place
    return Span(tile, number, first, inner, lanes % C.CHUNK, there)


@triton.jit
def _scale(inputs, own, block, item, C: tl.constexpr, READ: tl.constexpr):
    """What scales an item's products with a state, for each token.

    READ: the decays from the group's beginning; else dt and the decays to its end.
    """
    TILES: tl.constexpr = C.TILES
    ROW: tl.constexpr = 2 if READ else 5
    head = item // C.P_BLOCKS
    count = tiles_in(inputs, block.group, C)
    sums = sums_of(inputs.sums, own.number + own.inner, head, C)
    scale = tl.load(sums + ROW * C.CHUNK + own.lane, mask=own.there, other=0.0)
    for i in tl.static_range(TILES):
        sums = sums_of(inputs.sums, own.number - own.first + i, head, C)
        decay = tl.load(sums + 3 * C.CHUNK - 1, mask=i < count, other=1.0)
        between = own.first + own.inner > i if READ else own.first + own.inner < i
        scale = tl.where(between, scale * decay, scale)
    return scale


@triton.jit
def _store_flow(ptr, totals, own, item, count, flow, C: tl.constexpr):
    """Writes a flow summed over the tokens of each tile; to `ptr`, that of each token.

    Args:
        ptr: None, if nobody wants these.
        count: the group's tiles.
        flow: `[HEAD_TILES·c]`.
    """
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    if ptr is not None:
        at = (own.number + own.inner).to(tl.int64) * ITEMS + item
        tl.store(ptr + at * C.CHUNK + own.lane, flow, mask=own.there)
    inner = tl.arange(0, C.HEAD_TILES)
    at = (own.number + inner).to(tl.int64) * ITEMS + item
    total = add_up(tl.reshape(flow, [C.HEAD_TILES, C.CHUNK]), 1)
    tl.store(totals + at, total, mask=own.first + inner < count)


@triton.jit
def _write_read(inputs, outputs, block, first, C: tl.constexpr):
    """What dC of a span has through the state before its group; and the flows."""
    own = _span(inputs, block.group, first, C)
    count = tiles_in(inputs, block.group, C)
    read = load_sizes(inputs, inputs.C, own.tile, block.heads, C).to(tl.float32)
    acc = tl.full([C.HEAD_TILES * C.CHUNK, C.K_BLOCK], 0, tl.float32)
    taken = None
    if inputs.run_start is not None:
        offset = block.group % inputs.groups * (C.TILES * C.CHUNK)
        taken = enters(load_starts(inputs, own.tile, C), offset)
    high = block.high
    if inputs.states is None:  # no state comes before a row
        high = tl.where(block.group % inputs.groups == 0, block.low, high)
    scale = _scale(inputs, own, block, block.low, C, True)
    for item in tl.range(block.low, high, num_stages=C.STAGES):
        following = tl.minimum(item + 1, high - 1)
        next_scale = _scale(inputs, own, block, following, C, True)
        head = item // C.P_BLOCKS
        channels = item % C.P_BLOCKS * C.P_BLOCK + tl.arange(0, C.P_BLOCK)
        dy = load_channels(inputs.dy, own.tile, head, channels, C)
        product = dot_state(dy, inputs.entering, block.group, head, channels, C, False)
        product *= scale[:, None]
        flow = add_up(product * read, 1)
        if taken is not None:
            product = tl.where(taken[:, None], product, 0.0)
            flow = tl.where(taken & finite(flow), flow, 0.0)
        acc += product
        totals = outputs.arriving_totals
        _store_flow(outputs.arriving, totals, own, item, count, flow, C)
        scale = next_scale
    for item in range(high, block.high):
        none = own.lane * 0.0
        totals = outputs.arriving_totals
        _store_flow(outputs.arriving, totals, own, item, count, none, C)
    _store_sizes(outputs.dC, inputs, own, block, acc, C)


@triton.jit
def _write_written(inputs, outputs, block, first, C: tl.constexpr):
    """What dB of a span has through the state behind its group; and the flows."""
    own = _span(inputs, block.group, first, C)
    count = tiles_in(inputs, block.group, C)
    B = load_sizes(inputs, inputs.B, own.tile, block.heads, C).to(tl.float32)
    acc = tl.full([C.HEAD_TILES * C.CHUNK, C.K_BLOCK], 0, tl.float32)
    taken = None
    if inputs.run_start is not None:
        start = load_starts(inputs, own.tile, C)
        taken = (start >= 0) & (start == _last_run(inputs, block.group, C))
    high = block.high
    if inputs.dfinal is None:  # nobody looks at the state behind a row
        at_end = block.group % inputs.groups == inputs.groups - 1
        high = tl.where(at_end, block.low, high)
    scale = _scale(inputs, own, block, block.low, C, False)
    for item in tl.range(block.low, high, num_stages=C.STAGES):
        following = tl.minimum(item + 1, high - 1)
        next_scale = _scale(inputs, own, block, following, C, False)
        head = item // C.P_BLOCKS
        channels = item % C.P_BLOCKS * C.P_BLOCK + tl.arange(0, C.P_BLOCK)
        x = load_x(inputs, own.tile, head, channels, C)
        product = dot_state(x, inputs.leaving, block.group, head, channels, C, False)
        product *= scale[:, None]
        flow = add_up(product * B, 1)
        if taken is not None:
            product = tl.where(taken[:, None], product, 0.0)
            flow = tl.where(taken & finite(flow), flow, 0.0)
        acc += product
        _store_flow(None, outputs.dropped, own, item, count, flow, C)
        scale = next_scale
    for item in range(high, block.high):
        none = own.lane * 0.0
        _store_flow(None, outputs.dropped, own, item, count, none, C)
    _store_sizes(outputs.dB, inputs, own, block, acc, C)


@triton.jit
def _store_sizes(ptr, inputs, own, block, values, C: tl.constexpr):
    """Writes `[HEAD_TILES·c, K_BLOCK]` of a block's dB or dC."""
    k = tl.arange(0, C.K_BLOCK)
    first = block.block.to(tl.int64) * (inputs.rows * inputs.row_len)
    first += own.tile.first
    at = (first + tl.arange(0, C.HEAD_TILES * C.CHUNK))[:, None] * (C.G * C.K)
    at += (block.heads * C.K + k)[None, :]
    mask = own.tile.real[:, None] & (k < C.K)[None, :]
    tl.store(ptr + at, values, mask=mask)


@triton.jit
def _write_through(inputs, outputs, block, C: tl.constexpr):
    """The flow from the state before a group to that behind it."""
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    count = tiles_in(inputs, block.group, C)
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
# program: dC or dB of a span, or the flow through the group, for a block of items
# (B·V x blocks x G x (2 spans + 1), these fastest, which read the same states).
@triton.jit
def backward_heads_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    SPANS: tl.constexpr = (C.TILES + C.HEAD_TILES - 1) // C.HEAD_TILES
    kind = program % (2 * SPANS + 1)
    block = _block(program // (2 * SPANS + 1), C)
    count = tiles_in(inputs, block.group, C)
    if kind < 2 * SPANS:
        first = kind % SPANS * C.HEAD_TILES
        if first < count:
            if kind < SPANS:
                _write_read(inputs, outputs, block, first, C)
            else:
                _write_written(inputs, outputs, block, first, C)
    else:
        _write_through(inputs, outputs, block, C)
