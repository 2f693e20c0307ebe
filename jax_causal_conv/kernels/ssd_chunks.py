"""The kernels of the state-space duality for prompts and dense rows. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ssd_decode import load_state, load_token, slot_of, state_tile, step
from .ssd_device import (
    add_up,
    dot_left,
    dot_narrow,
    dot_right,
    dot_right_joined,
    largest,
    load_skip,
    load_tile,
    step_size,
    zero_tokens,
    zero_uncovered,
)


class _Work(NamedTuple):
    """What a program works at.

    Attributes:
        begin, length: the tokens of its sequence.
        chunk: the number of the sequence's first chunk.
        head, group, first_channel: whose P_BLOCK channels.
        skip: D of them.
    """

    begin: Any
    length: Any
    chunk: Any
    head: Any
    group: Any
    first_channel: Any
    skip: Any


@triton.jit
def _prefill(inputs, number, C: tl.constexpr):
    """A row of `SsdInputs.prefills`, of length 0 if any value is out of range."""
    row = inputs.prefills + number * 5
    begin = tl.load(row)
    length = tl.load(row + 1)
    slot = tl.load(row + 2)
    known = tl.load(row + 3) != 0
    chunk = tl.load(row + 4)
    chunks = (length + C.CHUNK - 1) // C.CHUNK
    fits = (begin >= 0) & (length <= inputs.num_tokens - begin)
    fits = fits & (chunk >= 0) & (chunks <= inputs.num_chunks - chunk)
    fits = fits & (slot >= 0) & (slot < inputs.num_slots)
    return begin, tl.where(fits, length, 0), slot, known, chunk


@triton.jit
def _tokens(inputs, chunk):
    """The first token of a chunk, and how many it has; 0 if a value is out of range."""
    begin = tl.load(inputs.chunks + chunk * 2)
    count = tl.load(inputs.chunks + chunk * 2 + 1)
    fits = (begin >= 0) & (count <= inputs.num_tokens - begin)
    return begin, tl.where(fits, count, 0)


@triton.jit
def _runs(inputs, begin, real, C: tl.constexpr):
    """Of a chunk's tokens, the place where their run begins; -1 of padding."""
    at = (begin + tl.arange(0, C.CHUNK)).to(tl.int64)
    return tl.load(inputs.run_start + at, mask=real, other=-1)


@triton.jit
def _enters(start, offset):
    """Is the state before the chunk at `offset` of the run that begins at `start`?"""
    return (start >= 0) & ((start < offset) | (start == 0))


@triton.jit
def _finite(values):
    return tl.abs(values) < float("inf")


@triton.jit
def _write_sums(inputs, outputs, chunk, block, C: tl.constexpr):
    """What becomes of the decays in one chunk, of a block of heads: `SsdOutputs.sums`.

    They are added up in float64. A float32 of a sum, say h, and the power f of what
    that lost give every decay without cancellation: between tokens r and t it is
    `exp2(h[t] - h[r]) * f[t] / f[r]`.
    """
    begin, count = _tokens(inputs, chunk)
    if count > 0:
        lanes = tl.arange(0, C.CHUNK)
        real = lanes < count
        heads = block * C.H_BLOCK + tl.arange(0, C.H_BLOCK)
        in_h = heads < C.H
        mask = real[:, None] & in_h[None, :]
        at = (begin + lanes).to(tl.int64)[:, None] * C.H + heads[None, :]
        dt = tl.load(inputs.dt + at, mask=mask, other=0.0)
        dt = step_size(dt, inputs.dt_bias, heads[None, :], C)
        if inputs.run_start is not None:
            start = _runs(inputs, begin, real, C)
            mask = mask & (start >= 0)[:, None]
        dt = tl.where(mask, dt, 0.0)
        A = tl.load(inputs.A + heads, mask=in_h, other=0.0).to(tl.float64)
        dt, steps = _steps(dt, A[None, :])
        total = tl.associative_scan(steps, 0, tl.standard._sum_combine)
        after = add_up(steps, 0)[None, :] - total
        rounded = total.to(tl.float32)
        rest = tl.exp2((total - rounded.to(tl.float64)).to(tl.float32))
        ROWS: tl.constexpr = C.SUMS * C.CHUNK
        out = outputs.sums + chunk.to(tl.int64) * (C.H * ROWS)
        out = out + heads[None, :] * ROWS + lanes[:, None]
        tl.store(out, rounded, mask=in_h[None, :])
        tl.store(out + C.CHUNK, dt / rest if C.SUMS == 5 else dt, mask=in_h[None, :])
        decay = tl.exp2(rounded) * rest
        tl.store(out + 2 * C.CHUNK, decay, mask=in_h[None, :])
        weight = dt * tl.exp2(after.to(tl.float32))
        tl.store(out + 3 * C.CHUNK, weight, mask=in_h[None, :])
        if C.SUMS == 5:
            tl.store(out + 4 * C.CHUNK, rest, mask=in_h[None, :])


@triton.jit
def _steps(dt, A):
    """The decays of tokens as powers of 2, in float64; and dt, NaN if not finite."""
    fine = _finite(dt)
    steps = tl.where(fine, dt, 0.0).to(tl.float64) * (A * 1.4426950408889634)
    # What is below leaves nothing of a float32; a sum of them is rounded less.
    steps = tl.maximum(steps, -160.0)
    return tl.where(fine, dt, float("nan")), steps


@triton.jit
def _write_scores(inputs, outputs, chunk, group, C: tl.constexpr):
    """The products of C and B in one chunk and group, where tokens see each other."""
    begin, count = _tokens(inputs, chunk)
    if count > 0:
        lanes = tl.arange(0, C.CHUNK)
        real = lanes < count
        size = tl.arange(0, C.K_BLOCK)
        at = (begin + lanes).to(tl.int64) * (C.G * C.K) + group * C.K
        at = at[:, None] + size[None, :]
        mask = real[:, None] & (size < C.K)[None, :]
        B = tl.load(inputs.B + at, mask=mask, other=0.0)
        read = tl.load(inputs.C + at, mask=mask, other=0.0)
        scores = tl.full([C.CHUNK, C.CHUNK], 0, tl.float32)
        # Rows are the tokens that are read from, columns those that read (INTRA 1).
        EXACT: tl.constexpr = C.EXACT
        FAST: tl.constexpr = C.FAST
        if C.INTRA == 0:
            scores = dot_narrow(read, tl.trans(B), scores, EXACT, FAST)
            late = lanes[:, None]
            early = lanes[None, :]
        else:
            scores = dot_narrow(B, tl.trans(read), scores, EXACT, FAST)
            late = lanes[None, :]
            early = lanes[:, None]
        seen = early <= late
        if inputs.run_start is not None:
            start = _runs(inputs, begin, real, C)
            bad = largest(tl.where(_finite(B.to(tl.float32)), 0, 1), 1) > 0
            seen = seen & (start[:, None] == start[None, :]) & (start >= 0)[:, None]
            if C.INTRA == 0:
                scores = tl.where(bad[None, :], float("nan"), scores)
            else:
                scores = tl.where(bad[:, None], float("nan"), scores)
        scores = tl.where(seen, scores, 0.0)
        out = outputs.scores + (chunk * C.G + group).to(tl.int64) * (C.CHUNK * C.CHUNK)
        tl.store(out + lanes[:, None] * C.CHUNK + lanes[None, :], scores)


@triton.jit
def _stretch_weights(inputs, begin, real, head, C: tl.constexpr):
    """Weights `[c]` of x for the state after a chunk, and the chunk's whole decay."""
    at = (begin + tl.arange(0, C.CHUNK)).to(tl.int64)
    dt = tl.load(inputs.dt + at * C.H + head, mask=real, other=0.0)
    dt = step_size(dt, inputs.dt_bias, head, C)
    if inputs.run_start is not None:
        real = real & (_runs(inputs, begin, real, C) >= 0)
    dt = tl.where(real, dt, 0.0)
    dt, steps = _steps(dt, tl.load(inputs.A + head).to(tl.float64))
    whole = add_up(steps, 0)
    after = whole - tl.associative_scan(steps, 0, tl.standard._sum_combine)
    return dt * tl.exp2(after.to(tl.float32)), whole


@triton.jit
def _initial_state(inputs, slot, known, head, channels, C: tl.constexpr):
    """A block of the state that a sequence starts from, in float32."""
    if inputs.states is not None:
        return load_state(inputs.states, slot, known, head, channels, C)
    else:
        return tl.full([C.P_BLOCK, C.K_BLOCK], 0, tl.float32)


@triton.jit
def _write_stretch(inputs, outputs, number, head, channels, C: tl.constexpr):
    """What a stretch adds to the state, see `SsdOutputs.carried`."""
    prefill = tl.load(inputs.stretches + number * 2)
    place = tl.load(inputs.stretches + number * 2 + 1)
    exists = (prefill >= 0) & (prefill < inputs.num_prefills) & (place >= 0)
    begin, length, slot, known, _ = _prefill(inputs, tl.where(exists, prefill, 0), C)
    size: tl.constexpr = C.STRETCH * C.CHUNK
    last = (length - 1) // size
    if exists & (length > size) & (place <= last):
        state = tl.full([C.P_BLOCK, C.K_BLOCK], 0, tl.float32)
        total = tl.full([1], 0, tl.float64)
        if (place == 0) | (place == last):
            state = _initial_state(inputs, slot, known, head, channels, C)
        if place < last:
            in_p = channels < C.P
            lanes = tl.arange(0, C.CHUNK)
            k = tl.arange(0, C.K_BLOCK)
            through_all = place == place
            # All but the last stretch have all their tokens.
            for i in tl.range(0, C.STRETCH, num_stages=C.STATE_STAGES):
                offset = (place * C.STRETCH + i) * C.CHUNK
                first = begin + offset
                real = lanes < C.CHUNK
                weight, whole = _stretch_weights(inputs, first, real, head, C)
                token = first.to(tl.int64)
                x = tl.load(
                    inputs.x
                    + (token * (C.H * C.P) + head * C.P)
                    + (lanes[:, None] * (C.H * C.P) + channels[None, :]),
                    mask=real[:, None] & in_p[None, :],
                    other=0.0,
                )
                B = tl.load(
                    inputs.B
                    + (token * (C.G * C.K) + head // (C.H // C.G) * C.K)
                    + (lanes[:, None] * (C.G * C.K) + k[None, :]),
                    mask=real[:, None] & (k < C.K)[None, :],
                    other=0.0,
                )
                decay = tl.exp2(whole.to(tl.float32))
                if inputs.run_start is None:
                    state = _add_chunk(state * decay, x, weight, B, C, False)
                else:
                    start = _runs(inputs, first, real, C)
                    state, through = _add_run(
                        state, decay, x, weight, B, start, offset, C, False
                    )
                    through_all = through_all & through
                total += whole
            total = tl.where(through_all, total, float("-inf"))
        at, mask = state_tile(number, head, channels, tl.arange(0, C.K_BLOCK), C)
        tl.store(outputs.carried + at, state, mask=mask)
        where = outputs.forget + number.to(tl.int64) * C.H + head + tl.arange(0, 1)
        tl.store(where, total.to(tl.float32))


@triton.jit
def _add_chunk(state, x, weight, B, C: tl.constexpr, TR: tl.constexpr):
    """`state + (weight * x)ᵀ @ B`."""
    PARTS: tl.constexpr = C.STATE_PARTS
    FAST: tl.constexpr = C.FAST
    weighted = x.to(tl.float32) * weight[:, None]
    if TR:
        return dot_right(tl.trans(B), weighted, state, PARTS, FAST)
    else:
        return dot_left(tl.trans(weighted), B, state, PARTS, FAST)


@triton.jit
def _add_run(
    state, decay, x, weight, B, start, offset, C: tl.constexpr, TR: tl.constexpr
):
    """`_add_chunk` where a chunk may hold several runs and padding.

    Only the last one goes on behind the chunk. NaN or inf in it make all of the state
    NaN; those of others reach nothing.

    Returns:
        The state after the chunk, and whether the one before takes part in it.
    """
    last = largest(start, 0)  # the latest run begins latest
    leaves = (start >= 0) & (start == last)
    through = (last < 0) | _enters(last, offset)
    wide = x.to(tl.float32)
    bad = (largest(tl.where(_finite(wide), 0, 1), 1) > 0) | (weight != weight)
    x = tl.where(leaves[:, None], x, 0.0)
    weight = tl.where(leaves, weight, 0.0)
    B = tl.where(leaves[:, None], B, 0.0)
    state = tl.where(through, state * decay, 0.0)
    state = _add_chunk(state, x, weight, B, C, TR)
    poisoned = largest(tl.where(bad & leaves, 1, 0), 0) > 0
    return tl.where(poisoned, float("nan"), state), through


# The first launch of a batch with prompts, and of dense rows. A program has one of four
# tasks, by its number:
#
# - what a stretch adds to the state, for P_BLOCK channels of a head (Q x H x P_BLOCKS
#   programs; only where few long sequences are cut into stretches),
# - the scores of a chunk's tokens in a group (M x G),
# - the running sums of dt·A of a chunk for H_BLOCK heads,
# - a sequence of one token, as in `decode_kernel` (N x H x P_BLOCKS; not of dense rows).
#   Those of skipped sequences zero their tokens, and all together those of nobody.
#
# Race-free: nothing is read that another program writes. Of the cache, programs of
# decodes read and write their own part of their own slot; those of stretches read slots
# of prefills, which no program here writes. Everything else is written once.
@triton.jit
def prepare_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    HEADS: tl.constexpr = C.H * C.P_BLOCKS
    P_BLOCK: tl.constexpr = C.P_BLOCK
    H_BLOCKS: tl.constexpr = (C.H + C.H_BLOCK - 1) // C.H_BLOCK
    stretches = inputs.num_stretches * HEADS
    scores = stretches + (0 if C.RESCORE else inputs.num_chunks * C.G)
    sums = scores + inputs.num_chunks * H_BLOCKS
    if program < stretches:
        if inputs.stretches is not None:
            head = program // C.P_BLOCKS % C.H
            channels = program % C.P_BLOCKS * P_BLOCK + tl.arange(0, P_BLOCK)
            _write_stretch(inputs, outputs, program // HEADS, head, channels, C)
    elif program < scores:
        i = program - stretches
        _write_scores(inputs, outputs, i // C.G, i % C.G, C)
    elif program < sums:
        i = program - scores
        _write_sums(inputs, outputs, i // H_BLOCKS, i % H_BLOCKS, C)
    elif inputs.role is not None:
        program -= sums
        head = program // C.P_BLOCKS % C.H
        channels = program % C.P_BLOCKS * P_BLOCK + tl.arange(0, P_BLOCK)
        seq = program // HEADS
        role = tl.load(inputs.role + seq)
        begin = tl.maximum(tl.load(inputs.offsets + seq), 0)
        end = tl.minimum(tl.load(inputs.offsets + seq + 1), inputs.num_tokens)
        in_p = channels < C.P
        if role == -1:
            slot, valid, known = slot_of(inputs, seq, C)
            if valid & (begin < end):
                state = load_state(inputs.states, slot, known, head, channels, C)
                token = load_token(inputs, begin, head, channels, C)
                step(inputs, outputs.y, state, slot, begin, token, head, channels, C)
        elif role < 0:
            zero_tokens(outputs.y, begin, end - begin, head, channels, in_p, C)
        num_seqs = inputs.num_seqs
        zero_uncovered(
            outputs.y,
            tl.load(inputs.offsets),
            tl.load(inputs.offsets + num_seqs),
            inputs.num_tokens,
            seq,
            num_seqs,
            head,
            channels,
            in_p,
            C,
        )


@triton.jit
def _entering_state(inputs, number, place, last, head, channels, C: tl.constexpr):
    """The state that enters a stretch from those that `prepare_kernel` left."""
    k = tl.arange(0, C.K_BLOCK)
    # Stretch 0 starts from what is kept in the place of the last one.
    number = number.to(tl.int64)
    from_last = number - place + tl.where(place == 0, last, 0)
    at, mask = state_tile(from_last, head, channels, k, C)
    state = tl.load(inputs.carried + at, mask=mask, other=0.0)
    for i in range(1, place):
        other = number - place + i
        at, mask = state_tile(other, head, channels, k, C)
        added = tl.load(inputs.carried + at, mask=mask, other=0.0)
        forget = tl.load(inputs.forget + other * C.H + head)
        through = forget > float("-inf")
        state = tl.where(through, state * tl.exp2(forget), 0.0) + added
    return state


@triton.jit
def _chunk(inputs, y_ptr, work, state, i, C: tl.constexpr, WHOLE: tl.constexpr):
    """One chunk of a head: its outputs are stored; the state after it is returned.

    Args:
        work: a `_Work`.
        state: `[P_BLOCK, K_BLOCK]`, float32, before the chunk.
        i: its number in the sequence.
        WHOLE: has it all its tokens?
    """
    CHUNK: tl.constexpr = C.CHUNK
    P_BLOCK: tl.constexpr = C.P_BLOCK
    FAST: tl.constexpr = C.FAST
    Y_PARTS: tl.constexpr = C.Y_PARTS
    lanes = tl.arange(0, CHUNK)
    k = tl.arange(0, C.K_BLOCK)
    p = tl.arange(0, P_BLOCK)
    # One address a tile, and in it offsets that are constants of the program.
    token = (work.begin + i * CHUNK).to(tl.int64)
    start_x = token * (C.H * C.P) + work.head * C.P + work.first_channel
    start_k = token * (C.G * C.K) + work.group * C.K
    place_x = lanes[:, None] * (C.H * C.P) + p[None, :]
    place_k = lanes[:, None] * (C.G * C.K) + k[None, :]
    left = work.length - i * CHUNK
    x_mask = lanes[:, None] < left
    k_mask = lanes[:, None] < left
    if C.P_BLOCKS * P_BLOCK != C.P:
        x_mask = x_mask & (work.first_channel + p < C.P)[None, :]
    if C.K_BLOCK != C.K:
        k_mask = k_mask & (k < C.K)[None, :]
    if WHOLE and C.P_BLOCKS * P_BLOCK == C.P:
        x_mask = None
    if WHOLE and C.K_BLOCK == C.K:
        k_mask = None
    read = load_tile(inputs.C + start_k + place_k, k_mask)
    B = load_tile(inputs.B + start_k + place_k, k_mask)
    x = load_tile(inputs.x + start_x + place_x, x_mask)
    m = (work.chunk + i).to(tl.int64)
    if not C.RESCORE:
        score_ptr = inputs.scores + (m * C.G + work.group) * (CHUNK * CHUNK)
        scores = tl.load(score_ptr + (lanes[:, None] * CHUNK + lanes[None, :]))
    sum_ptr = inputs.sums + (m * C.H + work.head) * (C.SUMS * CHUNK)
    total = tl.load(sum_ptr + lanes)
    dt = tl.load(sum_ptr + CHUNK + lanes)
    since = tl.load(sum_ptr + 2 * CHUNK + lanes)
    weight = tl.load(sum_ptr + 3 * CHUNK + lanes)
    decay = tl.load(sum_ptr + 3 * CHUNK - 1)
    finite_x = x
    offset = i * CHUNK
    if inputs.run_start is not None:
        start = _runs(inputs, work.begin + offset, lanes < left, C)
        # A product with what is not finite would reach every token.
        bad = largest(tl.where(_finite(x.to(tl.float32)), 0, 1), 1) > 0
        bad = bad | (dt != dt)
        finite_x = tl.where(_finite(x.to(tl.float32)), x, 0.0)
        dt = tl.where(dt == dt, dt, 0.0)
    if C.ABL & 2:
        y = tl.full([CHUNK, P_BLOCK] if C.INTER == 0 else [P_BLOCK, CHUNK], 0, tl.float32)
    elif C.INTER == 0:
        y = tl.full([CHUNK, P_BLOCK], 0, tl.float32)
        if C.JOIN & 2:
            y = dot_right_joined(read, state if C.TR else tl.trans(state), y, FAST)
        else:
            y = dot_right(read, state if C.TR else tl.trans(state), y, Y_PARTS, FAST)
        y *= since[:, None]
        if inputs.run_start is not None:
            y = tl.where(_enters(start, offset)[:, None], y, 0.0)
    else:
        y = tl.full([P_BLOCK, CHUNK], 0, tl.float32)
        y = dot_left(state, tl.trans(read), y, Y_PARTS, FAST)
        y *= since[None, :]
        if inputs.run_start is not None:
            y = tl.where(_enters(start, offset)[None, :], y, 0.0)
    if C.INTER == 1 and C.INTRA == 0:
        y = tl.trans(y)
    if C.INTRA == 0:
        between = total[:, None] - total[None, :]
        late = lanes[:, None]
        early = lanes[None, :]
        dt = dt[None, :]
    else:
        between = total[None, :] - total[:, None]
        late = lanes[None, :]
        early = lanes[:, None]
        dt = dt[:, None]
    if C.RESCORE:
        scores = tl.full([CHUNK, CHUNK], 0, tl.float32)
        if C.INTRA == 0:
            scores = dot_narrow(read, tl.trans(B), scores, C.EXACT, FAST)
        else:
            scores = dot_narrow(B, tl.trans(read), scores, C.EXACT, FAST)
        between = tl.where(late >= early, between, float("-inf"))
    else:
        between = tl.minimum(between, 126.0)
    mixed = scores * tl.exp2(between) * dt
    if C.SUMS == 5:
        rest = tl.load(sum_ptr + 4 * CHUNK + lanes)
        mixed *= rest[:, None] if C.INTRA == 0 else rest[None, :]
    if C.INTRA == 0:
        y = dot_left(mixed, finite_x, y, Y_PARTS, FAST)
    else:
        if C.JOIN & 1:
            y = dot_right_joined(tl.trans(finite_x), mixed, y, FAST)
        else:
            y = dot_right(tl.trans(finite_x), mixed, y, Y_PARTS, FAST)
        y = tl.trans(y)
    if inputs.D is not None:
        y += work.skip * x.to(tl.float32)
    if inputs.run_start is not None:
        sees = (start[:, None] - offset <= lanes[None, :]) & (
            lanes[None, :] <= lanes[:, None]
        )
        reached = largest(tl.where(sees & bad[None, :], 1, 0), 1) > 0
        y = tl.where(reached[:, None], float("nan"), y)
        y = tl.where((start >= 0)[:, None], y, 0.0)
    tl.store(y_ptr + start_x + place_x, y.to(y_ptr.dtype.element_ty), mask=x_mask)
    if inputs.run_start is not None:
        weight = tl.where(bad, float("nan"), weight)
        B = tl.where(_finite(B.to(tl.float32)), B, float("nan"))
        state, _ = _add_run(state, decay, x, weight, B, start, offset, C, C.TR)
        return state
    elif C.ABL & 4:
        return state * decay + tl.sum(weight)
    else:
        return _add_chunk(state * decay, x, weight, B, C, C.TR)


# The second launch: one program goes through one prefill, or through one stretch of it,
# for P_BLOCK channels of a head, chunk by chunk. Its state stays in registers from the
# first token to the last. The grid is 1-D, prefills or stretches x heads x blocks of
# channels, blocks fastest, so that programs side by side read the same scores, B and C.
#
# Reads: tokens of its sequence, what `prepare_kernel` left of their chunks, and the
# state that it starts from: the slot of the sequence, or what `prepare_kernel` left of
# the stretches before. Writes: y of its tokens; the program with the sequence's last
# token writes the slot.
#
# Race-free in a donated cache: the slot of a sequence is written by programs of its
# last stretch, each its own elements. Where that is the only stretch, they have read
# them before; where there are several, nobody reads the slot here, since
# `prepare_kernel` has left a copy. Tokens belong to one program each.
@triton.jit
def chunks_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    P_BLOCK: tl.constexpr = C.P_BLOCK
    CHUNK: tl.constexpr = C.CHUNK
    y_ptr = inputs.y if C.IN_PLACE else outputs.y
    states_ptr = inputs.states if C.IN_PLACE else outputs.states
    first_channel = program % C.P_BLOCKS * P_BLOCK
    channels = first_channel + tl.arange(0, P_BLOCK)
    head = program // C.P_BLOCKS % C.H
    number = program // (C.P_BLOCKS * C.H)
    prefill = number
    if inputs.stretches is not None:
        prefill = tl.load(inputs.stretches + number * 2)
        place = tl.load(inputs.stretches + number * 2 + 1)
        exists = (prefill >= 0) & (prefill < inputs.num_prefills) & (place >= 0)
        prefill = tl.where(exists, prefill, 0)
    begin, length, slot, known, chunk = _prefill(inputs, prefill, C)
    count = (length + CHUNK - 1) // CHUNK
    low = number - number
    high = count
    last = low
    if inputs.stretches is not None:
        last = (count - 1) // C.STRETCH
        low = tl.where(exists, place * C.STRETCH, count)
        high = tl.minimum(count, low + C.STRETCH)
    if low < high:
        if inputs.stretches is None:
            state = _initial_state(inputs, slot, known, head, channels, C)
        elif last > 0:
            state = _entering_state(inputs, number, place, last, head, channels, C)
        else:
            state = _initial_state(inputs, slot, known, head, channels, C)
        if C.TR:
            state = tl.trans(state)
        skip = None
        if inputs.D is not None:
            skip = load_skip(inputs.D, head, channels, channels < C.P, C)
        group = head // (C.H // C.G)
        work = _Work(begin, length, chunk, head, group, first_channel, skip)
        # All but a last chunk of fewer tokens need no masks.
        whole = tl.minimum(high, length // CHUNK)
        for i in tl.range(low, whole, num_stages=C.STAGES):
            state = _chunk(inputs, y_ptr, work, state, i, C, True)
        if whole < high:
            state = _chunk(inputs, y_ptr, work, state, whole, C, False)
        if states_ptr is not None:
            if high == count:
                at, mask = state_tile(slot, head, channels, tl.arange(0, C.K_BLOCK), C)
                final = (tl.trans(state) if C.TR else state).to(
                    states_ptr.dtype.element_ty
                )
                tl.store(states_ptr + at, final, mask=mask)
