"""The packed forward kernel. No JAX here."""

import triton
import triton.language as tl

from .device import (
    channel_block,
    convolve_rows,
    load_taps,
    load_window,
    offset_bound,
    roll_slot,
    store_window,
    zero_rows,
    zero_uncovered,
)


@triton.jit
def sequence(
    seq,
    query_start_loc_ptr,
    slot_ptr,
    has_initial_state_ptr,
    num_rejected_ptr,
    num_tokens,
    num_seqs,
    L: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    HAS_REJECTED: tl.constexpr,
    SCAN: tl.constexpr,
):
    """First token, end, slot and valid rows of history of sequence `seq`.

    All these loads overlap.
    """
    end = tl.load(query_start_loc_ptr + seq + 1)
    slot = seq
    if HAS_SLOTS:
        slot = tl.load(slot_ptr + seq)
    history = seq * 0  # a tensor, as below
    if HAS_INITIAL_STATE:
        seen = tl.load(has_initial_state_ptr + seq)
        history = tl.where(seen, L, 0)
        if HAS_REJECTED:
            rejected = tl.load(num_rejected_ptr + seq)
            rejected = tl.minimum(tl.maximum(rejected, 0), L)
            history = tl.maximum(history - rejected, 0)
    start = offset_bound(query_start_loc_ptr, seq, num_tokens, num_seqs, SCAN)
    return start, tl.maximum(tl.minimum(end, num_tokens), start), slot, history


# One program filters one chunk (at most block_m tokens) of one sequence for BLOCK_N
# channels. The grid is 1-D, chunks x blocks of channels, channels fastest: programs
# that run side by side read neighbouring memory, and no grid axis limit applies.
# Program -> (sequence, chunk) by chunk_seq/chunk_offset; programs behind the last
# chunk (chunk_seq == -1) zero the tokens that no sequence covers, and chunks of
# skipped sequences are zeroed as well, so that `out` needs no memset.
#
# Reads: its rows of x and the W-1 rows before them; chunk 0 the sequence's slot.
# Writes: its rows of out; chunk 0 of a live sequence its slot, in place.
#
# Race-free in a donated state buffer: live sequences own different slots, and of a
# sequence only chunk 0 touches the slot (later chunks take their history from x,
# which is why block_m >= W-1), in programs that own different channels. Within the
# program every read of the slot is before the first write: with a barrier between in
# roll_slot, and in store_window of several warps; one warp reads and writes in order.
# Rows of out belong to one program each, since sanitised offsets never overlap.
#
# Values are never trusted: offsets are cummax(clip(q, 0, T)), slots are compared with
# [0, S), a program number out of range is compared before it is multiplied.
@triton.jit
def packed_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    state_ptr,
    query_start_loc_ptr,
    slot_ptr,
    has_initial_state_ptr,
    num_rejected_ptr,
    chunk_seq_ptr,
    chunk_offset_ptr,
    num_tokens,
    num_seqs,
    num_slots,
    block_m,
    out_ptr,
    out_1_ptr,  # None where there are fewer parts: see channel_block
    out_2_ptr,
    out_3_ptr,
    spare_ptr,  # some launchers hand an in-place buffer over twice
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
    HAS_SLOTS: tl.constexpr,
    HAS_INITIAL_STATE: tl.constexpr,
    HAS_REJECTED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    PAIRS: tl.constexpr,
    L_BLOCK: tl.constexpr,
    SLOT_N: tl.constexpr,
    WINDOW_IS_SLOT: tl.constexpr,
    WARPS: tl.constexpr,
    SCAN: tl.constexpr,
    FAST: tl.constexpr,
):
    program = tl.program_id(0) // COL_BLOCKS
    block = tl.program_id(0) % COL_BLOCKS
    first_col, limit, out_ptr, out_stride = channel_block(
        block, (out_ptr, out_1_ptr, out_2_ptr, out_3_ptr), SPLIT, BLOCK_N
    )
    cols = first_col + tl.arange(0, BLOCK_N)
    mask = cols < limit
    x_ptr += OFFSET

    # Needed last, asked for first.
    taps, bias = load_taps(weight_ptr, bias_ptr, cols, mask, W, HAS_BIAS)
    seq = tl.load(chunk_seq_ptr + program)
    chunk = tl.load(chunk_offset_ptr + program)
    # Where decodes come first, program i serves sequence i: what is known of that one
    # is asked for at once, not after one more wait for memory.
    start, end, slot, history = program, program, program, program
    if program < num_seqs:
        start, end, slot, history = sequence(
            program,
            query_start_loc_ptr,
            slot_ptr,
            has_initial_state_ptr,
            num_rejected_ptr,
            num_tokens,
            num_seqs,
            L,
            HAS_SLOTS,
            HAS_INITIAL_STATE,
            HAS_REJECTED,
            SCAN,
        )
    if seq < 0:
        if (seq == -1) & (chunk >= 0):
            zero_uncovered(
                out_ptr,
                query_start_loc_ptr,
                num_tokens,
                num_seqs,
                chunk,
                block_m,
                cols,
                mask,
                out_stride,
                BLOCK_N,
                SCAN,
            )
    elif (seq < num_seqs) & (chunk >= 0):
        if seq != program:
            start, end, slot, history = sequence(
                seq,
                query_start_loc_ptr,
                slot_ptr,
                has_initial_state_ptr,
                num_rejected_ptr,
                num_tokens,
                num_seqs,
                L,
                HAS_SLOTS,
                HAS_INITIAL_STATE,
                HAS_REJECTED,
                SCAN,
            )
        length = end - start
        if (length > 0) & (chunk <= (length - 1) // block_m):
            first = chunk * block_m
            rows = tl.minimum(block_m, length - first)
            row_ptr = x_ptr + start.to(tl.int64) * X
            out_ptr += (start + first).to(tl.int64) * out_stride
            if (slot >= 0) & (slot < num_slots) & (slot != PAD_SLOT_ID):
                slot_base = state_ptr + slot.to(tl.int64) * (L * D)
                first_ptr = row_ptr + first.to(tl.int64) * X
                window = load_window(
                    first_ptr,
                    slot_base,
                    first,
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
                    first_ptr,
                    out_ptr,
                    chunk_seq_ptr,
                    window,
                    taps,
                    bias,
                    0,
                    0,
                    rows,
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
                if WINDOW_IS_SLOT and (chunk == 0) & (length <= block_m):
                    store_window(slot_base + cols, window, mask, D, W, WARPS)
                elif chunk == 0:
                    roll_slot(
                        row_ptr,
                        slot_base,
                        length,
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
                zero_rows(out_ptr + cols, rows, mask, out_stride, BLOCK_N)
