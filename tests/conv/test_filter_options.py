"""Dilation, residual and activations: what they mean, in every op and together."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal_conv import (
    build_metadata,
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
    checks,
)
from jax_causal_conv.xla.activations import ACTIVATIONS
from tests.support import cases, reference
from tests.support import checks as compare
from tests.support.cases import FLOATS
from tests.support.draws import draw_dense, draw_packed, draw_update, ints
from tests.support.gradients import (
    EACH_OP,
    check_gradients,
    function,
    loss_of,
    one_of_each_op,
    split,
    stack,
)
from tests.support.platforms import HAS_TRITON, exported, needs_triton

IMPLEMENTATIONS = [
    None,
    "xla",
    pytest.param(
        "interpret", marks=pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
    ),
]
each_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
NAMES = [name for name in ACTIVATIONS if name is not None]
OPTIONS = [
    {"dilation": 3, "residual": True, "activation": "gelu"},
    {"dilation": 2, "residual": False, "activation": "tanh"},
    {"dilation": 1, "residual": True, "activation": "sigmoid"},
    {"dilation": 5, "residual": True, "activation": "relu"},
]
each_option = pytest.mark.parametrize(
    "options", OPTIONS, ids=lambda o: f"{o['activation']}-{o['dilation']}"
)


def one_case_of(number, seed, options, **changes):
    reach = 3 * options["dilation"]
    return one_of_each_op(seed, state_len=reach + 2, **options, **changes)[number]


@pytest.mark.parametrize("implementation", [None, IMPLEMENTATIONS[-1]])
@each_option
@EACH_OP
def test_outputs_states_and_gradients(implementation, options, number):
    case = one_case_of(number, 1, options)
    compare.check(case, implementation)
    check_gradients(case, implementation)


@pytest.mark.parametrize("option", range(len(OPTIONS)))
@pytest.mark.parametrize("half", range(2))
def test_outputs_states_and_xlas_own_gradients(option, half):
    """These know no options: two ops for each will do."""
    case = one_case_of(2 * half + option % 2, 1, OPTIONS[option])
    compare.check(case, "xla")
    check_gradients(case, "xla")


@pytest.mark.forward_only  # derivatives of "xla" round each path into a ring
@each_implementation
@pytest.mark.parametrize("dtype", FLOATS[1:], ids=str)
@EACH_OP
def test_narrow_inputs_are_rounded_once(implementation, dtype, number):
    """Had act(conv) been rounded before x is added, large outputs would be far off."""
    case = one_case_of(number, 2, OPTIONS[0], x_dtype=dtype, state_dtype=dtype)
    compare.check(case, implementation)
    if implementation != "xla":
        check_gradients(case, implementation)


@each_implementation
def test_fewer_tokens_than_the_dilation(implementation):
    options = {"dilation": 7, "residual": True, "width": 3, "state_len": 15}
    compare.check(draw_dense(3, num_tokens=5, **options), implementation)
    check_gradients(draw_dense(3, num_tokens=5, **options), implementation)
    compare.check(draw_update(3, num_queries=None, **options), implementation)
    packed = draw_packed(3, num_tokens=9, **options)
    compare.check(packed, implementation)
    check_gradients(packed, implementation)


@pytest.mark.forward_only
@each_implementation
def test_a_filter_of_one_tap_has_no_dilation(implementation):
    case = draw_packed(4, width=1, state_len=2, dilation=9, residual=True)
    compare.check(case, implementation)


@each_implementation
def test_chunks_of_a_long_sequence(implementation):
    """Several chunks, each of which meets all phases, at the least block_m."""
    for block_m in (6, 7, None):
        sizes = {"num_tokens": 47, "num_seqs": 2, "state_len": 6, "dilation": 2}
        case = draw_packed(5, channels=5, block_m=block_m, **sizes)
        case = case.replace(query_start_loc=ints(1, 44, 46), cache_indices=ints(4, 1))
        compare.check(case, implementation)
        check_gradients(case, implementation)


@pytest.mark.forward_only
@each_implementation
def test_tokens_between_the_taps_are_never_met(implementation):
    case = draw_dense(
        6, num_tokens=20, dilation=2, state_len=None, segment_ids=False, residual=True
    )
    x = case.arrays["x"].copy()
    x[:, 1::2] = np.nan
    clean, _, magnitude = compare.expected(case)
    out = compare.call(case.replace(x=x), implementation, final=False)
    compare.assert_output(
        out[:, ::2], clean[:, ::2], magnitude[:, ::2], 4, "silu", case, True
    )
    assert np.isnan(out[:, 1::2]).all()


@each_implementation
def test_equal_ids_around_other_ids_are_different_runs(implementation):
    """A dilated tap may land in an earlier run of the same id: it is not seen."""
    ids = np.array([[0, 0, 0, 1, 0, 0, 0, -1, 0, 0, 1, 1, 0, 0, 0, 0]], np.int32)
    sizes = {"num_rows": 1, "num_tokens": ids.size, "width": 3, "state_len": 4}
    case = draw_dense(
        7, dilation=2, residual=True, **sizes, arrays={"segment_ids": ids}
    )
    compare.check(case, implementation)
    check_gradients(case, implementation)


# Activations.

SIZES = [0, 1e-30, 1e-6, 1e-3, 0.1, 0.5, 0.599, 0.601, 0.77, 1, 3, 5, 9, 15.9, 16.1]
SIZES += [17, 30, 60, 87, 89, 104, 1e3, 1e6, 1e13, 1e20, 3e38]
EXTREMES = np.array([SIZES, np.negative(SIZES)], np.float32).ravel()


@functools.partial(jax.jit, static_argnames=("name", "implementation"))
def activated(z, name, implementation):
    weight = jnp.ones((z.size, 1), z.dtype)

    def run(z):
        return causal_conv1d(
            z[None, None], weight, activation=name, implementation=implementation
        )[0, 0]

    out, pull_back = jax.vjp(run, z)
    return out, pull_back(jnp.ones_like(z))[0]


@each_implementation
@pytest.mark.parametrize("name", NAMES)
def test_activations_and_their_slopes_at_extremes(implementation, name):
    known = reference.ACTIVATIONS[name]
    out, slope = map(np.asarray, activated(EXTREMES, name, implementation))
    assert np.isfinite(out).all() and np.isfinite(slope).all()
    z = EXTREMES.astype(np.float64)
    with np.errstate(all="ignore"):
        want, want_slope = known.of(z), known.slope(z)
    near = abs(z) < 80
    np.testing.assert_allclose(out[near], want[near], rtol=6e-6, atol=1e-20)
    np.testing.assert_allclose(out, want, rtol=1e-5, atol=2e-30)
    # XLA's own derivatives take 1 - sigmoid, where nothing is left of large z.
    exact = implementation is None or implementation == "interpret"
    exact = exact and name != "silu"
    want_slope = np.where(np.isfinite(want_slope), want_slope, z > 0)
    atol = 1e-20 if exact else 3e-6
    np.testing.assert_allclose(slope[near], want_slope[near], rtol=8e-6, atol=atol)
    np.testing.assert_allclose(slope, want_slope, rtol=1e-5, atol=3e-6)


@each_implementation
def test_relu_has_no_slope_at_zero_and_keeps_nan(implementation):
    out, slope = activated(jnp.array([0.0, -0.0, jnp.nan]), "relu", implementation)
    assert (slope[:2] == 0).all() and not np.signbit(out[:2]).any()
    assert np.isnan(out[2])


def test_every_name_is_known_everywhere():
    canonical = {checks.activation_name(name) for name in cases.ACTIVATIONS}
    assert canonical == set(ACTIVATIONS)
    z = jnp.linspace(-4, 4, 101)
    for name in NAMES:
        want = getattr(jax.nn, name)(z)
        np.testing.assert_allclose(ACTIVATIONS[name].of(z), want, atol=1e-6)


# How the options live with what else the ops do.


@pytest.mark.forward_only
@each_implementation
def test_the_residual_is_the_ops_own_columns(implementation):
    rng = np.random.default_rng(8)
    wide = rng.standard_normal((2, 9, 23), np.float32)
    weight = rng.standard_normal((12, 3), np.float32)
    static = {"dilation": 2, "residual": True, "implementation": implementation}
    parts = causal_conv1d(wide, weight, channel_offset=5, split=(4, 8), **static)
    whole = causal_conv1d(wide[..., 5:17], weight, **static)
    np.testing.assert_array_equal(np.concatenate(parts, axis=-1), whole)


def test_decoding_continues_where_the_dense_op_ended():
    rng = np.random.default_rng(9)
    x = rng.standard_normal((2, 17, 6), np.float32)
    weight = rng.standard_normal((6, 4), np.float32)
    static = {"dilation": 3, "residual": True, "activation": "tanh"}
    want = causal_conv1d(x, weight, **static)
    out, state = causal_conv1d(x[:, :5], weight, return_final_state=True, **static)
    assert state.shape == (2, 9, 6)
    got = [out]
    for first, last in ((5, 6), (6, 10), (10, 17)):
        out, state = causal_conv1d_update(x[:, first:last], state, weight, **static)
        got.append(out)
    np.testing.assert_array_equal(np.concatenate(got, axis=1), want)


@EACH_OP
def test_under_vmap(number):
    drawn = [one_case_of(number, seed, OPTIONS[0]) for seed in (10, 11)]
    floats, rest = zip(*map(split, drawn), strict=True)
    run = function(drawn[0], None)
    got = jax.vmap(run)(stack(floats), stack(rest))
    for i in range(len(drawn)):
        want = run(floats[i], rest[i])
        for one, other in zip(got, want, strict=True):
            np.testing.assert_allclose(one[i], other, rtol=1e-6, atol=1e-6)


@needs_triton
@EACH_OP
def test_kernels_compile_and_are_exported(number):
    pytest.importorskip("flatbuffers")
    case = one_case_of(number, 12, OPTIONS[0])
    floats, rest = split(case)
    run = function(case, None)
    program = jax.export.deserialize(exported(run, floats, rest).serialize())
    for got, want in zip(program.call(floats, rest), run(floats, rest), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    cotangents = [np.ones(o.shape, o.dtype) for o in run(floats, rest)]
    gradient = jax.grad(loss_of(case, "triton"))
    exported(gradient, floats, rest, cotangents, platforms=("cuda",))


def test_chunks_must_be_as_long_as_the_filter_reaches():
    case = draw_packed(13, dilation=3, state_len=9, num_tokens=24)
    arrays = dict(case.arrays)
    for block_m in (8, 9):
        arrays["metadata"] = build_metadata(
            arrays["query_start_loc"], 24, block_m=block_m
        )
        call = functools.partial(causal_conv1d_fn, **arrays, dilation=3)
        if block_m == 9:
            call()
        else:
            with pytest.raises(ValueError, match=r"block_m .* \(W-1\) \* dilation = 9"):
                call()
