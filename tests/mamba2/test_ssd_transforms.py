"""The SSD op under jax's transformations: values, gradients, and what is not copied."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_causal_conv as jcc
from jax_causal_conv.mamba2.ssd import ssd, ssd_packed
from tests.support import checks, quick
from tests.support import ssd_reference as reference
from tests.support.draws import ints
from tests.support.platforms import KERNEL_CALLS, exported, needs_triton
from tests.support.ssd_cases import (
    BFLOAT16,
    FLOAT32,
    RECENT,
    Expected,
    batch,
    compare,
    draw_packed,
    draw_rows,
)

FLOATS = ("x", "dt", "A", "B", "C", "D", "dt_bias", "ssm_states", "initial_state")
FLOATS = (*FLOATS, *RECENT)


def split(case):
    """(floats, rest) of the arrays that there are."""
    present = {name: a for name, a in case.arrays.items() if a is not None}
    floats = {name: a for name, a in present.items() if name in FLOATS}
    return floats, {name: a for name, a in present.items() if name not in FLOATS}


def function(case, implementation=None):
    """(floats, rest) -> (y, states) of a case's shape."""
    options = case.shape.options() | {"implementation": implementation}
    absent = {n: None for n, a in case.arrays.items() if a is None}
    if case.packed:

        def packed(floats, rest):
            given = case.replace(**floats, **rest).arguments
            return tuple(jax.tree.leaves(ssd_packed(**given, **options)))

        return packed
    options["return_final_state"] = True
    return lambda floats, rest: ssd(**floats, **rest, **absent, **options)


def stack(cases):
    return [
        jax.tree.map(lambda *a: np.stack(a), *parts)
        for parts in zip(*map(split, cases), strict=True)
    ]


def weights_of(case, seed=0, dtype=np.float64):
    """Weights of the results, for a sum that gradients are taken of.

    Numbers of `dtype`: where XLA may, it does not round a cotangent to the result's.
    """
    rng = np.random.default_rng(seed)
    y = case.arrays["x"].shape
    lead = case.shape.num_slots if case.packed else case.shape.num_rows
    shapes = y, (lead, *case.shape.state_shape)
    drawn = [rng.standard_normal(shape) for shape in shapes]
    return [np.float64(w.astype(dtype)) for w in drawn]


def weighted(results, weights):
    pairs = zip(results, weights, strict=True)
    return sum((w * out.astype(jnp.float32)).sum() for out, w in pairs)


def gradient(case, implementation, jit=quick.jit):
    """A jitted (floats, rest, weights) -> (gradients, results)."""
    run = function(case, implementation)

    def loss(floats, rest, weights):
        results = run(floats, rest)
        return weighted(results, weights), results

    return jit(jax.grad(loss, has_aux=True))


# Gradients.

GRADIENT_CASES = {
    "packed": functools.partial(draw_packed, 0, bias=FLOAT32, dt_softplus=True),
    "packed, as many slots": functools.partial(draw_packed, 3, num_slots=5),
    "decode": functools.partial(batch, [1, 1, 1, 2], max_prefills=0),
    "rows": functools.partial(draw_rows, 1, d_by_channel=True),
    "rows without documents": functools.partial(
        draw_rows, 2, segment_ids=False, bias=FLOAT32, dt_limit=(0.01, 0.4)
    ),
    "rows without states": functools.partial(draw_rows, 3, state=None, d=None),
}


def slope_of(case, arrays, direction, weights):
    """Central difference of sum(weights * outputs) in float64 along a direction."""
    step, sums = 1e-5, []
    exact = reference.ssd_packed if case.packed else reference.ssd
    options = case.shape.options()
    for name in ("chunk_size", "precision"):
        options.pop(name)
    wide = {name: arrays[name].astype(np.float64) for name in split(case)[0]}
    arrays = arrays | wide
    for sign in (1, -1):
        moved = {
            name: arrays[name] + sign * step * direction[name] for name in direction
        }
        outs = exact(**(arrays | moved), **options)
        sums.append(sum((w * o).sum() for w, o in zip(weights, outs, strict=True)))
    return (sums[0] - sums[1]) / (2 * step)


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_gradients_are_slopes(name):
    """Along random directions, one argument at a time."""
    case = GRADIENT_CASES[name]()
    run = gradient(case, None)
    for seed in range(2):
        rng, weights = np.random.default_rng(seed), weights_of(case, seed)
        floats, rest = split(case)
        grads, _ = checks.to_host(run(floats, rest, [np.float32(w) for w in weights]))
        assert grads.keys() == floats.keys()
        for key, got in grads.items():
            assert got.dtype == floats[key].dtype
            grad = got.astype(np.float64)
            direction = rng.standard_normal(grad.shape)
            slope = slope_of(case, case.arrays, {key: direction}, weights)
            along, scale = (grad * direction).sum(), np.sqrt((grad**2).sum()) + 1e-6
            assert abs(along - slope) < 3e-5 * scale, (
                f"{key}: {along}, expected {slope}, scale {scale}"
            )


@functools.cache
def gradient_by(implementation, kind, dtype):
    """(gradients, results), once for all who compare theirs with them."""
    case = GRADIENT_CASES[kind](**dict.fromkeys(("x", "B", "C"), dtype))
    weights = [np.float32(w) for w in weights_of(case, dtype=dtype)]
    return checks.to_host(gradient(case, implementation)(*split(case), weights))


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16])
@pytest.mark.parametrize("kind", ["packed", "decode", "rows"])
def test_gradients_are_the_same_whoever_computes_forward(implementation, kind, dtype):
    """Those of rows by kernels too, those of packed batches by XLA."""
    kinds = dict.fromkeys(("x", "B", "C"), dtype)
    case = GRADIENT_CASES[kind](**kinds)
    want, _ = gradient_by("xla", kind, dtype)
    got, results = gradient_by(implementation, kind, dtype)
    compare(case, results, Expected(case), implementation)
    for name, grad in want.items():
        wide = np.float32(grad)
        scale = abs(wide).max() * (1e-5 if grad.dtype == np.float32 else 2**-7)
        np.testing.assert_allclose(
            np.float32(got[name]), wide, rtol=1e-5, atol=scale, err_msg=name
        )


@pytest.mark.forward_only  # XLA differentiates it for None too
@pytest.mark.parametrize("slots", [7, 9])
def test_gradients_see_nothing_of_what_the_batch_must_not_see(implementation, slots):
    """Poison in slots, tokens of nobody and foreign sequences."""
    case = batch([17, 1, 2, 9], head=2, tail=3, num_slots=slots, heads=2, groups=1)
    case = case.replace(
        cache_indices=ints(4, -1, 99, 2),
        has_initial_state=np.array([True, True, True, False]),
    )
    seen = np.zeros(34, bool)
    seen[2:19] = seen[22:31] = True
    named = np.isin(np.arange(slots), [2, 4])
    arrays = {n: a.copy() for n, a in case.arrays.items() if a is not None}
    for name in ("x", "dt", "B", "C"):
        arrays[name][~seen] = np.nan
    arrays["ssm_states"][np.arange(slots) != 4] = np.inf
    bad = case.replace(**arrays)

    def loss(floats, rest):
        y, states = function(bad, implementation)(floats, rest)
        return y.sum() + jnp.where(named[:, None, None, None], states, 0).sum()

    grads = checks.to_host(quick.jit(jax.grad(loss))(*split(bad)))
    for name, grad in grads.items():
        assert np.isfinite(grad).all(), f"the gradient of {name}"
        assert grad.any(), f"the gradient of {name}"
        if name in ("x", "dt", "B", "C"):
            assert (grad[~seen] == 0).all(), f"the gradient of {name}"


@pytest.mark.forward_only  # XLA differentiates it for None too
def test_gradients_of_two_sequences_in_one_slot_reach_nobody_else(implementation):
    case = batch([12, 2, 12, 1, 1, 12], num_slots=9, heads=2, groups=1)
    case = case.replace(cache_indices=ints(2, 2, 3, 0, 0, 5))
    mine = np.r_[0:14, 26:28]
    other = np.delete(np.arange(40), mine)

    def loss(floats, rest):
        y, states = function(case, implementation)(floats, rest)
        return y[mine].sum() + states[np.r_[0, 2]].sum()

    grads = checks.to_host(quick.jit(jax.grad(loss))(*split(case)))
    assert (grads["x"][other] == 0).all()
    assert (grads["ssm_states"][[3, 5]] == 0).all()


def test_gradients_see_no_foreign_documents_nor_padding(implementation):
    sizes = {"heads": 2, "groups": 1, "chunk_size": 5}
    case = draw_rows(4, num_rows=1, num_tokens=30, **sizes)
    ids = np.repeat([[-1, 2, 0, -1, 5, 6]], [2, 6, 8, 3, 4, 7], 1).astype(np.int32)
    case = case.replace(segment_ids=ids)
    seen = (ids[0] == 2) | (ids[0] == 5)
    run = function(case, implementation)

    @quick.jit
    @jax.grad
    def gradient(floats):  # the ids are constants of the program
        y, _ = run(floats, {"segment_ids": ids})
        return (y[:, seen] ** 2).sum()

    floats, _ = split(case)
    want = checks.to_host(gradient(floats))
    for poison in (np.nan, np.inf):
        bad = floats | {"initial_state": np.full_like(floats["initial_state"], poison)}
        for name in ("x", "dt", "B", "C"):
            bad[name] = floats[name].copy()
            bad[name][:, ~seen] = poison
        for name, got in checks.to_host(gradient(bad)).items():
            np.testing.assert_allclose(got, want[name], 1e-4, 1e-5, err_msg=name)


def test_gradient_of_a_step_that_forgets_everything_is_finite():
    case = draw_rows(6, num_rows=1, num_tokens=64, segment_ids=False, chunk_size=64)
    run = gradient(case, None)
    weights = [np.float32(w) for w in weights_of(case)]
    for step in (50, 1e4, 1e30):
        dt, x = case.arrays["dt"] / 100, case.arrays["x"].copy()
        dt[:, [7, 20, 21, 40]], x[:, [7, 20, 21, 40]] = step, 0
        grads, _ = run(*split(case.replace(dt=dt, x=x)), weights)
        for name, grad in checks.to_host(grads).items():
            assert np.isfinite(grad).all(), f"{name}, step {step}"


@pytest.mark.parametrize("slots", [5, 9])
def test_forward_mode(slots):
    case = draw_packed(1, num_slots=slots, chunk_size=5)
    floats, rest = split(case)
    tangent = jax.tree.map(np.cos, floats)
    run = function(case, "xla")
    outs, tangents = quick.jit(
        lambda f, t: jax.jvp(lambda f: run(f, rest), (f,), (t,))
    )(floats, tangent)
    weights = [np.cos(np.arange(out.size)).reshape(out.shape) for out in outs]
    got = sum((w * t).sum() for w, t in zip(weights, tangents, strict=True))
    want = slope_of(case, case.arrays, tangent, weights)
    np.testing.assert_allclose(got, want, rtol=1e-4)


# vmap, scan, cond.


@pytest.mark.parametrize("kind", ["packed", "rows", "rows without states"])
def test_vmap_over_everything(implementation, kind):
    cases = [GRADIENT_CASES[kind]().replace(**draw) for draw in redrawn(kind)]
    run = quick.jit(jax.vmap(function(cases[0], implementation)))
    for case, *result in zip(cases, *checks.to_host(run(*stack(cases))), strict=True):
        compare(case, result, Expected(case), implementation)


def redrawn(kind):
    """Arrays of other cases of a kind's shape."""
    shape = GRADIENT_CASES[kind]().shape
    draw = draw_packed if kind == "packed" else draw_rows
    return [draw(seed, shape=shape).arrays for seed in (10, 11, 12)]


@pytest.mark.parametrize("kind", ["packed", "rows"])
def test_vmap_over_x_alone(implementation, kind):
    """A (..., P) of several channels' heads, say; and of gradients."""
    case = GRADIENT_CASES[kind]()
    xs = np.stack([arrays["x"] for arrays in redrawn(kind)])
    run, (floats, rest) = function(case, implementation), split(case)
    of_x = jax.vmap(lambda x: run(floats | {"x": x}, rest))
    for x, *result in zip(xs, *checks.to_host(quick.jit(of_x)(xs)), strict=True):
        compare(case.replace(x=x), result, Expected(case.replace(x=x)), implementation)

    def slope(run):
        return jax.grad(lambda x: run(floats | {"x": x}, rest)[0].sum())

    slopes = np.asarray(quick.jit(jax.vmap(slope(run)))(xs))
    want = quick.jit(slope(function(case, "xla")))(xs[1])
    np.testing.assert_allclose(slopes[1], want, 1e-4, 1e-4)


@pytest.mark.forward_only  # XLA differentiates it for None too
def test_under_cond_and_remat(implementation):
    case = GRADIENT_CASES["packed"]()
    run = jax.checkpoint(function(case, implementation))
    floats, rest = split(case)

    @quick.jit
    @functools.partial(jax.grad, has_aux=True)
    def gradient(floats, flag):
        def skip(floats, rest):
            return jnp.zeros_like(floats["x"]), floats["ssm_states"]

        y, states = jax.lax.cond(flag, run, skip, floats, rest)
        return y.sum(), (y, states)

    grads, results = checks.to_host(gradient(floats, True))
    compare(case, results, Expected(case), implementation)
    assert grads["x"].any()
    grads, _ = gradient(floats, False)
    assert not np.asarray(grads["x"]).any()


LAYERS = 3


def layers_of(case, implementation=None):
    """(x, cache of all layers, rest) -> (x, cache): residual layers of one batch."""
    run, slots = function(case, implementation), case.shape.num_slots
    floats, _ = split(case)
    del floats["ssm_states"]

    def step(x, cache, rest):
        def layer(carry, number):
            x, cache = carry
            own = jcc.layer_slots(rest["cache_indices"], number, slots)
            own = rest | {"cache_indices": own}
            y, cache = run(floats | {"x": x, "ssm_states": cache}, own)
            return (x + 0.1 * y, cache), None

        return jax.lax.scan(layer, (x, cache), jnp.arange(LAYERS))[0]

    return step


@pytest.mark.forward_only
def test_scan_over_layers_carries_one_cache(implementation):
    case = batch([5, 1, 1, 7], num_slots=6, heads=2, groups=1)
    case = case.replace(cache_indices=ints(3, 6, -1, 0))
    floats, rest = split(case)
    caches = np.stack([np.roll(floats["ssm_states"], i, 0) for i in range(LAYERS)])
    flat = caches.reshape(-1, *caches.shape[2:])
    run = quick.jit(layers_of(case, implementation), donate_argnums=1)
    x, new = checks.to_host(run(floats["x"], jnp.array(flat), rest))
    want = floats["x"].astype(np.float64)
    for number in range(LAYERS):
        layer = case.replace(x=np.float32(want), ssm_states=caches[number])
        exact = Expected(layer)
        got = new.reshape(caches.shape)[number]
        np.testing.assert_allclose(got, exact.states, rtol=1e-4, atol=1e-5)
        want = want + 0.1 * exact.y
    np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5)


@pytest.mark.forward_only
def test_step_updates_a_cache_that_it_is_given_as_a_ref(implementation):
    case = batch([5, 1, 1, 7], num_slots=9, heads=2, groups=1)
    run = function(case, implementation)

    @quick.jit
    def step(ref, floats, rest):
        y, ref[...] = run(floats | {"ssm_states": ref[...]}, rest)
        return y

    floats, rest = split(case)
    ref = jax.new_ref(jnp.asarray(floats.pop("ssm_states")))
    for seed in (2, 3):
        x = draw_packed(seed, shape=case.shape).arrays["x"]
        case = case.replace(x=x)
        y = step(ref, floats | {"x": x}, rest)
        result = checks.to_host((y, ref[...]))
        compare(case, result, Expected(case), implementation)
        case = case.replace(ssm_states=result[1])


# The cache is not copied.


def cache_sized(compiled, shape):
    """The instructions of optimised HLO that copy or convert something of `shape`."""
    dims = ",".join(map(str, shape))
    pattern = rf"= \w+\[{dims}\]\S* (copy|convert|transpose|select|concatenate)\("
    return re.findall(pattern, compiled.as_text())


def donated(case, layers=None):
    floats, rest = split(case)
    states = floats.pop("ssm_states")
    run = function(case)
    if layers:
        step = layers_of(case)
        states = np.concatenate([states] * LAYERS)
        return lambda states: step(floats["x"], states, rest)[1], states
    return lambda states: run(floats | {"ssm_states": states}, rest), states


@pytest.mark.parametrize(
    ("state", "most", "layers"),
    [(FLOAT32, 3, False), (FLOAT32, 0, False), (BFLOAT16, 3, True)],
)
def test_donated_cache_is_updated_in_place(state, most, layers):
    if state == BFLOAT16 and jax.__version_info__ < (0, 11):
        pytest.skip("before jax 0.11 XLA:CPU converts a bfloat16 cache to float32")
    case = draw_packed(6, num_slots=2003, state=state, max_prefills=most)
    step, states = donated(case, layers)
    compiled = jax.jit(step, donate_argnums=0).lower(states).compile()
    assert cache_sized(compiled, states.shape) == []
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == states.nbytes
    assert memory.temp_size_in_bytes < states.nbytes / 2


def test_cache_that_is_not_donated_is_copied():
    """That is: the pattern of the test before finds a copy."""
    step, states = donated(draw_packed(6, num_slots=2003, max_prefills=0))
    compiled = jax.jit(step).lower(states).compile()
    assert "copy" in cache_sized(compiled, states.shape)


def test_without_prefills_there_is_no_work_for_chunks():
    def products(most):
        case = draw_packed(0, max_prefills=most)
        return str(jax.make_jaxpr(function(case, "xla"))(*split(case))).count(
            "dot_general"
        )

    assert products(None) > 0
    assert products(0) == 0


def test_eager_call_compiles_once_and_keeps_its_input(caplog, implementation):
    case, counts = draw_packed(0, dim=9), []
    floats, rest = jax.tree.map(jnp.asarray, split(case))
    run = function(case, implementation)
    for _ in range(2):
        caplog.clear()
        with jax.log_compiles():
            result = jax.block_until_ready(run(floats, rest))
        counts.append(sum("Finished XLA compilation" in m for m in caplog.messages))
    assert counts[0] > 0, "the log of compilations was not seen"
    assert counts[1] == 0, f"{counts[1]} compilations in the second call"
    compare(case, checks.to_host(result), Expected(case), implementation)
    kept = np.asarray(floats["ssm_states"])
    checks.assert_same_bits(kept, case.arrays["ssm_states"])


# Export.


def structs(case, **shapes):
    def struct(name, array):
        return jax.ShapeDtypeStruct(shapes.get(name, array.shape), array.dtype)

    return [{n: struct(n, a) for n, a in part.items()} for part in split(case)]


def check_symbolic(cases, **shapes):
    """One program of symbolic sizes serves cases of several."""
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    run = jax.jit(function(cases[0]))
    program = jax.export.export(run)(*structs(cases[0], **shapes))
    for case in cases:
        result = checks.to_host(program.call(*split(case)))
        compare(case, result, Expected(case))


def with_lead(case, sizes):
    """Shapes of arrays whose first dimensions have other sizes."""
    return {
        name: (*size, *case.arrays[name].shape[len(size) :])
        for name, size in sizes.items()
    }


@pytest.mark.parametrize("most", [0, 2])
def test_export_of_batches_of_any_size(most):
    T, S, N = jax.export.symbolic_shape("T, S, N")
    options = {"max_prefills": most, "chunk_size": 64}
    case = batch([5, 1, 1, 7, 3], tail=7, **options)
    other = batch([70, 1, 1, 7, 3, 1], seed=1, tail=8, num_slots=17, **options)
    sizes = dict.fromkeys(("x", "dt", "B", "C"), (T,)) | {"ssm_states": (S,)}
    sizes |= dict.fromkeys(("cache_indices", "has_initial_state"), (N,))
    shapes = with_lead(case, sizes | {"query_start_loc": (N + 1,)})
    check_symbolic([case, other], **shapes)


def test_export_of_rows_of_any_size():
    B, T = jax.export.symbolic_shape("B, T")
    cases = [draw_rows(0), draw_rows(1, num_rows=3, num_tokens=40)]
    sizes = dict.fromkeys(("x", "dt", "B", "C", "segment_ids"), (B, T))
    check_symbolic(cases, **with_lead(cases[0], sizes | {"initial_state": (B,)}))


def test_export_of_any_number_of_slots_needs_no_option():
    (S,) = jax.export.symbolic_shape("S")
    cases = [draw_packed(seed, num_slots=slots) for seed, slots in ((2, 7), (3, 12))]
    check_symbolic(cases, **with_lead(cases[0], {"ssm_states": (S,)}))


def test_how_many_prefills_must_be_said_where_sizes_are_symbolic():
    (T,) = jax.export.symbolic_shape("T")
    case = draw_packed(0)
    shapes = with_lead(case, dict.fromkeys(("x", "dt", "B", "C"), (T,)))
    with pytest.raises(ValueError, match=r"max_prefills must be given .* T = T"):
        jax.export.export(jax.jit(function(case)))(*structs(case, **shapes))


EXPORTED = {kind: GRADIENT_CASES[kind] for kind in ("packed", "decode", "rows")}
EXPORTED["drafts"] = functools.partial(
    batch, [1, 3, 0, 20], bias=FLOAT32, dt_softplus=True, drafts=2
)


@needs_triton
@pytest.mark.parametrize("kind", EXPORTED)
def test_export_for_a_cpu_and_a_gpu_carries_the_kernels(kind):
    pytest.importorskip("flatbuffers", reason="jax.export serialises with flatbuffers")
    case = EXPORTED[kind]()
    run = function(case)
    sizes = ints(*range(case.shape.num_seqs if case.packed else 3))

    def among_others(floats, rest):
        # jax 0.11 lowers this sum for CUDA as XLA:CPU cannot compile it.
        return *run(floats, rest), jnp.cumsum(sizes), jnp.cumsum(sizes > 0)

    arguments = split(case)
    program = exported(among_others, *arguments)
    program = jax.export.deserialize(program.serialize(vjp_order=1))
    assert any(call in program.mlir_module() for call in KERNEL_CALLS)
    if jax.default_backend() != "cpu":
        return
    *result, last, _ = checks.to_host(program.call(*arguments))
    compare(case, result, Expected(case))
    np.testing.assert_array_equal(last, np.cumsum(sizes))
    if kind != "packed":
        return
    weights = [np.float32(w) for w in weights_of(case)]
    want, _ = gradient(case, "xla")(*arguments, weights)
    zeros = [np.zeros(sizes.shape, jax.dtypes.float0)] * 2
    pullback = quick.jit(program.vjp().call)
    got = pullback(*jax.tree.leaves(arguments), *weights, *zeros)
    for name, grad in zip(sorted(arguments[0]), got, strict=False):
        np.testing.assert_allclose(grad, want[name], rtol=1e-4, atol=1e-4, err_msg=name)


@needs_triton
def test_kernels_say_that_they_need_static_sizes():
    case = batch([5, 1, 1, 7, 3])
    (slots,) = jax.export.symbolic_shape("S")
    shapes = structs(case, ssm_states=(slots, *case.shape.state_shape))
    cure = r'static sizes.*implementation="xla"'
    with pytest.raises(NotImplementedError, match=cure):
        exported(function(case), *shapes, platforms=("cuda",))
    saved = exported(function(case, "xla"), *shapes, platforms=("cpu", "cuda"))
    assert KERNEL_CALLS[0] not in saved.mlir_module()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="there is a GPU")
def test_triton_cannot_run_on_a_cpu():
    case = draw_packed(0)
    with pytest.raises(ValueError, match='implementation="triton" needs CUDA'):
        function(case, "triton")(*split(case))
