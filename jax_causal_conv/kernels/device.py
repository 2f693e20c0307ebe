"""Device functions shared by the conv's kernels, and what they hand to each other.

Conventions: rows of the input are C.X elements apart, rows of a part of the output as
many as its `Rows` say, all others C.D. A pointer to a row of the input, or of a part of
the output, points to where channel 0 is or would be. Pointers to rows are computed in
64 bits, so that no product of sizes overflows. C is a static record of constants, whose
fields have capital letters. No JAX here.

With a dilation, tokens that are C.DILATION apart see each other alone: a run of tokens
is as many walks, number `phase` over tokens phase, phase + C.DILATION and so on, each a
conv without dilation. Windows, steps and segments are those of one walk. There is a
single walk, of phase 0, where there is no dilation.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import activate


@dataclass(frozen=True)
class Constants:
    """What is static about a launch of a conv's kernel, C to the kernels.

    Attributes:
        W: taps of the filter.
        D: channels.
        X: elements of a row of x.
        OFFSET: the first of them that is a channel.
        SPLIT: channels of each part of the output.
        COL_BLOCKS: blocks of channels, none of which spans two parts.
        BLOCK_N: channels of a block.
        GROUP: rows of an unrolled step of the loop over tokens.
        WARPS: warps a program.
        PAIRS: channels are bfloat16, and parts and rows begin and end at even ones, so
            that two of them are one word.
        ACTIVATION: its canonical name, or None.
        L: rows of a slot.
        L_BLOCK, SLOT_N: rows and channels of a slot that are moved at once.
        WINDOW_IS_SLOT: whether the last W-1 rows that a program met are, to the bit,
            what the slot becomes.
        PAD_SLOT_ID: the slot number that means "skip".
        SCAN: offsets that a program looks at together.
        Q: tokens of each row of a decode step.
        DILATION: tokens from one tap to the next.
        RESIDUAL: whether x is added to the output.
        AHEAD: whether a group's rows are loaded while the one before it is filtered.
        FAST: whether to use CUDA spellings, which Triton's interpreter does not know;
            each has a plain twin beside it.
    """

    W: int
    D: int
    X: int
    OFFSET: int
    SPLIT: tuple[int, ...]
    COL_BLOCKS: int
    BLOCK_N: int
    GROUP: int
    WARPS: int
    PAIRS: bool
    ACTIVATION: str | None
    L: int = 0
    L_BLOCK: int = 0
    SLOT_N: int = 0
    WINDOW_IS_SLOT: bool = False
    PAD_SLOT_ID: int = 0
    SCAN: int = 0
    Q: int = 0
    DILATION: int = 1
    RESIDUAL: bool = False
    AHEAD: bool = True
    FAST: bool = True

    @property
    def REACH(self) -> int:  # a constant like the others
        """Tokens before its own that the filter spans."""
        return (self.W - 1) * self.DILATION


class Block(NamedTuple):
    """The channels of one program.

    Attributes:
        first: the first of C.BLOCK_N channels.
        limit: those from here on are not the program's: D, or where a part ends.
        cols: all of them, `[C.BLOCK_N]`.
    """

    first: Any
    limit: Any
    cols: Any


class Rows(NamedTuple):
    """Rows in memory.

    Attributes:
        ptr: to where channel 0 of the first one is, or would be.
        stride: elements from one to the next.
    """

    ptr: Any
    stride: Any


class Filter(NamedTuple):
    """A filter, or the sums for its gradient.

    Attributes:
        taps: W float32 rows, oldest first.
        bias: a float32 row.
    """

    taps: Any
    bias: Any


class Store(NamedTuple):
    """Where a state goes.

    Attributes:
        slot: its number; `ptr`, to its first row.
        end: the state is that after so many tokens of a sequence.
        live: whether it is stored at all; None: it is. (No function returns such a
            record: Triton 3.6 cannot.)
    """

    slot: Any
    ptr: Any
    end: Any
    live: Any


class Segments(NamedTuple):
    """Where a walk over the tokens of a row stands among its documents.

    Attributes:
        ptr: to the segment id of the token that has number 0; the walk numbers those
            behind it, and sets ptr on now and then: see `count_from`.
        last: the segment id of the last token.
        visible: how many tokens before the last one are of its run, at most W-1.

    With a dilation, last and visible are about the tokens of one walk, and ids must
    differ from run to run, since those of the tokens between are not looked at.
    """

    ptr: Any
    last: Any
    visible: Any


class Offsets(NamedTuple):
    """Where the sequences of a packed batch begin.

    Attributes:
        ptr: to `(num_seqs + 1,)` int32 of any values.
        num_tokens: T, to which they are clipped.
        num_seqs: N.
    """

    ptr: Any
    num_tokens: Any
    num_seqs: Any


@triton.jit
def channel_block(parts, C: tl.constexpr):
    """The channels of this program, and the part they lie in.

    Blocks are counted part by part, so that none spans two of them. Only scalars depend
    on the part, so that the same code serves all parts, and of the choice nothing is
    left where there is a single one.

    Args:
        parts: a tuple of pointers to the parts `(rows, C.SPLIT[i])` of an array.

    Returns:
        The `Block`, and the `Rows` of its part.
    """
    SPLIT: tl.constexpr = C.SPLIT
    block = tl.program_id(0) % C.COL_BLOCKS
    first = block * C.BLOCK_N
    limit = tl.cast(SPLIT[0], tl.int32)
    ptr = parts[0]
    stride = tl.cast(SPLIT[0], tl.int32)
    channels = 0
    blocks = 0
    for i in tl.static_range(1, len(SPLIT)):
        channels += SPLIT[i - 1]
        blocks += (SPLIT[i - 1] + C.BLOCK_N - 1) // C.BLOCK_N
        here = block >= blocks
        first = tl.where(here, channels + (block - blocks) * C.BLOCK_N, first)
        limit = tl.where(here, channels + SPLIT[i], limit)
        ptr = tl.where(here, parts[i] - channels, ptr)
        stride = tl.where(here, SPLIT[i], stride)
    cols = first + tl.arange(0, C.BLOCK_N)
    return Block(first, limit, cols), Rows(ptr, stride.to(tl.int64))


@triton.jit
def only_if(condition, block):
    """The block, or one that has no channels."""
    return Block(block.first, tl.where(condition, block.limit, 0), block.cols)


@triton.jit
def load_plain(row_ptr, block):
    """The channels of a row; zeros for those that are not the block's."""
    mask = block.cols < block.limit
    return tl.load(row_ptr + block.cols, mask=mask, other=0.0)


@triton.jit
def load_row(row_ptr, block, C: tl.constexpr):
    """`load_plain` of x or the like, for `widen`.

    Pairs are loaded, and kept until they are needed, as 32-bit words.
    """
    if C.PAIRS:
        words = block.first // 2 + tl.arange(0, C.BLOCK_N // 2)
        word_ptr = row_ptr.to(tl.pointer_type(tl.int32))
        return tl.load(word_ptr + words, mask=words < block.limit // 2, other=0)
    else:
        return load_plain(row_ptr, block)


@triton.jit
def widen(row, C: tl.constexpr):
    """What `load_row` has loaded, as float32: of a pair, each is one instruction."""
    if C.PAIRS:
        low = (row << 16).to(tl.float32, bitcast=True)
        high = (row & -65536).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(C.BLOCK_N)
    else:
        return row.to(tl.float32)


@triton.jit
def load_rows(row_ptr, stride, wanted, block, C: tl.constexpr):
    """`load_row` of GROUP rows, as a tuple; no load is issued unless `wanted`."""
    GROUP: tl.constexpr = C.GROUP  # Triton's static_range asks for a name
    block = only_if(wanted, block)
    rows = ()
    for g in tl.static_range(GROUP):
        rows = rows + (load_row(row_ptr + g * stride, block, C),)
    return rows


@triton.jit
def load_filter(weight_ptr, bias_ptr, block, C: tl.constexpr):
    """The `Filter` of a block's channels; a bias that is None is zero.

    A channel's taps lie side by side. Where they fill words of 8 bytes they are read
    as such: strided 2-byte reads would keep a short row busier than its own data.
    """
    W: tl.constexpr = C.W
    BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    INT: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    cols = block.cols
    mask = cols < block.limit
    taps = ()
    if (W * BITS) % 64 == 0:
        PER_WORD: tl.constexpr = 64 // BITS
        WORDS: tl.constexpr = W // PER_WORD
        word_ptr = weight_ptr.to(tl.pointer_type(tl.int64))
        for j in tl.static_range(WORDS):
            word = tl.load(word_ptr + cols.to(tl.int64) * WORDS + j, mask=mask, other=0)
            for i in tl.static_range(PER_WORD):
                w = (word >> (BITS * i)).to(INT)
                w = w.to(weight_ptr.dtype.element_ty, bitcast=True)
                taps = taps + (w.to(tl.float32),)
    else:
        for k in tl.static_range(W):
            w = tl.load(weight_ptr + cols.to(tl.int64) * W + k, mask=mask, other=0.0)
            taps = taps + (w.to(tl.float32),)
    bias = tl.full(cols.shape, 0, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return Filter(taps, bias)


@triton.jit
def segments_before(ptr, first, phase, C: tl.constexpr):
    """The `Segments` before token `first + phase` of a row.

    Args:
        ptr: to the id of that token.
        first: 0, where the run of token 0 sees all the history; or at least C.REACH.
    """
    W: tl.constexpr = C.W
    back = tl.where(first > 0, C.DILATION, 0)
    last = tl.load(ptr - tl.where(first > 0, C.DILATION, phase))
    same = first > 0
    visible = tl.where(same, 0, W - 1)
    for j in tl.static_range(2, W):
        same = same & (tl.load(ptr - j * back) == last)
        visible += tl.where(same, 1, 0)
    return Segments(ptr, last, visible)


@triton.jit
def next_token(segments, number, C: tl.constexpr):
    """The `Segments` one token later; that token has this number."""
    segment = tl.load(segments.ptr + number * C.DILATION)
    same = segment == segments.last
    visible = tl.where(same, tl.minimum(segments.visible + 1, C.W - 1), 0)
    return Segments(segments.ptr, segment, visible)


@triton.jit
def count_from(segments, number, C: tl.constexpr):
    """The same `Segments`, in which the token of this number has number 0."""
    ptr = segments.ptr + number * C.DILATION
    return Segments(ptr, segments.last, segments.visible)


@triton.jit
def within_reach(window, reach, C: tl.constexpr):
    """The W-1 rows before a token, those further back than `reach` tokens as zeros."""
    W: tl.constexpr = C.W
    rows = ()
    for k in tl.static_range(W - 1):
        rows = rows + (tl.where(reach >= W - 1 - k, window[k], 0.0),)
    return rows


@triton.jit
def preactivation(rows, filter, C: tl.constexpr):
    """`bias + Σ_k taps[k] · rows[k]` in float32."""
    W: tl.constexpr = C.W
    z = filter.bias
    for k in tl.static_range(W):
        z = tl.fma(rows[k], filter.taps[k], z)
    return z


@triton.jit
def filter_row(window, x, filter, segments, C: tl.constexpr):
    """One row of output in float32; zeros for padding.

    Args:
        window: the W-1 float32 rows before row x, oldest first.
        segments: as of this row, or None.
    """
    if segments is not None:
        window = within_reach(window, segments.visible, C)
    y = activate(preactivation(window + (x,), filter, C), C)
    if C.RESIDUAL:
        y += x
    if segments is not None:
        y = tl.where(segments.last >= 0, y, 0.0)
    return y


@triton.jit
def convolve_rows(row_ptr, out, window, filter, segments, rows, block, C: tl.constexpr):
    """Filters `rows` rows of a walk, the window rolling in registers.

    Each element of x is loaded and converted once. Whole groups of GROUP rows first,
    the next group's loads in flight while one is filtered; with GROUP a multiple of W
    the window needs no register moves.

    Args:
        row_ptr: scalar pointer to the first row of x.
        out: `Rows` of the walk's output, the first one first.
        window: tuple of the W-1 float32 rows before it, oldest first.
        segments: `Segments` before the first row, or None.

    Returns:
        The window behind the last row.
    """
    X: tl.constexpr = C.X * C.DILATION
    GROUP: tl.constexpr = C.GROUP
    cols = block.cols
    mask = cols < block.limit
    out_ptrs = out.ptr + cols
    if GROUP > 1:
        groups = rows // GROUP
        if C.AHEAD:
            fresh = load_rows(row_ptr, X, groups > 0, block, C)
        for i in range(groups):
            if C.AHEAD:
                row_ptr += GROUP * X
                ahead = load_rows(row_ptr, X, i + 1 < groups, block, C)
            else:
                fresh = load_rows(row_ptr, X, True, block, C)
                row_ptr += GROUP * X
            for g in tl.static_range(GROUP):
                x = widen(fresh[g], C)
                if segments is not None:
                    segments = next_token(segments, g, C)
                y = filter_row(window, x, filter, segments, C)
                y = y.to(out.ptr.dtype.element_ty)
                tl.store(out_ptrs + g * out.stride, y, mask=mask)
                window = (window + (x,))[1:]
            if C.AHEAD:
                fresh = ahead
            out_ptrs += GROUP * out.stride
            if segments is not None:
                segments = count_from(segments, GROUP, C)
    # Here a row is loaded while the one before it is filtered. The first one's load is
    # issued at once, beside those of the window.
    rest = rows % GROUP if GROUP > 1 else rows
    fresh_row = load_row(row_ptr, only_if(rest > 0, block), C)
    for i in range(rest):
        row_ptr += X
        ahead_row = load_row(row_ptr, only_if(i + 1 < rest, block), C)
        x = widen(fresh_row, C)
        if segments is not None:
            segments = next_token(segments, 0, C)
        y = filter_row(window, x, filter, segments, C)
        tl.store(out_ptrs, y.to(out.ptr.dtype.element_ty), mask=mask)
        window = (window + (x,))[1:]
        fresh_row = ahead_row
        out_ptrs += out.stride
        if segments is not None:
            segments = count_from(segments, 1, C)
    return window


@triton.jit
def zero_rows(out, rows, block):
    """Writes zeros to the first `rows` of `out`."""
    cols = block.cols
    out_ptrs = out.ptr + cols
    zeros = tl.full(cols.shape, 0, out.ptr.dtype.element_ty)
    for _ in range(rows):
        tl.store(out_ptrs, zeros, mask=cols < block.limit)
        out_ptrs += out.stride


@triton.jit
def load_window(x_ptr, slot_ptr, first, history, block, C: tl.constexpr):
    """The W-1 float32 rows that a token's walk has before it, as a tuple.

    Args:
        x_ptr: scalar pointer to the token's row, which is in the chunk from `first` on.
        slot_ptr: scalar pointer to row 0 of the slot; None if there is no history.
        first: 0, or at least C.REACH, so that all rows come from the slot or all from
            x.
        history: number of valid rows at the front of the slot, the newest last; more
            by the token's phase.
    """
    W: tl.constexpr = C.W
    window = ()
    from_x = only_if(first > 0, block)
    for k in tl.static_range(W - 1):
        back = (W - 1 - k) * C.DILATION
        row = history - back
        # Where a row must not be seen, no channel of it is loaded.
        from_slot = only_if((first == 0) & (row >= 0), block)
        if slot_ptr is None:
            raw = load_row(x_ptr - back * C.X, from_x, C)
            window = window + (widen(raw, C),)
        elif slot_ptr.dtype == x_ptr.dtype:
            ptr = tl.where(first > 0, x_ptr - back * C.X, slot_ptr + row * C.D)
            limit = tl.where(first > 0, block.limit, from_slot.limit)
            raw = load_row(ptr, Block(block.first, limit, block.cols), C)
            window = window + (widen(raw, C),)
        else:
            x = load_row(x_ptr - back * C.X, from_x, C)
            old = load_plain(slot_ptr + row * C.D, from_slot).to(tl.float32)
            window = window + (tl.where(first > 0, widen(x, C), old),)
    return window


@triton.jit
def filter_rows(
    row_ptr,
    slot_ptr,
    segment_ptr,
    out,
    token,
    history,
    filter,
    chunk,
    block,
    C: tl.constexpr,
):
    """Filters the rows of a chunk, walk after walk.

    Args:
        row_ptr: scalar pointer to the chunk's first row of x.
        slot_ptr: scalar pointer to row 0 of the slot; None if there is no history.
        segment_ptr: to segment ids, or None.
        out: `Rows` of the output.
        token: the number of the chunk's first row among these and among the ids.
        history: number of valid rows at the front of the slot; the newest last.
        chunk: position of its first token, how many tokens there are at most, and the
            length of its sequence.

    Returns:
        The window behind the last row, where there is a single walk; else nothing.
    """
    first, most, length = chunk
    if C.DILATION == 1:
        window = load_window(row_ptr, slot_ptr, first, history, block, C)
        segments = None
        if segment_ptr is not None:
            segments = segments_before(segment_ptr + token, first, 0, C)
        out = Rows(out.ptr + token * out.stride, out.stride)
        rows = tl.minimum(most, length - first)
        return convolve_rows(row_ptr, out, window, filter, segments, rows, block, C)
    else:
        out = Rows(out.ptr + token * out.stride, out.stride)
        rows = tl.minimum(most, length - first)
        for phase in range(tl.minimum(rows, C.DILATION)):
            x_ptr = row_ptr + phase * tl.cast(C.X, tl.int64)
            window = load_window(x_ptr, slot_ptr, first, history + phase, block, C)
            segments = None
            if segment_ptr is not None:
                own_ptr = segment_ptr + token + phase
                segments = segments_before(own_ptr, first, phase, C)
            convolve_rows(
                x_ptr,
                walk_of(out, phase, C),
                window,
                filter,
                segments,
                in_walk(rows, phase, C),
                block,
                C,
            )
        return ()


@triton.jit
def in_walk(count, phase, C: tl.constexpr):
    """How many of `count` tokens a walk meets."""
    if C.DILATION == 1:
        return count
    else:
        return (count - phase + (C.DILATION - 1)) // C.DILATION


@triton.jit
def walk_of(rows, phase, C: tl.constexpr):
    """Those of some `Rows` that a walk meets."""
    return Rows(rows.ptr + phase * rows.stride, rows.stride * C.DILATION)


@triton.jit
def written_store(inputs, seq, length, C: tl.constexpr):
    """The `Store` of the state after a sequence whose slots are read and written."""
    return _named_store(inputs, tl.load(inputs.write_slots + seq), length, C)


@triton.jit
def _named_store(inputs, slot, end, C: tl.constexpr):
    live = (slot >= 0) & (slot < inputs.num_slots) & (slot != C.PAD_SLOT_ID)
    return Store(slot, inputs.states + slot.to(tl.int64) * (C.L * C.D), end, live)


@triton.jit
def snapshot_store(inputs, seq, last, C: tl.constexpr):
    """The `Store` of a sequence's snapshot; none where `last`, its state, goes."""
    end = tl.load(inputs.snapshot_ends + seq)
    end = tl.minimum(tl.maximum(end, 0), last.end)
    store = _named_store(inputs, tl.load(inputs.snapshot_slots + seq), end, C)
    taken = last.slot
    if last.live is not None:
        taken = tl.where(last.live, taken, -1)
    return Store(store.slot, store.ptr, end, store.live & (store.slot != taken))


@triton.jit
def store_window(store, window, block, C: tl.constexpr):
    """Makes the slot the W-1 rows of `window`, all of which had the slot's dtype.

    A single warp reads the slot and writes it in order; several need a barrier.

    bfloat16 is written by its bits, since rounding could change the payload of a NaN.
    """
    W: tl.constexpr = C.W
    slot_ptr = store.ptr
    if store.live is not None:
        block = only_if(store.live, block)
    cols = block.cols
    if C.WARPS > 1:
        tl.debug_barrier()
    for k in tl.static_range(W - 1):
        row = window[k]
        if slot_ptr.dtype.element_ty == tl.bfloat16:
            bits = row.to(tl.int32, bitcast=True) >> 16
            row = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(slot_ptr + cols + k * C.D, row, mask=cols < block.limit)


@triton.jit
def roll_slot(x_ptr, slot_ptr, store, early, history, block, C: tl.constexpr):
    """Stores the last L rows of `concat(history, x[0:end])`, perhaps in place.

    In place, rows move left by `length - rejected`, or *right* where more rows were
    rejected than arrive, so neither an ascending nor a descending loop over rows is
    safe. Instead all L rows of SLOT_N channels are read, of both states if there are
    two, then a barrier, then written; channels are independent. The caller has
    issued its own reads of the slot before.

    Args:
        x_ptr: scalar pointer to the sequence's first row.
        slot_ptr: scalar pointer to the first row of the slot with the history.
        store: a `Store`.
        early: another, or None.
        history: number of valid rows at the front of the slot.
    """
    row = tl.arange(0, C.L_BLOCK)[:, None]
    for n in range(0, C.BLOCK_N, C.SLOT_N):
        cols = (block.first + n + tl.arange(0, C.SLOT_N))[None, :]
        mask = (row < C.L) & (cols < block.limit)
        rows = _rows_after(x_ptr, slot_ptr, store.end, history, cols, mask, C)
        if early is not None:
            before = _rows_after(x_ptr, slot_ptr, early.end, history, cols, mask, C)
        tl.debug_barrier()
        if early is not None:
            stored = (row < C.L) & (cols < tl.where(early.live, block.limit, 0))
            tl.store(early.ptr + row * C.D + cols, before, mask=stored)
        if store.live is not None:
            mask = (row < C.L) & (cols < tl.where(store.live, block.limit, 0))
        tl.store(store.ptr + row * C.D + cols, rows, mask=mask)


@triton.jit
def _rows_after(x_ptr, slot_ptr, end, history, cols, mask, C: tl.constexpr):
    """The last L rows of `concat(history, x[0:end])`, of some channels."""
    row = tl.arange(0, C.L_BLOCK)[:, None]
    token = (end - C.L) + row  # of the sequence; negative: history
    new = tl.load(
        x_ptr + token.to(tl.int64) * C.X + cols, mask=mask & (token >= 0), other=0.0
    )
    source = history + token
    old = tl.load(
        slot_ptr + source * C.D + cols,
        mask=mask & (token < 0) & (source >= 0),
        other=0.0,
    )
    return tl.where(token >= 0, new.to(slot_ptr.dtype.element_ty), old)


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _clip(offset, num_tokens):
    return tl.minimum(tl.maximum(offset, 0), num_tokens)


@triton.jit
def offset_bound(offsets, last, C: tl.constexpr):
    """`max(clip(offsets[0..last], 0, T))`: cummax at one entry.

    Well-formed offsets need no maximum, but any vector of integers has a meaning,
    and a scan of a few cached lines, SCAN at a time, is cheaper than a second kernel.
    Offsets are loaded four at a time. The last ones of the array, where fewer than four
    are left, are loaded apart.
    """
    SCAN: tl.constexpr = C.SCAN
    lanes = tl.arange(0, SCAN)
    best = tl.full([SCAN], 0, tl.int32)
    full = (last + 1) // SCAN * SCAN
    for base in range(0, full, SCAN):
        best = tl.maximum(best, tl.load(offsets.ptr + base + lanes))
    whole = (offsets.num_seqs + 1) // 4 * 4
    i = full + lanes
    wanted = i < tl.minimum(whole, (last // 4 + 1) * 4)
    q = tl.load(offsets.ptr + i, mask=wanted, other=0)
    best = tl.maximum(best, tl.where(i <= last, q, 0))
    four = whole + tl.arange(0, 4)
    rest = tl.load(offsets.ptr + four, mask=four <= last, other=0)
    best = tl.maximum(tl.reduce(best, 0, _max), tl.reduce(rest, 0, _max))
    return _clip(best, offsets.num_tokens)


@triton.jit
def zero_uncovered(out, offsets, chunk, block_m, block, C: tl.constexpr):
    """Writes zeros to chunk `chunk` of the tokens that no sequence covers.

    These tokens are numbered from 0: first the head, before the first sequence, then
    the tail, behind the last one.
    """
    num_tokens = offsets.num_tokens
    head = _clip(tl.load(offsets.ptr), num_tokens)
    # The last sequence ends where the last offset says, or later. So most programs
    # behind the last chunk, which have nothing to do, see that without the scan.
    end = _clip(tl.load(offsets.ptr + offsets.num_seqs), num_tokens)
    end = tl.maximum(end, head)
    if chunk <= (head + (num_tokens - end) - 1) // block_m:
        tail = offset_bound(offsets, offsets.num_seqs, C)
        uncovered = head + (num_tokens - tail)
        if chunk <= (uncovered - 1) // block_m:
            first = chunk * block_m
            last = tl.minimum(first + block_m, uncovered)
            cols = block.cols
            zeros = tl.full(cols.shape, 0, out.ptr.dtype.element_ty)
            for i in range(first, last):
                token = tl.where(i < head, i, tail + (i - head))
                row_ptr = out.ptr + token.to(tl.int64) * out.stride
                tl.store(row_ptr + cols, zeros, mask=cols < block.limit)
