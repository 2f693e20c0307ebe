"""Drafts that can be taken back: what a slot knows of its last tokens. No JAX here.

A slot holds the state before a request's last DRAFTS tokens, and of these x, dt and B,
oldest first. Some of the newest may have been rejected; a sequence begins with those
that are kept. "The state after n tokens" leaves the last DRAFTS of all those out, the
sequence's own included: it is the one after n of DRAFTS + length tokens, the first of
which, in the place of those that are rejected or never were, do nothing.
"""

import triton
import triton.language as tl

from .ssd_device import (
    Store,
    load_bias,
    next_state,
    own_tokens,
    slot_of,
    step_size,
    stores_of,
)


@triton.jit
def kept_of(inputs, seq, known, C: tl.constexpr):
    """How many of its slot's recent tokens, the first ones, a sequence begins with."""
    kept = tl.where(known, C.DRAFTS, 0)
    if inputs.rejected is not None:
        kept -= tl.minimum(tl.maximum(tl.load(inputs.rejected + seq), 0), kept)
    return kept


@triton.jit
def without(stores, tokens):
    """Two `Store`s, counted without so many tokens in front."""
    last, early = stores
    return (
        Store(last.slot, tl.maximum(last.end - tokens, 0), last.live),
        Store(early.slot, tl.maximum(early.end - tokens, 0), early.live),
    )


@triton.jit
def _load_recent(inputs, slot, i, head, channels, C: tl.constexpr):
    """x, dt and B of a recent token, for one head."""
    size = tl.arange(0, C.K_BLOCK)
    row = slot.to(tl.int64) * C.DRAFTS + i
    x_ptr = inputs.recent_x + row * (C.H * C.P) + head * C.P
    B_ptr = inputs.recent_B + row * (C.G * C.K) + head // (C.H // C.G) * C.K
    return (
        tl.load(x_ptr + channels, mask=channels < C.P, other=0.0),
        tl.load(inputs.recent_dt + row * C.H + head),
        tl.load(B_ptr + size, mask=size < C.K, other=0.0),
    )


@triton.jit
def replay(inputs, state, slot, first, end, A, head, channels, C: tl.constexpr):
    """The state after a slot's recent tokens `first` up to `end`, given that before."""
    nearest = tl.minimum(first, C.DRAFTS - 1)
    ahead = _load_recent(inputs, slot, nearest, head, channels, C)
    for i in range(first, end):
        x, dt, B = ahead
        following = tl.minimum(i + 1, C.DRAFTS - 1)
        ahead = _load_recent(inputs, slot, following, head, channels, C)
        # As those of the batch, if the slots have wider ones.
        x = x.to(inputs.x.dtype.element_ty).to(tl.float32)
        B = B.to(inputs.B.dtype.element_ty)
        state = next_state(state, x, dt.to(tl.float32), B, A)
    return state


@triton.jit
def _rows_after(pointers, its, end, bias, columns, WIDTH, C: tl.constexpr):
    """DRAFTS rows of one array: those that belong to the state after `end` tokens.

    Args:
        pointers: to the batch's first row and to the slot's.
        its: the sequence's first token, and how many it keeps.
        bias: of step sizes, which the batch's are yet to become; else None.
        columns, WIDTH: which of how many.
    """
    fresh, recent = pointers
    begin, kept = its
    place = tl.arange(0, C.RECENT_BLOCK)
    wanted = (place < C.DRAFTS)[:, None] & (columns < WIDTH)[None, :]
    old = end + place - (C.DRAFTS - kept)
    at = old[:, None] * WIDTH + columns[None, :]
    mask = wanted & ((old >= 0) & (old < kept))[:, None]
    rows = tl.load(recent + at, mask=mask, other=0.0)
    new = old - kept
    at = (begin + new).to(tl.int64)[:, None] * WIDTH + columns[None, :]
    is_new = wanted & (new >= 0)[:, None]
    values = tl.load(fresh + at, mask=is_new, other=0.0)
    if bias is not None:
        values = step_size(values, bias, C)
    else:
        rows = rows.to(values.dtype)  # as `replay` sees them
    dtype = recent.dtype.element_ty
    return tl.where(is_new, values.to(dtype), rows.to(dtype))


@triton.jit
def _renew(pointers, its, stores, bias, columns, WIDTH: tl.constexpr, C: tl.constexpr):
    """Writes what a sequence leaves of one array.

    Args:
        pointers: to the batch's first row, and to that of all slots.
        its: slot, first token, how many it keeps.
        stores, bias, columns, WIDTH: see `_rows_after`.
    """
    fresh, recent = pointers
    slot, begin, kept = its
    last, early = stores
    SIZE: tl.constexpr = C.DRAFTS * WIDTH
    rows_of = fresh, recent + slot.to(tl.int64) * SIZE
    tokens = begin, kept
    rows = _rows_after(rows_of, tokens, last.end, bias, columns, WIDTH, C)
    if C.STORES > 1:
        before = _rows_after(rows_of, tokens, early.end, bias, columns, WIDTH, C)
    tl.debug_barrier()
    if C.STORES > 1:
        _store_rows(recent, early, before, columns, WIDTH, C)
    _store_rows(recent, last, rows, columns, WIDTH, C)


@triton.jit
def _store_rows(recent, store, rows, columns, WIDTH: tl.constexpr, C: tl.constexpr):
    place = tl.arange(0, C.RECENT_BLOCK)[:, None]
    limit = tl.where(store.live, WIDTH, 0)
    mask = (place < C.DRAFTS) & (columns < limit)[None, :]
    out = recent + store.slot.to(tl.int64) * (C.DRAFTS * WIDTH)
    tl.store(out + (place * WIDTH + columns[None, :]), rows, mask=mask)


# The last launch of a batch with drafts: what the slots know of the last tokens. One
# program serves COLUMNS columns of a sequence's x, dt and B, rows of which are H * P,
# H and G * K wide; the grid is 1-D, sequences x blocks of columns, blocks fastest.
#
# It is a launch of its own since programs of all heads replay the same B, and those of
# all channels of a head the same dt, which is written here in place.
#
# Race-free: live sequences write different slots, none of which another one reads, and
# of a slot each program owns other columns. It reads all rows of these that it needs,
# then waits at a barrier, then writes. Tokens and states are not written.
@triton.jit
def recent_kernel(inputs, outputs, C: tl.constexpr):
    X: tl.constexpr = C.H * C.P
    H: tl.constexpr = C.H
    B: tl.constexpr = C.G * C.K
    WIDEST: tl.constexpr = X if X > B else B
    BLOCKS: tl.constexpr = (WIDEST + C.COLUMNS - 1) // C.COLUMNS
    first = tl.program_id(0) % BLOCKS * C.COLUMNS
    seq = tl.program_id(0) // BLOCKS
    slot, valid, known = slot_of(inputs, seq, C)
    begin, end = own_tokens(inputs, seq, C)
    served = valid & (begin < end)
    if inputs.role is None:
        served = served & (end - begin <= 1 + C.DRAFTS)
    else:
        served = served & (tl.load(inputs.role + seq) >= -1)
    if served:
        its = slot, begin, kept_of(inputs, seq, known, C)
        stores = stores_of(inputs, seq, slot, end - begin, C)
        columns = first + tl.arange(0, C.COLUMNS)
        if first < X:
            arrays = inputs.x, inputs.recent_x
            _renew(arrays, its, stores, None, columns, X, C)
        if first < H:
            arrays = inputs.dt, inputs.recent_dt
            bias = load_bias(inputs, columns[None, :], C)
            _renew(arrays, its, stores, bias, columns, H, C)
        if first < B:
            arrays = inputs.B, inputs.recent_B
            _renew(arrays, its, stores, None, columns, B, C)
