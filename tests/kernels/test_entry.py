"""The generated functions through which kernels are called, and their launches."""

import dataclasses
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import JITFunction

from jax_causal_conv.kernels import (
    activations,
    backward,
    dense,
    interpreter,
    offsets,
    packed,
    record,
    rows,
    stores,
    update,
    walks,
)
from jax_causal_conv.kernels.entry import arrays, entry, leaves, position, replaced
from jax_causal_conv.kernels.record import Launch

OPS = (backward, dense, packed, update)
SHARED = (activations, offsets, rows, stores, walks)
FUNCTIONS = {
    f"{function.fn.__module__}.{name}": function
    for module in OPS + SHARED
    for name, function in vars(module).items()
    if isinstance(function, JITFunction)
}


class Inputs(NamedTuple):
    a: Any
    b: Any
    parts: Any
    scale: Any


class Outputs(NamedTuple):
    out: Any
    a: Any = None


@dataclasses.dataclass(frozen=True)
class Facts:
    N: int
    NAME: str | None = None
    FAST: bool = True


@triton.jit
def _doubled(x):
    return 2 * x


@triton.jit
def combine(inputs, outputs, C: tl.constexpr):
    lanes = tl.arange(0, C.N)
    total = tl.load(inputs.a + lanes) * inputs.scale
    if inputs.b is not None:
        total += tl.load(inputs.b + lanes)
    if C.NAME == "twice":
        total = _doubled(total)
    for i in tl.static_range(len(inputs.parts)):
        tl.store(inputs.parts[i] + lanes, total + i)
    tl.store(outputs.out + lanes, total)


def some(b=None, parts=1):
    """A record of inputs: eight numbers in each array."""
    ones = np.ones(8, np.float32)
    return Inputs(3 * ones, b, tuple(ones + i for i in range(parts)), 10)


def source(*records, spare=0):
    return inspect.getsource(entry(combine, *records, spare).fn)


def test_an_entry_takes_what_is_present_and_builds_the_records():
    text = source(some(parts=2), Outputs(out=1), spare=1)
    assert text == (
        "def combine(inputs_a, inputs_parts_0, inputs_parts_1, inputs_scale, "
        "outputs_out, spare_0, C: tl.constexpr):\n"
        "    kernel(Inputs(inputs_a, None, (inputs_parts_0, inputs_parts_1,), "
        "inputs_scale), Outputs(outputs_out, None), C)\n"
    )


def test_an_entry_is_made_once_for_each_form():
    outputs = Outputs(out=1)
    first = entry(combine, some(), outputs, 0)
    assert entry(combine, some(), outputs, 0) is first
    others = [
        entry(combine, some(b=1), outputs, 0),
        entry(combine, some(parts=2), outputs, 0),
        entry(combine, some(), Outputs(1, 1), 0),
        entry(combine, some(), outputs, 1),
    ]
    assert len({id(other) for other in [first, *others]}) == 5
    assert all(other.fn.__name__ == "combine" for other in others)
    assert len({other.fn.__code__.co_filename for other in [first, *others]}) == 5


def test_an_entry_depends_on_all_that_its_kernel_calls():
    """What Triton caches code by changes with the source of a function far below."""
    name = "jax_causal_conv.kernels.dense.dense_kernel"
    inputs = dense.DenseInputs(*[1] * len(dense.DenseInputs._fields))
    key = entry(FUNCTIONS[name], inputs, dense.DenseOutputs((1,)), 0).cache_key
    changed = _with_another_sigmoid(FUNCTIONS[name], {})
    assert entry(changed, inputs, dense.DenseOutputs((1,)), 0).cache_key != key
    same = _with_another_sigmoid(FUNCTIONS[name], {}, "", "")
    assert entry(same, inputs, dense.DenseOutputs((1,)), 0).cache_key == key


def _with_another_sigmoid(function, done, old="_reciprocal(1.0", new="_reciprocal(1"):
    """A copy of a Triton function and of all that it calls; `sigmoid` is edited."""
    if function not in done:
        fn = function.fn
        scope = dict(fn.__globals__)
        for name in fn.__code__.co_names:
            if isinstance(scope.get(name), JITFunction):
                scope[name] = _with_another_sigmoid(scope[name], done, old, new)
        copy = type(fn)(fn.__code__, scope, fn.__name__, fn.__defaults__)
        copy.__annotations__ = fn.__annotations__
        copy.__module__ = fn.__module__
        jitted = triton.jit(copy)
        if fn.__name__ == "sigmoid":
            assert old in jitted.src
            jitted._unsafe_update_src(jitted.src.replace(old, new))
        done[function] = jitted
    return done[function]


def test_leaves_positions_and_replacement():
    inputs = some(b=None, parts=2)
    assert [type(leaf) for leaf in leaves(inputs)] == [np.ndarray] * 3 + [int]
    assert position(inputs, "scale") == 3 and position(inputs, "parts") == 1
    assert len(arrays(inputs)) == 3
    assert replaced(inputs, "xyz") == Inputs("x", None, ("y", "z"), 10)


@pytest.mark.parametrize("b, want", [(None, 60.0), (4.0, 68.0)])
def test_a_launch_in_the_interpreter(b, want):
    given = some(None if b is None else np.full(8, b, np.float32), parts=2)
    out = jax.ShapeDtypeStruct((8,), jnp.float32)
    launch = Launch(combine, given, Outputs(out), 1, 1, Facts(8, "twice"))
    outputs = Outputs(np.zeros(8, np.float32))
    interpreter.run(launch, given, outputs)
    np.testing.assert_array_equal(outputs.out, want)
    np.testing.assert_array_equal(given.parts[1], want + 1)


def test_launches_of_one_op_follow_each_other():
    seen = []

    def launches():
        first = yield "first"
        second = yield first[0] + " then second"
        return *first, *second

    def call(launch):
        seen.append(launch)
        return (f"result of {launch}",)

    results = record.run(launches(), call)
    assert seen == ["first", "result of first then second"]
    assert results == ("result of first", f"result of {seen[1]}")


def test_an_error_of_a_launch_is_not_the_end_of_the_launches():
    def launches():
        yield None
        return ()

    def call(_):
        raise StopIteration("the caller's own")

    with pytest.raises(StopIteration, match="the caller's own"):
        record.run(launches(), call)
