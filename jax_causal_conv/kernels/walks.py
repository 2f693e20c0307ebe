"""The conv over a run of tokens: windows that roll, and segments that bound them.

With a dilation, tokens that are C.DILATION apart see each other alone: a run of tokens
is as many walks, number `phase` over tokens phase, phase + C.DILATION and so on, each a
conv without dilation. Windows, steps and segments are those of one walk. There is a
single walk, of phase 0, where there is no dilation. No JAX here.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import activate
from .rows import Block, Rows, load_plain, load_row, load_rows, only_if, widen


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
