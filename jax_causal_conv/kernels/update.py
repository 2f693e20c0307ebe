"""The decode kernel. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import (
    Rows,
    channel_block,
    convolve_rows,
    filter_rows,
    in_walk,
    load_filter,
    load_plain,
    roll_slot,
    store_window,
    walk_of,
    zero_rows,
)


class UpdateInputs(NamedTuple):
    """The arrays of `UpdateOperands`, and S, the number of slots."""

    x: Any
    weight: Any
    bias: Any
    states: Any
    slots: Any
    cache_seqlens: Any
    num_rejected: Any
    num_slots: Any


class UpdateOutputs(NamedTuple):
    """The parts of the output."""

    out: tuple


@triton.jit
def load_ring(slot_ptr, cursor, block, C: tl.constexpr):
    """The W-1 float32 rows that the walk of row `cursor` has before it, as a tuple.

    The rows are those of a circular buffer, and cursor may be up to C.DILATION - 1
    more than the number of its last row.
    """
    W: tl.constexpr = C.W
    window = ()
    for k in tl.static_range(W - 1):
        row = cursor - (W - 1 - k) * C.DILATION
        row = tl.where(row < 0, row + C.L, row)
        window = window + (load_plain(slot_ptr + row * C.D, block).to(tl.float32),)
    return window


@triton.jit
def store_ring(row_ptr, slot_ptr, cursor, block, C: tl.constexpr):
    """Writes the Q rows at `row_ptr` to a circular buffer, from row `cursor` on.

    Of more than L rows only the last L are written. A barrier puts the writes behind
    the reads of the buffer that the caller has issued.
    """
    KEPT: tl.constexpr = min(C.Q, C.L)
    tl.debug_barrier()
    cols = block.cols
    x_ptrs = row_ptr + (C.Q - KEPT) * C.X + cols
    for q in range(C.Q - KEPT, C.Q):
        x = tl.load(x_ptrs, mask=cols < block.limit, other=0.0)
        x_ptrs += C.X
        row = (cursor + q) % C.L
        x = x.to(slot_ptr.dtype.element_ty)
        tl.store(slot_ptr + row * C.D + cols, x, mask=cols < block.limit)


# One program advances one request by its Q tokens for BLOCK_N channels; the grid is
# 1-D, rows x blocks of channels, channels fastest. It alone reads and writes its part
# of the request's slot, and reads all it needs of it before the first write. Several
# warps have a barrier in between; a single one reads and writes in order. So updating a
# donated buffer in place is race-free.
#
# With cache_seqlens slots are circular buffers: history is the C.REACH rows before the
# cursor, input q goes to row (cursor + q) mod L.
@triton.jit
def update_kernel(inputs, outputs, C: tl.constexpr):
    request = tl.program_id(0) // C.COL_BLOCKS
    block, out = channel_block(outputs.out, C)

    # The filter is needed last, but its loads are issued first, to overlap with others.
    filter = load_filter(inputs.weight, inputs.bias, block, C)
    slot = request
    if inputs.slots is not None:
        slot = tl.load(inputs.slots + request)
    row_ptr = inputs.x + C.OFFSET + request.to(tl.int64) * (C.Q * C.X)
    out = Rows(out.ptr + request.to(tl.int64) * (C.Q * out.stride), out.stride)
    if (slot >= 0) & (slot < inputs.num_slots) & (slot != C.PAD_SLOT_ID):
        slot_ptr = inputs.states + slot.to(tl.int64) * (C.L * C.D)
        if inputs.cache_seqlens is not None:
            cursor = tl.load(inputs.cache_seqlens + request) % C.L
            # The remainder has the sign of the dividend.
            cursor = tl.where(cursor < 0, cursor + C.L, cursor)
            for phase in range(min(C.DILATION, C.Q)):
                window = load_ring(slot_ptr, cursor + phase, block, C)
                convolve_rows(
                    row_ptr + phase * tl.cast(C.X, tl.int64),
                    walk_of(out, phase, C),
                    window,
                    filter,
                    None,
                    in_walk(C.Q, phase, C),
                    block,
                    C,
                )
            store_ring(row_ptr, slot_ptr, cursor, block, C)
        else:
            history = C.L
            if inputs.num_rejected is not None:
                rejected = tl.load(inputs.num_rejected + request)
                history = C.L - tl.minimum(tl.maximum(rejected, 0), C.L)
            window = filter_rows(
                row_ptr,
                slot_ptr,
                None,
                out,
                0,
                history,
                filter,
                (0, C.Q, C.Q),
                block,
                C,
            )
            if C.WINDOW_IS_SLOT:
                store_window(slot_ptr, window, block, C)
            else:
                roll_slot(row_ptr, slot_ptr, C.Q, history, block, C)
    else:
        zero_rows(out, C.Q, block)
