"""`halo_state`: the dense op with its time axis sharded over devices.

The sharded op runs on eight CPU devices, in a child process. On small integers, where
sums are exact in any order, it must equal the op on one device bit for bit; otherwise
it must be as near to the float64 reference, in values and gradients, as that op.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_causal_conv import causal_conv1d, halo_state
from tests.support import checks, eight_devices, quick
from tests.support.draws import draw_dense
from tests.support.gpu_compiler import CompiledProgram
from tests.support.gradients import assert_gradient, expected_gradients

CHECKS = eight_devices.Checks()
TIME = {"time": 8}
BOTH = {"batch": 2, "time": 4}
WIDTH = 4
SIZES = {"num_rows": 2, "num_tokens": 8 * (WIDTH - 1), "channels": 6, "width": WIDTH}


def draw_rows(seed=0, *, ids=None, **changes):
    """By default each device holds as few tokens as it may: W-1."""
    case = draw_dense(seed, **(SIZES | {"state_len": None} | changes))
    rows = len(case.arrays["x"])
    return case if ids is None else case.replace(segment_ids=np.tile(ids, (rows, 1)))


def documents(*lengths, first=0):
    """Ids of documents of these lengths; a negative length is padding."""
    return np.concatenate(
        [
            np.full(abs(length), first + i if length > 0 else -1, np.int32)
            for i, length in enumerate(lengths)
        ]
    )


@functools.cache
def make_mesh(kind="Auto", **sizes):
    kinds = (getattr(AxisType, kind),) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


@functools.cache
def sharded(mesh, activation="silu", dilation=1, residual=False):
    """(x, weight, bias, initial_state, segment_ids) -> out, jitted."""
    batch = "batch" if "batch" in mesh.axis_names else None
    rows = P(batch, "time")

    def part(x, weight, bias, initial_state, segment_ids):
        before = halo_state(
            x,
            "time",
            (weight.shape[1] - 1) * dilation,
            segment_ids=segment_ids,
            initial_state=initial_state,
        )
        return causal_conv1d(
            x,
            weight,
            bias,
            initial_state=before,
            segment_ids=segment_ids,
            activation=activation,
            dilation=dilation,
            residual=residual,
        )

    specs = (rows, P(), P(), P(batch), rows)
    mapped = jax.shard_map(part, mesh=mesh, in_specs=specs, out_specs=rows)
    jitted = quick.jit(mapped)

    def run(*args):
        placed = [
            None if a is None else jax.device_put(a, NamedSharding(mesh, spec))
            for a, spec in zip(args, specs, strict=True)
        ]
        return jitted(*placed)

    run.mapped, run.specs = mapped, specs
    return run


@functools.partial(quick.jit, static_argnames=("dilation", "residual"))
def unsharded(x, weight, bias, initial_state, segment_ids, **options):
    return causal_conv1d(
        x, weight, bias, initial_state=initial_state, segment_ids=segment_ids, **options
    )


ORDER = ("x", "weight", "bias", "initial_state", "segment_ids")


def arguments(case):
    return tuple(case.arrays[name] for name in ORDER)


def assert_equal_to_one_device(mesh, case):
    """Of integers without activation; and as exact as the op of the case itself."""
    rounded = {
        name: np.round(4 * array)
        for name, array in case.arrays.items()
        if array is not None and array.dtype.kind == "f"
    }
    whole = case.replace(**rounded)
    activation = case.options["activation"]
    options = {name: case.options[name] for name in ("dilation", "residual")}
    got = sharded(mesh, None, **options)(*arguments(whole))
    want = unsharded(*arguments(whole), **options)
    checks.assert_same_bits(*map(np.asarray, (got, want)), whole)

    out = np.asarray(sharded(mesh, activation, **options)(*arguments(case)))
    exact, _, magnitude = checks.expected(case)
    checks.assert_output(
        out,
        exact,
        magnitude,
        case.shape.width,
        activation,
        case,
        options["residual"],
    )


# Time is 24, a device's part 3: edges are at 3, 6, 9, …
PATTERNS = {
    "one document": documents(24),
    "edges at edges": documents(3, 6, 3, 9, 3),
    "one before edges": documents(2, 3, 3, 9, 7),
    "one behind edges": documents(4, 3, 6, 11),
    "three parts": documents(1, 11, 12),
    "single tokens": documents(*[1] * 24),
    "padding at edges": documents(3, -3, 6, -1, 5, -6),
    "padding on both sides": documents(2, -2, 7, -8, 5),
    "padding alone": documents(-24),
    "padding before the first": documents(-3, 21),
    "one id around others": np.tile(np.array([5, 5, 5, 2], np.int32), 6),
    "one id on both sides of an edge": documents(3, first=7).tolist()
    + documents(3, 18, first=7).tolist(),
}


@CHECKS.over(PATTERNS)
def documents_may_begin_and_end_anywhere(name):
    case = draw_rows(1, ids=np.asarray(PATTERNS[name], np.int32))
    assert_equal_to_one_device(make_mesh(**TIME), case)


@CHECKS.over((3, 5))
def random_documents_and_a_state(state_len):
    for seed in range(25):
        case = draw_rows(seed, state_len=state_len)
        assert_equal_to_one_device(make_mesh(**TIME), case)


@CHECKS.over(("Auto", "Explicit"), (True, False))
def rows_may_be_sharded_as_well(kind, segments):
    mesh, sizes = make_mesh(kind, **BOTH), {"num_rows": 4, "num_tokens": 28}
    for seed in range(3):
        case = draw_rows([2, seed], segment_ids=segments, state_len=4, **sizes)
        assert_equal_to_one_device(mesh, case)


@CHECKS.over((1, 2, 7))
def any_width(width):
    case = draw_rows(width, width=width, num_tokens=8 * max(width - 1, 1))
    assert_equal_to_one_device(make_mesh(**TIME), case)


@CHECKS.over((2, 3))
def taps_apart(dilation):
    reach = (WIDTH - 1) * dilation
    case = draw_rows(
        dilation,
        dilation=dilation,
        residual=True,
        num_tokens=8 * reach,
        state_len=reach + 1,
        ids=np.repeat(documents(3, 6, -2, 9, 4), dilation),
    )
    assert_equal_to_one_device(make_mesh(**TIME), case)


@CHECKS.over(((), ("initial_state",)))
def halves_are_received_in_their_own_dtype(given):
    half = np.dtype("float16")
    case = draw_rows(3, x_dtype=half, state_dtype=np.dtype("float32"), state_len=3)
    if not given:
        case = case.replace(initial_state=None)
    assert_equal_to_one_device(make_mesh(**TIME), case)
    mesh = make_mesh(**TIME)

    def state(x, initial_state=None):
        return halo_state(x, "time", 2, initial_state=initial_state)

    arrays = [case.arrays[name] for name in ("x", *given)]
    specs = (P(None, "time"), P())[: len(arrays)]
    mapped = jax.shard_map(state, mesh=mesh, in_specs=specs, out_specs=P(None, "time"))
    got = mapped(*arrays)
    assert got.dtype == ("float32" if given else "float16")
    assert got.shape == (2, 8 * 2, 6)


@functools.cache
def gradients(mesh, activation):
    """(floats, segment_ids, cotangent) -> gradients by name, jitted."""
    run = sharded(mesh, activation)

    def pull(floats, segment_ids, cotangent):
        def of(floats):
            return run.mapped(*(floats.get(name) for name in ORDER[:4]), segment_ids)

        return jax.vjp(of, floats)[1](cotangent)[0]

    return quick.jit(pull)


@CHECKS.over((None, 5), ("TIME", "BOTH"))
def gradients_are_those_of_one_device(state_len, sizes):
    mesh = make_mesh(**{"TIME": TIME, "BOTH": BOTH}[sizes])
    case = draw_rows(4, ids=documents(3, 2, -2, 8, 6, 3), state_len=state_len)
    floats = {name: case.arrays[name] for name in ORDER[:4]}
    floats = {name: array for name, array in floats.items() if array is not None}
    rng = np.random.default_rng(5)
    for ids in PATTERNS.values():
        changed = case.replace(segment_ids=np.tile(np.int32(ids), (2, 1)))
        cotangent = rng.standard_normal(floats["x"].shape).astype(np.float32)
        pull = gradients(mesh, case.options["activation"])
        got = pull(floats, changed.arrays["segment_ids"], cotangent)
        want = expected_gradients(changed, cotangent)
        for name, gradient in got.items():
            assert_gradient(np.asarray(gradient), *want[name], name, changed)


@CHECKS.over(((3, 21), (4, 20), (2, 22), (3, -6, 15), (-7, 17)))
def nan_in_another_document_reaches_nothing(lengths):
    """NaN in all tokens left of the last document, and in no cotangent."""
    mesh, case = make_mesh(**TIME), draw_rows(6, ids=documents(*lengths))
    last = 24 - lengths[-1]
    clean_x, ids = case.arrays["x"], case.arrays["segment_ids"]
    bad_x = clean_x.copy()
    bad_x[:, :last] = np.nan
    activation = case.options["activation"]
    cotangent = np.zeros_like(clean_x)
    cotangent[:, last:] = 1
    filters = {name: case.arrays[name] for name in ("weight", "bias")}
    results = []
    for x in (clean_x, bad_x):
        out = sharded(mesh, activation)(*arguments(case.replace(x=x)))
        pull = gradients(mesh, activation)
        results.append((np.asarray(out), pull({"x": x} | filters, ids, cotangent)))
    (clean, clean_grads), (out, grads) = results
    checks.assert_same_bits(out[:, last:], clean[:, last:])
    dx, clean_dx = np.asarray(grads["x"]), np.asarray(clean_grads["x"])
    checks.assert_same_bits(dx[:, last:], clean_dx[:, last:])
    assert not clean_dx[:, :last].any()
    if all(length < 0 for length in lengths[:-1]):  # padding: nobody multiplies it
        for name in ("x", "weight", "bias"):
            got, want = np.asarray(grads[name]), np.asarray(clean_grads[name])
            checks.assert_same_bits(got, want, name)


@CHECKS.over((True, False))
def only_the_last_rows_cross_devices_to_the_right(segments):
    mesh, case = make_mesh(**TIME), draw_rows(7, segment_ids=segments)
    run = sharded(mesh)
    x, weight, bias, _, ids = arguments(case)

    def both(x, ids, cotangent):
        out, pullback = jax.vjp(lambda x: run.mapped(x, weight, bias, None, ids), x)
        return out, pullback(cotangent)

    time = NamedSharding(mesh, P(None, "time"))
    args = [None if a is None else jax.device_put(a, time) for a in (x, ids, x)]
    compiled = jax.jit(both).lower(*args).compile()
    sent = CompiledProgram(compiled.as_text(), 0, 0, 1, 0, 0).collectives()
    opcodes = [i.opcode for i in sent]
    report = [i.text[:200] for i in sent]
    assert set(opcodes) == {"collective-permute"}, report
    assert len(opcodes) <= 2 + segments, report  # the halo, its ids, its cotangent
    rows = 4 * 2 * (WIDTH - 1)
    assert {size for i in sent for size in i.sizes} <= {rows, rows * 6}, report


@CHECKS.over()
def wrong_arguments_are_named():
    mesh = make_mesh(**TIME)
    x = np.zeros((2, 24, 6), np.float32)

    def call(x, axis="time", count=3, **given):
        mapped = jax.shard_map(
            lambda x: halo_state(x, axis, count, **given),
            mesh=mesh,
            in_specs=P(None, "time"),
            out_specs=P(None, "time"),
        )
        return jax.eval_shape(mapped, x)

    assert call(x).shape == (2, 8 * 3, 6)
    assert call(x, count=0).shape == (2, 0, 6)
    for error, words, arguments in (
        (ValueError, "at least state_len = 4 tokens .* got 3", {"count": 4}),
        (ValueError, "state_len must be at least 0, got -1", {"count": -1}),
        (TypeError, "state_len must be a static int", {"count": 3.0}),
        (
            ValueError,
            r"segment_ids must have shape",
            {"segment_ids": np.zeros((2, 4), int)},
        ),
        (
            TypeError,
            "segment_ids must have an integer",
            {"segment_ids": np.zeros((2, 3))},
        ),
        (
            ValueError,
            "initial_state must .* state_len = 3",
            {"initial_state": np.zeros((2, 2, 6), "f")},
        ),
        (ValueError, "initial_state must", {"initial_state": np.zeros((2, 3, 5), "f")}),
        (TypeError, "initial_state must", {"initial_state": np.zeros((2, 3, 6), int)}),
    ):
        with pytest.raises(error, match=words):
            call(x, **arguments)
    with pytest.raises(ValueError, match=r"x must have shape"):
        call(x[..., 0])
    with pytest.raises(TypeError, match="x must be one of"):
        call(x.astype(np.int32))
    with pytest.raises(NameError, match="nowhere"):
        call(x, axis="nowhere")


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(on_eight_devices, name):
    on_eight_devices(name)
