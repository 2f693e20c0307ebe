"""The first kernels of the SSD's gradient: sums, scores and states. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ssd_device import (
    add_run,
    add_tokens,
    add_up,
    cut,
    dot_exact,
    dot_narrow,
    dot_right,
    enters,
    exponents,
    finite,
    largest,
    load_bias,
    load_tile,
    power_of_sum,
    running_sum,
    state_tile,
    step_size,
)


class Tile(NamedTuple):
    """The tokens of a tile.

    Attributes:
        first: the first one's number among all rows', int64.
        real: `[c]`, which of them there are.
    """

    first: Any
    real: Any


@triton.jit
def tile_of(inputs, row, tile, C: tl.constexpr, COUNT: tl.constexpr = 1):
    """The tokens of COUNT tiles of a row, from this one on, as far as there are any."""
    offset = tile * C.CHUNK
    first = row.to(tl.int64) * inputs.row_len + offset
    return Tile(first, tl.arange(0, C.CHUNK * COUNT) < inputs.row_len - offset)


@triton.jit
def tiles_in(inputs, group, C: tl.constexpr):
    """How many tiles a group has."""
    return tl.minimum(inputs.tiles - group % inputs.groups * C.TILES, C.TILES)


@triton.jit
def load_channels(ptr, tile, head, channels, C: tl.constexpr):
    """`[c, P_BLOCK]` of x or dy."""
    PART: tl.constexpr = C.PART or C.P_BLOCKS * C.P_BLOCK != C.P
    ptr = ptr + (tile.first * (C.H * C.P) + head * C.P)
    lanes = tl.arange(0, tile.real.shape[0])
    at = lanes[:, None] * (C.H * C.P) + channels[None, :]
    mask = tile.real[:, None] & (channels < C.P)[None, :]
    return load_tile(ptr + at, mask, PART)


@triton.jit
def load_x(inputs, tile, head, channels, C: tl.constexpr):
    """`[c, P_BLOCK]` of x; with segments NaN and inf are zeros, see `load_sizes`."""
    x = load_channels(inputs.x, tile, head, channels, C)
    if inputs.run_start is not None:
        x = tl.where(finite(x), x, 0.0)
    return x


@triton.jit
def load_sizes(inputs, ptr, tile, group, C: tl.constexpr):
    """`[c, K_BLOCK]` of B or C.

    With segments NaN and inf are zeros, as in `xla.ssd`: in a product they would reach
    the tokens of other runs. Outputs of their own run are NaN, and have no gradients.
    """
    PART: tl.constexpr = C.PART or C.K_BLOCK > C.K
    k = tl.arange(0, C.K_BLOCK)
    ptr = ptr + (tile.first * (C.G * C.K) + group * C.K)
    lanes = tl.arange(0, tile.real.shape[0])
    at = lanes[:, None] * (C.G * C.K) + k[None, :]
    mask = tile.real[:, None] & (k < C.K)[None, :]
    sizes = load_tile(ptr + at, mask, PART)
    if inputs.run_start is not None:
        sizes = tl.where(finite(sizes), sizes, 0.0)
    return sizes


@triton.jit
def load_starts(inputs, tile, C: tl.constexpr):
    """Where the runs of a tile's tokens begin; -1 of padding."""
    at = tile.first + tl.arange(0, tile.real.shape[0])
    return tl.load(inputs.run_start + at, mask=tile.real, other=-1)


@triton.jit
def sums_of(sums_ptr, number, head, C: tl.constexpr):
    """A pointer to `[6, c]` of `SsdBackwardOutputs.sums` of the tile of this number."""
    return sums_ptr + (number.to(tl.int64) * C.H + head) * (6 * C.CHUNK)


@triton.jit
def decay_of(sums, C: tl.constexpr):
    """The decay of a whole tile."""
    return tl.load(sums + 3 * C.CHUNK - 1)


@triton.jit
def scores_at(number, pair, group, C: tl.constexpr):
    """Where the pair's `[r, t]` is in `SsdBackwardOutputs.scores`."""
    PAIRS: tl.constexpr = C.TILES * (C.TILES + 1) // 2
    lanes = tl.arange(0, C.CHUNK)
    tile = (number.to(tl.int64) * C.G + group) * PAIRS + pair
    return tile * (C.CHUNK * C.CHUNK) + (lanes[:, None] * C.CHUNK + lanes[None, :])


@triton.jit
def _write_sums(inputs, outputs, number, block, C: tl.constexpr):
    """The sums of a tile for a block of heads, added up in float64."""
    row = number // inputs.tiles
    tile = tile_of(inputs, row, number % inputs.tiles, C)
    heads = block * C.H_BLOCK + tl.arange(0, C.H_BLOCK)
    in_h = (heads < C.H)[None, :]
    mask = tile.real[:, None] & in_h
    lanes = tl.arange(0, C.CHUNK)
    at = (tile.first + lanes)[:, None] * C.H + heads[None, :]
    dt = tl.load(inputs.dt + at, mask=mask, other=0.0)
    dt = step_size(dt, load_bias(inputs, heads[None, :], C), C)
    if inputs.run_start is not None:
        mask = mask & (load_starts(inputs, tile, C) >= 0)[:, None] & finite(dt)
    A = tl.load(inputs.A + heads, mask=heads < C.H, other=0.0).to(tl.float64)
    dt, steps = exponents(tl.where(mask, dt, 0.0), A[None, :])
    total = running_sum(steps)
    after = add_up(steps, 0)[None, :] - total
    rounded = total.to(tl.float32)
    lost = (total - rounded.to(tl.float64)).to(tl.float32)
    ROWS: tl.constexpr = 6 * C.CHUNK
    out = outputs.sums + number.to(tl.int64) * (C.H * ROWS)
    out = out + (heads[None, :] * ROWS + lanes[:, None])
    tl.store(out, rounded, mask=in_h)
    tl.store(out + C.CHUNK, dt, mask=in_h)
    tl.store(out + 2 * C.CHUNK, power_of_sum(total), mask=in_h)
    remains = power_of_sum(after)
    tl.store(out + 3 * C.CHUNK, remains, mask=in_h)
    tl.store(out + 4 * C.CHUNK, tl.exp2(lost), mask=in_h)
    tl.store(out + 5 * C.CHUNK, dt * remains, mask=in_h)


@triton.jit
def pair_of(pair):
    """The tiles i and j <= i of a pair; i is 4 behind the last."""
    i = (pair >= 1).to(tl.int32) + (pair >= 3).to(tl.int32)
    i += (pair >= 6).to(tl.int32) + (pair >= 10).to(tl.int32)
    return i, pair - i * (i + 1) // 2


@triton.jit
def _write_scores(inputs, outputs, number, pair, group, C: tl.constexpr):
    row = number // inputs.groups
    late, early = pair_of(pair)
    first = number % inputs.groups * C.TILES
    if first + late < inputs.tiles:
        B = load_sizes(
            inputs, inputs.B, tile_of(inputs, row, first + early, C), group, C
        )
        read = load_sizes(
            inputs, inputs.C, tile_of(inputs, row, first + late, C), group, C
        )
        scores = dot_narrow(B, tl.trans(read), C)
        tl.store(outputs.scores + scores_at(number, pair, group, C), scores)


# What all heads of a group share, and what is made of dt alone: a program makes the
# sums of a tile for H_BLOCK heads (B·L x H / H_BLOCK programs), or the scores of a pair
# of tiles (B·V x G x pairs).
@triton.jit
def backward_prepare_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    BLOCKS: tl.constexpr = (C.H + C.H_BLOCK - 1) // C.H_BLOCK
    PAIRS: tl.constexpr = C.TILES * (C.TILES + 1) // 2
    sums = inputs.rows * inputs.tiles * BLOCKS
    if program < sums:
        _write_sums(inputs, outputs, program // BLOCKS, program % BLOCKS, C)
    else:
        i = program - sums
        _write_scores(
            inputs, outputs, i // (PAIRS * C.G), i % PAIRS, i // PAIRS % C.G, C
        )


@triton.jit
def _store_planes(ptr, state, number, head, channels, C: tl.constexpr):
    """Writes a state of `entering` or `leaving`; number is that of the group."""
    at, mask = state_tile(number * C.PLANES, head, channels, C)
    if C.TERMS == 0:
        tl.store(ptr + at, state, mask=mask)
    elif C.TERMS == 1:
        tl.store(ptr + at, state.to(tl.bfloat16), mask=mask)
    else:
        upper, rest = cut(state)
        tl.store(ptr + at, upper, mask=mask)
        at, mask = state_tile(number * C.PLANES + 1, head, channels, C)
        tl.store(ptr + at, rest.to(tl.bfloat16), mask=mask)


@triton.jit
def load_plane(ptr, number, plane, head, channels, C: tl.constexpr):
    """`[P_BLOCK, K_BLOCK]` of a state of `entering` or `leaving`."""
    at, mask = state_tile(number * C.PLANES + plane, head, channels, C)
    PART: tl.constexpr = C.P_BLOCKS * C.P_BLOCK != C.P or C.K_BLOCK != C.K
    return load_tile(ptr + at, mask, PART)


@triton.jit
def load_planes(ptr, number, head, channels, C: tl.constexpr):
    """The sum of all planes, in float32."""
    state = load_plane(ptr, number, 0, head, channels, C).to(tl.float32)
    if C.TERMS == 2:
        state += load_plane(ptr, number, 1, head, channels, C).to(tl.float32)
    return state


@triton.jit
def dot_state(a, ptr, number, head, channels, C: tl.constexpr, TRANS: tl.constexpr):
    """`a @ state`, or the transposed state, for a narrow `a`."""
    FAST: tl.constexpr = C.FAST
    Y_PARTS: tl.constexpr = C.Y_PARTS
    state = load_plane(ptr, number, 0, head, channels, C)
    if TRANS:
        state = tl.trans(state)
    acc = tl.full([a.shape[0], state.shape[1]], 0, tl.float32)
    if C.TERMS == 0:
        return dot_right(a, state, acc, Y_PARTS, FAST)
    else:
        acc = dot_exact(a, state, acc, FAST)
        if C.TERMS == 2:
            rest = load_plane(ptr, number, 1, head, channels, C)
            if TRANS:
                rest = tl.trans(rest)
            acc = dot_exact(a, rest, acc, FAST)
        return acc


@triton.jit
def _first_state(ptr, row, head, channels, k, C: tl.constexpr):
    """A state of a row, from element k on, or zeros if there are none."""
    if ptr is not None:
        at, mask = state_tile(row, head, channels, C)
        return tl.load(ptr + k + at, mask=mask, other=0.0).to(tl.float32)
    else:
        return tl.full([channels.shape[0], C.K_BLOCK], 0, tl.float32)


@triton.jit
def state_before(state, decay, dy, since, read, start, offset, C: tl.constexpr):
    """The cotangent of the state before a tile, from that of the one behind it.

    Args:
        decay: of the tile; `since`, to each token; `read`, C.
        start: where the tokens' runs begin; None without segments.
        offset: the first token's place in the row.
    """
    if start is None:
        return add_tokens(state * decay, dy, since, read, C)
    else:
        last = largest(start, 0)  # the latest run begins latest
        through = (last < 0) | enters(last, offset)
        state = tl.where(through, state * decay, 0.0)
        return add_run(state, dy, since, read, enters(start, offset), C)


@triton.jit
def _state_after(state, decay, x, weight, B, start, offset, C: tl.constexpr):
    """The state behind a tile; the arguments are like those of `state_before`."""
    if start is None:
        return add_tokens(state * decay, x, weight, B, C)
    else:
        last = largest(start, 0)
        through = (last < 0) | enters(last, offset)
        state = tl.where(through, state * decay, 0.0)
        return add_run(state, x, weight, B, (start >= 0) & (start == last), C)


@triton.jit
def _step(
    inputs, state, row, i, head, channels, k, C: tl.constexpr, BACK: tl.constexpr
):
    """The state behind tile i from that before; BACK, their cotangents, backwards.

    Args:
        state: K_BLOCK elements of K, from element k on.
    """
    lanes = tl.arange(0, C.CHUNK)
    group = head // (C.H // C.G)
    tile = tile_of(inputs, row, i, C)
    sums = sums_of(inputs.sums, row * inputs.tiles + i, head, C)
    decay = decay_of(sums, C)
    offset = i * C.CHUNK
    start = None
    if inputs.run_start is not None:
        start = load_starts(inputs, tile, C)
    if BACK:
        dy = load_channels(inputs.dy, tile, head, channels, C)
        read = load_sizes(inputs, inputs.C + k, tile, group, C)
        since = tl.load(sums + 2 * C.CHUNK + lanes)
        return state_before(state, decay, dy, since, read, start, offset, C)
    else:
        x = load_x(inputs, tile, head, channels, C)
        B = load_sizes(inputs, inputs.B + k, tile, group, C)
        weight = tl.load(sums + 5 * C.CHUNK + lanes)
        return _state_after(state, decay, x, weight, B, start, offset, C)


# The states before groups, and the cotangents of those behind: a program goes through a
# row for K_BLOCK of an item's K elements, forwards or backwards, with the state in its
# registers (B x 2 x I x K / K_BLOCK, these fastest, which read the same x or dy). Here
# K_BLOCK divides K, or is no less.
@triton.jit
def backward_states_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    ITEMS: tl.constexpr = C.H * C.P_BLOCKS
    PARTS: tl.constexpr = (C.K + C.K_BLOCK - 1) // C.K_BLOCK
    k = program % PARTS * C.K_BLOCK
    program = program // PARTS
    item = program % ITEMS
    back = program // ITEMS % 2
    row = program // (2 * ITEMS)
    head = item // C.P_BLOCKS
    channels = item % C.P_BLOCKS * C.P_BLOCK + tl.arange(0, C.P_BLOCK)
    count = inputs.tiles
    first = row * inputs.groups
    if back == 0:
        state = _first_state(inputs.states, row, head, channels, k, C)
        # What the last group adds is no state before a group.
        last = (inputs.groups - 1) * C.TILES
        for i in tl.range(0, last, num_stages=C.STAGES):
            if i % C.TILES == 0:
                number = first + i // C.TILES
                _store_planes(outputs.entering + k, state, number, head, channels, C)
            state = _step(inputs, state, row, i, head, channels, k, C, False)
        number = first + inputs.groups - 1
        _store_planes(outputs.entering + k, state, number, head, channels, C)
    else:
        state = _first_state(inputs.dfinal, row, head, channels, k, C)
        left = 0
        if outputs.dstates is None:  # then what goes behind the first group suffices
            left = C.TILES
        for done in tl.range(0, count - left, num_stages=C.STAGES):
            i = count - 1 - done
            if (i % C.TILES == C.TILES - 1) | (done == 0):
                number = first + i // C.TILES
                _store_planes(outputs.leaving + k, state, number, head, channels, C)
            state = _step(inputs, state, row, i, head, channels, k, C, True)
        if outputs.dstates is None:
            _store_planes(outputs.leaving + k, state, first, head, channels, C)
        else:
            at, mask = state_tile(row, head, channels, C)
            tl.store(outputs.dstates + k + at, state, mask=mask)
