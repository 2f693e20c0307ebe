"""Offsets of a packed batch, which may be any integers. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Offsets(NamedTuple):
    """Where the sequences of a packed batch begin.

    Attributes:
        ptr: to `(num_seqs + 1,)` int32 of any values.
        num_tokens: T, to which they are clipped.
        num_seqs: N.
    """

    ptr: Any
    num_tokens: Any
    num_seqs: Any


@triton.jit
def _max(a, b):
    return tl.maximum(a, b)


@triton.jit
def _clip(offset, num_tokens):
    return tl.minimum(tl.maximum(offset, 0), num_tokens)


@triton.jit
def offset_bound(offsets, last, C: tl.constexpr):
    """`max(clip(offsets[0..last], 0, T))`: cummax at one entry.

    Well-formed offsets need no maximum, but any vector of integers has a meaning,
    and a scan of a few cached lines, SCAN at a time, is cheaper than a second kernel.
    Offsets are loaded four at a time. The last ones of the array, where fewer than four
    are left, are loaded apart.
    """
    SCAN: tl.constexpr = C.SCAN
    lanes = tl.arange(0, SCAN)
    best = tl.full([SCAN], 0, tl.int32)
    full = (last + 1) // SCAN * SCAN
    for base in range(0, full, SCAN):
        best = tl.maximum(best, tl.load(offsets.ptr + base + lanes))
    whole = (offsets.num_seqs + 1) // 4 * 4
    i = full + lanes
    wanted = i < tl.minimum(whole, (last // 4 + 1) * 4)
    q = tl.load(offsets.ptr + i, mask=wanted, other=0)
    best = tl.maximum(best, tl.where(i <= last, q, 0))
    four = whole + tl.arange(0, 4)
    rest = tl.load(offsets.ptr + four, mask=four <= last, other=0)
    best = tl.maximum(tl.reduce(best, 0, _max), tl.reduce(rest, 0, _max))
    return _clip(best, offsets.num_tokens)


@triton.jit
def zero_uncovered(out, offsets, chunk, block_m, block, C: tl.constexpr):
    """Writes zeros to chunk `chunk` of the tokens that no sequence covers.

    These tokens are numbered from 0: first the head, before the first sequence, then
    the tail, behind the last one.
    """
    num_tokens = offsets.num_tokens
    head = _clip(tl.load(offsets.ptr), num_tokens)
    # The last sequence ends where the last offset says, or later. So most programs
    # behind the last chunk, which have nothing to do, see that without the scan.
    end = _clip(tl.load(offsets.ptr + offsets.num_seqs), num_tokens)
    end = tl.maximum(end, head)
    if chunk <= (head + (num_tokens - end) - 1) // block_m:
        tail = offset_bound(offsets, offsets.num_seqs, C)
        uncovered = head + (num_tokens - tail)
        if chunk <= (uncovered - 1) // block_m:
            first = chunk * block_m
            last = tl.minimum(first + block_m, uncovered)
            cols = block.cols
            zeros = tl.full(cols.shape, 0, out.ptr.dtype.element_ty)
            for i in range(first, last):
                token = tl.where(i < head, i, tail + (i - head))
                row_ptr = out.ptr + token.to(tl.int64) * out.stride
                tl.store(row_ptr + cols, zeros, mask=cols < block.limit)
