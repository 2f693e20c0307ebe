"""Rows in pieces, rows sharded over time, and what `jax.checkpoint` keeps of them.

Rows are sharded over eight CPU devices, in a child process.
"""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from jax_causal_conv import ssd, ssd_halo_state
from jax_causal_conv.mamba2 import Mamba2Cache, Mamba2Config, Mamba2LM, Mamba2Mixer
from tests.support import eight_devices, quick, ssd_reference

CHECKS = eight_devices.Checks(quick.compilation)
PARTS, TOKENS = 8, 32  # four a device
SIZES = {"d_state": 5, "headdim": 8, "n_groups": 2, "chunk_size": 4}
IDS = {
    "one document": None,
    "documents": np.repeat([3, 3, 1, -1, 1, 1, 0, 2], [3, 4, 9, 2, 3, 3, 4, 4]),
    "one over several parts": np.repeat([-1, 5, 6], [2, 21, 9]),
    "padding": np.repeat([7, -1, 7, -1], [8, 9, 4, 11]),
    "nothing but padding": np.full(TOKENS, -2),
}


def ids_of(name):
    """Two rows: the named one, and one that is shifted by two tokens."""
    ids = IDS[name]
    return None if ids is None else jnp.asarray(np.stack([ids, np.roll(ids, 2)]))


def make_mixer(**options):
    mixer = Mamba2Mixer(16, **(SIZES | options), rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)

    def draw(array):
        return jnp.asarray(rng.standard_normal(array.shape) * 0.5, array.dtype)

    nnx.update(mixer, jax.tree.map(draw, nnx.state(mixer, nnx.Param)))
    return mixer


def draw_rows(seed=1):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((2, TOKENS, 16)), jnp.float32)


def draw_states(mixer, seed=2):
    rng = np.random.default_rng(seed)

    def draw(array):
        return jnp.asarray(rng.standard_normal(array.shape), array.dtype)

    return jax.tree.map(draw, mixer.init_cache(2))


def assert_close(got, want, tolerance=2e-5):
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        scale = max(1e-3, np.abs(other).max())
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * scale)


@functools.cache
def time_mesh():
    return jax.make_mesh((PARTS,), ("time",), axis_types=(AxisType.Auto,))


def ssd_inputs(seed=0):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    A = -jnp.asarray([0.01, 0.3, 2.0, 90.0])  # some remember, some forget at once
    return {
        "x": draw(2, TOKENS, 4, 3),
        "dt": draw(2, TOKENS, 4),
        "A": A,
        "B": draw(2, TOKENS, 2, 5),
        "C": draw(2, TOKENS, 2, 5),
        "dt_bias": draw(4),
        "initial_state": draw(2, 4, 3, 5),
    }


OPTIONS = {"dt_softplus": True, "dt_limit": (0.05, 2.0)}


def whole(ids, inputs):
    return ssd(
        **inputs, **OPTIONS, segment_ids=ids, chunk_size=8, return_final_state=True
    )


def sharded(ids, inputs):
    rows = P(None, "time")

    def part(ids, inputs):
        inputs = dict(inputs)
        C = inputs.pop("C")
        before = ssd_halo_state(**inputs, **OPTIONS, axis_name="time", segment_ids=ids)
        inputs["initial_state"] = before
        y, state = ssd(
            **inputs,
            **OPTIONS,
            C=C,
            segment_ids=ids,
            chunk_size=8,
            return_final_state=True,
        )
        return y, state[None]

    by_time = {name: rows if name in ("x", "dt", "B", "C") else P() for name in inputs}
    y, states = jax.shard_map(
        part,
        mesh=time_mesh(),
        in_specs=(None if ids is None else rows, by_time),
        out_specs=(rows, P("time")),
    )(ids, inputs)
    return y, states[-1]  # of the last device


@functools.cache
def with_gradients(function):
    """(ids, inputs) -> results, and gradients of a sum of them."""
    rng = np.random.default_rng(5)
    weights = [
        rng.standard_normal(shape).astype("f4")
        for shape in [(2, TOKENS, 4, 3), (2, 4, 3, 5)]
    ]

    def loss(inputs, ids):
        results = function(ids, inputs)
        total = sum((a * w).sum() for a, w in zip(results, weights, strict=True))
        return total, results

    gradient = quick.jit(jax.value_and_grad(loss, has_aux=True))

    def call(ids, inputs):
        (_, results), gradients = gradient(inputs, ids)
        return results, gradients

    return call


@CHECKS.over(IDS)
def ssd_over_time(name):
    """Values and gradients, of the final state too, are those of one device."""
    ids, inputs = ids_of(name), ssd_inputs()
    if ids is not None:  # what belongs to nobody may hold anything
        poison = (ids < 0)[..., None, None]
        inputs["x"] = jnp.where(poison, jnp.nan, inputs["x"])
    want, dwant = with_gradients(whole)(ids, inputs)
    got, dgot = with_gradients(sharded)(ids, inputs)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((got, dgot)))
    assert_close(got, want)
    for key, gradient in dwant.items():
        assert_close(dgot[key], gradient, 5e-5)
    if ids is None:  # and as near to float64 as one device is
        arrays = {k: np.asarray(v, np.float64) for k, v in inputs.items()}
        dt = np.logaddexp(0, arrays["dt"] + arrays["dt_bias"])
        exact, _ = ssd_reference.ssd(
            arrays["x"],
            np.clip(dt, *OPTIONS["dt_limit"]),
            arrays["A"],
            arrays["B"],
            arrays["C"],
            initial_state=arrays["initial_state"],
        )
        assert_close(got[0], exact)


@CHECKS.over([1, 2])
def mixer_over_time(num_shards):
    mixer, u = make_mixer(num_shards=num_shards), draw_rows()
    ids = ids_of("documents")
    before = draw_states(mixer)
    graphdef, params = nnx.split(mixer)
    rows = P(None, "time")

    def part(params, u, ids, before):
        return nnx.merge(graphdef, params)(
            u, segment_ids=ids, initial_state=before, axis_name="time"
        )

    specs = (P(), rows, rows, P())
    apply = jax.shard_map(part, mesh=time_mesh(), in_specs=specs, out_specs=rows)

    def on_one(params, u, ids, before):
        return nnx.merge(graphdef, params)(u, segment_ids=ids, initial_state=before)

    def loss(function, params, u, before):
        out = function(params, u, ids, before)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    results = [
        quick.jit(
            jax.value_and_grad(
                functools.partial(loss, function), argnums=(0, 1, 2), has_aux=True
            )
        )(params, u, before)
        for function in (apply, on_one)
    ]
    ((_, got), dgot), ((_, want), dwant) = results
    assert_close(got, want)
    assert_close(dgot, dwant, 1e-4)


@CHECKS.over()
def model_over_time():
    config = Mamba2Config(vocab_size=31, d_model=16, n_layers=2, **SIZES)
    model, ids = Mamba2LM(config, rngs=nnx.Rngs(0)), ids_of("documents")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, TOKENS)))
    graphdef, params = nnx.split(model)
    rows = P(None, "time")

    def part(params, tokens, ids):
        model = nnx.merge(graphdef, params)
        return model(tokens, segment_ids=ids, axis_name="time")

    apply = jax.shard_map(
        part, mesh=time_mesh(), in_specs=(P(), rows, rows), out_specs=rows
    )

    def on_one(params, tokens, ids):
        return nnx.merge(graphdef, params)(tokens, segment_ids=ids)

    got, want = (
        np.asarray(quick.jit(function)(params, tokens, ids))[ids >= 0]
        for function in (apply, on_one)
    )
    assert_close(got, want)


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(on_eight_devices, name):
    on_eight_devices(name)


@pytest.mark.parametrize("name", ["one document", "documents"])
def test_a_row_in_pieces_is_the_row(name):
    mixer, u, ids = make_mixer(), draw_rows(), ids_of(name)
    before = draw_states(mixer)

    @quick.jit
    def call(u, ids, state):
        return mixer(u, segment_ids=ids, initial_state=state, return_final_state=True)

    want, after = call(u, ids, before)
    out, state = [], before
    # Each piece but the first begins inside a document, as a state before it asks for.
    for piece in (slice(0, 5), slice(5, 6), slice(6, 12), slice(12, TOKENS)):
        one, state = call(u[:, piece], None if ids is None else ids[:, piece], state)
        out.append(one)
    assert isinstance(state, Mamba2Cache)
    real = np.ones((2, TOKENS), bool) if ids is None else np.asarray(ids >= 0)
    got = np.concatenate(out, axis=1)
    assert_close(got[real], np.asarray(want)[real])
    assert_close(state, after)


def test_serving_goes_on_from_a_row():
    mixer, u = make_mixer(), draw_rows()
    want = quick.jit(mixer)(u)
    read = quick.jit(lambda u: mixer(u, return_final_state=True))
    out, cache = read(u[:, :30])
    assert_close(out, want[:, :30])

    @quick.jit
    def decode(u, cache):
        seen = jnp.ones(2, bool)
        return mixer.packed(
            u, cache, jnp.arange(3), has_initial_state=seen, max_prefills=0
        )

    for place in (30, 31):
        out, cache = decode(u[:, place], cache)
        assert_close(out, want[:, place])


def test_a_model_in_pieces_is_the_model():
    config = Mamba2Config(vocab_size=31, d_model=16, n_layers=2, **SIZES)
    model = Mamba2LM(config, rngs=nnx.Rngs(0))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 12)))

    @quick.jit
    def call(tokens, state):
        return model(tokens, initial_state=state, return_final_state=True)

    want, after = call(tokens, None)
    first, state = call(tokens[:, :6], None)
    second, state = call(tokens[:, 6:], state)
    assert_close(np.concatenate([first, second], axis=1), want)
    assert_close(state, after)


def test_checkpoint_policies_keep_what_they_say():
    """Temporary memory of a gradient: everything > the conv's output > nothing."""
    layers, tokens, mixer = 24, 64, make_mixer()
    graphdef, params = nnx.split(mixer)
    u = jnp.ones((2, tokens, 16))

    def stacked(layers):
        return jax.tree.map(lambda a: jnp.stack([a] * layers), params)

    def block(u, params):
        return u + 0.05 * nnx.merge(graphdef, params)(u), None

    def temporary(block):
        def loss(stacked, u):
            return jnp.square(jax.lax.scan(block, u, stacked)[0]).sum()

        gradient = quick.jit(jax.grad(loss))
        memory = gradient.lower(stacked(layers), u).compile().memory_analysis()
        # Few layers: what is computed again may be rounded otherwise, and each layer
        # makes more of it.
        return memory.temp_size_in_bytes, gradient(stacked(2), u)

    policies = jax.checkpoint_policies
    policy = policies.save_only_these_names("conv")
    everything, want = temporary(block)
    nothing, one = temporary(jax.checkpoint(block))
    conv, other = temporary(jax.checkpoint(block, policy=policy))
    kept = layers * 2 * tokens * sum(mixer.column_sizes[1:4]) * 4
    assert kept / 2 < conv - nothing < 2 * kept, (conv - nothing, kept)
    assert everything > conv + kept, (nothing, conv, everything)
    assert_close(one, want, 1e-4)
    assert_close(other, want, 1e-4)


def test_the_conv_is_computed_once_on_cpus_in_float32():
    def barriers(mixer, platform):
        traced = jax.jit(mixer).trace(draw_rows())
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        return text.count("optimization_barrier")

    mixer, half = make_mixer(), make_mixer(dtype=jnp.bfloat16)
    assert barriers(mixer, "cpu") == barriers(mixer, "tpu") + 3  # x, B, C
    assert barriers(half, "cpu") == barriers(half, "tpu")


def test_the_conv_computed_once_is_the_same(monkeypatch):
    """The output has the same bits. Some sums over tokens may take another order."""
    graphdef, params = nnx.split(make_mixer())
    u, cotangent = draw_rows(), draw_rows(seed=3)

    def results():
        @jax.jit
        def step(params, u):
            out, pull = jax.vjp(lambda p, u: nnx.merge(graphdef, p)(u), params, u)
            return out, pull(cotangent)

        text = step.lower(params, u).as_text()
        return text.count("optimization_barrier"), *step(params, u)

    here = importlib.import_module(Mamba2Mixer.__module__)
    barriers, out, gradients = results()
    monkeypatch.setattr(here, "_computed_once", lambda array: array)
    none, want, others = results()
    assert barriers >= none + 3
    np.testing.assert_array_equal(out, want)
    assert_close(gradients, others, 2e-6)


def test_errors_of_the_state_before_a_part():
    inputs = ssd_inputs()
    names = ("x", "dt", "A", "B")
    inputs = {name: inputs[name] for name in names}
    with pytest.raises(ValueError, match=r"A must have shape \(H,\)"):
        ssd_halo_state(**inputs | {"A": inputs["A"][:3]}, axis_name="time")
    with pytest.raises(ValueError, match="segment_ids must have shape"):
        ssd_halo_state(**inputs, axis_name="time", segment_ids=jnp.zeros((2, 3), int))
    with pytest.raises(ValueError, match="initial_state must have shape"):
        ssd_halo_state(
            **inputs, axis_name="time", initial_state=jnp.zeros((2, 4, 3, 6))
        )
