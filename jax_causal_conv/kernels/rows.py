"""Channels of a program, rows of them in memory, and the filter that they meet.

Rows of the input are C.X elements apart, rows of a part of the output as many as its
`Rows` say, all others C.D. A pointer to a row of the input, or of a part of the output,
points to where channel 0 is or would be. Pointers to rows are computed in 64 bits, so
that no product of sizes overflows. C is `constants.Constants`. No JAX here.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Block(NamedTuple):
    """The channels of one program.

    Attributes:
        first: the first of C.BLOCK_N channels.
        limit: those from here on are not the program's: D, or where a part ends.
        cols: all of them, `[C.BLOCK_N]`.
    """

    first: Any
    limit: Any
    cols: Any


class Rows(NamedTuple):
    """Rows in memory.

    Attributes:
        ptr: to where channel 0 of the first one is, or would be.
        stride: elements from one to the next.
    """

    ptr: Any
    stride: Any


class Filter(NamedTuple):
    """A filter, or the sums for its gradient.

    Attributes:
        taps: W float32 rows, oldest first.
        bias: a float32 row.
    """

    taps: Any
    bias: Any


@triton.jit
def channel_block(parts, C: tl.constexpr):
    """The channels of this program, and the part they lie in.

    Blocks are counted part by part, so that none spans two of them. Only scalars depend
    on the part, so that the same code serves all parts, and of the choice nothing is
    left where there is a single one.

    Args:
        parts: a tuple of pointers to the parts `(rows, C.SPLIT[i])` of an array.

    Returns:
        The `Block`, and the `Rows` of its part.
    """
    SPLIT: tl.constexpr = C.SPLIT
    block = tl.program_id(0) % C.COL_BLOCKS
    first = block * C.BLOCK_N
    limit = tl.cast(SPLIT[0], tl.int32)
    ptr = parts[0]
    stride = tl.cast(SPLIT[0], tl.int32)
    channels = 0
    blocks = 0
    for i in tl.static_range(1, len(SPLIT)):
        channels += SPLIT[i - 1]
        blocks += (SPLIT[i - 1] + C.BLOCK_N - 1) // C.BLOCK_N
        here = block >= blocks
        first = tl.where(here, channels + (block - blocks) * C.BLOCK_N, first)
        limit = tl.where(here, channels + SPLIT[i], limit)
        ptr = tl.where(here, parts[i] - channels, ptr)
        stride = tl.where(here, SPLIT[i], stride)
    cols = first + tl.arange(0, C.BLOCK_N)
    return Block(first, limit, cols), Rows(ptr, stride.to(tl.int64))


@triton.jit
def only_if(condition, block):
    """The block, or one that has no channels."""
    return Block(block.first, tl.where(condition, block.limit, 0), block.cols)


@triton.jit
def load_plain(row_ptr, block):
    """The channels of a row; zeros for those that are not the block's."""
    mask = block.cols < block.limit
    return tl.load(row_ptr + block.cols, mask=mask, other=0.0)


@triton.jit
def load_row(row_ptr, block, C: tl.constexpr):
    """`load_plain` of x or the like, for `widen`.

    Pairs are loaded, and kept until they are needed, as 32-bit words.
    """
    if C.PAIRS:
        words = block.first // 2 + tl.arange(0, C.BLOCK_N // 2)
        word_ptr = row_ptr.to(tl.pointer_type(tl.int32))
        return tl.load(word_ptr + words, mask=words < block.limit // 2, other=0)
    else:
        return load_plain(row_ptr, block)


@triton.jit
def widen(row, C: tl.constexpr):
    """What `load_row` has loaded, as float32: of a pair, each is one instruction."""
    if C.PAIRS:
        low = (row << 16).to(tl.float32, bitcast=True)
        high = (row & -65536).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape(C.BLOCK_N)
    else:
        return row.to(tl.float32)


@triton.jit
def load_rows(row_ptr, stride, wanted, block, C: tl.constexpr):
    """`load_row` of GROUP rows, as a tuple; no load is issued unless `wanted`."""
    GROUP: tl.constexpr = C.GROUP  # Triton's static_range asks for a name
    block = only_if(wanted, block)
    rows = ()
    for g in tl.static_range(GROUP):
        rows = rows + (load_row(row_ptr + g * stride, block, C),)
    return rows


@triton.jit
def load_filter(weight_ptr, bias_ptr, block, C: tl.constexpr):
    """The `Filter` of a block's channels; a bias that is None is zero.

    A channel's taps lie side by side. Where they fill words of 8 bytes they are read
    as such: strided 2-byte reads would keep a short row busier than its own data.
    """
    W: tl.constexpr = C.W
    BITS: tl.constexpr = weight_ptr.dtype.element_ty.primitive_bitwidth
    INT: tl.constexpr = tl.int16 if BITS == 16 else tl.int32
    cols = block.cols
    mask = cols < block.limit
    taps = ()
    if (W * BITS) % 64 == 0:
        PER_WORD: tl.constexpr = 64 // BITS
        WORDS: tl.constexpr = W // PER_WORD
        word_ptr = weight_ptr.to(tl.pointer_type(tl.int64))
        for j in tl.static_range(WORDS):
            word = tl.load(word_ptr + cols.to(tl.int64) * WORDS + j, mask=mask, other=0)
            for i in tl.static_range(PER_WORD):
                w = (word >> (BITS * i)).to(INT)
                w = w.to(weight_ptr.dtype.element_ty, bitcast=True)
                taps = taps + (w.to(tl.float32),)
    else:
        for k in tl.static_range(W):
            w = tl.load(weight_ptr + cols.to(tl.int64) * W + k, mask=mask, other=0.0)
            taps = taps + (w.to(tl.float32),)
    bias = tl.full(cols.shape, 0, tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    return Filter(taps, bias)


@triton.jit
def zero_rows(out, rows, block):
    """Writes zeros to the first `rows` of `out`."""
    cols = block.cols
    out_ptrs = out.ptr + cols
    zeros = tl.full(cols.shape, 0, out.ptr.dtype.element_ty)
    for _ in range(rows):
        tl.store(out_ptrs, zeros, mask=cols < block.limit)
        out_ptrs += out.stride
