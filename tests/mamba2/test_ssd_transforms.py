"""The state-space-duality op against the recurrence, token by token in float64."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_causal_conv.mamba2.ssd import ssd, ssd_packed
from tests.support import checks
from tests.support import ssd_reference as reference

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SIZES = {"heads": 6, "dim": 5, "groups": 3, "size": 7}  # H, P, G, K
STATIC = {
    ssd: ("chunk_size", "return_final_state"),
    ssd_packed: ("chunk_size", "max_prefills", "pad_slot_id"),
}
FLOATS = ("x", "dt", "A", "B", "C", "D")
MALFORMED = (-(2**31), -7, 0, 3, 11, 19, 5, 2**31 - 1)


@functools.cache
def jitted_ssd(function):
    return jax.jit(function, static_argnames=STATIC[function])


def parameters(rng, *lead, heads, dim, groups, size, dtype=np.float32):
    def normal(*shape):
        return rng.standard_normal(shape).astype(dtype)

    return {
        "x": normal(*lead, heads, dim),
        "dt": rng.uniform(0.001, 0.5, (*lead, heads)).astype(np.float32),
        "A": -rng.uniform(0.5, 16, heads).astype(np.float32),
        "B": normal(*lead, groups, size),
        "C": normal(*lead, groups, size),
        "D": rng.standard_normal(heads).astype(np.float32),
    }


def state_shape(heads, dim, groups, size):
    del groups
    return heads, dim, size


def draw_batch(
    seed, tokens=40, seqs=7, slots=9, dtype=np.float32, state=np.float32, **sizes
):
    """A packed batch: decodes, prefills, empty and skipped ones, gaps at both ends."""
    rng, sizes = np.random.default_rng(seed), SIZES | sizes
    weight = rng.choice([0, 1, 1, 2, 9, 17], seqs + 2)
    ends = np.cumsum(weight) * min(1, tokens / max(1, weight.sum()))
    offsets = ends.astype(np.int32)[:-1]
    if seed % 5 == 4:  # nonsense
        offsets = rng.choice(MALFORMED, seqs + 1).astype(np.int32)
    indices = rng.permutation(max(slots, seqs))[:seqs]  # some are out of range
    indices = np.where(rng.random(seqs) < 0.15, -1, indices).astype(np.int32)
    states = rng.standard_normal((slots, *state_shape(**sizes))).astype(state)
    return parameters(rng, tokens, **sizes, dtype=dtype) | {
        "ssm_states": states,
        "query_start_loc": offsets,
        "cache_indices": indices,
        "has_initial_state": rng.random(seqs) < 0.6,
    }


def draw_rows(seed, batch=2, tokens=23, dtype=np.float32, state=np.float32, **sizes):
    """Rows of several documents and padding, with initial states."""
    rng, sizes = np.random.default_rng(seed), SIZES | sizes
    ids = rng.integers(-1, 3, (batch, tokens))
    ids = np.take_along_axis(ids, np.sort(rng.integers(0, 6, ids.shape), 1), 1)
    states = rng.standard_normal((batch, *state_shape(**sizes))).astype(state)
    return parameters(rng, batch, tokens, **sizes, dtype=dtype) | {
        "initial_state": states,
        "segment_ids": ids.astype(np.int32),
    }


def run(arrays, **options):
    return checks.to_host(jitted_ssd(ssd_packed)(**arrays, **options))


def run_dense(arrays, **options):
    return checks.to_host(jitted_ssd(ssd)(**arrays, return_final_state=True, **options))


def sizes_of(arrays):
    """The arguments that make the reference sum up the size of every term."""
    sized = ("x", "B", "C", "D", "ssm_states", "initial_state")
    return {
        name: abs(array) if name in sized and array is not None else array
        for name, array in arrays.items()
    }


def assert_close(got, exact, magnitude, what, terms=32):
    """One rounding to `got.dtype`, and sums in float32 of terms of `magnitude`."""
    assert got.shape == exact.shape, f"{what}: {got.shape}, expected {exact.shape}"
    wide = np.float64 if got.dtype == np.float64 else np.float32
    allowed = terms * np.finfo(wide).eps * magnitude
    allowed = allowed + checks.unit_in_last_place(exact, got.dtype) + 1e-37
    error = abs(got.astype(np.float64) - exact)
    allowed = np.where(magnitude == 0, 0, allowed)
    if got.size == 0:
        return
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), (
        f"{what}: {(~(error <= allowed)).sum()} of {error.size} are wrong; at {worst} "
        f"got {got[worst]!r}, expected {exact[worst]!r}, allowed {allowed[worst]!r}"
    )


def check_batch(arrays, result=None, terms=32, **options):
    """ssd_packed against the recurrence; unnamed slots bit for bit."""
    got, got_states = run(arrays, **options) if result is None else result
    options = {k: v for k, v in options.items() if k != "chunk_size"}
    y, states = reference.ssd_packed(**arrays, **options)
    size, state_size = reference.ssd_packed(**sizes_of(arrays), **options)
    assert got.dtype == arrays["x"].dtype
    assert got_states.dtype == arrays["ssm_states"].dtype
    assert_close(got, y, size, "y", terms)
    assert_close(got_states, states, state_size, "states", terms)
    old = arrays["ssm_states"]
    kept = (states == old.astype(np.float64)).all((1, 2, 3))
    checks.assert_same_bits(got_states[kept], old[kept])


def check_dense(arrays, terms=32, **options):
    got, got_state = run_dense(arrays, **options)
    y, state = reference.ssd(**arrays)
    size, state_size = reference.ssd(**sizes_of(arrays))
    assert got.dtype == arrays["x"].dtype
    assert_close(got, y, size, "y", terms)
    assert_close(got_state, state, state_size, "final state", terms)


# As many as there are sequences, or more: the batch is taken in another order.
SLOTS = pytest.mark.parametrize("slots", [7, 9])


@SLOTS
@pytest.mark.parametrize("chunk_size", [5, 64])
def test_mixed_batches_equal_the_recurrence(chunk_size, slots):
    for seed in range(20):
        check_batch(draw_batch(seed, slots=slots), chunk_size=chunk_size)


@pytest.mark.parametrize(
    ("dtype", "state"),
    [(BFLOAT16, BFLOAT16), (np.float16, np.float32)],
)
def test_narrow_inputs_and_states_are_rounded_once(dtype, state):
    for seed in range(10):
        check_batch(draw_batch(seed, dtype=dtype, state=state), chunk_size=6)


@pytest.mark.parametrize(
    "sizes",
    [
        {"heads": 3, "groups": 1, "dim": 1, "size": 3, "tokens": 13, "seqs": 20},
        {"heads": 1, "groups": 1, "dim": 3, "size": 1, "tokens": 1, "seqs": 3},
    ],
)
def test_shapes(sizes):
    for seed in range(6):
        check_batch(draw_batch(seed, **sizes), chunk_size=4)


def test_optional_arguments_may_be_left_out():
    for seed in (0, 1):
        arrays = draw_batch(seed)
        for name in ("cache_indices", "has_initial_state"):
            del arrays[name]
        check_batch(arrays | {"D": None}, chunk_size=8)


def test_pad_slot_id_names_a_slot_to_skip():
    arrays = draw_batch(2)
    live = np.diff(arrays["query_start_loc"]) > 0
    arrays["cache_indices"][np.flatnonzero(live)[1]] = 8
    check_batch(arrays, pad_slot_id=8)


@pytest.mark.parametrize("most", [0, 2])
def test_surplus_prefills_are_skipped(most):
    prefills = [
        sum(np.diff(draw_batch(seed)["query_start_loc"]) > 1) for seed in range(4)
    ]
    assert max(prefills) > 2, prefills
    for seed, slots in itertools.product(range(4), (7, 9)):
        check_batch(draw_batch(seed, slots=slots), max_prefills=most, chunk_size=5)


def test_without_prefills_there_is_no_work_for_chunks():
    def products(most):
        def step(arrays):
            return ssd_packed(**arrays, max_prefills=most, implementation="xla")

        return str(jax.make_jaxpr(step)(draw_batch(0))).count("dot_general")

    assert products(None) > 0
    assert products(0) == 0


@pytest.mark.parametrize("lengths", [[5, 5, 5], [15]])
def test_chunks_suffice_for_the_most_of_them(lengths):
    """Lengths that need all the chunks of 4 that 15 tokens get."""
    arrays = draw_batch(1, tokens=15, seqs=6, slots=6)
    ends = np.cumsum([0, *lengths, *[0] * (6 - len(lengths))]).astype(np.int32)
    arrays |= {"query_start_loc": ends, "cache_indices": np.arange(6, dtype=np.int32)}
    check_batch(arrays, chunk_size=4, max_prefills=len(lengths))


def test_any_split_into_steps_gives_the_same():
    rng, sizes = np.random.default_rng(0), SIZES
    for _ in range(8):
        data = parameters(rng, 30, **sizes)
        want, want_state = reference.recurrence(**data, state=np.zeros((6, 5, 7)))
        states = rng.standard_normal((4, 6, 5, 7)).astype(np.float32)
        got, begin = [], 0
        while begin < 30:
            end = min(30, begin + int(rng.choice([1, 1, 2, 5, 8])))
            # The same bucket for every step: 10 tokens, a stranger behind.
            rows = np.arange(begin, begin + 10) % 30
            step = {k: data[k] if k in "AD" else data[k][rows] for k in data}
            offsets = np.array([0, end - begin, 10], np.int32)
            y, states = run(
                step
                | {
                    "ssm_states": states,
                    "query_start_loc": offsets,
                    "cache_indices": np.array([2, 0], np.int32),
                    "has_initial_state": np.array([begin > 0, False]),
                },
                chunk_size=3,
            )
            got.append(y[: end - begin])
            begin = end
        sized, sized_state = reference.recurrence(
            **sizes_of(data), state=np.zeros((6, 5, 7))
        )
        assert_close(np.concatenate(got), want, sized, "y", 64)
        assert_close(states[2], want_state, sized_state, "state", 64)


@functools.cache
def gradient_of_the_seen():
    """Of the outputs, which are 0 where unseen, and the named slots."""

    def loss(floats, rest, named):
        y, states = ssd_packed(**floats, **rest, chunk_size=5)
        return y.sum() + jnp.where(named[:, None, None, None], states, 0).sum()

    return jax.jit(jax.grad(loss))


@SLOTS
def test_unnamed_slots_keep_their_bits_and_nobody_sees_them(slots):
    """Poison in all that the batch must not see: slots, tokens, foreign sequences."""
    num_slots = slots
    for seed, poison in enumerate((np.nan, np.inf, -np.inf, np.nan)):
        arrays = draw_batch(seed, slots=num_slots)
        offsets, slots = arrays["query_start_loc"], arrays["cache_indices"]
        live = (np.diff(offsets) > 0) & (slots >= 0) & (slots < num_slots)
        arrays["has_initial_state"][np.flatnonzero(live)[:2]] = [True, False]
        y, states = reference.ssd_packed(**arrays)
        seen, named = np.zeros(40, bool), np.zeros(num_slots, bool)
        for i in np.flatnonzero(live):
            seen[offsets[i] : offsets[i + 1]] = named[slots[i]] = True
        read = slots[live & arrays["has_initial_state"]]
        for name in ("x", "dt", "B", "C"):
            arrays[name][~seen] = poison
        old = arrays["ssm_states"]
        old[np.setdiff1d(np.arange(num_slots), read)] = poison
        assert 0 < seen.sum() < 40, "the case shows nothing"
        got, got_states = run(arrays, chunk_size=5)
        np.testing.assert_allclose(got, y, rtol=1e-4, atol=1e-5)
        assert (got[~seen] == 0).all()
        np.testing.assert_allclose(got_states[named], states[named], 1e-4, 1e-5)
        checks.assert_same_bits(got_states[~named], old[~named])

        floats = {name: arrays.pop(name) for name in (*FLOATS, "ssm_states")}
        grads = checks.to_host(gradient_of_the_seen()(floats, arrays, named))
        for name, grad in grads.items():
            assert np.isfinite(grad).all(), f"the gradient of {name}"
            assert grad.any(), f"the gradient of {name}"
            if name in ("x", "dt", "B", "C"):
                assert (grad[~seen] == 0).all(), f"the gradient of {name}"


@SLOTS
def test_two_sequences_in_one_slot_harm_nobody_else(slots):
    """None may be; then what becomes of these two is open."""
    arrays = draw_batch(3, slots=slots)
    arrays |= {
        "query_start_loc": np.array([0, 12, 14, 26, 27, 28, 28, 40], np.int32),
        "cache_indices": np.array([2, 2, 3, 0, 0, 4, 5], np.int32),
    }
    want, want_states = reference.ssd_packed(**arrays)
    other = np.r_[14:26, 28:40]

    def loss(x):
        y, states = ssd_packed(**(arrays | {"x": x}), chunk_size=2)
        return y[np.r_[0:14, 26:28]].sum() + states[np.r_[0, 2]].sum(), (y, states)

    grad, (y, states) = checks.to_host(jax.grad(loss, has_aux=True)(arrays["x"]))
    np.testing.assert_allclose(y[other], want[other], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(states[3:], want_states[3:], rtol=1e-4, atol=1e-5)
    assert (grad[other] == 0).all()
    arrays["x"][other] = np.nan
    y, states = run(arrays, chunk_size=2)
    assert np.isfinite(np.delete(y, other, axis=0)).all()
    assert np.isfinite(states[np.r_[0, 2]]).all()


@SLOTS
def test_nan_of_one_sequence_stays_in_it(slots):
    arrays = draw_batch(3, slots=slots)
    arrays |= {
        "query_start_loc": np.array([0, 10, 11, 23, 24, 30, 36, 40], np.int32),
        "cache_indices": np.arange(7, dtype=np.int32),
    }
    want, want_states = run(arrays, chunk_size=5)
    for begin, end, slot in ((11, 23, 2), (23, 24, 3)):
        x = arrays["x"].copy()
        x[begin] = np.nan
        got, states = run(arrays | {"x": x}, chunk_size=5)
        rest = np.r_[0:begin, end:40]
        np.testing.assert_array_equal(got[rest], want[rest])
        assert np.isnan(got[begin:end]).all()
        others = np.delete(np.arange(slots), slot)
        np.testing.assert_array_equal(states[others], want_states[others])
        assert np.isnan(states[slot]).all()


def cache_sized(compiled, shape):
    """The instructions of optimised HLO that copy or convert something of `shape`."""
    dims = ",".join(map(str, shape))
    pattern = rf"= \w+\[{dims}\]\S* (copy|convert|transpose|select|concatenate)\("
    return re.findall(pattern, compiled.as_text())


def donated_step(states, arrays, most):
    return ssd_packed(**(arrays | {"ssm_states": states}), max_prefills=most)


def donated_layers(states, arrays, most):
    def layer(states, x):
        y, states = donated_step(states, arrays | {"x": x}, most)
        return states, y

    return jax.lax.scan(layer, states, jnp.stack([arrays["x"]] * 3))


@pytest.mark.parametrize(
    ("function", "state", "most"),
    [
        (donated_step, np.float32, 3),
        (donated_step, np.float32, 0),
        (donated_layers, BFLOAT16, 3),
    ],
)
def test_donated_cache_is_updated_in_place(function, state, most):
    if state == BFLOAT16 and jax.__version_info__ < (0, 11):
        pytest.skip("before jax 0.11 XLA:CPU converts a bfloat16 cache to float32")
    arrays = draw_batch(6, slots=2003, state=state)
    states = arrays["ssm_states"]
    jit = jax.jit(function, donate_argnums=0, static_argnums=2)
    compiled = jit.lower(states, arrays, most).compile()
    assert cache_sized(compiled, states.shape) == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == states.nbytes
    assert memory.temp_size_in_bytes < states.nbytes / 2


def test_export_for_any_number_of_slots():
    arrays = draw_batch(2, slots=7)
    (slots,) = jax.export.symbolic_shape("S")
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), arrays)
    states = jax.ShapeDtypeStruct((slots, *state_shape(**SIZES)), np.float32)

    def step(arrays):
        return ssd_packed(**arrays, max_prefills=5)

    exported = jax.export.export(jax.jit(step))(shapes | {"ssm_states": states})
    for seed, number in ((2, 7), (3, 12)):
        arrays = draw_batch(seed, slots=number)
        check_batch(arrays, checks.to_host(exported.call(arrays)), max_prefills=5)


def test_cache_that_is_not_donated_is_copied():
    """That is: the pattern of the test before finds a copy."""
    arrays = draw_batch(6, slots=2003)
    jit = jax.jit(donated_step, static_argnums=2)
    compiled = jit.lower(arrays["ssm_states"], arrays, 0).compile()
    assert "copy" in cache_sized(compiled, arrays["ssm_states"].shape)


def slope_of(function, arrays, direction, weights):
    """Central difference of sum(weights * outputs) in float64 along a direction."""
    step, sums = 1e-5, []
    for sign in (1, -1):
        moved = {
            name: arrays[name].astype(np.float64) + sign * step * direction[name]
            for name in direction
        }
        outs = function(**(arrays | moved))
        sums.append(sum((w * o).sum() for w, o in zip(weights, outs, strict=True)))
    return (sums[0] - sums[1]) / (2 * step)


def check_gradients(op, exact, cases, names):
    """Gradients of float32 along random directions, one argument at a time."""

    @jax.jit
    @jax.grad
    def gradient(floats, rest, weights):
        outs = op(**floats, **rest)
        return sum((w * out).sum() for w, out in zip(weights, outs, strict=True))

    for seed, arrays in enumerate(cases):
        rng = np.random.default_rng(seed)
        weights = [rng.standard_normal(out.shape) for out in exact(**arrays)]
        floats = {name: arrays[name] for name in names}
        rest = {name: arrays[name] for name in arrays if name not in names}
        narrow = [w.astype(np.float32) for w in weights]
        grads = checks.to_host(gradient(floats, rest, narrow))
        for name in names:
            grad = grads[name].astype(np.float64)
            assert grads[name].dtype == arrays[name].dtype
            direction = rng.standard_normal(grad.shape)
            slope = slope_of(exact, arrays, {name: direction}, weights)
            got, scale = (grad * direction).sum(), np.sqrt((grad**2).sum()) + 1e-6
            assert abs(got - slope) < 3e-5 * scale, (
                f"{name}: {got}, expected {slope}, scale {scale}"
            )


def test_packed_gradients():
    check_gradients(
        functools.partial(ssd_packed, chunk_size=5),
        reference.ssd_packed,
        [draw_batch(0), draw_batch(3), draw_batch(0, slots=7), draw_batch(3, slots=7)],
        (*FLOATS, "ssm_states"),
    )


@pytest.mark.parametrize("segments", [True, False])
def test_dense_gradients(segments):
    cases = [draw_rows(seed) for seed in (1, 2)]
    if not segments:
        cases = [case | {"segment_ids": None} for case in cases]
    check_gradients(
        functools.partial(ssd, chunk_size=5, return_final_state=True),
        reference.ssd,
        cases,
        (*FLOATS, "initial_state"),
    )


@SLOTS
def test_forward_mode(slots):
    arrays = draw_batch(1, slots=slots)
    floats = {name: arrays[name] for name in (*FLOATS, "ssm_states")}
    tangent = jax.tree.map(np.cos, floats)

    def outputs(floats):
        return ssd_packed(**(arrays | floats), chunk_size=5, implementation="xla")

    outs, tangents = jax.jit(lambda f, t: jax.jvp(outputs, (f,), (t,)))(floats, tangent)
    weights = [np.cos(np.arange(out.size)).reshape(out.shape) for out in outs]
    got = sum((w * t).sum() for w, t in zip(weights, tangents, strict=True))
    want = slope_of(reference.ssd_packed, arrays, tangent, weights)
    np.testing.assert_allclose(got, want, rtol=1e-4)


@pytest.mark.parametrize(
    ("chunk_size", "segments"), [(1, True), (5, True), (64, True), (5, False)]
)
def test_dense_equals_the_recurrence(segments, chunk_size):
    for seed in range(6):
        arrays = draw_rows(seed)
        if not segments:
            del arrays["segment_ids"]
        check_dense(arrays, chunk_size=chunk_size)


def test_dense_in_narrow_dtypes():
    check_dense(draw_rows(0, dtype=BFLOAT16, state=BFLOAT16), chunk_size=6)


def test_dense_without_options():
    arrays = {name: draw_rows(1)[name] for name in FLOATS}
    y, _ = reference.ssd(**arrays)
    sizes, _ = reference.ssd(**sizes_of(arrays))
    assert_close(np.asarray(jitted_ssd(ssd)(**arrays)), y, sizes, "y")


def test_segments_equal_separate_documents():
    arrays = draw_rows(2, batch=1, tokens=24)
    arrays["segment_ids"] = np.repeat([[4, 7, 4, -1]], [7, 7, 7, 3], 1)
    got, state = run_dense(arrays, chunk_size=5)
    for begin in (0, 7, 14):
        alone = {
            name: array[:, begin : begin + 7] if array.ndim > 2 else array
            for name, array in arrays.items()
            if name != "segment_ids"
        }
        alone["initial_state"] = arrays["initial_state"] * (begin == 0)
        y, last = run_dense(alone, chunk_size=5)
        np.testing.assert_allclose(got[:, begin : begin + 7], y, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(state, last, rtol=1e-4, atol=1e-5)
    assert (got[:, 21:] == 0).all()


def test_row_of_padding_returns_its_initial_state():
    arrays = draw_rows(3)
    arrays["segment_ids"][1] = -1
    y, state = run_dense(arrays, chunk_size=5)
    assert (y[1] == 0).all()
    checks.assert_same_bits(state[1], arrays["initial_state"][1])


def test_foreign_segments_and_padding_are_not_seen():
    """Nor is the initial state by anybody, since the row begins with padding."""
    clean = draw_rows(4, batch=1, tokens=30)
    ids = np.repeat([[-1, 2, 0, -1, 5, 6]], [2, 6, 8, 3, 4, 7], 1).astype(np.int32)
    padding, foreign = ids[0] < 0, (ids[0] == 0) | (ids[0] == 6)
    seen = ~(padding | foreign)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(floats):
        y = ssd(**floats, segment_ids=ids, chunk_size=5)
        return (y[:, seen] ** 2).sum(), y

    floats = {name: clean[name] for name in (*FLOATS, "initial_state")}
    want, want_y = checks.to_host(gradient(floats))
    for poison in (np.nan, np.inf):
        bad = floats | {"initial_state": np.full_like(floats["initial_state"], poison)}
        for name in ("x", "dt", "B", "C"):
            bad[name] = floats[name].copy()
            bad[name][:, ~seen] = poison
        got, y = checks.to_host(gradient(bad))
        np.testing.assert_allclose(y[:, seen], want_y[:, seen], 1e-5, 1e-6)
        assert (y[:, padding] == 0).all()
        assert np.isnan(y[:, foreign]).all()
        for name in got:
            np.testing.assert_allclose(got[name], want[name], 1e-4, 1e-5, err_msg=name)


def test_nan_in_a_segment_is_seen_from_there_on():
    arrays = draw_rows(5)
    arrays["segment_ids"][0] = np.repeat([1, 2], [15, 8])
    want, want_state = run_dense(arrays, chunk_size=5)
    for name, token, heads, end in (
        ("x", (0, 4, 3, 2), [3], 15),
        ("dt", (0, 4, 5), [5], 15),
        ("B", (0, 4, 1), [2, 3], 15),
        ("C", (0, 4, 0), [0, 1], 5),
        ("x", (0, 17, 0), [0], 23),
    ):
        array = arrays[name].copy()
        array[token] = np.nan
        got, state = run_dense(arrays | {name: array}, chunk_size=5)
        bad = np.zeros((2, 23, 6), bool)
        bad[0, token[1] : end, heads] = True
        np.testing.assert_array_equal(np.isnan(got).all(3), bad, name)
        np.testing.assert_allclose(got[~bad], want[~bad], rtol=1e-5, atol=1e-6)
        in_state = np.isnan(state).all((2, 3))
        np.testing.assert_array_equal(in_state, bad[:, -1])
        np.testing.assert_allclose(state[~in_state], want_state[~in_state], 1e-5, 1e-6)


def test_step_that_forgets_everything_costs_no_precision():
    arrays = draw_rows(6, batch=1, tokens=64)
    del arrays["segment_ids"]
    arrays["dt"] = arrays["dt"] / 100
    arrays["x"][:, [7, 20, 21, 40]] = 0
    gradient = jax.jit(jax.grad(lambda f, state: ssd(**f, initial_state=state).sum()))
    for step in (50, 1e4, 1e30):
        arrays["dt"][:, [7, 20, 21, 40]] = step
        check_dense(arrays, chunk_size=64)
        floats = {name: arrays[name] for name in FLOATS}
        grads = checks.to_host(gradient(floats, arrays["initial_state"]))
        for name, grad in grads.items():
            assert np.isfinite(grad).all(), f"{name}, step {step}"


def test_float64():
    with jax.enable_x64(True):
        arrays = draw_batch(1, dtype=np.float64, state=np.float64)
        arrays = {k: v.astype(float) if k in FLOATS else v for k, v in arrays.items()}
        check_batch(arrays, chunk_size=5)
        dense = draw_rows(1, dtype=np.float64)
        del dense["initial_state"]
        check_dense(dense, chunk_size=5)
        assert run_dense(dense, chunk_size=5)[1].dtype == np.float64


def test_wide_parameters_and_integers_are_narrowed_safely():
    with jax.enable_x64(True):
        arrays = draw_batch(1)
        for name in ("dt", "A", "D"):
            arrays[name] = arrays[name].astype(np.float64)
        for name, value in (("query_start_loc", 2**40), ("cache_indices", 2**32 + 1)):
            arrays[name] = arrays[name].astype(np.int64)
            arrays[name][-1] = value
        check_batch(arrays, chunk_size=5)


def test_vmap_over_everything():
    cases = [draw_batch(seed) for seed in (0, 1, 4)]
    stacked = jax.tree.map(lambda *a: np.stack(a), *cases)
    mapped = jax.jit(jax.vmap(lambda a: ssd_packed(**a, chunk_size=5)))(stacked)
    for case, *result in zip(cases, *checks.to_host(mapped), strict=True):
        check_batch(case, result)


def test_eager_call_compiles_once_and_keeps_its_input(caplog):
    case = draw_batch(0, dim=9)
    arrays, counts = jax.tree.map(jnp.asarray, case), []
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            result = jax.block_until_ready(ssd_packed(**arrays))
        counts.append(sum("Finished XLA compilation" in m for m in caplog.messages))
    assert counts[0] > 0, "the log of compilations was not seen"
    assert counts[1] == 0, f"{counts[1]} compilations in the second call"
    check_batch(case, checks.to_host(result))
    checks.assert_same_bits(np.asarray(arrays["ssm_states"]), case["ssm_states"])


@pytest.mark.parametrize("empty", ["tokens", "seqs", "slots", "heads", "dim", "size"])
def test_sizes_of_zero(empty):
    sizes = {empty: 0} | ({"groups": 1} if empty == "heads" else {})
    arrays = draw_batch(0, **sizes)
    y, states = run(arrays)
    if empty == "size":
        check_batch(arrays, (y, states))
        check_dense(draw_rows(0, size=0))
        return
    assert (y.shape, y.dtype) == (arrays["x"].shape, arrays["x"].dtype)
    assert not y.any()
    checks.assert_same_bits(states, arrays["ssm_states"])
    if empty in ("heads", "dim"):
        dense = draw_rows(0, **sizes)
    else:
        dense = draw_rows(0, **({"batch": 0} if empty == "seqs" else {"tokens": 0}))
    y, state = run_dense(dense)
    assert y.shape == dense["x"].shape
    checks.assert_same_bits(state, dense["initial_state"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": np.zeros((40, 6), np.float32)}, ValueError, r"x must have shape \(T, H"),
        ({"x": np.zeros((40, 6, 5), np.int32)}, TypeError, "x must be one of"),
        ({"dt": np.zeros((39, 6), np.float32)}, ValueError, r"dt must .*\(39, 6\)"),
        ({"A": np.zeros(5, np.float32)}, ValueError, r"A must have shape \(H,\) = \(6"),
        ({"A": None}, TypeError, "A must be an array"),
        ({"B": np.zeros((40, 4, 7), np.float32)}, ValueError, "G divides H = 6, got"),
        ({"B": np.zeros((40, 0, 7), np.float32)}, ValueError, "G divides H = 6, got"),
        ({"C": np.zeros((40, 3, 8), np.float32)}, ValueError, r"C must .*\(40, 3, 8\)"),
        ({"D": np.zeros((6, 4), np.float32)}, ValueError, r"D must have shape \(H,\)"),
        ({"ssm_states": np.zeros((9, 6, 7, 5))}, ValueError, r"\(S, H, P, K\) = \(any"),
        (
            {"ssm_states": np.zeros((3, 6, 5, 7)), "cache_indices": None},
            ValueError,
            "N",
        ),
        ({"query_start_loc": np.zeros(8)}, TypeError, "query_start_loc must have an"),
        ({"query_start_loc": np.zeros(0, int)}, ValueError, r"\(N\+1,\), got \(0,\)"),
        ({"cache_indices": np.zeros(6, int)}, ValueError, r"cache_indices .*\(7,\)"),
        ({"has_initial_state": np.zeros(7)}, TypeError, "has_initial_state .* bool"),
        ({"max_prefills": -1}, ValueError, "max_prefills must be at least 0, got -1"),
        ({"max_prefills": 1.5}, TypeError, "max_prefills must be a static int"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"pad_slot_id": None}, TypeError, "pad_slot_id must be a static int"),
    ],
)
def test_packed_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        ssd_packed(**(draw_batch(0) | changes))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"x": np.zeros((2, 23, 6), np.float32)},
            ValueError,
            r"x must .*\(B, T, H, P\)",
        ),
        ({"dt": np.zeros((2, 23), np.float32)}, ValueError, r"dt must .*\(B, T, H\)"),
        (
            {"initial_state": np.zeros((2, 6, 5))},
            ValueError,
            r"\(B, H, P, K\) = \(2, 6",
        ),
        ({"segment_ids": np.zeros((2, 22), int)}, ValueError, "segment_ids must have"),
        ({"chunk_size": True}, TypeError, "chunk_size must be a static int"),
        ({"return_final_state": 1}, TypeError, "return_final_state must be True"),
    ],
)
def test_dense_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        ssd(**(draw_rows(0) | changes))
