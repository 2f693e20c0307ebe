"""The recipes of docs/recipes.md against a plain NumPy statement of each block."""

import re

import jax
import numpy as np
import pytest

from tests.support import REPOSITORY

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOKENS = 9


@pytest.fixture(scope="module")
def recipes():
    text = (REPOSITORY / "docs" / "recipes.md").read_text()
    scope: dict = {}
    for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S):
        exec(compile(block, "recipes.md", "exec"), scope)
    return scope


@pytest.fixture
def draw():
    rng = np.random.default_rng(0)
    return lambda *shape: rng.standard_normal(shape).astype(np.float32)


def conv(x, weight, bias=0.0, dilation=1):
    """What PyTorch's depthwise Conv1d gives, padded on the left alone."""
    out = np.zeros(x.shape) + bias
    for t in range(x.shape[1]):
        for k in range(weight.shape[1]):
            back = (weight.shape[1] - 1 - k) * dilation
            if t >= back:
                out[:, t] += weight[:, k] * x[:, t - back].astype(np.float64)
    return out


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def close(got, want):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_qwen3_next(recipes, draw):
    qkv, weight = draw(2, TOKENS, 14), draw(14, 4)
    got = recipes["qwen3_next"](qkv, weight, 4, 6)
    y = silu(conv(qkv, weight))
    close(got, (y[..., :4], y[..., 4:8], y[..., 8:]))


def test_stacked(recipes, draw):
    x = draw(2, TOKENS, 5)
    projections, filters = (
        [draw(5, n) for n in (3, 3, 6)],
        [draw(n, 4) for n in (3, 3, 6)],
    )
    got = recipes["stacked"](x, projections, filters)
    close(
        got, [silu(conv(x @ p, w)) for p, w in zip(projections, filters, strict=True)]
    )


def test_mamba1(recipes, draw):
    xz, weight, bias = draw(2, TOKENS, 12), draw(6, 4), draw(6)
    got = recipes["mamba1"](xz, weight, bias)
    close(got, (silu(conv(xz[..., :6], weight, bias)), xz[..., 6:]))


def test_recurrent_gemma(recipes, draw):
    x, y, weight, bias = draw(2, TOKENS, 6), draw(2, TOKENS, 6), draw(6, 4), draw(6)
    got = recipes["recurrent_gemma"](x, y, weight, bias, lambda h: h.cumsum(1))
    close(got, conv(x, weight, bias).cumsum(1) * gelu(y))


def test_canon_and_inkling(recipes, draw):
    x, weight = draw(2, TOKENS, 6), draw(6, 4)
    close(recipes["canon"](x, weight), x + conv(x, weight))


def test_dilated(recipes, draw):
    x, weight = draw(2, TOKENS, 6), draw(6, 4)
    close(recipes["dilated"](x, weight), silu(conv(x, weight, dilation=3)))


def test_zaya1(recipes, draw):
    heads, size = 3, 4
    dim = heads * size
    qk, depthwise, bias = draw(2, TOKENS, dim), draw(dim, 2), draw(dim)
    grouped, group_bias = draw(heads, size, size, 2), draw(dim)
    got = jax.jit(recipes["zaya1"])(qk, depthwise, bias, grouped, group_bias)
    # As published: zeros in front of the first conv are all that either one pads.
    padded = np.concatenate([np.zeros((2, 2, dim)), qk], axis=1)
    x = padded[:, :-1] * depthwise[:, 0] + padded[:, 1:] * depthwise[:, 1] + bias
    assert x.shape == (2, TOKENS + 1, dim)
    want = np.zeros(qk.shape) + group_bias
    for h in range(heads):
        own = slice(h * size, (h + 1) * size)
        want[..., own] += x[:, 1:, own] @ grouped[h, :, :, 1].T
        want[..., own] += x[:, :-1, own] @ grouped[h, :, :, 0].T
    close(got, want)
