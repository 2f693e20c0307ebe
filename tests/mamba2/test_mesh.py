"""The mixer and the model on meshes of devices, where jax has eight of them."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jax_causal_conv import mamba2
from tests.support import checks, eight_devices, quick

CHECKS = eight_devices.Checks(quick.compilation)
KINDS = ("Auto", "Explicit")
GROUPS = {"Auto": 1, "Explicit": 2}  # of four shards: one in all, or one in two
ROWS = np.random.default_rng(0).integers(0, 32, (2, 9), np.int32)
IDS = np.repeat([[0, 0, 0, 1, 1, 1, 1, -1, -1]], 2, axis=0).astype(np.int32)
OFFSETS, SLOTS = np.array([0, 5, 6, 9], np.int32), np.array([3, 0, 1], np.int32)
SEEN = np.array([False, True, True])


def make_mesh(kind, **sizes):
    kinds = (getattr(AxisType, kind),) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=kinds)


@functools.cache
def make_model(groups, **options):
    config = mamba2.Mamba2Config(
        vocab_size=32,
        d_model=16,
        n_layers=2,
        expand=4,
        headdim=8,
        d_state=4,
        n_groups=groups,
        use_bias=True,
        tie_embeddings=False,
    )
    model = mamba2.Mamba2LM(config, rngs=nnx.Rngs(0), **options)
    rng = np.random.default_rng(1)  # biases are drawn as well
    state = jax.tree.map(
        lambda a: a + np.float32(0.1) * rng.standard_normal(a.shape, np.float32),
        nnx.state(model),
    )
    nnx.update(model, state)
    return model


def drawn_cache(model):
    rng = np.random.default_rng(2)
    return jax.tree.map(
        lambda a: rng.standard_normal(a.shape, np.float32), model.init_cache(4)
    )


def loss(model, tokens, ids):
    logits = model(tokens, segment_ids=ids)
    return jnp.square(jnp.where((ids >= 0)[..., None], logits, 0)).sum(), logits


def train(model, tokens, ids):
    """(gradients by name, logits)."""
    gradients, logits = nnx.grad(loss, has_aux=True)(model, tokens, ids)
    return gradients, logits


def serve(model, tokens, cache):
    return model.packed(
        tokens,
        cache,
        OFFSETS,
        cache_indices=SLOTS,
        has_initial_state=SEEN,
        max_prefills=2,
    )


def compiled(function, model, *arguments):
    graph, state = nnx.split(model)
    run = quick.jit(lambda state, *rest: function(nnx.merge(graph, state), *rest))
    return run.lower(state, *arguments).compile(), (state, *arguments)


def run(function, model, *arguments):
    program, arguments = compiled(function, model, *arguments)
    return program(*arguments)


@functools.cache
def on_one_device(groups, function):
    model = make_model(groups)
    if function is train:
        return checks.to_host(run(train, model, ROWS, IDS))
    return checks.to_host(run(serve, model, ROWS[0], drawn_cache(model)))


def assert_close(got, want):
    for one, other in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        scale = np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-5 * scale + 1e-6)


def ordered(model, tree):
    """Arrays like the parameters, in the order of a model's columns."""

    def order(where, array):
        mixer = model.layers[where[1]].mixer if where[0] == "layers" else None
        if "in_proj" in where:
            return array[..., mixer.in_proj_order]
        return array[mixer.conv_order] if "conv" in where else array

    return [order(where, p[...]) for where, p in nnx.to_flat_state(tree)]


def collectives(program):
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    return re.findall(rf"= .* ({kinds})(?:-start)?\(", program.as_text())


@CHECKS.over(KINDS)
def gradients_of_a_divided_model_are_those_of_the_whole(kind):
    groups = GROUPS[kind]
    mesh = make_mesh(kind, data=2, model=4)
    model = mamba2.tensor_parallel(make_model(groups), mesh, "model")
    rows, ids = jax.device_put((ROWS, IDS), NamedSharding(mesh, P("data", None)))
    with jax.set_mesh(mesh):
        gradients, logits = run(train, model, rows, ids)
    want, whole = on_one_device(groups, train)
    assert_close(checks.to_host(logits), whole)
    assert_close(checks.to_host(jax.tree.leaves(gradients)), ordered(model, want))


@CHECKS.over(KINDS)
def packed_step_of_a_divided_model_communicates_in_sums_alone(kind):
    groups = GROUPS[kind]
    mesh = make_mesh(kind, model=4, rest=2)
    model = mamba2.tensor_parallel(make_model(groups), mesh, "model")
    whole = drawn_cache(make_model(groups))
    divided = tuple(
        mamba2.Mamba2Cache(
            jax.device_put(old.conv[..., layer.mixer.conv_order], new.conv.sharding),
            jax.device_put(old.ssm, new.ssm.sharding),
        )
        for layer, old, new in zip(
            model.layers, whole, model.init_cache(4), strict=True
        )
    )
    assert divided[0].ssm.sharding.spec[1] == "model"
    with jax.set_mesh(mesh):
        program, arguments = compiled(serve, model, ROWS[0], divided)
        logits, cache = checks.to_host(program(*arguments))
    # For each layer out_proj's sum and the norm's, and the logits' columns.
    found = collectives(program)
    assert found.count("all-reduce") <= 2 * len(model.layers), found
    assert set(found) <= {"all-reduce", "all-gather"} and found.count("all-gather") <= 1
    want, states = on_one_device(groups, serve)
    assert_close(logits, want)
    for layer, got, old in zip(model.layers, cache, states, strict=True):
        assert_close(got.conv, old.conv[..., layer.mixer.conv_order])
        assert_close(got.ssm, old.ssm)


def tokens_of(model):
    """What an engine makes of three requests."""
    engine = mamba2.Engine(
        model, num_slots=2, max_tokens_per_step=8, token_buckets=[8], decode_buckets=[2]
    )
    requests = [mamba2.Request([1, 2, 3, 4, 5], 3), mamba2.Request([6], 4)]
    drawn = mamba2.SamplingParams(temperature=1.0, top_k=9, seed=1)
    requests.append(mamba2.Request([7, 8], 2, drawn))
    generations = [engine.submit(request) for request in requests]
    engine.run()
    return [generation.tokens for generation in generations]


@CHECKS.over(("Auto",))
def engine_serves_a_divided_model(kind):
    mesh = make_mesh(kind, model=4)
    divided = mamba2.tensor_parallel(make_model(1), mesh, "model")
    with jax.set_mesh(mesh):
        got = tokens_of(divided)
    assert got == tokens_of(make_model(1))


@CHECKS.over(("jit", "eager"))
def mixer_takes_explicitly_sharded_rows(how):
    mesh = make_mesh("Explicit", data=2)
    mixer = mamba2.Mamba2Mixer(16, d_state=4, headdim=8, rngs=nnx.Rngs(0))
    u = np.random.default_rng(0).standard_normal((2, 9, 16), np.float32)
    want = mixer(u, segment_ids=IDS)
    graph, state = nnx.split(mixer)
    with jax.set_mesh(mesh):
        state = jax.device_put(state, NamedSharding(mesh, P()))
        rows = jax.device_put(u, NamedSharding(mesh, P("data", None, None)))

        def call(state, rows):
            return nnx.merge(graph, state)(rows, segment_ids=IDS)

        got = (jax.jit(call) if how == "jit" else call)(state, rows)
    assert got.sharding.spec[0] == "data"
    assert_close(checks.to_host(got), checks.to_host(want))


def test_sizes_that_do_not_fit_are_refused():
    mesh = jax.make_mesh((1,), ("model",))
    with pytest.raises(ValueError, match="axis must be one of"):
        mamba2.tensor_parallel(make_model(1), mesh, "heads")
    sizes = {"d_state": 4, "headdim": 8, "rngs": nnx.Rngs(0)}
    with pytest.raises(ValueError, match="multiple of it, got 4 and 6"):
        mamba2.Mamba2Mixer(96, n_groups=6, num_shards=4, **sizes)
    with pytest.raises(ValueError, match="must divide the number of heads"):
        mamba2.Mamba2Mixer(16, n_groups=1, num_shards=8, **sizes)


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(on_eight_devices, name):
    on_eight_devices(name)
