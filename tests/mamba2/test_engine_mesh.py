"""The engine on meshes of devices, where jax has eight of them."""

import functools
import itertools
import re

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jax_causal_conv import mamba2
from jax_causal_conv.mamba2.engine.prefixes import Blocks, Prefixes
from jax_causal_conv.mamba2.engine.requests import Generation, Terms
from jax_causal_conv.mamba2.engine.schedule import Schedule, Slots
from tests.mamba2.test_mesh import make_mesh
from tests.support import eight_devices, quick

CHECKS = eight_devices.Checks()
SLOTS = 2


@functools.cache
def make_model():
    config = mamba2.Mamba2Config(
        vocab_size=32, d_model=16, n_layers=1, expand=4, headdim=8, d_state=4
    )
    return mamba2.Mamba2LM(config, rngs=nnx.Rngs(0))


def make_engine(model, slots=SLOTS, **options):
    sizes = {"max_tokens_per_step": 8, "token_buckets": [8], "decode_buckets": [slots]}
    return mamba2.Engine(model, num_slots=slots, **(sizes | options))


def draw_requests():
    """Greedy and sampled ones; most prompts begin alike, some are longer than a step"""
    rng = np.random.default_rng(0)
    common = rng.integers(0, 32, 6)
    for i in range(24):
        prompt = rng.integers(0, 32, rng.integers(1, 12))
        if i % 3:
            prompt = np.concatenate([common, prompt])
        sampling = mamba2.SamplingParams(temperature=i % 2, top_k=9, top_p=0.95)
        yield mamba2.Request(prompt, int(rng.integers(1, 9)), sampling)


FORKED = mamba2.Request(
    range(9), 6, mamba2.SamplingParams(temperature=1.0, top_k=5, seed=5)
)


def serve(engine, between=lambda engine, i: None):
    """The tokens of each request, some of which come while others run."""
    generations = []
    with quick.compilation():
        for i, request in enumerate(draw_requests()):
            generations.append(engine.submit(request))
            if i % 5 == 4:
                engine.step()
                between(engine, i)
        if engine._keeps_prefixes:
            generations += engine.submit(FORKED, n=3)
        engine.run()
    return [generation.tokens for generation in generations]


@functools.cache
def on_one_device():
    return serve(make_engine(make_model(), slots=3, prefix_slots=2, prefix_block=2))


def disturb(engine, i):
    """All that are running are paused, for two rounds; then a step is interrupted."""
    if i == 9:
        engine.paused = [g.id for g in engine._schedule.running]
        assert len(engine.paused) > SLOTS and all(map(engine.pause, engine.paused))
    elif i == 19:
        assert all(map(engine.resume, engine.paused))
        engine.step()
        engine._intact = False  # as an error in the midst of the next one leaves it


def devices_that_talk(program, mesh):
    """The groups of devices that exchange anything, as indices in the mesh."""
    kinds = "all-reduce|all-gather|all-to-all|collective-[a-z]+|reduce-scatter"
    operations = re.findall(rf"= .* (?:{kinds})(?:-start)?\(.*", program.as_text())
    groups = []
    for operation in operations:
        shape, axes, order = re.search(
            r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", operation
        ).groups()
        devices = np.arange(mesh.size).reshape([*map(int, axes.split(","))])
        if order:
            devices = devices.transpose([*map(int, order.split(","))])
        groups += devices.reshape([*map(int, shape.split(","))]).tolist()
    return groups


@CHECKS.over()
def each_device_has_requests_of_its_own():
    mesh = make_mesh("Auto", data=8)
    engine = make_engine(
        make_model(), mesh=mesh, data_axis="data", prefix_slots=2, prefix_block=2
    )
    uneven = []

    def look(engine, i):
        disturb(engine, i)
        of_each = [len(slots.running) for slots in engine._schedule.shares]
        uneven.append(max(of_each) - min(of_each))

    assert serve(engine, look) == on_one_device()
    assert uneven[0] <= 1, "five requests on eight devices"
    assert {g.share for g in engine.stats.requests} == set(range(8))
    steps = engine.stats.steps
    assert {step.devices for step in steps} == {8}
    assert max(step.decode_tokens for step in steps) > 2 * SLOTS
    assert all(step.padding >= 0 for step in steps)
    for program in engine._device.executables.values():
        assert devices_that_talk(program, mesh) == []


@CHECKS.over()
def each_group_of_devices_has_a_divided_model():
    mesh = make_mesh("Explicit", data=2, model=4)
    with jax.set_mesh(mesh):
        model = mamba2.tensor_parallel(make_model(), mesh, "model")
        engine = make_engine(
            model, mesh=mesh, data_axis="data", prefix_slots=4, prefix_block=2
        )
        assert serve(engine, disturb) == on_one_device()
    assert engine.stats.prefix_hits > 0
    for program in engine._device.executables.values():
        groups = np.array(devices_that_talk(program, mesh))
        assert {*map(tuple, groups // 4)} == {(0, 0, 0, 0), (1, 1, 1, 1)}
    cache = engine._device.state.cache[0]
    assert cache.ssm.sharding.spec == P("data", "model", None, None)


@CHECKS.over()
def drafts_of_a_model_on_each_device():
    mesh, model = make_mesh("Auto", data=2), make_model()
    engine = make_engine(model, draft=model, max_drafts=1, mesh=mesh, data_axis="data")
    assert serve(engine) == on_one_device()[:24]
    assert engine.stats.acceptance > 0.99


def test_requests_go_where_their_prompt_was_read_unless_there_are_many():
    blocks = Blocks(2)
    shares = [
        Slots(4, 32, 4, 1, Prefixes(range(4, 8), blocks), tokens_on_host=False)
        for _ in range(2)
    ]
    schedule, ids = Schedule(shares), itertools.count()

    def share_of(*prompt):
        terms = Terms.of(mamba2.Request(prompt), 32)
        digests = blocks.digests(terms.prompt)
        generation = Generation(
            next(ids), None, terms, 0.0, terms.prompt, digests=digests
        )
        schedule.wait(generation)
        assert schedule.admit(0.0) == [generation]
        schedule.took(schedule.plan({}))
        return generation.share

    assert [share_of(1, 2, 3, 4), share_of(5, 6, 7, 8)] == [0, 1]
    for generation in schedule.running:
        schedule.remove(generation)
    assert share_of(5, 6, 7, 8, 9) == 1
    assert share_of(5, 6, 7, 8, 10) == 0, "the other one has its share of requests"
    assert share_of(1, 2, 3, 11) == 0
    assert share_of(12, 13) == 1


def test_meshes_that_do_not_fit_are_refused():
    mesh, model = jax.make_mesh((1,), ("data",)), make_model()
    with pytest.raises(ValueError, match="given together"):
        make_engine(model, mesh=mesh)
    with pytest.raises(ValueError, match="given together"):
        make_engine(model, data_axis="data")
    with pytest.raises(ValueError, match="data_axis must be one of"):
        make_engine(model, mesh=mesh, data_axis="model")
    with pytest.raises(TypeError, match="mesh must be a"):
        make_engine(model, mesh=mesh.abstract_mesh, data_axis="data")
    divided = mamba2.tensor_parallel(model, mesh, "data")
    with pytest.raises(ValueError, match="must not be divided over"):
        make_engine(divided, mesh=mesh, data_axis="data")
    other = jax.make_mesh((1,), ("other",))
    with pytest.raises(ValueError, match="must be on the engine's mesh"):
        make_engine(divided, mesh=other, data_axis="other")


@pytest.mark.parametrize("name", CHECKS)
def test_on_eight_devices(on_eight_devices, name):
    on_eight_devices(name)
