"""The activations and their derivatives, by name. No JAX here.

What is below float32's range may come out as 0, and nothing is NaN that is not so by
definition: exponentials grow to infinity only where their reciprocal is wanted.
"""

import math

import triton
import triton.language as tl

# gelu is z · sigmoid(z · (A + B · z²)): what its form with tanh says, of which nothing
# is lost to 1 + tanh.
_GELU_A = tl.constexpr(math.sqrt(8 / math.pi))
_GELU_B = tl.constexpr(0.044715 * math.sqrt(8 / math.pi))
# From here on gelu's derivative is 1 or 0, to float32.
_GELU_FAR = tl.constexpr(16.0)


@triton.jit
def activate(z, C: tl.constexpr):
    """The activation `C.ACTIVATION` of float32 z."""
    if C.ACTIVATION == "silu":
        return z * sigmoid(z, C)
    elif C.ACTIVATION == "gelu":
        return z * sigmoid(z * (_GELU_A + _GELU_B * (z * z)), C)
    elif C.ACTIVATION == "relu":
        return tl.where(z <= 0, 0.0, z)  # a NaN stays one
    elif C.ACTIVATION == "sigmoid":
        return sigmoid(z, C)
    elif C.ACTIVATION == "tanh":
        return _tanh(z, C)
    else:
        tl.static_assert(C.ACTIVATION is None, "unknown activation")
        return z


@triton.jit
def through_activation(dy, z, C: tl.constexpr):
    """The cotangent of z, from that of `activate(z)`."""
    if C.ACTIVATION == "silu":  # dy · s · (1 + z · (1 - s)) with s = sigmoid(z)
        s = sigmoid(z, C)
        scaled = dy * s
        return tl.fma(scaled, z - z * s, scaled)
    elif C.ACTIVATION == "gelu":
        square = z * z
        exponent = z * (_GELU_A + _GELU_B * square)
        inner = z * (_GELU_A + 3 * _GELU_B * square) * _sigmoid_slope(exponent, C)
        inner = tl.where(tl.abs(z) >= _GELU_FAR, 0.0, inner)  # else infinity times 0
        return dy * (sigmoid(exponent, C) + inner)
    elif C.ACTIVATION == "relu":
        return tl.where(z > 0, dy, 0.0)
    elif C.ACTIVATION == "sigmoid":
        return dy * _sigmoid_slope(z, C)
    elif C.ACTIVATION == "tanh":
        return dy * (4.0 * _sigmoid_slope(2.0 * z, C))
    else:
        tl.static_assert(C.ACTIVATION is None, "unknown activation")
        return dy


@triton.jit
def sigmoid(z, C: tl.constexpr):
    """`1 / (1 + exp(-z))`, in four instructions if C.FAST.

    exp2 is one instruction where exp adds range checks, and an approximate reciprocal
    one where a division is eight. The relative error stays below 4e-6 down to z = -87;
    below that the result, under 2e-38, may be 0.
    """
    return _reciprocal(1.0 + tl.exp2(z * -1.4426950408889634), C)


@triton.jit
def _reciprocal(a, C: tl.constexpr):
    if C.FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;",
            "=f,f",
            [a],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return 1.0 / a


@triton.jit
def _sigmoid_slope(z, C: tl.constexpr):
    """The derivative of sigmoid; 1 - sigmoid would lose what is left of large z."""
    e = tl.exp2(tl.abs(z) * -1.4426950408889634)
    r = _reciprocal(1.0 + e, C)
    return e * r * r


@triton.jit
def _tanh(z, C: tl.constexpr):
    """The hyperbolic tangent: a polynomial near 0, where the other form cancels."""
    size = tl.abs(z)
    far = 1.0 - 2.0 * sigmoid(-2.0 * size, C)
    # A fit of (tanh(z) - z) / z³ by powers of z² for |z| < 0.6, to 8e-8 of tanh(z).
    square = z * z
    p = tl.fma(square, -0.00627639, 0.02111622)
    p = tl.fma(square, p, -0.05387514)
    p = tl.fma(square, p, 0.13332924)
    p = tl.fma(square, p, -0.3333333)
    near = tl.fma(z * square, p, z)
    return tl.where(size < 0.6, near, tl.where(z < 0, -far, far))
