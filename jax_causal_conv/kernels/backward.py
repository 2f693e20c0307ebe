"""The backward kernels. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import through_activation
from .offsets import Offsets, offset_bound, zero_uncovered
from .rows import (
    Filter,
    Rows,
    channel_block,
    load_filter,
    load_plain,
    load_row,
    load_rows,
    only_if,
    widen,
    zero_rows,
)
from .walks import (
    count_from,
    in_walk,
    load_window,
    next_token,
    preactivation,
    segments_before,
    walk_of,
    within_reach,
)


class RowsBackwardInputs(NamedTuple):
    """The arrays of `RowsBackwardOperands`, and where the last run of each row is.

    Attributes:
        live: int32.
        segment_ids: with a dilation, such as differ from run to run.
        state_start, state_end: `(B,)` int32, the tokens of the run whose last ones
            the slot holds; None is all of the row.
        row_len, chunks, block_m: tokens and chunks of a row, tokens of a chunk.
    """

    x: Any
    weight: Any
    bias: Any
    history: Any
    dy: tuple
    dslots: Any
    live: Any
    segment_ids: Any
    state_start: Any
    state_end: Any
    row_len: Any
    chunks: Any
    block_m: Any


class PackedBackwardInputs(NamedTuple):
    """The arrays of `PackedBackwardOperands` and its metadata; numbers T and N.

    Attributes:
        live: int32.
        block_m: tokens of a chunk.
    """

    x: Any
    weight: Any
    bias: Any
    history: Any
    dy: tuple
    dslots: Any
    query_start_loc: Any
    live: Any
    chunk_seq: Any
    chunk_offset: Any
    num_tokens: Any
    num_seqs: Any
    block_m: Any


class BackwardOutputs(NamedTuple):
    """Gradients.

    Attributes:
        dx: like x, but of D channels.
        dhistory: like history, float32.
        partial: `(P, W+1, D)` float32, each chunk's sums for dweight and dbias.
    """

    dx: Any
    dhistory: Any
    partial: Any


class Chunk(NamedTuple):
    """Those of `rows` tokens that one walk meets.

    Attributes:
        first: position in its sequence of the first of all tokens of the chunk.
        phase: the walk's.
        rows: how many of the chunk's tokens it meets.
        left: how many from there to the sequence's end.
    """

    first: Any
    phase: Any
    rows: Any
    left: Any


class SlotRows(NamedTuple):
    """The rows of a slot (here of its cotangent) that are copies of tokens.

    Tokens from `start` on have a row there, as far as there are rows; token `end - 1`
    has the last one.

    Attributes:
        ptr: to row 0 of the slot.
    """

    ptr: Any
    start: Any
    end: Any


class Walk(NamedTuple):
    """Where the backward pass stands before token t, all tokens being of one walk.

    Attributes:
        window: the W-1 rows of x before t, oldest first.
        pending: dx of tokens t-(W-1) … t-1, as far as tokens before t contribute.
        sums: the `Filter` of sums over the chunk's own tokens, for dweight and dbias.
    """

    window: Any
    pending: Any
    sums: Any


@triton.jit
def backward_row(x, dy, walk, filter, segments, inside, mine, C: tl.constexpr):
    """Steps the backward pass by token t: row t of x and dy comes in, one dx goes out.

    Args:
        segments: as of t, or None.
        inside, mine: whether t lies in the sequence, and in the chunk; None if it does.
            Outside of the sequence dy is 0.

    Returns:
        The finished dx of token t-(W-1), and the new `Walk`.
    """
    W: tl.constexpr = C.W
    rows = walk.window + (x,)
    if segments is not None:
        # Padding uses no rows, not even its own, which may hold anything.
        real = segments.last >= 0
        reach = tl.where(real, segments.visible, -1)
        rows = within_reach(walk.window, reach, C) + (tl.where(real, x, 0.0),)
    dz = through_activation(dy, preactivation(rows, filter, C), C)
    if segments is not None:
        dz = tl.where(real, dz, 0.0)
    counted = dz
    if inside is not None:
        dz = tl.where(inside, dz, 0.0)
        counted = tl.where(mine, dz, 0.0)
    sums = ()
    dx = ()
    for k in tl.static_range(W):
        sums = sums + (tl.fma(counted, rows[k], walk.sums.taps[k]),)
        # What is out of reach is selected from the product, not multiplied with zero,
        # which a tap that is NaN would turn into NaN.
        if segments is not None:
            back = tl.where(reach >= W - 1 - k, filter.taps[k] * dz, 0.0)
            dx = dx + (walk.pending[k] + back if k < W - 1 else back,)
        elif k < W - 1:
            dx = dx + (tl.fma(filter.taps[k], dz, walk.pending[k]),)
        else:
            dx = dx + (filter.taps[k] * dz,)
    if C.RESIDUAL:
        if segments is not None:
            dy = tl.where(real, dy, 0.0)
        dx = dx[: W - 1] + (dx[W - 1] + dy,)
    sums = Filter(sums, walk.sums.bias + counted)
    return dx[0], Walk((walk.window + (x,))[1:], dx[1:], sums)


@triton.jit
def masked_step(
    x_ptr, dy_ptr, step, walk, filter, segments, chunk, block, C: tl.constexpr
):
    """`backward_row` for a token that may lie behind the chunk or the sequence.

    Args:
        x_ptr, dy_ptr: scalar pointers to the token.
        step: its number, counted from the chunk's first token.
    """
    inside = step < chunk.left
    here = only_if(inside, block)
    x = widen(load_row(x_ptr, here, C), C)
    dy = widen(load_row(dy_ptr, here, C), C)
    mine = step < chunk.rows
    return backward_row(x, dy, walk, filter, segments, inside, mine, C)


@triton.jit
def next_token_in(segments, number, step, chunk, C: tl.constexpr):
    """`next_token` where that may lie behind the row's end.

    There stands another row's id, or nothing: the row's last id is read again.

    Args:
        number: the token's number in the walk.
        step: its number counted from the chunk's first token.
    """
    last = chunk.left - 1
    return next_token(segments, number + tl.minimum(last - step, 0), C)


@triton.jit
def finish_chunk(
    x_ptr,
    dy,
    dx_ptrs,
    dslot,
    segments,
    walk,
    filter,
    done,
    chunk,
    block,
    C: tl.constexpr,
):
    """The rest of `backward_walk`, after `done` of the chunk's dx, one row at a time.

    Args:
        x_ptr: scalar pointer to the next row of x that comes in.
        dy: `Rows`, the first one that of the same token.
        dx_ptrs: to the next row of dx that goes out.
    """
    W: tl.constexpr = C.W
    mask = block.cols < block.limit
    dy_ptr = dy.ptr
    for i in range(done, chunk.rows):
        step = i + (W - 1)
        if segments is not None:
            segments = next_token_in(segments, 0, step, chunk, C)
        dx, walk = masked_step(
            x_ptr, dy_ptr, step, walk, filter, segments, chunk, block, C
        )
        if dslot is not None:
            token = chunk.first + chunk.phase + i * C.DILATION
            row = token - dslot.end + C.L
            copied = (token >= dslot.start) & (token < dslot.end) & (row >= 0)
            from_slot = load_plain(dslot.ptr + row * C.D, only_if(copied, block))
            dx += from_slot.to(tl.float32)
        tl.store(dx_ptrs, dx.to(dx_ptrs.dtype.element_ty), mask=mask)
        x_ptr += C.X * C.DILATION
        dy_ptr += dy.stride
        dx_ptrs += C.D * C.DILATION
        if segments is not None:
            segments = count_from(segments, 1, C)
    return walk.sums


@triton.jit
def backward_walk(
    x_ptr,
    dy,
    dx_ptr,
    dhistory_ptr,
    dslot,
    segments,
    window,
    sums,
    filter,
    chunk,
    block,
    C: tl.constexpr,
):
    """Gradients of those of a chunk's tokens that one walk meets.

    Goes over them and the W-1 tokens behind, whose gradients reach back into the
    chunk, and computes their pre-activations again. The first W-1 rows that come out
    belong to tokens before the chunk: to the history if it is the first chunk, else
    to another program, which computes them itself.

    Args:
        x_ptr, dx_ptr: scalar pointers to the walk's first row in the chunk.
        dy: `Rows` of the walk, the first one that of the same token.
        dhistory_ptr: to the first of the history's float32 rows that is the walk's.
        dslot: `SlotRows`, or None.
        segments: `Segments` before the first token, or None.
        window: tuple of the W-1 float32 rows before it, oldest first.
        sums: the `Filter` of sums for dweight and dbias so far.

    Returns:
        The sums with those over the walk's tokens added.
    """
    W: tl.constexpr = C.W
    X: tl.constexpr = C.X * C.DILATION
    D: tl.constexpr = C.D * C.DILATION
    GROUP: tl.constexpr = C.GROUP
    cols = block.cols
    mask = cols < block.limit
    zeros = tl.full([C.BLOCK_N], 0, tl.float32)
    pending = ()
    for _ in tl.static_range(W - 1):
        pending = pending + (zeros,)
    walk = Walk(window, pending, sums)
    dy_ptr = dy.ptr
    dx_ptrs = dx_ptr + cols

    for s in tl.static_range(W - 1):
        if segments is not None:
            segments = next_token_in(segments, s, s, chunk, C)
        dx, walk = masked_step(
            x_ptr + s * X,
            dy_ptr + s * dy.stride,
            s,
            walk,
            filter,
            segments,
            chunk,
            block,
            C,
        )
        before = tl.where(chunk.first == 0, block.limit, 0)
        tl.store(dhistory_ptr + s * D + cols, dx, mask=cols < before)
    x_ptr += (W - 1) * X
    dy_ptr += (W - 1) * dy.stride
    if segments is not None:
        segments = count_from(segments, W - 1, C)

    # Whole groups of the chunk's own tokens need no masks, as long as the slot holds no
    # copies of them. While one group is computed, the next one's loads are in flight.
    plain = chunk.rows
    if dslot is not None:
        if chunk.first < dslot.end:
            copied = tl.maximum(dslot.start, dslot.end - C.L)
            copied = in_walk(copied - chunk.first, chunk.phase, C)
            plain = tl.minimum(plain, copied)
    groups = tl.maximum(plain - (W - 1), 0) // GROUP
    xs = load_rows(x_ptr, X, groups > 0, block, C)
    dys = load_rows(dy_ptr, dy.stride, groups > 0, block, C)
    for i in range(groups):
        x_ptr += GROUP * X
        dy_ptr += GROUP * dy.stride
        more = i + 1 < groups
        next_xs = load_rows(x_ptr, X, more, block, C)
        next_dys = load_rows(dy_ptr, dy.stride, more, block, C)
        dxs = ()
        for g in tl.static_range(GROUP):
            if segments is not None:
                segments = next_token(segments, g, C)
            x, dy_row = widen(xs[g], C), widen(dys[g], C)
            dx, walk = backward_row(x, dy_row, walk, filter, segments, None, None, C)
            dxs = dxs + (dx,)
        for g in tl.static_range(GROUP):
            tl.store(dx_ptrs + g * D, dxs[g].to(dx_ptr.dtype.element_ty), mask=mask)
        xs = next_xs
        dys = next_dys
        dx_ptrs += GROUP * D
        if segments is not None:
            segments = count_from(segments, GROUP, C)

    dy = Rows(dy_ptr, dy.stride)
    done = groups * GROUP
    return finish_chunk(
        x_ptr, dy, dx_ptrs, dslot, segments, walk, filter, done, chunk, block, C
    )


@triton.jit
def no_sums(C: tl.constexpr):
    """A `Filter` of zeros."""
    W: tl.constexpr = C.W
    zeros = tl.full([C.BLOCK_N], 0, tl.float32)
    taps = ()
    for _ in tl.static_range(W):
        taps = taps + (zeros,)
    return Filter(taps, zeros)


@triton.jit
def backward_chunk(
    token,
    x_ptr,
    dy,
    dx_ptr,
    history,
    dslot,
    segment_ptr,
    filter,
    chunk,
    block,
    C: tl.constexpr,
):
    """Gradients of a chunk's tokens, walk after walk.

    Args:
        token: number of the chunk's first token in the arrays of all.
        x_ptr: scalar pointer to its row of x.
        dy: `Rows` of all tokens.
        dx_ptr: to the first of all rows of dx.
        history: pointers to all sequences' history and to its gradient, and the number
            of the element with which the sequence's begins.
        dslot: `SlotRows`, or None.
        segment_ptr: to the segment ids of all tokens, or None.
        chunk: position of its first token, how many there are, and the length of its
            sequence.

    Returns:
        The `Filter` of the sums over the chunk's tokens, for dweight and dbias.
    """
    W: tl.constexpr = C.W
    history_ptr, dhistory_ptr, element = history
    first, rows, length = chunk
    history_ptr += element
    if C.DILATION == 1:
        window = load_window(x_ptr, history_ptr, first, C.REACH, block, C)
        segments = None
        if segment_ptr is not None:
            segments = segments_before(segment_ptr + token, first, 0, C)
        return backward_walk(
            x_ptr,
            Rows(dy.ptr + token * dy.stride, dy.stride),
            dx_ptr + token * C.D,
            dhistory_ptr + element,
            dslot,
            segments,
            window,
            no_sums(C),
            filter,
            Chunk(first, 0, rows, length - first),
            block,
            C,
        )
    else:
        dhistory_ptr += element
        dx_ptr += token * C.D
        dy = Rows(dy.ptr + token * dy.stride, dy.stride)
        sums = no_sums(C)
        for phase in range(C.DILATION):
            own_history = dhistory_ptr + phase * C.D
            if phase < rows:
                row_ptr = x_ptr + phase * tl.cast(C.X, tl.int64)
                window = load_window(
                    row_ptr, history_ptr, first, C.REACH + phase, block, C
                )
                segments = None
                if segment_ptr is not None:
                    own_ptr = segment_ptr + token + phase
                    segments = segments_before(own_ptr, first, phase, C)
                sums = backward_walk(
                    row_ptr,
                    walk_of(dy, phase, C),
                    dx_ptr + phase * tl.cast(C.D, tl.int64),
                    own_history,
                    dslot,
                    segments,
                    window,
                    sums,
                    filter,
                    Chunk(
                        first,
                        phase,
                        in_walk(rows, phase, C),
                        in_walk(length - first, phase, C),
                    ),
                    block,
                    C,
                )
            elif first == 0:  # nobody met these rows of the history
                zero_rows(Rows(own_history, C.D * C.DILATION), W - 1, block)
        return sums


@triton.jit
def partial_rows(outputs, program, C: tl.constexpr):
    """A program's own W+1 rows of `partial`."""
    before = program.to(tl.int64) * ((C.W + 1) * C.D)
    return Rows(outputs.partial + before, C.D)


@triton.jit
def store_sums(partial, sums, block, C: tl.constexpr):
    """Writes a program's sums to its rows of `partial`."""
    W: tl.constexpr = C.W
    cols = block.cols
    mask = cols < block.limit
    ptrs = partial.ptr + cols
    for k in tl.static_range(W):
        tl.store(ptrs + k * C.D, sums.taps[k], mask=mask)
    tl.store(ptrs + W * C.D, sums.bias, mask=mask)


# One program takes one chunk of one row for BLOCK_N channels, on a grid like that of
# the dense forward, with longer chunks. It writes its rows of dx, the first chunk the
# row's dhistory, and its own W+1 rows of `partial`, the sums for dweight and dbias over
# its tokens, which are added up afterwards in a fixed order: no atomics, the same bits
# in every run.
@triton.jit
def rows_backward_kernel(inputs, outputs, C: tl.constexpr):
    block, dy = channel_block(inputs.dy, C)
    program = tl.program_id(0) // C.COL_BLOCKS
    row = program // inputs.chunks
    row_len = inputs.row_len
    first = program % inputs.chunks * inputs.block_m
    rows = tl.minimum(inputs.block_m, row_len - first)
    token = row.to(tl.int64) * row_len + first
    history_rows = row.to(tl.int64) * (C.REACH * C.D)
    dhistory_ptr = outputs.dhistory + history_rows

    live = row >= 0
    if inputs.live is not None:
        live = tl.load(inputs.live + row) != 0
    if live:
        dslot = None
        if inputs.dslots is not None:
            start = 0
            end = row_len
            if inputs.state_start is not None:
                start = tl.load(inputs.state_start + row)
                end = tl.load(inputs.state_end + row)
            dslot = SlotRows(inputs.dslots + row.to(tl.int64) * (C.L * C.D), start, end)
        filter = load_filter(inputs.weight, inputs.bias, block, C)
        x_ptr = inputs.x + C.OFFSET + token * C.X
        sums = backward_chunk(
            token,
            x_ptr,
            dy,
            outputs.dx,
            (inputs.history, outputs.dhistory, history_rows),
            dslot,
            inputs.segment_ids,
            filter,
            (first, rows, row_len),
            block,
            C,
        )
        store_sums(partial_rows(outputs, program, C), sums, block, C)
    else:
        zero_rows(Rows(outputs.dx + token * C.D, C.D), rows, block)
        if first == 0:
            zero_rows(Rows(dhistory_ptr, C.D), C.REACH, block)
        zero_rows(partial_rows(outputs, program, C), C.W + 1, block)


# The same on the grid of the packed forward: program -> (sequence, chunk) through the
# metadata, programs behind the last chunk zero the uncovered rows of dx. Values are
# trusted as little as there. dhistory of sequences without a chunk is not written.
@triton.jit
def packed_backward_kernel(inputs, outputs, C: tl.constexpr):
    block, dy = channel_block(inputs.dy, C)
    program = tl.program_id(0) // C.COL_BLOCKS
    num_seqs = inputs.num_seqs
    block_m = inputs.block_m
    offsets = Offsets(inputs.query_start_loc, inputs.num_tokens, num_seqs)
    partial = partial_rows(outputs, program, C)
    zero_rows(partial, C.W + 1, block)

    seq = tl.load(inputs.chunk_seq + program)
    chunk = tl.load(inputs.chunk_offset + program)
    if seq < 0:
        if (seq == -1) & (chunk >= 0):
            zero_uncovered(Rows(outputs.dx, C.D), offsets, chunk, block_m, block, C)
    elif (seq < num_seqs) & (chunk >= 0):
        start = offset_bound(offsets, seq, C)
        end = tl.load(inputs.query_start_loc + seq + 1)
        length = tl.maximum(tl.minimum(end, inputs.num_tokens), start) - start
        if (length > 0) & (chunk <= (length - 1) // block_m):
            first = chunk * block_m
            rows = tl.minimum(block_m, length - first)
            token = start.to(tl.int64) + first
            if tl.load(inputs.live + seq) != 0:
                filter = load_filter(inputs.weight, inputs.bias, block, C)
                x_ptr = inputs.x + C.OFFSET + token * C.X
                history_rows = seq.to(tl.int64) * (C.REACH * C.D)
                dslot = None
                if inputs.dslots is not None:
                    dslot_ptr = inputs.dslots + seq.to(tl.int64) * (C.L * C.D)
                    dslot = SlotRows(dslot_ptr, 0, length)
                sums = backward_chunk(
                    token,
                    x_ptr,
                    dy,
                    outputs.dx,
                    (inputs.history, outputs.dhistory, history_rows),
                    dslot,
                    None,
                    filter,
                    (first, rows, length),
                    block,
                    C,
                )
                # The sums overwrite the zeros, which other threads may have written.
                tl.debug_barrier()
                store_sums(partial, sums, block, C)
            else:
                zero_rows(Rows(outputs.dx + token * C.D, C.D), rows, block)
