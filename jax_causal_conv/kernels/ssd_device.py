"""Device functions shared by the kernels of the state-space duality. No JAX here.

Conventions: `C` is the launch's record of constants (`ssd_record.SsdConstants`).
Letters as in `ssd_record`. Decays are powers of two: sums of dt·A are kept in units of
log 2, since `exp2` is one instruction of a GPU; `power` is its exact twin.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .offsets import Offsets, offset_bound

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# LOG2E minus its float32: together they have the precision of two float32.
LOG2E_REST: tl.constexpr = tl.constexpr(1.9259629911e-08)


@triton.jit
def add_up(values, AXIS: tl.constexpr):
    """The sum along an axis; as `tl.sum`, which the interpreter cannot call."""
    return tl.reduce(values, AXIS, tl.standard._sum_combine)


@triton.jit
def running_sum(values):
    """Sums of the first values along axis 0."""
    return tl.associative_scan(values, 0, tl.standard._sum_combine)


@triton.jit
def largest(values, AXIS: tl.constexpr):
    return tl.reduce(values, AXIS, tl.standard._elementwise_max)


@triton.jit
def finite(values):
    return tl.abs(values.to(tl.float32)) < float("inf")


@triton.jit
def are_finite(rows):
    """Of each row, whether all its values are finite."""
    return largest(tl.where(finite(rows), 0, 1), 1) == 0


@triton.jit
def power(whole, rest):
    """Two to the power of `whole + rest`, where `rest` is what `whole` has lost.

    To half a unit in the last place and a little: a GPU's `exp2` is up to two off, and
    always to the same side where decays are alike, so that the state of a head that
    forgets slowly would be off by as much after each chunk or token.
    """
    # By selection, which keeps NaN: the difference of two infinities would be one.
    whole = tl.where(whole < -1000.0, -1000.0, tl.where(whole > 1000.0, 1000.0, whole))
    n = tl.floor(whole + 0.5)
    f = (whole - n) + rest
    # The series of exp(f * log(2)), where |f| <= 1/2: the eighth term is below 6e-9.
    series = tl.fma(f, 1.5252733804e-05, 1.5403530393e-04)
    series = tl.fma(f, series, 1.3333558146e-03)
    series = tl.fma(f, series, 9.6181291076e-03)
    series = tl.fma(f, series, 5.5504108665e-02)
    series = tl.fma(f, series, 2.4022650696e-01)
    series = tl.fma(f, series, 6.9314718056e-01)
    series = tl.fma(f, series, 1.0)
    # Below the least normal number it is 0. A NaN in `n` is in the series as well.
    n = tl.minimum(tl.maximum(n, -127.0), 128.0)
    return series * ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def power_of_sum(total):
    """`power` of a float64 number."""
    whole = total.to(tl.float32)
    return power(whole, (total - whole.to(tl.float64)).to(tl.float32))


# --- step sizes -------------------------------------------------------------------


@triton.jit
def softplus(v):
    """`log(1 + exp(v))` with a relative error of 2e-7 wherever it is not tiny.

    The GPU's own logarithm is of no use here: near 1 it has only an absolute bound.
    """
    a = -tl.abs(v)
    a = tl.where(a < -100.0, -100.0, a)  # selected, since maximum would drop a NaN
    # e = exp(a): the whole powers of two apart, so that no bits of `a` are lost.
    n = tl.floor(a * LOG2E + 0.5)
    e = tl.exp2(n) * tl.exp2(tl.fma(a, LOG2E_REST, tl.fma(a, LOG2E, -n)))
    # log(1 + e) = 2 artanh(z), where z <= 1/3: eight terms suffice.
    z = e / (2.0 + e)
    z2 = z * z
    series = z2 * (1.0 / 15.0) + 1.0 / 13.0
    series = series * z2 + 1.0 / 11.0
    series = series * z2 + 1.0 / 9.0
    series = series * z2 + 1.0 / 7.0
    series = series * z2 + 1.0 / 5.0
    series = series * z2 + 1.0 / 3.0
    log = 2.0 * z + 2.0 * z * (series * z2)
    return tl.where(v > 0, v, 0.0) + log


@triton.jit
def load_bias(inputs, heads, C: tl.constexpr):
    """The bias of heads' step sizes, in float32."""
    if inputs.dt_bias is not None:
        bias = tl.load(inputs.dt_bias + heads, mask=heads < C.H, other=0.0)
        return bias.to(tl.float32)
    else:
        return 0.0


@triton.jit
def step_size(dt, bias, C: tl.constexpr):
    """A step size as it takes part: with bias, softplus and limits, in float32."""
    dt = dt.to(tl.float32) + bias
    if C.SOFTPLUS:
        dt = softplus(dt)
    if C.LOW is not None:  # by selection: NaN stays
        dt = tl.where(dt < C.LOW, C.LOW, dt)
    if C.HIGH is not None:
        dt = tl.where(dt > C.HIGH, C.HIGH, dt)
    return dt


@triton.jit
def exponents(dt, A):
    """The decays of tokens as powers of two, in float64; and dt, NaN if not finite."""
    fine = finite(dt)
    steps = tl.where(fine, dt, 0.0).to(tl.float64) * (A * LOG2E)
    # What is below leaves nothing of a float32, and rounds a sum less.
    steps = tl.maximum(steps, -160.0)
    return tl.where(fine, dt, float("nan")), steps


# --- tiles ------------------------------------------------------------------------


@triton.jit
def load_tile(ptrs, mask, PART: tl.constexpr):
    """Values, and zeros where they are masked; only looked at if PART of a tile is."""
    if PART:
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(ptrs, values, mask, PART: tl.constexpr):
    if PART:
        tl.store(ptrs, values, mask=mask)
    else:
        tl.store(ptrs, values)


@triton.jit
def load_skip(inputs, head, channels, C: tl.constexpr):
    """D of a head's channels in float32, one value of all or one each."""
    if inputs.D is None:
        return 0.0  # which nobody looks at
    elif C.D_BY_CHANNEL:
        at = head * C.P + channels
        skip = tl.load(inputs.D + at, mask=channels < C.P, other=0.0)
        return skip.to(tl.float32)
    else:
        return tl.load(inputs.D + head).to(tl.float32)


@triton.jit
def state_tile(slot, head, channels, C: tl.constexpr):
    """Where a block of a state is in `(S, H, P, K)`, and which of it there is."""
    size = tl.arange(0, C.K_BLOCK)
    row = slot.to(tl.int64) * (C.H * C.P * C.K) + head * (C.P * C.K)
    at = row + (channels[:, None] * C.K + size[None, :])
    return at, (channels < C.P)[:, None] & (size < C.K)[None, :]


@triton.jit
def load_state(states_ptr, slot, known, head, channels, C: tl.constexpr):
    """A block of the state in a slot, in float32; zeros where it holds none."""
    size = tl.arange(0, C.K_BLOCK)
    at, _ = state_tile(slot, head, channels, C)
    mask = (channels < tl.where(known, C.P, 0))[:, None] & (size < C.K)[None, :]
    return tl.load(states_ptr + at, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def initial_state(inputs, slot, known, head, channels, C: tl.constexpr):
    """A block of the state that a sequence starts from, in float32."""
    if inputs.states is not None:
        return load_state(inputs.states, slot, known, head, channels, C)
    else:
        return tl.full([channels.shape[0], C.K_BLOCK], 0, tl.float32)


@triton.jit
def slot_of(inputs, seq, C: tl.constexpr):
    """The slot of a sequence, whether it names one, and whether it holds a state."""
    slot = seq
    if inputs.slots is not None:
        slot = tl.load(inputs.slots + seq)
    valid = (slot >= 0) & (slot < inputs.num_slots) & (slot != C.PAD_SLOT_ID)
    if inputs.known is not None:
        return slot, valid, valid & tl.load(inputs.known + seq)
    else:
        return slot, valid, slot < slot * 0  # none does


@triton.jit
def own_tokens(inputs, seq, C: tl.constexpr):
    """Where the tokens of a sequence begin and end."""
    num_tokens = inputs.num_tokens
    end = tl.load(inputs.offsets + seq + 1)
    if inputs.role is None:  # offsets are as the caller gave them
        offsets = Offsets(inputs.offsets, num_tokens, inputs.num_seqs)
        begin = offset_bound(offsets, seq, C)
    else:
        begin = tl.load(inputs.offsets + seq)
        begin = tl.minimum(tl.maximum(begin, 0), num_tokens)
    return begin, tl.maximum(tl.minimum(end, num_tokens), begin)


class Store(NamedTuple):
    """A state that a sequence leaves: where, after how many tokens, and whether."""

    slot: Any
    end: Any
    live: Any


@triton.jit
def stores_of(inputs, seq, slot, length, C: tl.constexpr):
    """The `Store` of a live sequence's state, and that of its snapshot.

    Where there are no snapshots it is one that is not live. Nor is a snapshot that is
    to go where the state goes.
    """
    end = length
    live = length > 0
    if inputs.write_slots is not None:
        slot = tl.load(inputs.write_slots + seq)
        live = (slot >= 0) & (slot < inputs.num_slots) & (slot != C.PAD_SLOT_ID)
    last = Store(slot, end, live)
    if inputs.snapshot_slots is not None:
        early = tl.load(inputs.snapshot_slots + seq)
        end = tl.load(inputs.snapshot_ends + seq)
        end = tl.minimum(tl.maximum(end, 0), length)
        free = (early >= 0) & (early < inputs.num_slots) & (early != C.PAD_SLOT_ID)
        free = free & (early != tl.where(live, slot, -1))
        return last, Store(early, end, free)
    else:
        return last, Store(slot, end, length < 0)


@triton.jit
def next_state(state, x, dt, B, A):
    """The state after a token: of a head, `[P_BLOCK, K_BLOCK]`; x and dt float32."""
    decay = power(dt * A * LOG2E, 0.0)
    return state * decay + (x * dt)[:, None] * B.to(tl.float32)[None, :]


@triton.jit
def store_state(states_ptr, store, when, state, head, channels, C: tl.constexpr):
    """Writes a block of a state where it goes, if it does and `when`."""
    size = tl.arange(0, C.K_BLOCK)
    at, _ = state_tile(store.slot, head, channels, C)
    limit = tl.where(store.live & when, C.P, 0)
    mask = (channels < limit)[:, None] & (size < C.K)[None, :]
    tl.store(states_ptr + at, state.to(states_ptr.dtype.element_ty), mask=mask)


@triton.jit
def zero_tokens(y_ptr, first, count, head, channels, C: tl.constexpr):
    """Zeros in y for `count` tokens from `first`, in a head's channels."""
    lanes = tl.arange(0, 16)
    zeros = tl.full([16, channels.shape[0]], 0, tl.float32)
    zeros = zeros.to(y_ptr.dtype.element_ty)
    for done in range(0, count, 16):
        rows = done + lanes
        at = (first + rows).to(tl.int64) * (C.H * C.P) + head * C.P
        mask = (rows < count)[:, None] & (channels < C.P)[None, :]
        tl.store(y_ptr + at[:, None] + channels[None, :], zeros, mask=mask)


# --- products ---------------------------------------------------------------------


@triton.jit
def dot_exact(a, b, acc, FAST: tl.constexpr):
    """A product of 16-bit operands: exact, but for its float32 sums."""
    if FAST:
        return tl.dot(a, b, acc)
    else:  # the interpreter would multiply the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def to_tf32(a):
    """Rounded to the 11 bits that a product in TF32 keeps."""
    bits = a.to(tl.int32, bitcast=True)
    rounded = ((bits + 4096) & -8192).to(tl.float32, bitcast=True)
    return tl.where(finite(a), rounded, a)  # rounding up would turn some NaN into 0


@triton.jit
def cut(values):
    """The upper 8 bits of float32 values, as bfloat16, and what is left.

    Cut off, not rounded: that takes a mask and a subtraction, where a GPU rounds a
    value that it also needs as float32 in a slow instruction.
    """
    bits = values.to(tl.int32, bitcast=True)
    upper = (bits & -65536).to(tl.float32, bitcast=True)
    return (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True), values - upper


@triton.jit
def dot_left(wide, narrow, acc, PARTS: tl.constexpr, FAST: tl.constexpr):
    """`acc + wide @ narrow` for a float32 `wide`.

    Matrix units multiply 8 (bfloat16) or 11 bits (TF32). A narrow operand is exact in
    them; the wide one is taken apart into so many terms that are.

    Args:
        PARTS: 3 terms of 8 bits are all of a float32, 2 suffice where the result is
            rounded to 16 bits later, 1 rounds the operand.
    """
    if narrow.dtype == tl.bfloat16:
        rest = wide
        for _ in tl.static_range(PARTS - 1):
            term, rest = cut(rest)
            acc = dot_exact(term, narrow, acc, FAST)
        acc = dot_exact(rest.to(tl.bfloat16), narrow, acc, FAST)
    elif narrow.dtype == tl.float16:
        # float16 has too short a range for the terms, but TF32 holds its values.
        exact = narrow.to(tl.float32)
        term = to_tf32(wide)
        acc = tl.dot(term, exact, acc, input_precision="tf32")
        if PARTS > 1:
            rest = to_tf32(wide - term)
            acc = tl.dot(rest, exact, acc, input_precision="tf32")
    elif PARTS > 1:
        acc = tl.dot(wide, narrow.to(tl.float32), acc, input_precision="tf32x3")
    else:
        acc = tl.dot(wide, narrow.to(tl.float32), acc, input_precision="tf32")
    return acc


@triton.jit
def dot_right(narrow, wide, acc, PARTS: tl.constexpr, FAST: tl.constexpr):
    """`acc + narrow @ wide`: as `dot_left`, from the other side."""
    if narrow.dtype == tl.bfloat16:
        rest = wide
        for _ in tl.static_range(PARTS - 1):
            term, rest = cut(rest)
            acc = dot_exact(narrow, term, acc, FAST)
        acc = dot_exact(narrow, rest.to(tl.bfloat16), acc, FAST)
    elif narrow.dtype == tl.float16:
        exact = narrow.to(tl.float32)
        term = to_tf32(wide)
        acc = tl.dot(exact, term, acc, input_precision="tf32")
        if PARTS > 1:
            rest = to_tf32(wide - term)
            acc = tl.dot(exact, rest, acc, input_precision="tf32")
    elif PARTS > 1:
        acc = tl.dot(narrow.to(tl.float32), wide, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(narrow.to(tl.float32), wide, acc, input_precision="tf32")
    return acc


@triton.jit
def dot_narrow(a, b, C: tl.constexpr):
    """`a @ b` of operands as they were given."""
    acc = tl.full([a.shape[0], b.shape[1]], 0, tl.float32)
    if (a.dtype == b.dtype) & (a.dtype != tl.float32):
        return dot_exact(a, b, acc, C.FAST)
    elif C.EXACT:
        wide = a.to(tl.float32)
        return tl.dot(wide, b.to(tl.float32), acc, input_precision="tf32x3")
    else:
        wide = a.to(tl.float32)
        return tl.dot(wide, b.to(tl.float32), acc, input_precision="tf32")


@triton.jit
def add_tokens(state, x, weight, B, C: tl.constexpr):
    """`state + (weight * x)ᵀ @ B`.

    The product is summed up from zero. Tensor cores cut off what a sum has no room for,
    always towards zero: summed up in the state, each would take a little of all that a
    head remembers.
    """
    PARTS: tl.constexpr = C.STATE_PARTS
    FAST: tl.constexpr = C.FAST
    weighted = x.to(tl.float32) * weight[:, None]
    added = tl.full([x.shape[1], B.shape[1]], 0, tl.float32)
    return state + dot_left(tl.trans(weighted), B, added, PARTS, FAST)


# --- prefills and runs ------------------------------------------------------------


@triton.jit
def load_prefill(inputs, number, C: tl.constexpr):
    """A row of `SsdInputs.prefills`, of length 0 if a value is out of range."""
    WIDTH: tl.constexpr = 5 if C.STORES == 0 else 6
    row = inputs.prefills + number * WIDTH
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
def prefill_sequence(inputs, number):
    """The number of a prefill's sequence, which there is where `C.STORES`."""
    seq = tl.load(inputs.prefills + number * 6 + 5)
    return tl.minimum(tl.maximum(seq, 0), inputs.num_seqs - 1)


@triton.jit
def load_runs(inputs, first, real, C: tl.constexpr):
    """Of a chunk's tokens, the place where their run begins; -1 of padding."""
    at = first.to(tl.int64) + tl.arange(0, C.CHUNK)
    return tl.load(inputs.run_start + at, mask=real, other=-1)


@triton.jit
def enters(start, offset):
    """Is the state before place `offset` of a row of the run that begins at `start`?"""
    return (start >= 0) & ((start < offset) | (start == 0))


@triton.jit
def add_run(state, x, weight, B, leaves, C: tl.constexpr):
    """`add_tokens` for those of a chunk's tokens that are of the run that goes on.

    NaN or inf in one of them makes all of the state NaN; those of others reach nothing.
    """
    bad = (are_finite(x) & are_finite(B) & finite(weight)) == 0
    x = tl.where(leaves[:, None], x, 0.0)
    weight = tl.where(leaves, weight, 0.0)
    B = tl.where(leaves[:, None], B, 0.0)
    state = add_tokens(state, x, weight, B, C)
    poisoned = largest(tl.where(leaves & bad, 1, 0), 0) > 0
    return tl.where(poisoned, float("nan"), state)
