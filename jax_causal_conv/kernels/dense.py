"""The dense forward kernel. No JAX here."""

import triton
import triton.language as tl

from .device import (
    channel_block,
    convolve_rows,
    load_taps,
    load_window,
    visible_before,
)


# One program filters block_m tokens of one row for BLOCK_N channels; the grid is 1-D,
# rows x chunks x blocks of channels, channels fastest. It writes its rows of out and
# nothing else, so programs are independent. Where segments end inside a row is found
# from the ids of the token and its W-1 predecessors, while the window rolls.
@triton.jit
def dense_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    initial_state_ptr,
    segment_ids_ptr,
    row_len,
    chunks,
    block_m,
    out_ptr,
    out_1_ptr,  # None where there are fewer parts: see channel_block
    out_2_ptr,
    out_3_ptr,
    X: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLIT: tl.constexpr,
    COL_BLOCKS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    HAS_SEGMENTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    FAST: tl.constexpr,
):
    block = tl.program_id(0) % COL_BLOCKS
    first_col, limit, out_ptr, out_stride = channel_block(
        block, (out_ptr, out_1_ptr, out_2_ptr, out_3_ptr), SPLIT, BLOCK_N
    )
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = cols < limit
    x_ptr += OFFSET
    row = (tl.program_id(0) // COL_BLOCKS) // chunks
    first = (tl.program_id(0) // COL_BLOCKS) % chunks * block_m

    token = row.to(tl.int64) * row_len + first
    segment_ptr = segment_ids_ptr + token
    taps, bias = load_taps(weight_ptr, bias_ptr, cols, mask, W, HAS_BIAS)
    window = load_window(
        x_ptr + token * X,
        initial_state_ptr + row.to(tl.int64) * (L * D),
        first,
        L if HAS_INITIAL_STATE else 0,
        first_col,
        limit,
        X,
        D,
        W,
        BLOCK_N,
        PAIRS,
    )
    previous, visible = visible_before(segment_ptr, first, W, HAS_SEGMENTS)
    convolve_rows(
        x_ptr + token * X,
        out_ptr + token * out_stride,
        segment_ptr,
        window,
        taps,
        bias,
        previous,
        visible,
        tl.minimum(block_m, row_len - first),
        first_col,
        limit,
        out_stride,
        X,
        W,
        SILU,
        HAS_SEGMENTS,
        BLOCK_N,
        GROUP,
        PAIRS,
        FAST,
    )
