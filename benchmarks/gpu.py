"""Device time of the kernels on an NVIDIA GPU: `python -m benchmarks.gpu`.

Results are compared with the XLA implementation before they are timed, but for the
largest dense batch. Times are summed over the kernels of a call, from the profiler,
each kernel's the median over calls; GB/s counts every byte that must move once. The
ceiling is a device-to-device copy of 1 GB in the same run. Every call gets the same
arrays: small cases may find them in the L2 cache.
"""

import argparse
import collections
import dataclasses
import functools
import glob
import json
import statistics
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal_conv import (
    build_metadata,
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
)

DIM, WIDTH, SLOTS = 5376, 4, 1024
DTYPE = jnp.bfloat16


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        suite, case: what was run.
        microseconds: device time of a call, all its kernels.
        gigabytes_per_second: bytes that must move over that time.
        error: largest difference from XLA over the largest value.
        kernels: kernels launched by a call.
    """

    suite: str
    case: str
    microseconds: float
    gigabytes_per_second: float
    error: float
    kernels: float


def device_time(call, calls: int) -> tuple[float, float]:
    """Median microseconds of all kernels of one call, and how many there are."""
    for _ in range(3):
        jax.block_until_ready(call())
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                result = call()
            jax.block_until_ready(result)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(path)
    durations = collections.defaultdict(list)
    for plane in data.planes:
        if "/device:GPU" in plane.name:
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        durations[event.name].append(event.duration_ns / 1e3)
    total = sum(statistics.median(d) * len(d) for d in durations.values())
    return total / calls, sum(map(len, durations.values())) / calls


def normal(rng, *shape):
    return jnp.asarray(rng.standard_normal(shape, np.float32), DTYPE)


def difference(got, expected) -> float:
    """The largest difference over the largest value, over all arrays."""
    errors = []
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        exact = b.astype(jnp.float32)
        error = jnp.abs(a.astype(jnp.float32) - exact).max()
        errors.append(float(error / jnp.abs(exact).max()))
    return float(np.max(errors))  # NaN stays NaN


def copy(rng, megabytes: int):
    """The ceiling: a copy that reads and writes `megabytes` each."""
    x = normal(rng, megabytes << 19)
    return functools.partial(jax.jit(jnp.copy), x), 2 * x.nbytes, 0.0


def packed(rng, lengths: list[int]):
    """One packed step with prebuilt metadata and a donated cache."""
    x = normal(rng, sum(lengths), DIM)
    weight, bias = normal(rng, DIM, WIDTH), normal(rng, DIM)
    states = normal(rng, SLOTS, WIDTH - 1, DIM)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    slots = jnp.asarray(rng.permutation(SLOTS)[: len(lengths)].astype(np.int32))
    batch = {
        "cache_indices": slots,
        "has_initial_state": jnp.ones(len(lengths), bool),
        "metadata": jax.tree.map(jnp.asarray, build_metadata(offsets, x.shape[0])),
    }
    args = (weight, bias)
    offsets = jnp.asarray(offsets)
    expected = jax.jit(functools.partial(causal_conv1d_fn, implementation="xla"))(
        x, *args, states, offsets, **batch
    )
    step = jax.jit(causal_conv1d_fn, donate_argnames="conv_states")
    nbytes = 2 * x.nbytes + 2 * len(lengths) * states.nbytes // SLOTS
    holder = [states]

    def call():
        out, holder[0] = step(x, *args, holder[0], offsets, **batch)
        return out

    error = difference((call(), holder[0]), expected)
    return call, nbytes, error


def update(rng, batch: int):
    """One decode step with slot indices and a donated cache."""
    x = normal(rng, batch, DIM)
    weight, bias = normal(rng, DIM, WIDTH), normal(rng, DIM)
    states = normal(rng, SLOTS, WIDTH - 1, DIM)
    slots = jnp.asarray(rng.permutation(SLOTS)[:batch].astype(np.int32))
    expected = causal_conv1d_update(
        x,
        states,
        weight,
        bias,
        "silu",
        conv_state_indices=slots,
        implementation="xla",
    )
    step = jax.jit(
        functools.partial(causal_conv1d_update, activation="silu"),
        donate_argnames="conv_state",
    )
    nbytes = 2 * x.nbytes + 2 * batch * states.nbytes // SLOTS
    holder = [states]

    def call():
        out, holder[0] = step(x, holder[0], weight, bias, conv_state_indices=slots)
        return out

    error = difference((call(), holder[0]), expected)
    return call, nbytes, error


def dense(rng, batch: int, length: int, backward: bool):
    """The dense op, or its gradients in x, weight and bias."""
    x, dy = normal(rng, batch, length, DIM), normal(rng, batch, length, DIM)
    weight, bias = normal(rng, DIM, WIDTH), normal(rng, DIM)

    def step(implementation):
        def forward(x, weight, bias):
            return causal_conv1d(
                x, weight, bias, activation="silu", implementation=implementation
            )

        if not backward:
            return jax.jit(lambda dy, *args: forward(*args))
        return jax.jit(lambda dy, *args: jax.vjp(forward, *args)[1](dy))

    args = (dy, x, weight, bias)
    call = functools.partial(step(None), *args)
    error = float("nan")  # the longest is not compared
    if batch * length <= 16384:
        error = difference(call(), step("xla")(*args))
    return call, (3 if backward else 2) * x.nbytes, error


def suites():
    """(suite, case, maker of a call) of everything that is timed."""
    for megabytes in (16, 64, 1024):
        yield "copy", f"{megabytes} MB", functools.partial(copy, megabytes=megabytes)
    for tokens in (2048, 8000, 32768, 131072):
        yield "prefill", f"{tokens}", functools.partial(packed, lengths=[tokens])
    for name, lengths in {
        "252 x 1 + 4 x 449": [1] * 252 + [449] * 4,
        "32 x 1 + 8 x 1020": [1] * 32 + [1020] * 8,
        "256 x 1": [1] * 256,
    }.items():
        yield "mixed", name, functools.partial(packed, lengths=lengths)
    for batch in (1, 16, 64, 256, 1024):
        yield "decode", f"{batch}", functools.partial(update, batch=batch)
    for backward in (False, True):
        name = "dense backward" if backward else "dense forward"
        for batch, length in ((1, 8192), (8, 2048), (16, 8192)):
            maker = functools.partial(
                dense, batch=batch, length=length, backward=backward
            )
            yield name, f"{batch} x {length}", maker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=30)
    parser.add_argument("--json", help="write the table to this file, too")
    args = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("no GPU is visible to jax")
    device = jax.devices()[0].device_kind
    print(f"{device}, jax {jax.__version__}, {DTYPE.__name__}, D {DIM}, W {WIDTH}")
    print(f"{'':34}{'us':>9}{'GB/s':>8}{'of copy':>9}{'error':>10}{'kernels':>9}")
    rows, ceiling = [], 0.0
    for suite, case, maker in suites():
        call, nbytes, error = maker(np.random.default_rng(0))
        time, kernels = device_time(call, args.calls)
        row = Row(suite, case, time, nbytes / time / 1e3, error, kernels)
        rows.append(row)
        if suite == "copy":
            ceiling = row.gigabytes_per_second
        print(
            f"{suite:15}{case:>19}{time:9.1f}{row.gigabytes_per_second:8.0f}"
            f"{row.gigabytes_per_second / ceiling:9.0%}{error:10.1e}{kernels:9.1f}"
        )
    if args.json:
        with open(args.json, "w") as file:
            table = [dataclasses.asdict(row) for row in rows]
            json.dump({"device": device, "jax": jax.__version__, "rows": table}, file)


if __name__ == "__main__":
    main()
