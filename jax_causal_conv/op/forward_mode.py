"""Forward mode where an op has none: an error that names the op and the cure.

jax finds out late. What it pushes forward it may yet pull back (so it differentiates
a scan), and within jit it first compiles what was never pulled back: there it raises an
error of its own that names no op, with nobody to add to it. So tangents pass a
primitive of ours on their way in, which vanishes when they are transposed and raises
otherwise.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from .record import Op

_CURE = (
    '{op}: forward mode and derivatives of higher order need implementation="xla", got '
    "implementation={implementation!r}, which has first-order, reverse-mode gradients "
    'alone. Give implementation="xla" to the op, layer or model'
)


def refusal(op: Op, implementation: str | None) -> str:
    """What to say of derivatives that only XLA has."""
    return _CURE.format(op=op.public, implementation=implementation)


def without(op: Op, implementation: str | None, operands: Any) -> Any:
    """The same operands, whose tangents cannot be evaluated but can be transposed."""
    leaves, tree = jax.tree.flatten(operands)
    floats = [
        i
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, jax.core.Tracer) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    passed = _operands_p.bind(
        *(leaves[i] for i in floats), op=op, implementation=implementation
    )
    for i, leaf in zip(floats, passed, strict=True):
        leaves[i] = leaf
    return jax.tree.unflatten(tree, leaves)


def undifferentiated(op: Op, implementation: str, function: Callable) -> Callable:
    """The same function, which has no derivatives: not even those of a rule's parts."""
    refusing = jax.custom_jvp(function)

    @refusing.defjvp
    def _(*_):
        raise NotImplementedError(refusal(op, implementation))

    return refusing


def _pass(*leaves, **_):
    return list(leaves)


def _pass_batched(leaves, dims, **params):
    return _operands_p.bind(*leaves, **params), dims


def _push_forward(primals, tangents, **params):
    return list(primals), [
        t if isinstance(t, ad.Zero) else _tangent_p.bind(t, **params) for t in tangents
    ]


def _refuse(*_, op: Op, implementation: str | None, **__):
    raise TypeError(refusal(op, implementation))


_operands_p = Primitive("causal_conv_operands")
_operands_p.multiple_results = True
_operands_p.def_impl(_pass)
_operands_p.def_abstract_eval(_pass)
batching.primitive_batchers[_operands_p] = _pass_batched
mlir.register_lowering(_operands_p, lambda ctx, *leaves, **_: leaves)
ad.primitive_jvps[_operands_p] = _push_forward

_tangent_p = Primitive("causal_conv_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda aval, **_: aval)
batching.primitive_batchers[_tangent_p] = _refuse
mlir.register_lowering(_tangent_p, _refuse)
ad.deflinear2(_tangent_p, lambda cotangent, *_, **__: [cotangent])
