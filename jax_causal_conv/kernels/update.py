"""The decode kernel. No JAX here."""

import triton
import triton.language as tl

from .device import (
    channel_block,
    convolve_rows,
    load_taps,
    load_window,
    roll_slot,
    store_window,
    zero_rows,
)


# One program advances one request by its Q tokens for BLOCK_N channels; the grid is
# 1-D, rows x blocks of channels, channels fastest. It alone reads and writes its part
# of the request's slot, and reads all it needs of it before the first write (with a
# barrier in between, or none where one warp does both in order), so
# updating a donated buffer in place is race-free.
#
# CIRCULAR: history is the W-1 rows before the cursor, input q goes to row
# (cursor + q) mod L, and of more than L inputs only the last L are written.
@triton.jit
def update_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    cache_seqlens_ptr,
    slot_ptr,
    num_rejected_ptr,
    num_slots,
    out_ptr,
    out_1_ptr,  # None where there are fewer parts: see channel_block
    out_2_ptr,
    out_3_ptr,
    spare_ptr,  # some launchers hand an in-place buffer over twice
    Q: tl.constexpr,
    X: tl.constexpr,
    OFFSET: tl.constexpr,
    SPLIT: tl.constexpr,
    COL_BLOCKS: tl.constexpr,
    D: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    PAD_SLOT_ID: tl.constexpr,
    SILU: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    CIRCULAR: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_REJECTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    L_BLOCK: tl.constexpr,
    SLOT_N: tl.constexpr,
    WINDOW_IS_SLOT: tl.constexpr,
    WARPS: tl.constexpr,
    FAST: tl.constexpr,
):
    request = tl.program_id(0) // COL_BLOCKS
    block = tl.program_id(0) % COL_BLOCKS
    first_col, limit, out_ptr, out_stride = channel_block(
        block, (out_ptr, out_1_ptr, out_2_ptr, out_3_ptr), SPLIT, BLOCK_N
    )
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = cols < limit
    x_ptr += OFFSET

    # Needed last, asked for first.
    taps, bias = load_taps(weight_ptr, bias_ptr, cols, mask, W, HAS_BIAS)
    slot = request
    if HAS_SLOTS:
        slot = tl.load(slot_ptr + request)
    row_ptr = x_ptr + request.to(tl.int64) * (Q * X)
    out_ptr += request.to(tl.int64) * (Q * out_stride)
    if (slot >= 0) & (slot < num_slots) & (slot != PAD_SLOT_ID):
        slot_base = state_ptr + slot.to(tl.int64) * (L * D)
        if CIRCULAR:
            cursor = tl.load(cache_seqlens_ptr + request) % L
            cursor = tl.where(cursor < 0, cursor + L, cursor)  # floored
            window = ()
            for k in tl.static_range(W - 1):
                row = cursor - (W - 1 - k)
                row = tl.where(row < 0, row + L, row)
                old = tl.load(slot_base + row * D + cols, mask=mask, other=0.0)
                window = window + (old.to(tl.float32),)
        else:
            history = L
            if HAS_REJECTED:
                rejected = tl.load(num_rejected_ptr + request)
                history = L - tl.minimum(tl.maximum(rejected, 0), L)
            window = load_window(
                row_ptr,
                slot_base,
                0,
                history,
                first_col,
                limit,
                X,
                D,
                W,
                BLOCK_N,
                PAIRS,
            )
        window = convolve_rows(
            row_ptr,
            out_ptr,
            slot_ptr,
            window,
            taps,
            bias,
            0,
            0,
            Q,
            first_col,
            limit,
            out_stride,
            X,
            W,
            SILU,
            False,
            BLOCK_N,
            GROUP,
            PAIRS,
            FAST,
        )
        if CIRCULAR:
            tl.debug_barrier()
            kept: tl.constexpr = min(Q, L)
            x_ptrs = row_ptr + (Q - kept) * X + cols
            for q in range(Q - kept, Q):
                x = tl.load(x_ptrs, mask=mask, other=0.0)
                x_ptrs += X
                row = (cursor + q) % L
                tl.store(
                    slot_base + row * D + cols,
                    x.to(state_ptr.dtype.element_ty),
                    mask=mask,
                )
        elif WINDOW_IS_SLOT:
            store_window(slot_base + cols, window, mask, D, W, WARPS)
        else:
            roll_slot(
                row_ptr,
                slot_base,
                Q,
                history,
                first_col,
                limit,
                X,
                D,
                L,
                L_BLOCK,
                BLOCK_N,
                SLOT_N,
            )
    else:
        zero_rows(out_ptr + cols, Q, mask, out_stride, BLOCK_N)
