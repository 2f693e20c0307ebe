"""The first kernel of the state-space duality with prompts. No JAX here."""

import triton
import triton.language as tl

from .ssd_decode import (
    advance,
    load_head,
    load_token,
    serve_drafts,
    store_step,
)
from .ssd_device import (
    add_run,
    add_tokens,
    add_up,
    enters,
    exponents,
    initial_state,
    largest,
    load_bias,
    load_prefill,
    load_runs,
    load_state,
    load_tile,
    own_tokens,
    power,
    power_of_sum,
    prefill_sequence,
    running_sum,
    slot_of,
    state_tile,
    step_size,
    zero_tokens,
)
from .ssd_recent import kept_of, replay


@triton.jit
def _write_sums(inputs, outputs, chunk, block, C: tl.constexpr):
    """What decays and weights there are in one chunk, of a block of heads.

    They are added up in float64. A float32 of a sum, say h, and the power f of what
    that lost give every decay without cancellation: between tokens r and t it is
    `exp2(h[t] - h[r]) * f[t] / f[r]`.
    """
    begin = tl.load(inputs.chunks + chunk * 2)
    count = tl.load(inputs.chunks + chunk * 2 + 1)
    if (count > 0) & (begin >= 0) & (count <= inputs.num_tokens - begin):
        lanes = tl.arange(0, C.CHUNK)
        real = lanes < count
        heads = block * C.H_BLOCK + tl.arange(0, C.H_BLOCK)
        in_h = heads < C.H
        mask = real[:, None] & in_h[None, :]
        at = (begin + lanes).to(tl.int64)[:, None] * C.H + heads[None, :]
        dt = tl.load(inputs.dt + at, mask=mask, other=0.0)
        dt = step_size(dt, load_bias(inputs, heads[None, :], C), C)
        if inputs.run_start is not None:
            mask = mask & (load_runs(inputs, begin, real, C) >= 0)[:, None]
        A = tl.load(inputs.A + heads, mask=in_h, other=0.0).to(tl.float64)
        dt, steps = exponents(tl.where(mask, dt, 0.0), A[None, :])
        total = running_sum(steps)
        after = add_up(steps, 0)[None, :] - total
        rounded = total.to(tl.float32)
        fine = tl.exp2((total - rounded.to(tl.float64)).to(tl.float32))
        ROWS: tl.constexpr = C.SUMS * C.CHUNK
        out = outputs.sums + chunk.to(tl.int64) * (C.H * ROWS)
        out = out + (heads[None, :] * ROWS + lanes[:, None])
        in_h = in_h[None, :]
        tl.store(out, rounded, mask=in_h)
        tl.store(out + C.CHUNK, dt / fine if C.SUMS == 5 else dt, mask=in_h)
        tl.store(out + 2 * C.CHUNK, power_of_sum(total), mask=in_h)
        tl.store(out + 3 * C.CHUNK, power_of_sum(after) * dt, mask=in_h)
        if C.SUMS == 5:
            tl.store(out + 4 * C.CHUNK, fine, mask=in_h)


@triton.jit
def _write_weights(inputs, out, first, head, C: tl.constexpr):
    """Weights of a stretch's tokens for the state at its end, the last ones first.

    Returns:
        The exponent of the stretch's whole decay, float64, and where the last run in
        the stretch begins: -1 if there is none, 0 without segments.
    """
    size: tl.constexpr = C.STRETCH * C.CHUNK
    BLOCK: tl.constexpr = C.SUM_BLOCK
    blocks: tl.constexpr = (size + BLOCK - 1) // BLOCK
    A = tl.load(inputs.A + head).to(tl.float64)
    bias = load_bias(inputs, head, C)
    whole = A * 0.0
    last = first * 0
    if inputs.run_start is not None:
        last = last - 1
    for i in range(blocks):
        lanes = (blocks - 1 - i) * BLOCK + tl.arange(0, BLOCK)
        inside = lanes < size
        at = first.to(tl.int64) + lanes
        dt = tl.load(inputs.dt + at * C.H + head, mask=inside, other=0.0)
        dt = step_size(dt, bias, C)
        real = inside
        if inputs.run_start is not None:
            start = tl.load(inputs.run_start + at, mask=inside, other=-1)
            real = start >= 0
            last = tl.maximum(last, largest(start, 0))  # the latest run begins latest
        dt, steps = exponents(tl.where(real, dt, 0.0), A)
        whole += add_up(steps, 0)
        after = whole - running_sum(steps)
        tl.store(out + lanes, dt * power_of_sum(after), mask=inside)
    return whole, last


@triton.jit
def _added(inputs, weights, first, last, head, block, C: tl.constexpr):
    """What the tokens of a whole stretch add to the state after it.

    Args:
        weights: a pointer to theirs; `first`, the first token; `last`, where the run
            that goes on begins.
    """
    P_BLOCK: tl.constexpr = C.P_BLOCK
    lanes = tl.arange(0, C.CHUNK)
    k = tl.arange(0, C.K_BLOCK)
    p = block * P_BLOCK + tl.arange(0, P_BLOCK)
    x_mask = (lanes >= 0)[:, None] & (p < C.P)[None, :]
    k_mask = (lanes >= 0)[:, None] & (k < C.K)[None, :]
    PART_P: tl.constexpr = C.P_BLOCKS * P_BLOCK != C.P
    PART_K: tl.constexpr = C.K_BLOCK != C.K
    x_at = lanes[:, None] * (C.H * C.P) + p[None, :]
    k_at = lanes[:, None] * (C.G * C.K) + k[None, :]
    added = tl.full([P_BLOCK, C.K_BLOCK], 0, tl.float32)
    for i in tl.range(0, C.STRETCH, num_stages=C.STATE_STAGES):
        token = (first + i * C.CHUNK).to(tl.int64)
        x_ptr = inputs.x + (token * (C.H * C.P) + head * C.P)
        B_ptr = inputs.B + (token * (C.G * C.K) + head // (C.H // C.G) * C.K)
        x = load_tile(x_ptr + x_at, x_mask, PART_P)
        B = load_tile(B_ptr + k_at, k_mask, PART_K)
        weight = tl.load(weights + i * C.CHUNK + lanes)
        if inputs.run_start is None:
            added = add_tokens(added, x, weight, B, C)
        else:
            start = load_runs(inputs, token, lanes >= 0, C)
            leaves = (start >= 0) & (start == last)
            added = add_run(added, x, weight, B, leaves, C)
    return added


@triton.jit
def _write_stretch(inputs, outputs, number, head, block, C: tl.constexpr):
    """What a stretch adds to the state, see `SsdOutputs.carried`."""
    prefill = tl.load(inputs.stretches + number * 2)
    place = tl.load(inputs.stretches + number * 2 + 1)
    exists = (prefill >= 0) & (prefill < inputs.num_prefills) & (place >= 0)
    prefill = tl.where(exists, prefill, 0)
    begin, length, slot, known, _ = load_prefill(inputs, prefill, C)
    size: tl.constexpr = C.STRETCH * C.CHUNK
    P_BLOCK: tl.constexpr = C.P_BLOCK
    last_place = (length - 1) // size
    if exists & (length > size) & (place <= last_place):
        channels = block * P_BLOCK + tl.arange(0, P_BLOCK)
        row = number.to(tl.int64) * C.H + head
        if place == last_place:
            state = initial_state(inputs, slot, known, head, channels, C)
        else:  # it has all its tokens
            first = begin + place * size
            weights = outputs.weights + (row * C.P_BLOCKS + block) * size
            total, last = _write_weights(inputs, weights, first, head, C)
            tl.debug_barrier()  # the program's own weights are read below
            state = _added(inputs, weights, first, last, head, block, C)
            # Where another run has begun, nothing of what was before goes on.
            through = (last < 0) | enters(last, place * size)
            forget = tl.where(through, total, float("-inf")).to(tl.float32)
            tl.store(outputs.forget + row, forget)
            if place == 0:
                old = initial_state(inputs, slot, known, head, channels, C)
                if C.DRAFTS > 0:
                    seq = prefill_sequence(inputs, prefill)
                    kept = kept_of(inputs, seq, known, C)
                    A = load_head(inputs, head, channels, C).A
                    old = replay(inputs, old, slot, 0, kept, A, head, channels, C)
                state += tl.where(through, old * power(forget, 0.0), 0.0)
        at, mask = state_tile(number, head, channels, C)
        tl.store(outputs.carried + at, state, mask=mask)


@triton.jit
def _serve(inputs, outputs, seq, head, channels, C: tl.constexpr):
    """A decode, or zeros for the tokens of a sequence that is skipped or of nobody."""
    role = tl.load(inputs.role + seq)
    begin, end = own_tokens(inputs, seq, C)
    if role == -1:
        slot, valid, known = slot_of(inputs, seq, C)
        if valid & (begin < end):
            state = load_state(inputs.states, slot, known, head, channels, C)
            own = seq, slot, end - begin
            if C.DRAFTS > 0:
                serve_drafts(
                    inputs, outputs, state, known, own, begin, head, channels, C
                )
            else:
                token = load_token(inputs, begin, head, channels, C)
                its = load_head(inputs, head, channels, C)
                new, y = advance(inputs, state, token, its, C)
                store_step(
                    inputs, outputs, state, new, y, own, begin, head, channels, C
                )
    elif role < 0:
        zero_tokens(outputs.y, begin, end - begin, head, channels, C)
    if seq == 0:
        zero_tokens(outputs.y, 0, begin, head, channels, C)
    if seq == inputs.num_seqs - 1:
        zero_tokens(outputs.y, end, inputs.num_tokens - end, head, channels, C)


# The first launch of a batch with prompts, and of dense rows. A program has one of
# three tasks, by its number:
#
# - what a stretch adds to the state, for P_BLOCK channels of a head (Q x H x P_BLOCKS
#   programs; only where few long sequences are cut into stretches),
# - the running sums of dt·A of a chunk for H_BLOCK heads (M x H / H_BLOCK),
# - a sequence of few tokens, as in `decode_kernel` (N x H x P_BLOCKS; not of dense
#   rows). Those of skipped sequences zero their tokens, the first and the last one also
#   those of nobody.
#
# Race-free: nothing is read that another program writes. Of the cache, programs of
# decodes read and write their own part of slots, as in `decode_kernel`; those of
# stretches read slots of prefills, which nobody but the prefills, later, may write.
# Recent tokens are written later. All else is written once.
@triton.jit
def prepare_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    HEADS: tl.constexpr = C.H * C.P_BLOCKS
    P_BLOCK: tl.constexpr = C.P_BLOCK
    H_BLOCKS: tl.constexpr = (C.H + C.H_BLOCK - 1) // C.H_BLOCK
    stretches = inputs.num_stretches * HEADS
    sums = stretches + inputs.num_chunks * H_BLOCKS
    if program < stretches:
        if inputs.stretches is not None:
            head = program // C.P_BLOCKS % C.H
            block = program % C.P_BLOCKS
            _write_stretch(inputs, outputs, program // HEADS, head, block, C)
    elif program < sums:
        i = program - stretches
        _write_sums(inputs, outputs, i // H_BLOCKS, i % H_BLOCKS, C)
    elif inputs.role is not None:
        program -= sums
        head = program // C.P_BLOCKS % C.H
        channels = program % C.P_BLOCKS * P_BLOCK + tl.arange(0, P_BLOCK)
        _serve(inputs, outputs, program // HEADS, head, channels, C)
