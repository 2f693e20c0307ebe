"""Functions of the SSD's kernels that results alone would not show to be right."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from jax_causal_conv.kernels import interpreter
from jax_causal_conv.kernels.record import Launch
from jax_causal_conv.kernels.ssd_device import power, to_tf32

COUNT = 64


class Inputs(NamedTuple):
    values: Any


class Outputs(NamedTuple):
    results: Any


@dataclasses.dataclass(frozen=True)
class Constants:
    FAST: bool = True


@triton.jit
def tf32_kernel(inputs, outputs, C: tl.constexpr):
    at = tl.arange(0, 64)
    tl.store(outputs.results + at, to_tf32(tl.load(inputs.values + at)))


@triton.jit
def power_kernel(inputs, outputs, C: tl.constexpr):
    at = tl.arange(0, 64)
    tl.store(outputs.results + at, power(tl.load(inputs.values + at), 0.0))


def run(kernel, values):
    """The kernel's results for at most COUNT values."""
    inputs = Inputs(np.resize(np.float32(values), COUNT))
    outputs = Outputs(np.full(COUNT, np.nan, np.float32))
    interpreter.run(Launch(kernel, inputs, outputs, 1, 4, Constants()), inputs, outputs)
    return outputs.results[: len(values)]


def test_what_is_rounded_to_tf32_keeps_eleven_bits():
    values = np.random.default_rng(0).standard_normal(COUNT).astype(np.float32)
    rounded = run(tf32_kernel, values)
    assert not (rounded.view(np.uint32) & 0x1FFF).any()
    np.testing.assert_allclose(rounded, values, rtol=2.0**-11)


def test_rounding_to_tf32_keeps_every_nan_and_infinity():
    """A GPU's own NaN has all bits set: to round it up would make it a zero."""
    nans = np.uint32([0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7FC00000]).view(np.float32)
    assert np.isnan(run(tf32_kernel, nans)).all()
    infinite = [np.inf, -np.inf]
    assert run(tf32_kernel, infinite).tolist() == infinite


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0, 120.0])
def test_powers_of_two_are_right_to_a_unit_in_the_last_place(scale):
    values = -np.random.default_rng(1).uniform(0, scale, COUNT).astype(np.float32)
    want = np.exp2(values.astype(np.float64))
    np.testing.assert_allclose(run(power_kernel, values), want, rtol=1.0e-7)


def test_powers_of_two_beyond_all_bounds():
    values = [0.0, -1e3, -1e30, -np.inf, np.inf, 1e30, np.nan]
    want = [1.0, 0.0, 0.0, 0.0, np.inf, np.inf, np.nan]
    np.testing.assert_array_equal(run(power_kernel, values), np.float32(want))
