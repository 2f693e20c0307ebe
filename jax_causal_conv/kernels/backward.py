"""The backward kernels. No JAX here."""

import triton
import triton.language as tl

from .device import (
    channel_block,
    load_row,
    load_rows,
    load_taps,
    load_window,
    next_visible,
    offset_bound,
    preactivation,
    seen,
    sigmoid,
    visible_before,
    widen,
    zero_rows,
    zero_uncovered,
)


@triton.jit
def through_silu(dy, z, FAST: tl.constexpr):
    """`dy · silu'(z) = dy · s · (1 + z · (1 - s))` with s the sigmoid of z."""
    s = sigmoid(z, FAST)
    scaled = dy * s
    return tl.fma(scaled, z - z * s, scaled)


@triton.jit
def backward_row(
    x,
    dy,
    window,
    pending,
    taps,
    bias,
    dtaps,
    dbias,
    reach,
    inside,
    own,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    MASKED: tl.constexpr,
    FAST: tl.constexpr,
):
    """Steps the backward pass by token t: row t of x and dy comes in, one dx goes out.

    Args:
        window: the W-1 rows of x before t, oldest first.
        pending: dx of tokens t-(W-1) … t-1, as far as tokens before t contribute.
        dtaps, dbias: running sums over the chunk's own tokens.
        reach: see `next_visible`.
        inside, own: if MASKED, whether t lies in the sequence, and in the chunk.

    Returns:
        The finished dx of token t-(W-1), and the new window, pending, dtaps, dbias.
    """
    window = window + (x,)
    rows = seen(window, reach, W, HAS_SEGMENTS)
    dz = dy
    if SILU:
        dz = through_silu(dy, preactivation(rows, taps, bias, W), FAST)
    if HAS_SEGMENTS:
        dz = tl.where(reach >= 0, dz, 0.0)
    mine = dz
    if MASKED:
        dz = tl.where(inside, dz, 0.0)
        mine = tl.where(own, dz, 0.0)
    sums = ()
    dx = ()
    for k in tl.static_range(W):
        sums = sums + (tl.fma(mine, rows[k], dtaps[k]),)
        # Selected behind the product: even a tap that is NaN reaches only what it may.
        if HAS_SEGMENTS:
            back = tl.where(reach >= W - 1 - k, taps[k] * dz, 0.0)
            dx = dx + (pending[k] + back if k < W - 1 else back,)
        else:
            dx = dx + (tl.fma(taps[k], dz, pending[k]) if k < W - 1 else taps[k] * dz,)
    return dx[0], window[1:], dx[1:], sums, dbias + mine


@triton.jit
def masked_step(
    x_ptr,
    dy_ptr,
    segment_ptr,
    step,
    window,
    pending,
    taps,
    bias,
    dtaps,
    dbias,
    previous,
    visible,
    rows,
    ahead,
    first_col,
    limit,
    W: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
):
    """`backward_row` for a token that may lie behind the chunk or the sequence.

    Args:
        x_ptr, dy_ptr, segment_ptr: scalar pointers to the token.
        step: its number, counted from the chunk's first token.
        rows, ahead: tokens of the chunk; tokens from its first to the sequence's end.
    """
    inside = step < ahead
    limit = tl.where(inside, limit, 0)
    x = widen(load_row(x_ptr, first_col, limit, BLOCK_N, PAIRS), PAIRS)
    dy = widen(load_row(dy_ptr, first_col, limit, BLOCK_N, PAIRS), PAIRS)
    reach = 0
    if HAS_SEGMENTS:
        # Behind the row's end stands another row's id, or nothing: stay on the last.
        segment_ptr += tl.minimum(ahead - 1 - step, 0)
        previous, visible, reach = next_visible(segment_ptr, previous, visible, W)
    dx, window, pending, dtaps, dbias = backward_row(
        x,
        dy,
        window,
        pending,
        taps,
        bias,
        dtaps,
        dbias,
        reach,
        inside,
        step < rows,
        W,
        SILU,
        HAS_SEGMENTS,
        True,
        FAST,
    )
    return dx, window, pending, dtaps, dbias, previous, visible


@triton.jit
def backward_chunk(
    x_ptr,
    dy_ptr,
    dx_ptr,
    dhistory_ptr,
    dslot_ptr,
    segment_ptr,
    window,
    taps,
    bias,
    previous,
    visible,
    first,
    rows,
    length,
    state_start,
    state_end,
    first_col,
    limit,
    dy_stride,
    X: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    SILU: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
):
    """Gradients of tokens `[first, first + rows)` of a sequence.

    Walks over them and the W-1 tokens behind, whose gradients reach back into the
    chunk, and computes their pre-activations again. The first W-1 rows that come out
    belong to tokens before the chunk: to the history if it is the first chunk, else
    to another program, which computes them itself.

    Args:
        x_ptr, dy_ptr, dx_ptr: scalar pointers to row `first`.
        dhistory_ptr: to the first of the history's W-1 float32 rows.
        dslot_ptr: to row 0 of the slot's cotangent; tokens from `state_start` on have
            a row there, as far as there are rows, token `state_end - 1` the last one.
        segment_ptr, previous, visible: see `next_visible`.
        length: tokens of the sequence.

    Returns:
        The sums over the chunk's tokens for dweight (a tuple of W rows) and dbias.
    """
    previous = tl.cast(previous, tl.int32)  # loops carry tensors, not constants
    visible = tl.cast(visible, tl.int32)
    dbias = tl.full([BLOCK_N], 0, tl.float32)
    pending = ()
    for _ in tl.static_range(W - 1):
        pending = pending + (dbias,)
    dtaps = pending + (dbias,)
    cols = first_col + tl.arange(0, BLOCK_N)
    dx_ptrs = dx_ptr + cols
    ahead = length - first

    for s in tl.static_range(W - 1):
        dx, window, pending, dtaps, dbias, previous, visible = masked_step(
            x_ptr + s * X,
            dy_ptr + s * dy_stride,
            segment_ptr + s,
            s,
            window,
            pending,
            taps,
            bias,
            dtaps,
            dbias,
            previous,
            visible,
            rows,
            ahead,
            first_col,
            limit,
            W,
            SILU,
            HAS_SEGMENTS,
            BLOCK_N,
            PAIRS,
            FAST,
        )
        before = tl.where(first == 0, limit, 0)
        tl.store(dhistory_ptr + s * D + cols, dx, mask=cols < before)
    x_ptr += (W - 1) * X
    dy_ptr += (W - 1) * dy_stride
    segment_ptr += W - 1

    # Whole groups of the chunk's own tokens, of none of which the slot holds a copy,
    # need no masks; the next group's loads are in flight meanwhile.
    plain = rows
    if HAS_SLOTS and first < state_end:
        plain = tl.minimum(rows, tl.maximum(state_start, state_end - L) - first)
    groups = tl.maximum(plain - (W - 1), 0) // GROUP
    xs = load_rows(x_ptr, groups > 0, first_col, limit, X, BLOCK_N, GROUP, PAIRS)
    dys = load_rows(
        dy_ptr, groups > 0, first_col, limit, dy_stride, BLOCK_N, GROUP, PAIRS
    )
    for i in range(groups):
        x_ptr += GROUP * X
        dy_ptr += GROUP * dy_stride
        more = i + 1 < groups
        next_xs = load_rows(x_ptr, more, first_col, limit, X, BLOCK_N, GROUP, PAIRS)
        next_dys = load_rows(
            dy_ptr, more, first_col, limit, dy_stride, BLOCK_N, GROUP, PAIRS
        )
        dxs = ()
        for g in tl.static_range(GROUP):
            reach = 0
            if HAS_SEGMENTS:
                previous, visible, reach = next_visible(
                    segment_ptr + g, previous, visible, W
                )
            dx, window, pending, dtaps, dbias = backward_row(
                widen(xs[g], PAIRS),
                widen(dys[g], PAIRS),
                window,
                pending,
                taps,
                bias,
                dtaps,
                dbias,
                reach,
                True,
                True,
                W,
                SILU,
                HAS_SEGMENTS,
                False,
                FAST,
            )
            dxs = dxs + (dx,)
        for g in tl.static_range(GROUP):
            tl.store(
                dx_ptrs + g * D, dxs[g].to(dx_ptr.dtype.element_ty), mask=cols < limit
            )
        xs = next_xs
        dys = next_dys
        dx_ptrs += GROUP * D
        segment_ptr += GROUP

    for i in range(groups * GROUP, rows):
        dx, window, pending, dtaps, dbias, previous, visible = masked_step(
            x_ptr,
            dy_ptr,
            segment_ptr,
            i + (W - 1),
            window,
            pending,
            taps,
            bias,
            dtaps,
            dbias,
            previous,
            visible,
            rows,
            ahead,
            first_col,
            limit,
            W,
            SILU,
            HAS_SEGMENTS,
            BLOCK_N,
            PAIRS,
            FAST,
        )
        if HAS_SLOTS:
            token = first + i
            row = token - state_end + L
            copied = (token >= state_start) & (token < state_end) & (row >= 0)
            slot_limit = tl.where(copied, limit, 0)
            dx += load_row(
                dslot_ptr + row * D, first_col, slot_limit, BLOCK_N, False
            ).to(tl.float32)
        tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=cols < limit)
        x_ptr += X
        dy_ptr += dy_stride
        dx_ptrs += D
        segment_ptr += 1
    return dtaps, dbias


@triton.jit
def store_partial(
    partial_ptr, program, dtaps, dbias, cols, mask, D: tl.constexpr, W: tl.constexpr
):
    """Writes a program's sums to its own W+1 rows of `(P, W+1, D)`."""
    ptrs = partial_ptr + program.to(tl.int64) * ((W + 1) * D) + cols
    for k in tl.static_range(W):
        tl.store(ptrs + k * D, dtaps[k], mask=mask)
    tl.store(ptrs + W * D, dbias, mask=mask)


# One program takes one chunk of one row for BLOCK_N channels, on a grid like that of
# the dense forward, with longer chunks. It writes its rows of dx, the first chunk the
# row's dhistory, and its own W+1 rows of `partial`, the sums for dweight and dbias over
# its tokens, which are added up afterwards in a fixed order: no atomics, the same bits
# in every run.
@triton.jit
def rows_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    history_ptr,
    dy_ptr,
    dy_1_ptr,
    dy_2_ptr,
    dy_3_ptr,
    dslots_ptr,
    live_ptr,
    segment_ids_ptr,
    state_start_ptr,
    state_end_ptr,
    row_len,
    chunks,
    block_m,
    dx_ptr,
    dhistory_ptr,
    partial_ptr,
    X: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLIT: tl.constexpr,
    COL_BLOCKS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_LIVE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
):
    block = tl.program_id(0) % COL_BLOCKS
    first_col, limit, dy_ptr, dy_stride = channel_block(
        block, (dy_ptr, dy_1_ptr, dy_2_ptr, dy_3_ptr), SPLIT, BLOCK_N
    )
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = cols < limit
    x_ptr += OFFSET
    program = tl.program_id(0) // COL_BLOCKS
    row = program // chunks
    first = program % chunks * block_m
    rows = tl.minimum(block_m, row_len - first)
    token = row.to(tl.int64) * row_len + first
    dhistory_ptr += row.to(tl.int64) * ((W - 1) * D)

    live = row >= 0
    if HAS_LIVE:
        live = tl.load(live_ptr + row) != 0
    if live:
        state_start = 0
        state_end = row_len
        if HAS_SLOTS & HAS_SEGMENTS:
            state_start = tl.load(state_start_ptr + row)
            state_end = tl.load(state_end_ptr + row)
        segment_ptr = segment_ids_ptr + token
        taps, bias = load_taps(weight_ptr, bias_ptr, cols, mask, W, HAS_BIAS)
        window = load_window(
            x_ptr + token * X,
            history_ptr + row.to(tl.int64) * ((W - 1) * D),
            first,
            W - 1,
            first_col,
            limit,
            X,
            D,
            W,
            BLOCK_N,
            PAIRS,
        )
        previous, visible = visible_before(segment_ptr, first, W, HAS_SEGMENTS)
        dtaps, dbias = backward_chunk(
            x_ptr + token * X,
            dy_ptr + token * dy_stride,
            dx_ptr + token * D,
            dhistory_ptr,
            dslots_ptr + row.to(tl.int64) * (L * D),
            segment_ptr,
            window,
            taps,
            bias,
            previous,
            visible,
            first,
            rows,
            row_len,
            state_start,
            state_end,
            first_col,
            limit,
            dy_stride,
            X,
            D,
            W,
            L,
            SILU,
            HAS_SLOTS,
            HAS_SEGMENTS,
            BLOCK_N,
            GROUP,
            PAIRS,
            FAST,
        )
        store_partial(partial_ptr, program, dtaps, dbias, cols, mask, D, W)
    else:
        zero_rows(dx_ptr + token * D + cols, rows, mask, D, BLOCK_N)
        if first == 0:
            zero_rows(dhistory_ptr + cols, W - 1, mask, D, BLOCK_N)
        zero_rows(
            partial_ptr + program.to(tl.int64) * ((W + 1) * D) + cols,
            W + 1,
            mask,
            D,
            BLOCK_N,
        )


# The same on the grid of the packed forward: program -> (sequence, chunk) through the
# metadata, programs behind the last chunk zero the uncovered rows of dx. Values are
# trusted as little as there. dhistory of sequences without a chunk is not written.
@triton.jit
def packed_backward_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    history_ptr,
    dy_ptr,
    dy_1_ptr,
    dy_2_ptr,
    dy_3_ptr,
    dslots_ptr,
    query_start_loc_ptr,
    live_ptr,
    chunk_seq_ptr,
    chunk_offset_ptr,
    num_tokens,
    num_seqs,
    block_m,
    dx_ptr,
    dhistory_ptr,
    partial_ptr,
    X: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLIT: tl.constexpr,
    COL_BLOCKS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    SCAN: tl.constexpr,
    FAST: tl.constexpr,
):
    block = tl.program_id(0) % COL_BLOCKS
    first_col, limit, dy_ptr, dy_stride = channel_block(
        block, (dy_ptr, dy_1_ptr, dy_2_ptr, dy_3_ptr), SPLIT, BLOCK_N
    )
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = cols < limit
    x_ptr += OFFSET
    program = tl.program_id(0) // COL_BLOCKS
    partial_ptrs = partial_ptr + program.to(tl.int64) * ((W + 1) * D) + cols
    zero_rows(partial_ptrs, W + 1, mask, D, BLOCK_N)

    seq = tl.load(chunk_seq_ptr + program)
    chunk = tl.load(chunk_offset_ptr + program)
    if seq < 0:
        if (seq == -1) & (chunk >= 0):
            zero_uncovered(
                dx_ptr,
                query_start_loc_ptr,
                num_tokens,
                num_seqs,
                chunk,
                block_m,
                cols,
                mask,
                D,
                BLOCK_N,
                SCAN,
            )
    elif (seq < num_seqs) & (chunk >= 0):
        start = offset_bound(query_start_loc_ptr, seq, num_tokens, num_seqs, SCAN)
        end = tl.load(query_start_loc_ptr + seq + 1)
        length = tl.maximum(tl.minimum(end, num_tokens), start) - start
        if (length > 0) & (chunk <= (length - 1) // block_m):
            first = chunk * block_m
            rows = tl.minimum(block_m, length - first)
            token = start.to(tl.int64) + first
            if tl.load(live_ptr + seq) != 0:
                taps, bias = load_taps(weight_ptr, bias_ptr, cols, mask, W, HAS_BIAS)
                window = load_window(
                    x_ptr + token * X,
                    history_ptr + seq.to(tl.int64) * ((W - 1) * D),
                    first,
                    W - 1,
                    first_col,
                    limit,
                    X,
                    D,
                    W,
                    BLOCK_N,
                    PAIRS,
                )
                dtaps, dbias = backward_chunk(
                    x_ptr + token * X,
                    dy_ptr + token * dy_stride,
                    dx_ptr + token * D,
                    dhistory_ptr + seq.to(tl.int64) * ((W - 1) * D),
                    dslots_ptr + seq.to(tl.int64) * (L * D),
                    chunk_seq_ptr,
                    window,
                    taps,
                    bias,
                    0,
                    0,
                    first,
                    rows,
                    length,
                    0,
                    length,
                    first_col,
                    limit,
                    dy_stride,
                    X,
                    D,
                    W,
                    L,
                    SILU,
                    HAS_SLOTS,
                    False,
                    BLOCK_N,
                    GROUP,
                    PAIRS,
                    FAST,
                )
                tl.debug_barrier()  # behind the zeros above
                store_partial(partial_ptr, program, dtaps, dbias, cols, mask, D, W)
            else:
                zero_rows(dx_ptr + token * D + cols, rows, mask, D, BLOCK_N)
