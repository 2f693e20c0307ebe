"""Checks of several devices at work: `python -m tests.on_devices`.

A model over two devices computes what one computes: divided by heads or by time in
training, divided by heads or by requests in the engine. What the devices exchange is
counted in the compiled programs. `tests.on_device` runs them too, where there are two
GPUs; with `JAX_NUM_CPU_DEVICES=2` they run on a CPU.
"""

import collections
import functools
import re
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from jax_causal_conv import mamba2

DEVICES = 2
LAYERS = 2
ON_GPU = jax.default_backend() == "gpu"
# Sizes of kernels on a GPU, and small ones on a CPU. All heads share B and C.
SIZES = (
    {"d_model": 256, "headdim": 64, "d_state": 64, "vocab_size": 1000}
    if ON_GPU
    else {"d_model": 16, "headdim": 8, "d_state": 4, "chunk_size": 8, "vocab_size": 32}
)


@functools.cache
def make_model() -> mamba2.Mamba2LM:
    """In float32, which leaves no draw to the order of a sum."""
    config = mamba2.Mamba2Config(n_layers=LAYERS, n_groups=1, **SIZES)
    return mamba2.Mamba2LM(
        config,
        precision="highest",
        implementation="triton" if ON_GPU else None,
        rngs=nnx.Rngs(0),
    )


def precise(check):
    """The same check, whose products have float32's precision on a GPU too."""

    @functools.wraps(check)
    def run():
        with jax.default_matmul_precision("highest"):
            return check()

    return run


def make_mesh(axis: str) -> Mesh:
    return Mesh(np.array(jax.devices()[:DEVICES]), (axis,))


def draw_rows(length: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and numbers of documents, which end anywhere."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, SIZES["vocab_size"], (2, length), np.int32)
    return tokens, np.cumsum(rng.random(tokens.shape) < 0.02, axis=1).astype(np.int32)


def loss(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    taken = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], -1)
    return -taken.sum()


def exchanged(program: jax.stages.Compiled) -> collections.Counter:
    """How often which kind of exchange between devices is in a program."""
    kinds = "all-reduce|all-gather|all-to-all|collective-[a-z]+|reduce-scatter"
    return collections.Counter(
        re.findall(rf"= .* ({kinds})(?:-start)?\(", program.as_text())
    )


def told(counts: collections.Counter) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in counts.items()) or "no exchange"


def assert_close(got, want) -> None:
    for pair in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        one, other = map(np.asarray, pair)
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * np.abs(other).max())


def compiled(function, *arguments) -> tuple[jax.stages.Compiled, tuple]:
    program = jax.jit(function).lower(*arguments).compile()
    return program, program(*arguments)


@functools.cache
def gradients_on_one(length: int):
    graph, params = nnx.split(make_model())
    tokens, ids = draw_rows(length)

    def total(params):
        return loss(nnx.merge(graph, params)(tokens, segment_ids=ids), tokens)

    return compiled(jax.value_and_grad(total), params)[1]


@precise
def training_by_heads() -> str:
    """A loss and its gradients, of a model that `tensor_parallel` has divided."""
    length = 300 if ON_GPU else 24
    tokens, ids = draw_rows(length)
    model = mamba2.tensor_parallel(make_model(), make_mesh("model"), "model")
    graph, params = nnx.split(model)

    def total(params):
        return loss(nnx.merge(graph, params)(tokens, segment_ids=ids), tokens)

    program, (value, gradients) = compiled(jax.value_and_grad(total), params)
    want, whole = gradients_on_one(length)
    assert_close(value, want)
    for where, gradient in nnx.to_flat_state(gradients):
        other = dict(nnx.to_flat_state(whole))[where][...]
        if where[0] == "layers":
            mixer = model.layers[where[1]].mixer
            if "in_proj" in where:
                other = other[..., mixer.in_proj_order]
            elif "conv" in where:
                other = other[mixer.conv_order]
        assert_close(gradient[...], other)
    counts = exchanged(program)
    assert "all-to-all" not in counts and counts["all-reduce"], counts
    return f"as on one device; {told(counts)} for {LAYERS} layers"


@precise
def training_by_time() -> str:
    """A loss and its gradients, of rows each device has a part of."""
    length = 512 if ON_GPU else 24
    tokens, ids = draw_rows(length)
    graph, params = nnx.split(make_model())
    rows = P(None, "time")

    def part(params, tokens, ids):
        model = nnx.merge(graph, params)
        logits = model(tokens, segment_ids=ids, axis_name="time")
        return jax.lax.psum(loss(logits, tokens), "time")

    total = jax.shard_map(
        part, mesh=make_mesh("time"), in_specs=(P(), rows, rows), out_specs=P()
    )
    program, got = compiled(jax.value_and_grad(total), params, tokens, ids)
    assert_close(got, gradients_on_one(length))
    counts = exchanged(program)
    assert counts["collective-permute"], counts
    return f"as on one device; {told(counts)} for {LAYERS} layers"


def tokens_of(engine: mamba2.Engine, steps: int = 16) -> list[list[int]]:
    """What an engine makes of greedy and drawn requests, some of them paused."""
    rng, generations = np.random.default_rng(1), []
    for i in range(24):
        prompt = rng.integers(0, SIZES["vocab_size"], rng.integers(1, 40))
        sampling = mamba2.SamplingParams(temperature=i % 2, top_k=50, top_p=0.9)
        generations.append(engine.submit(mamba2.Request(prompt, steps, sampling)))
    sampling = mamba2.SamplingParams(temperature=1.0, seed=3)
    request = mamba2.Request(range(20), steps, sampling)
    generations += engine.submit(request, n=3)
    for _ in range(4):
        engine.step()
    paused = [g.id for g in generations[:9] if engine.pause(g.id)]
    engine.run()
    assert paused and all(map(engine.resume, paused))
    engine.run()
    return [generation.tokens for generation in generations]


def make_engine(model: mamba2.Mamba2LM, **options) -> mamba2.Engine:
    return mamba2.Engine(
        model,
        num_slots=8,
        max_tokens_per_step=64,
        token_buckets=[64],
        decode_buckets=[8],
        prefix_slots=4,
        prefix_block=4,
        **options,
    )


@functools.cache
def tokens_on_one() -> list[list[int]]:
    return tokens_of(make_engine(make_model()))


@precise
def engine_by_heads() -> str:
    """The engine's tokens, of a model that `tensor_parallel` has divided."""
    model = mamba2.tensor_parallel(make_model(), make_mesh("model"), "model")
    engine = make_engine(model)
    assert tokens_of(engine) == tokens_on_one()
    counts = [exchanged(step) for step in engine._device.executables.values()]
    assert all(count["all-reduce"] <= 2 * LAYERS + 2 for count in counts), counts
    return f"the same tokens; {told(counts[0])} a step for {LAYERS} layers"


@precise
def engine_by_requests() -> str:
    """The engine's tokens, where each device has requests of its own."""
    engine = make_engine(make_model(), mesh=make_mesh("data"), data_axis="data")
    assert tokens_of(engine) == tokens_on_one()
    assert {g.share for g in engine.stats.requests} == set(range(DEVICES))
    counts = [exchanged(step) for step in engine._device.executables.values()]
    assert not any(counts), counts
    return f"the same tokens; {told(counts[0])} a step"


CHECKS = (training_by_heads, training_by_time, engine_by_heads, engine_by_requests)


def main() -> None:
    if len(jax.devices()) < DEVICES:
        raise SystemExit(f"needs {DEVICES} devices, got {jax.devices()}")
    for check in CHECKS:
        began = time.perf_counter()
        name, found = check.__name__, check()
        print(f"{name}: {found} ({time.perf_counter() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
