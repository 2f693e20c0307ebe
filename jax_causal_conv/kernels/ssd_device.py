"""Device functions shared by the kernels of the state-space duality. No JAX here.

Conventions: `C` is the launch's record of constants (`ssd_record.SsdConstants`).
Letters as in `jax_causal_conv.ssd`: H heads of P channels, G groups, K state size, c
tokens in a chunk. Decays are powers of two: sums of dt·A are kept in units of log 2,
since `exp2` is one instruction of a GPU.
"""

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
# LOG2E minus its float32: together they have the precision of two float32.
LOG2E_REST: tl.constexpr = tl.constexpr(1.9259629911e-08)


@triton.jit
def add_up(values, AXIS: tl.constexpr):
    """The sum along an axis; as `tl.sum`, which is not known to the interpreter."""
    return tl.reduce(values, AXIS, tl.standard._sum_combine)


@triton.jit
def largest(values, AXIS: tl.constexpr):
    return tl.reduce(values, AXIS, tl.standard._elementwise_max)


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
def step_size(dt, bias_ptr, heads, C: tl.constexpr):
    """dt as it takes part: with its bias, softplus and limits, in float32."""
    dt = dt.to(tl.float32)
    if bias_ptr is not None:
        dt += tl.load(bias_ptr + heads, mask=heads < C.H, other=0.0).to(tl.float32)
    if C.SOFTPLUS:
        dt = softplus(dt)
    if C.LOW is not None:  # by selection: NaN stays
        dt = tl.where(dt < C.LOW, C.LOW, dt)
    if C.HIGH is not None:
        dt = tl.where(dt > C.HIGH, C.HIGH, dt)
    return dt


@triton.jit
def load_tile(ptrs, mask):
    """Values, and zeros where they are masked; all of them if the mask is None."""
    if mask is None:
        return tl.load(ptrs)
    else:
        return tl.load(ptrs, mask=mask, other=0.0)


@triton.jit
def load_skip(D_ptr, head, channels, mask, C: tl.constexpr):
    """D of a head's channels, in float32: one value of all, or one each."""
    if C.D_BY_CHANNEL:
        return tl.load(D_ptr + head * C.P + channels, mask=mask, other=0.0).to(
            tl.float32
        )
    else:
        return tl.load(D_ptr + head).to(tl.float32)


@triton.jit
def _dot(a, b, acc, FAST: tl.constexpr):
    """A product that is exact but for float32 sums: of 16-bit operands."""
    if FAST:
        return tl.dot(a, b, acc)
    else:  # the interpreter would multiply the bits of bfloat16
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)


@triton.jit
def _to_tf32(a):
    """Rounded to the 11 bits that a product in TF32 keeps."""
    bits = a.to(tl.int32, bitcast=True)
    return ((bits + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _cut(values):
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
            term, rest = _cut(rest)
            acc = _dot(term, narrow, acc, FAST)
        acc = _dot(rest.to(tl.bfloat16), narrow, acc, FAST)
    elif narrow.dtype == tl.float16:
        # float16 has too short a range for the terms, but TF32 holds its values.
        exact = narrow.to(tl.float32)
        term = _to_tf32(wide)
        acc = tl.dot(term, exact, acc, input_precision="tf32")
        if PARTS > 1:
            rest = _to_tf32(wide - term)
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
            term, rest = _cut(rest)
            acc = _dot(narrow, term, acc, FAST)
        acc = _dot(narrow, rest.to(tl.bfloat16), acc, FAST)
    elif narrow.dtype == tl.float16:
        exact = narrow.to(tl.float32)
        term = _to_tf32(wide)
        acc = tl.dot(exact, term, acc, input_precision="tf32")
        if PARTS > 1:
            rest = _to_tf32(wide - term)
            acc = tl.dot(exact, rest, acc, input_precision="tf32")
    elif PARTS > 1:
        acc = tl.dot(narrow.to(tl.float32), wide, acc, input_precision="tf32x3")
    else:
        acc = tl.dot(narrow.to(tl.float32), wide, acc, input_precision="tf32")
    return acc


@triton.jit
def dot_right_joined(narrow, wide, acc, FAST: tl.constexpr):
    """`dot_right` with two terms, side by side in one product."""
    upper, rest = _cut(wide)
    both = tl.join(upper, rest.to(tl.bfloat16))
    both = tl.reshape(both, [wide.shape[0], 2 * wide.shape[1]])
    zero = tl.full([narrow.shape[0], 2 * wide.shape[1]], 0, tl.float32)
    twice = _dot(narrow, both, zero, FAST)
    a, b = tl.split(tl.reshape(twice, [narrow.shape[0], wide.shape[1], 2]))
    return acc + (a + b)


@triton.jit
def dot_narrow(a, b, acc, EXACT: tl.constexpr, FAST: tl.constexpr):
    """`acc + a @ b` of operands as they were given."""
    if (a.dtype == b.dtype) & (a.dtype != tl.float32):
        return _dot(a, b, acc, FAST)
    elif EXACT:
        return tl.dot(
            a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32x3"
        )
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="tf32")


@triton.jit
def zero_tokens(y_ptr, first, count, head, channels, mask, C: tl.constexpr):
    """Zeros in y for `count` tokens from `first`, in a head's channels."""
    lanes = tl.arange(0, C.ZERO_ROWS)
    zeros = tl.full([C.ZERO_ROWS, channels.shape[0]], 0, tl.float32)
    zeros = zeros.to(y_ptr.dtype.element_ty)
    for done in range(0, count, C.ZERO_ROWS):
        rows = done + lanes
        at = (first + rows).to(tl.int64) * (C.H * C.P) + head * C.P
        tl.store(
            y_ptr + at[:, None] + channels[None, :],
            zeros,
            mask=(rows < count)[:, None] & mask[None, :],
        )


@triton.jit
def zero_uncovered(
    y_ptr, begin, end, num_tokens, part, parts, head, channels, mask, C: tl.constexpr
):
    """Zeros for this part of the tokens before `begin` and from `end` on.

    Blocks of tokens, head first, are dealt out to so many parts in turn.
    """
    size: tl.constexpr = C.ZERO_ROWS
    for first in range(part * size, begin, parts * size):
        zero_tokens(
            y_ptr, first, tl.minimum(size, begin - first), head, channels, mask, C
        )
    for first in range(end + part * size, num_tokens, parts * size):
        zero_tokens(
            y_ptr, first, tl.minimum(size, num_tokens - first), head, channels, mask, C
        )
