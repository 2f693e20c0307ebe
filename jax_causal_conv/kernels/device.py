"""Device functions shared by the kernels. No JAX here.

Conventions: `cols` are the channels `[BLOCK_N]` of a program and `mask` those below
`limit`: D, or where the part of the output that the program writes ends. Rows of the
input are X apart, rows of a part `stride`, all others D; pointers to parts and to the
input are where column 0 would be. Row pointers are 64-bit bases plus `cols`, so a
product of sizes never overflows.
`FAST` chooses CUDA spellings that Triton's interpreter does not know; each has a
plain twin beside it.
"""

import triton
import triton.language as tl


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _clip(offset, num_tokens):
    return tl.minimum(tl.maximum(offset, 0), num_tokens)


@triton.jit
def channel_block(block, parts, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr):
    """The channels of one block, and the part they lie in.

    Blocks are counted part by part, so that none spans two of them. Only scalars
    depend on the part, so the code is one for all; of a single part none is left.

    Args:
        block: number of the block.
        parts: tuple of pointers to the parts `(rows, SPLIT[i])` of an array.
        SPLIT: the channels of each part.

    Returns:
        The first channel; the limit of the part's channels; a pointer to where channel
        0 would be in the part's first row; and its stride.
    """
    first = block * BLOCK_N
    limit = tl.cast(SPLIT[0], tl.int32)
    ptr = parts[0]
    stride = tl.cast(SPLIT[0], tl.int32)
    channels = 0
    blocks = 0
    for i in tl.static_range(1, len(SPLIT)):
        channels += SPLIT[i - 1]
        blocks += (SPLIT[i - 1] + BLOCK_N - 1) // BLOCK_N
        here = block >= blocks
        first = tl.where(here, channels + (block - blocks) * BLOCK_N, first)
        limit = tl.where(here, channels + SPLIT[i], limit)
        ptr = tl.where(here, parts[i] - channels, ptr)
        stride = tl.where(here, SPLIT[i], stride)
    return first, limit, ptr, stride.to(tl.int64)


@triton.jit
def offset_bound(query_start_loc_ptr, last, num_tokens, num_seqs, SCAN: tl.constexpr):
    """`max(clip(query_start_loc[0..last], 0, T))`: cummax at one entry.

    Well-formed offsets need no maximum, but any vector of integers has a meaning,
    and a scan of a few cached lines, SCAN at a time, is cheaper than a second kernel.
    Four offsets are one access; the array's last ones, which fill no four, are others.
    """
    lanes = tl.arange(0, SCAN)
    best = tl.full([SCAN], 0, tl.int32)
    full = (last + 1) // SCAN * SCAN
    for base in range(0, full, SCAN):
        best = tl.maximum(best, tl.load(query_start_loc_ptr + base + lanes))
    whole = (num_seqs + 1) // 4 * 4
    i = full + lanes
    wanted = i < tl.minimum(whole, (last // 4 + 1) * 4)
    q = tl.load(query_start_loc_ptr + i, mask=wanted, other=0)
    best = tl.maximum(best, tl.where(i <= last, q, 0))
    four = whole + tl.arange(0, 4)
    rest = tl.load(query_start_loc_ptr + four, mask=four <= last, other=0)
    best = tl.maximum(tl.reduce(best, 0, _max), tl.reduce(rest, 0, _max))
    return _clip(best, num_tokens)


@triton.jit
def sigmoid(y, FAST: tl.constexpr):
    """`1 / (1 + exp(-y))`, in four instructions when FAST.

    exp2 is one instruction where exp adds range checks, and an approximate reciprocal
    one where a division is eight. The relative error stays below 4e-6 down to y = -87;
    below that the result, under 2e-38, may be 0.
    """
    e = tl.exp2(y * -1.4426950408889634)
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [1.0 + e],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / (1.0 + e)


@triton.jit
def load_row(
    row_ptr,
    first_col,
    limit,
    BLOCK_N: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """BLOCK_N channels of a row, for `widen`; zeros from `limit` on.

    PAIRS: channels are bfloat16, and parts and rows begin and end at even ones. They
    are loaded, and kept until they are needed, as 32-bit words of two.
    """
    if PAIRS:
        words = first_col // 2 + tl.arange(0, BLOCK_N // 2)
        word_ptr = row_ptr.to(tl.pointer_type(tl.int32))
        return tl.load(word_ptr + words, mask=words < limit // 2, other=0)
    else:
        cols = first_col + tl.arange(0, BLOCK_N)
        return tl.load(row_ptr + cols, mask=cols < limit, other=0.0)


@triton.jit
def widen(row, PAIRS: tl.constexpr):
    """What `load_row` has loaded, as float32: of a pair, each is one instruction."""
    if PAIRS:
        low = (row << 16).to(tl.float32, bitcast=True)
        high = (row & -65536).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(2 * row.shape[0])
    else:
        return row.to(tl.float32)


@triton.jit
def load_taps(
    weight_ptr, bias_ptr, cols, mask, W: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """float32 filter taps, oldest first, as a tuple of W rows, and the bias row.

    A channel's taps lie side by side. Where they fill words of 8 bytes they are read
    as such: strided 2-byte reads would keep a short row busier than its own data.
    """
    BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    INT: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
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
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return taps, bias


@triton.jit
def next_visible(segment_ptr, previous, visible, W: tl.constexpr):
    """Steps the bookkeeping of segments to the token at `segment_ptr`.

    Args:
        segment_ptr: pointer to the token's segment id.
        previous: the id of the token before it.
        visible: how many tokens before that one are of its run, at most W-1.

    Returns:
        The token's id; its `visible`; and `reach`, which is `visible` but -1 for
        padding: the token sees itself and others up to `reach` tokens back.
    """
    segment = tl.load(segment_ptr)
    visible = tl.where(segment == previous, tl.minimum(visible + 1, W - 1), 0)
    return segment, visible, tl.where(segment >= 0, visible, -1)


@triton.jit
def visible_before(segment_ptr, first, W: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """`previous` and `visible` for `next_visible` at token `first` of a row.

    Args:
        segment_ptr: pointer to the id of token `first`.
        first: 0, where the run of token 0 sees all the history; or at least W-1.
    """
    previous = 0
    visible = W - 1
    if HAS_SEGMENTS:
        back = tl.where(first > 0, 1, 0)
        previous = tl.load(segment_ptr - back)
        same = first > 0
        visible = tl.where(same, 0, W - 1)
        for j in tl.static_range(2, W):
            same = same & (tl.load(segment_ptr - j * back) == previous)
            visible += tl.where(same, 1, 0)
    return previous, visible


@triton.jit
def seen(window, reach, W: tl.constexpr, HAS_SEGMENTS: tl.constexpr):
    """The window with rows out of a token's reach replaced by zeros."""
    if HAS_SEGMENTS:
        rows = ()
        for k in tl.static_range(W):
            rows = rows + (tl.where(reach >= W - 1 - k, window[k], 0.0),)
        return rows
    else:
        return window


@triton.jit
def preactivation(window, taps, bias, W: tl.constexpr):
    """`bias + Σ_k taps[k] · window[k]` in float32."""
    z = bias
    for k in tl.static_range(W):
        z = tl.fma(window[k], taps[k], z)
    return z


@triton.jit
def filter_row(
    window,
    taps,
    bias,
    reach,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    FAST: tl.constexpr,
):
    """One row of output in float32; zeros for padding."""
    y = preactivation(seen(window, reach, W, HAS_SEGMENTS), taps, bias, W)
    if SILU:
        y = y * sigmoid(y, FAST)
    if HAS_SEGMENTS:
        y = tl.where(reach >= 0, y, 0.0)
    return y


@triton.jit
def convolve_rows(
    row_ptr,
    out_ptr,
    segment_ptr,
    window,
    taps,
    bias,
    previous,
    visible,
    rows,
    first_col,
    limit,
    out_stride,
    X: tl.constexpr,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Filters `rows` consecutive rows, the window rolling in registers.

    Each element of x is loaded and converted once. Whole groups of GROUP rows first,
    the next group's loads in flight while one is filtered; with GROUP a multiple of W
    the window needs no register moves.

    Args:
        row_ptr, out_ptr: scalar pointers to the first row.
        segment_ptr: pointer to its segment id, followed only if HAS_SEGMENTS.
        window: tuple of the W-1 float32 rows before it, oldest first.
        previous, visible: see `next_visible`.
        first_col: the first of the BLOCK_N channels.

    Returns:
        The window behind the last row.
    """
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = cols < limit
    out_ptrs = out_ptr + cols
    if GROUP > 1:
        groups = rows // GROUP
        fresh = load_rows(
            row_ptr, groups > 0, first_col, limit, X, BLOCK_N, GROUP, PAIRS
        )
        for i in range(groups):
            row_ptr += GROUP * X
            ahead = load_rows(
                row_ptr, i + 1 < groups, first_col, limit, X, BLOCK_N, GROUP, PAIRS
            )
            for g in tl.static_range(GROUP):
                window = window + (widen(fresh[g], PAIRS),)
                reach = 0
                if HAS_SEGMENTS:
                    previous, visible, reach = next_visible(
                        segment_ptr + g, previous, visible, W
                    )
                y = filter_row(window, taps, bias, reach, W, SILU, HAS_SEGMENTS, FAST)
                y = y.to(out_ptr.dtype.element_ty)
                tl.store(out_ptrs + g * out_stride, y, mask=mask)
                window = window[1:]
            fresh = ahead
            out_ptrs += GROUP * out_stride
            if HAS_SEGMENTS:
                segment_ptr += GROUP
    # One row ahead here, too: the first is asked for together with the window.
    rest = rows % GROUP if GROUP > 1 else rows
    x = load_row(row_ptr, first_col, tl.where(rest > 0, limit, 0), BLOCK_N, PAIRS)
    for i in range(rest):
        row_ptr += X
        more = tl.where(i + 1 < rest, limit, 0)
        ahead = load_row(row_ptr, first_col, more, BLOCK_N, PAIRS)
        window = window + (widen(x, PAIRS),)
        reach = 0
        if HAS_SEGMENTS:
            previous, visible, reach = next_visible(segment_ptr, previous, visible, W)
        y = filter_row(window, taps, bias, reach, W, SILU, HAS_SEGMENTS, FAST)
        tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=mask)
        window = window[1:]
        x = ahead
        out_ptrs += out_stride
        if HAS_SEGMENTS:
            segment_ptr += 1
    return window


@triton.jit
def store_window(
    slot_ptrs, window, mask, D: tl.constexpr, W: tl.constexpr, WARPS: tl.constexpr
):
    """Makes the slot the W-1 rows of `window`, all of which had the slot's dtype.

    One warp's reads of the slot are before its writes; of more, behind a barrier.

    bfloat16 goes back by its bits: rounding could change the payload of a NaN.
    """
    if WARPS > 1:
        tl.debug_barrier()
    for k in tl.static_range(W - 1):
        row = window[k]
        if slot_ptrs.dtype.element_ty == tl.bfloat16:
            bits = row.to(tl.int32, bitcast=True) >> 16
            row = bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
        tl.store(slot_ptrs + k * D, row, mask=mask)


@triton.jit
def load_rows(
    row_ptr,
    wanted,
    first_col,
    limit,
    stride,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """GROUP consecutive rows as a tuple; no load is issued unless `wanted`."""
    limit = tl.where(wanted, limit, 0)
    rows = ()
    for g in tl.static_range(GROUP):
        row = load_row(row_ptr + g * stride, first_col, limit, BLOCK_N, PAIRS)
        rows = rows + (row,)
    return rows


@triton.jit
def zero_rows(out_ptrs, rows, mask, stride, BLOCK_N: tl.constexpr):
    """Writes zeros to `rows` consecutive rows."""
    zeros = tl.full([BLOCK_N], 0, out_ptrs.dtype.element_ty)
    for _ in range(rows):
        tl.store(out_ptrs, zeros, mask=mask)
        out_ptrs += stride


@triton.jit
def zero_uncovered(
    out_ptr,
    query_start_loc_ptr,
    num_tokens,
    num_seqs,
    chunk,
    block_m,
    cols,
    mask,
    stride,
    BLOCK_N: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Writes zeros to block `chunk` of the tokens that no sequence covers.

    They are numbered head first (before the first sequence), then tail.
    """
    head = _clip(tl.load(query_start_loc_ptr), num_tokens)
    # The scan can only find a later end than the last offset and the first: most
    # programs behind the last chunk have nothing to do, and see it here.
    end = _clip(tl.load(query_start_loc_ptr + num_seqs), num_tokens)
    end = tl.maximum(end, head)
    if chunk <= (head + (num_tokens - end) - 1) // block_m:
        tail = offset_bound(query_start_loc_ptr, num_seqs, num_tokens, num_seqs, SCAN)
        uncovered = head + (num_tokens - tail)
        if chunk <= (uncovered - 1) // block_m:
            first = chunk * block_m
            last = tl.minimum(first + block_m, uncovered)
            zeros = tl.full([BLOCK_N], 0, out_ptr.dtype.element_ty)
            for i in range(first, last):
                token = tl.where(i < head, i, tail + (i - head))
                tl.store(out_ptr + token.to(tl.int64) * stride + cols, zeros, mask=mask)


@triton.jit
def load_window(
    x_ptr,
    slot_ptr,
    first,
    history,
    first_col,
    limit,
    X: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """The W-1 float32 rows before row `first` of a sequence, as a tuple.

    Args:
        x_ptr: scalar pointer to row `first`.
        slot_ptr: scalar pointer to row 0 of the slot.
        first: 0, or at least W-1, so that all rows come from the slot or all from x.
        history: number of valid rows at the front of the slot; the newest last.
    """
    window = ()
    for k in tl.static_range(W - 1):
        back = W - 1 - k
        row = history - back
        # No channel passes where a row must not be seen.
        old_limit = tl.where((first == 0) & (row >= 0), limit, 0)
        if slot_ptr.dtype == x_ptr.dtype:
            ptr = tl.where(first > 0, x_ptr - back * X, slot_ptr + row * D)
            seen_limit = tl.where(first > 0, limit, old_limit)
            raw = load_row(ptr, first_col, seen_limit, BLOCK_N, PAIRS)
            window = window + (widen(raw, PAIRS),)
        else:
            x_limit = tl.where(first > 0, limit, 0)
            x = load_row(x_ptr - back * X, first_col, x_limit, BLOCK_N, PAIRS)
            old = load_row(slot_ptr + row * D, first_col, old_limit, BLOCK_N, False)
            old = old.to(tl.float32)
            window = window + (tl.where(first > 0, widen(x, PAIRS), old),)
    return window


@triton.jit
def roll_slot(
    x_ptr,
    slot_ptr,
    length,
    history,
    first_col,
    limit,
    X: tl.constexpr,
    D: tl.constexpr,
    L: tl.constexpr,
    L_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SLOT_N: tl.constexpr,
):
    """Makes the slot the last L rows of `concat(history, x[0:length])`, in place.

    Rows move left by `length - rejected`, or *right* where more rows were rejected
    than arrive, so neither an ascending nor a descending loop over rows is safe.
    Instead all L rows of SLOT_N channels are read, then a barrier, then written;
    channels are independent of each other. The caller has issued its own reads of
    the slot before.

    Args:
        x_ptr: scalar pointer to the sequence's first row.
        slot_ptr: scalar pointer to the slot's first row.
        history: number of valid rows at the front of the slot.
    """
    row = tl.arange(0, L_BLOCK)[:, None]
    token = (length - L) + row  # of the sequence; negative: history
    for n in range(0, BLOCK_N, SLOT_N):
        cols = (first_col + n + tl.arange(0, SLOT_N))[None, :]
        mask = (row < L) & (cols < limit)
        new = tl.load(
            x_ptr + token.to(tl.int64) * X + cols, mask=mask & (token >= 0), other=0.0
        )
        source = history + token
        old = tl.load(
            slot_ptr + source * D + cols,
            mask=mask & (token < 0) & (source >= 0),
            other=0.0,
        )
        rows = tl.where(token >= 0, new.to(slot_ptr.dtype.element_ty), old)
        tl.debug_barrier()
        tl.store(slot_ptr + row * D + cols, rows, mask=mask)
