"""Forward and backward of the dense op against a depthwise `nnx.Conv` and silu.

`python -m benchmarks.training`: both compute the same function of the same arrays and
their gradients in x, weight and bias; results are compared before they are timed, and
runs are interleaved. Needs flax.
"""

import argparse
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_causal_conv import causal_conv1d

WIDTH = 4


def seconds(function, *args):
    """Wall time of one finished call, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def compare(batch: int, length: int, dim: int, dtype, repeats: int):
    """Median seconds of nnx.Conv and of ours, and the largest relative difference."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    x, dy = normal(batch, length, dim), normal(batch, length, dim)
    weight, bias = normal(dim, WIDTH), normal(dim)
    layer = nnx.Conv(
        dim,
        dim,
        WIDTH,
        padding=((WIDTH - 1, 0),),
        feature_group_count=dim,
        dtype=dtype,
        param_dtype=dtype,
        rngs=nnx.Rngs(0),
    )
    graph, _ = nnx.split(layer)

    def flax_conv(x, weight, bias):
        state = nnx.State({"kernel": weight.T[:, None], "bias": bias})
        return jax.nn.silu(nnx.merge(graph, state)(x))

    def ours(x, weight, bias):
        return causal_conv1d(x, weight, bias, activation="silu")

    def step(function):
        def forward_backward(x, weight, bias, dy):
            out, pull = jax.vjp(function, x, weight, bias)
            return out, *pull(dy)

        return jax.jit(forward_backward)

    peer, own = step(flax_conv), step(ours)
    _, expected = seconds(peer, x, weight, bias, dy)
    _, got = seconds(own, x, weight, bias, dy)
    error = max(
        float(jnp.linalg.norm((a - b).astype(jnp.float32)))
        / float(jnp.linalg.norm(a.astype(jnp.float32)))
        for a, b in zip(expected, got, strict=True)
    )
    times = [
        [seconds(f, x, weight, bias, dy)[0] for f in (peer, own)]
        for _ in range(repeats)
    ]
    return *(statistics.median(t) for t in zip(*times, strict=True)), error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--dim", type=int, default=5376)
    args = parser.parse_args()
    shape = (args.batch, args.length, args.dim)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, x {shape}, W = 4")
    for dtype in (jnp.float32, jnp.bfloat16):
        peer, own, error = compare(*shape, dtype, args.repeats)
        print(
            f"{jnp.dtype(dtype).name:9} nnx.Conv + silu {peer:.3f} s   ours {own:.3f} s"
            f"   {peer / own:5.1f} x faster   relative difference {error:.1e}"
        )


if __name__ == "__main__":
    main()
