"""The op against `silu(x)` on the same array: `python -m benchmarks.mixed`.

2,048 packed tokens of 5,376 channels, W = 4, bias, silu, a donated cache of 512 slots:
252 decodes + 4 prefills, one prefill, or 256 decodes; medians of interleaved runs.
`copies` counts copies and converts of the cache's size in the optimised HLO.
"""

import argparse
import re
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal_conv import build_metadata, causal_conv1d_fn

TOKENS, DIM, WIDTH, SLOTS = 2048, 5376, 4, 512
WORKLOADS = {
    "mixed": [1] * 252 + [449] * 4,
    "prefill": [TOKENS],
    "decode": [1] * 256,
}


def seconds(function, *args):
    """Wall time of one finished call, and its result."""
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def cache_copies(hlo: str, shape: tuple[int, ...]) -> int:
    """Copies and converts of `shape`, or its rows flattened, in HLO text."""
    flat = (shape[0] * shape[1], shape[2])
    sizes = "|".join(re.escape(",".join(map(str, s))) for s in (shape, flat))
    return len(re.findall(rf"\[(?:{sizes})\]\S* (?:copy|convert)\(", hlo))


def compare(lengths: list[int], dtype, repeats: int) -> tuple[float, float, float, int]:
    """Median seconds of silu and of the op, spread of the ratio, cache copies."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape, np.float32), dtype)

    x = normal(sum(lengths), DIM)
    weight, bias = normal(DIM, WIDTH), normal(DIM)
    states = normal(SLOTS, WIDTH - 1, DIM)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    slots = rng.permutation(SLOTS)[: len(lengths)].astype(np.int32)
    seen = np.ones(len(lengths), bool)
    metadata = build_metadata(offsets, x.shape[0])

    def conv(states, x):
        return causal_conv1d_fn(
            x,
            weight,
            bias,
            states,
            offsets,
            cache_indices=slots,
            has_initial_state=seen,
            metadata=metadata,
        )

    silu = jax.jit(jax.nn.silu)
    step = jax.jit(conv, donate_argnums=0).lower(states, x).compile()
    copies = cache_copies(step.as_text(), states.shape)
    baseline, ours = [], []
    for i in range(repeats + 2):
        t0, _ = seconds(silu, x)
        t1, (_, states) = seconds(step, states, x)
        if i >= 2:
            baseline.append(t0)
            ours.append(t1)
    ratios = sorted(b / a for a, b in zip(baseline, ours, strict=True))
    spread = (ratios[int(0.9 * repeats)] - ratios[int(0.1 * repeats)]) / 2
    return statistics.median(baseline), statistics.median(ours), spread, copies


def metadata_seconds(num_seqs: int, repeats: int = 50) -> float:
    """Median host time of build_metadata."""
    offsets = np.arange(num_seqs + 1, dtype=np.int32) * 3
    times = [
        seconds(build_metadata, offsets, int(offsets[-1]))[0] for _ in range(repeats)
    ]
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=30)
    repeats = parser.parse_args().repeats
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {repeats} runs each")
    print(f"{'':18}{'silu ms':>9}{'conv ms':>9}{'ratio':>7}{'±':>6}{'copies':>8}")
    for name, lengths in WORKLOADS.items():
        for dtype in (jnp.float32, jnp.bfloat16):
            silu, conv, spread, copies = compare(lengths, dtype, repeats)
            print(
                f"{name:9}{jnp.dtype(dtype).name:9}{silu * 1e3:9.2f}{conv * 1e3:9.2f}"
                f"{conv / silu:7.2f}{spread:6.2f}{copies:8}"
            )
    host = metadata_seconds(4096) * 1e3
    print(f"build_metadata on the host, 4,096 sequences: {host:.3f} ms")


if __name__ == "__main__":
    main()
