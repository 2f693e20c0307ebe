"""The decode kernel. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import Rows, channel_block, load_filter, load_plain, zero_rows
from .stores import Store, roll_slot, store_window, written_store
from .walks import convolve_rows, filter_rows, in_walk, walk_of


class UpdateInputs(NamedTuple):
    """The arrays of `UpdateOperands`, and S, the number of slots."""

    x: Any
    weight: Any
    bias: Any
    states: Any
    slots: Any
    cache_seqlens: Any
    num_rejected: Any
    write_slots: Any
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


@triton.jit
def move_ring(row_ptr, slot_ptr, store, cursor, block, C: tl.constexpr):
    """Stores all of a circular buffer, with the Q rows of `store_ring` in it."""
    row = tl.arange(0, C.L_BLOCK)[:, None]
    behind = row - cursor
    behind = tl.where(behind < 0, behind + C.L, behind)
    fresh = behind < C.Q
    token = behind + (C.Q - 1 - behind) // C.L * C.L  # the last one that goes there
    for n in range(0, C.BLOCK_N, C.SLOT_N):
        cols = (block.first + n + tl.arange(0, C.SLOT_N))[None, :]
        mask = (row < C.L) & (cols < block.limit)
        x_ptrs = row_ptr + token.to(tl.int64) * C.X + cols
        x = tl.load(x_ptrs, mask=mask & fresh, other=0.0)
        at = row * C.D + cols
        old = tl.load(slot_ptr + at, mask=mask & (behind >= C.Q), other=0.0)
        rows = tl.where(fresh, x.to(slot_ptr.dtype.element_ty), old)
        tl.debug_barrier()
        stored = (row < C.L) & (cols < tl.where(store.live, block.limit, 0))
        tl.store(store.ptr + at, rows, mask=stored)


# One program advances one request by its Q tokens for BLOCK_N channels; the grid is
# 1-D, rows x blocks of channels, channels fastest. It alone writes its part of the slot
# that the request's state goes to, which no other request reads, and reads all it needs
# of the request's slot before the first write, since the two may be one. Several warps
# have a barrier in between; a single one reads and writes in order. So updating a
# donated buffer in place is race-free.
#
# With cache_seqlens slots are circular buffers: history is the C.REACH rows before the
# cursor, input q goes to row (cursor + q) mod L.
@triton.jit
def update_kernel(inputs, outputs, C: tl.constexpr):
    Q: tl.constexpr = C.Q
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
        store = Store(slot, slot_ptr, C.Q, None)
        if inputs.write_slots is not None:
            store = written_store(inputs, request, C.Q, C)
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
            if inputs.write_slots is None:
                store_ring(row_ptr, slot_ptr, cursor, block, C)
            else:
                move_ring(row_ptr, slot_ptr, store, cursor, block, C)
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
                (0, Q, Q),
                block,
                C,
            )
            if C.WINDOW_IS_SLOT:
                store_window(store, window, block, C)
            else:
                roll_slot(row_ptr, slot_ptr, store, None, history, block, C)
    else:
        zero_rows(out, C.Q, block)
