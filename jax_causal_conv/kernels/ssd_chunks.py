"""The second kernel of the state-space duality with prompts. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ssd_device import (
    Store,
    add_run,
    add_tokens,
    add_up,
    are_finite,
    dot_left,
    dot_narrow,
    dot_right,
    enters,
    exponents,
    finite,
    initial_state,
    largest,
    load_bias,
    load_prefill,
    load_runs,
    load_skip,
    load_tile,
    power,
    power_of_sum,
    prefill_sequence,
    running_sum,
    state_tile,
    step_size,
    store_state,
    store_tile,
    stores_of,
)
from .ssd_recent import kept_of, replay, without


class Work(NamedTuple):
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
def _entering_state(inputs, number, place, last, head, channels, C: tl.constexpr):
    """The state that enters a stretch, from what `prepare_kernel` has left of others.

    Args:
        number: of the stretch; `place`, of its sequence's; `last`, the last of these.
    """
    first = number.to(tl.int64) - place
    # Stretch 0 starts from what is kept in the place of the last one.
    at, mask = state_tile(first + tl.where(place == 0, last, 0), head, channels, C)
    state = tl.load(inputs.carried + at, mask=mask, other=0.0)
    for i in range(1, place):
        at, mask = state_tile(first + i, head, channels, C)
        added = tl.load(inputs.carried + at, mask=mask, other=0.0)
        forget = tl.load(inputs.forget + (first + i) * C.H + head)
        through = forget > float("-inf")
        state = tl.where(through, state * power(forget, 0.0), 0.0) + added
    return state


class Chunk(NamedTuple):
    """A chunk's tokens, for one head.

    Attributes:
        token: the first one's place in the batch; `offset`, in its sequence.
        real: `[c]`, which of them there are.
        read, B: `[c, K_BLOCK]`, C and B.
        x: `[c, P_BLOCK]`.
        x_at, x_mask: where x is in its array, and which of it there is.
        sums: a pointer to the chunk's rows of `SsdOutputs.sums`.
    """

    token: Any
    offset: Any
    real: Any
    read: Any
    B: Any
    x: Any
    x_at: Any
    x_mask: Any
    sums: Any


@triton.jit
def _load_chunk(inputs, work, i, C: tl.constexpr, WHOLE: tl.constexpr):
    """Chunk i of a sequence; WHOLE says that it has all its tokens."""
    lanes = tl.arange(0, C.CHUNK)
    k = tl.arange(0, C.K_BLOCK)
    p = tl.arange(0, C.P_BLOCK)
    offset = i * C.CHUNK
    real = lanes < work.length - offset
    # One address a tile, and in it offsets that are constants of the program.
    token = (work.begin + offset).to(tl.int64)
    start_x = token * (C.H * C.P) + work.head * C.P + work.first_channel
    start_k = token * (C.G * C.K) + work.group * C.K
    x_at = start_x + (lanes[:, None] * (C.H * C.P) + p[None, :])
    k_at = start_k + (lanes[:, None] * (C.G * C.K) + k[None, :])
    k_mask = real[:, None] & (k < C.K)[None, :]
    x_mask = real[:, None] & (work.first_channel + p < C.P)[None, :]
    PART_K: tl.constexpr = not WHOLE or C.K_BLOCK != C.K
    PART_P: tl.constexpr = not WHOLE or C.P_BLOCKS * C.P_BLOCK != C.P
    read = load_tile(inputs.C + k_at, k_mask, PART_K)
    B = load_tile(inputs.B + k_at, k_mask, PART_K)
    x = load_tile(inputs.x + x_at, x_mask, PART_P)
    row = (work.chunk + i).to(tl.int64) * C.H + work.head
    sums = inputs.sums + row * (C.SUMS * C.CHUNK)
    return Chunk(token, offset, real, read, B, x, x_at, x_mask, sums)


@triton.jit
def _chunk(inputs, y_ptr, work, state, i, C: tl.constexpr, WHOLE: tl.constexpr):
    """One chunk of a head: its outputs are stored, the state after it is returned.

    What is a matrix of (tokens, channels) elsewhere is transposed here: the state in
    registers is then a left operand as it is, and nothing else needs to be rearranged
    but the decayed scores and, at last, y.

    Args:
        work: a `Work`.
        state: `[P_BLOCK, K_BLOCK]`, float32, before the chunk.
        i, WHOLE: see `_load_chunk`.
    """
    P_BLOCK: tl.constexpr = C.P_BLOCK
    CHUNK: tl.constexpr = C.CHUNK
    FAST: tl.constexpr = C.FAST
    Y_PARTS: tl.constexpr = C.Y_PARTS
    lanes = tl.arange(0, CHUNK)
    chunk = _load_chunk(inputs, work, i, C, WHOLE)
    total = tl.load(chunk.sums + lanes)
    dt = tl.load(chunk.sums + CHUNK + lanes)
    since = tl.load(chunk.sums + 2 * CHUNK + lanes)
    weight = tl.load(chunk.sums + 3 * CHUNK + lanes)
    decay = tl.load(chunk.sums + 3 * CHUNK - 1)
    # What the state before the chunk has for its tokens.
    y = tl.full([P_BLOCK, CHUNK], 0, tl.float32)
    y = dot_left(state, tl.trans(chunk.read), y, Y_PARTS, FAST)
    y *= since[None, :]
    # What its tokens have for each other: rows for later ones, in columns.
    seen = lanes[:, None] <= lanes[None, :]
    scores = dot_narrow(chunk.B, tl.trans(chunk.read), C)
    x = chunk.x
    start = None
    poisoned = None
    if inputs.run_start is not None:
        start = load_runs(inputs, chunk.token, chunk.real, C)
        y = tl.where(enters(start, chunk.offset)[None, :], y, 0.0)
        seen = seen & (start[:, None] == start[None, :]) & (start >= 0)[:, None]
        # NaN and inf are for tokens of their own run, from theirs on; but a product
        # with them would reach all.
        bad = (are_finite(x) & are_finite(chunk.B) & finite(dt)) == 0
        poisoned = largest(tl.where(seen & bad[:, None], 1, 0), 0) > 0
        scores = tl.where(seen, scores, 0.0)
        x = tl.where(finite(x), x, 0.0)
        dt = tl.where(finite(dt), dt, 0.0)
    between = tl.where(seen, total[None, :] - total[:, None], float("-inf"))
    mixed = scores * tl.exp2(between) * dt[:, None]
    if C.SUMS == 5:
        mixed *= tl.load(chunk.sums + 4 * CHUNK + lanes)[None, :]
    y = dot_right(tl.trans(x), mixed, y, Y_PARTS, FAST)
    if poisoned is not None:
        y = tl.where(poisoned[None, :], float("nan"), y)
    y = tl.trans(y)
    if inputs.D is not None:
        y += work.skip * chunk.x.to(tl.float32)
    if start is not None:
        y = tl.where((start >= 0)[:, None], y, 0.0)
    y = y.to(y_ptr.dtype.element_ty)
    PART: tl.constexpr = not WHOLE or C.P_BLOCKS * P_BLOCK != C.P
    store_tile(y_ptr + chunk.x_at, y, chunk.x_mask, PART)
    return _state_after(state, decay, chunk, weight, start, C)


@triton.jit
def _state_after(state, decay, chunk, weight, start, C: tl.constexpr):
    """The state after a chunk, where runs begin at `start`; None without segments."""
    if start is None:
        return add_tokens(state * decay, chunk.x, weight, chunk.B, C)
    else:
        last = largest(start, 0)  # the latest run begins latest
        through = (last < 0) | enters(last, chunk.offset)
        state = tl.where(through, state * decay, 0.0)
        leaves = (start >= 0) & (start == last)
        return add_run(state, chunk.x, weight, chunk.B, leaves, C)


@triton.jit
def _state_within(inputs, work, state, i, count, C: tl.constexpr):
    """The state after `count` tokens of chunk i, given that before the chunk.

    `SsdOutputs.sums` are those of the whole chunk: there are others for a part of it.
    """
    lanes = tl.arange(0, C.CHUNK)
    k = tl.arange(0, C.K_BLOCK)
    p = work.first_channel + tl.arange(0, C.P_BLOCK)
    real = lanes < count
    token = (work.begin + i * C.CHUNK).to(tl.int64) + lanes
    dt = tl.load(inputs.dt + token * C.H + work.head, mask=real, other=0.0)
    dt = step_size(dt, load_bias(inputs, work.head, C), C)
    A = tl.load(inputs.A + work.head).to(tl.float64)
    dt, steps = exponents(tl.where(real, dt, 0.0), A)
    total = add_up(steps, 0)
    weight = dt * power_of_sum(total - running_sum(steps))
    x_at = token * (C.H * C.P) + work.head * C.P
    k_at = token * (C.G * C.K) + work.group * C.K
    x_mask = real[:, None] & (p < C.P)[None, :]
    k_mask = real[:, None] & (k < C.K)[None, :]
    x = tl.load(inputs.x + x_at[:, None] + p[None, :], mask=x_mask, other=0.0)
    B = tl.load(inputs.B + k_at[:, None] + k[None, :], mask=k_mask, other=0.0)
    return add_tokens(state * power_of_sum(total), x, weight, B, C)


@triton.jit
def _store_within(inputs, work, state, i, store, when, channels, C: tl.constexpr):
    """Stores a state that is after some tokens of chunk i, if it is live and `when`.

    Args:
        state: before the chunk.
    """
    if store.live & when:
        count = store.end - i * C.CHUNK
        then = _state_within(inputs, work, state, i, count, C)
        states_ptr = inputs.states
        store_state(states_ptr, store, when, then, work.head, channels, C)


@triton.jit
def _later(last, early, tokens):
    """Those `Store`s of states after so many tokens or more, counted from there."""
    return (
        Store(last.slot, last.end - tokens, last.live & (last.end >= tokens)),
        Store(early.slot, early.end - tokens, early.live & (early.end >= tokens)),
    )


@triton.jit
def _on_the_way(store, length, low, high, C: tl.constexpr):
    """The `Store`, if it ends in chunks `low` up to `high`, before the last token."""
    chunk = store.end // C.CHUNK
    here = (store.end < length) & (chunk >= low) & (chunk < high)
    return Store(store.slot, store.end, store.live & here)


@triton.jit
def _store_last(inputs, state, stores, length, work, channels, C: tl.constexpr):
    """Stores the state after a sequence wherever it is wanted."""
    last, early = stores
    whole = last.end == length
    store_state(inputs.states, last, whole, state, work.head, channels, C)
    if C.STORES > 1:
        whole = early.end == length
        store_state(inputs.states, early, whole, state, work.head, channels, C)


@triton.jit
def _through_stores(inputs, y_ptr, work, state, low, stops, channels, C: tl.constexpr):
    """Goes through whole chunks; stores what is wanted of the states on the way.

    Args:
        state: before chunk `low`.
        stops: the first chunk behind the whole ones, and both `Store`s, which are not
            live if they are to be stored elsewhere, or later.

    Returns:
        The state after these chunks.
    """
    whole, last, early = stops
    at_last = tl.where(last.live, last.end // C.CHUNK, whole)
    at_early = tl.where(early.live, early.end // C.CHUNK, whole)
    first = tl.minimum(at_last, at_early)
    second = tl.maximum(at_last, at_early)
    for part in range(3):
        begin = tl.where(part == 0, low, tl.where(part == 1, first, second))
        upto = tl.where(part == 0, first, tl.where(part == 1, second, whole))
        for i in tl.range(begin, upto, num_stages=C.STAGES):
            state = _chunk(inputs, y_ptr, work, state, i, C, True)
        new = (part == 0) | ((part == 1) & (second > first))
        when = new & (at_last == upto)
        _store_within(inputs, work, state, upto, last, when, channels, C)
        if C.STORES > 1:
            when = new & (at_early == upto)
            _store_within(inputs, work, state, upto, early, when, channels, C)
    return state


# The second launch: one program goes through one prefill, or through one stretch of it,
# for P_BLOCK channels of a head, chunk by chunk. Its state stays in registers from the
# first token to the last. The grid is 1-D, prefills or stretches x heads x blocks of
# channels, blocks fastest, so that programs side by side read the same B and C.
#
# Reads: tokens of its sequence, what `prepare_kernel` left of their chunks, and the
# state that it starts from: the slot of the sequence, or what `prepare_kernel` left of
# the stretches before. The first program of a sequence also replays recent tokens of
# its slot, which nobody writes here. Writes: y of its tokens; the program with the
# token after which a state is wanted, the sequence's last one or an earlier one, writes
# its slot.
#
# Race-free in a donated cache: sequences write different slots, none of which another
# one reads, and each slot is written by programs of one stretch, each its own elements.
# If that slot is the one that the sequence reads: where there is one stretch, the
# programs have read their elements before, and what they write is computed from them;
# where there are several, nobody reads the slot here, since `prepare_kernel` has left a
# copy. Tokens belong to one program each.
@triton.jit
def chunks_kernel(inputs, outputs, C: tl.constexpr):  # noqa: PLR0915 (steps of one kernel)
    program = tl.program_id(0)
    P_BLOCK: tl.constexpr = C.P_BLOCK
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
    begin, length, slot, known, chunk = load_prefill(inputs, prefill, C)
    count = (length + C.CHUNK - 1) // C.CHUNK
    low = count * 0
    high = count
    if inputs.stretches is not None:
        last = (count - 1) // C.STRETCH
        low = tl.where(exists, place * C.STRETCH, count)
        high = tl.minimum(count, low + C.STRETCH)
    if low < high:
        if inputs.stretches is None:
            state = initial_state(inputs, slot, known, head, channels, C)
        elif last > 0:
            state = _entering_state(inputs, number, place, last, head, channels, C)
        else:
            state = initial_state(inputs, slot, known, head, channels, C)
        skip = load_skip(inputs, head, channels, C)
        group = head // (C.H // C.G)
        work = Work(begin, length, chunk, head, group, first_channel, skip)
        # All but a last chunk of fewer tokens need no masks.
        whole = tl.minimum(high, length // C.CHUNK)
        if C.STORES == 0:
            for i in tl.range(low, whole, num_stages=C.STAGES):
                state = _chunk(inputs, y_ptr, work, state, i, C, True)
        else:
            seq = prefill_sequence(inputs, prefill)
            stores = stores_of(inputs, seq, slot, length, C)
            if C.DRAFTS > 0:
                kept = kept_of(inputs, seq, known, C)
                latest, early = without(stores, C.DRAFTS - kept)
                A = tl.load(inputs.A + head).to(tl.float32)
                here = tl.where(low == 0, kept, 0)
                done = here * 0
                if C.STORES > 1:
                    done = tl.minimum(early.end, here)
                    state = replay(inputs, state, slot, 0, done, A, head, channels, C)
                    store_state(
                        inputs.states, early, early.end < here, state, head, channels, C
                    )
                state = replay(inputs, state, slot, done, here, A, head, channels, C)
                stores = _later(latest, early, kept)
            stops = (
                whole,
                _on_the_way(stores[0], length, low, high, C),
                _on_the_way(stores[1], length, low, high, C),
            )
            state = _through_stores(inputs, y_ptr, work, state, low, stops, channels, C)
        if whole < high:
            state = _chunk(inputs, y_ptr, work, state, whole, C, False)
        if states_ptr is not None:
            if high == count:
                if C.STORES == 0:
                    at, mask = state_tile(slot, head, channels, C)
                    final = state.to(states_ptr.dtype.element_ty)
                    tl.store(states_ptr + at, final, mask=mask)
                else:
                    _store_last(inputs, state, stores, length, work, channels, C)
