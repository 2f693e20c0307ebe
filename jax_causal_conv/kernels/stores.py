"""Where a state goes, and how it gets there. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import only_if


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
