"""The end-to-end suite: a Mamba2 model with random weights in the engine.

The shares of the conv and the SSD in a step are read from a profile on a GPU: the
durations of this package's kernels over those of all kernels, in the same steps; where
none of them ran, XLA computed the op, and the row says so. On a CPU, where XLA
fuses the conv with its neighbours, no profile can tell; there it is the time of a
jitted program of the convs alone (all layers, the step's shapes, donated caches) over
that of the step: what the conv would cost by itself.
"""

import functools
import re
import statistics
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from benchmarks import timing
from benchmarks.cases import Case, Options, Row
from benchmarks.timing import Prepared
from benchmarks.workload import Workload
from jax_causal_conv import build_metadata, causal_conv1d_fn
from jax_causal_conv.mamba2 import Engine, Mamba2Config, Mamba2LM, Request

# The published sizes of state-spaces/mamba2-*, their vocabulary padded to 50,288.
SHAPES = {
    "tiny": Mamba2Config(vocab_size=1024, d_model=256, n_layers=4, chunk_size=16),
    "130m": Mamba2Config(vocab_size=50288, d_model=768, n_layers=24),
    "780m": Mamba2Config(vocab_size=50288, d_model=1536, n_layers=48),
    "2.7b": Mamba2Config(vocab_size=50288, d_model=2560, n_layers=64),
}

# How the kernels of this package are called in a profile.
_KERNELS = {
    "conv": re.compile(r"^(packed|update|dense|rows)(_backward)?_kernel"),
    "SSD": re.compile(r"^(ssd_)?(decode|prepare|chunks)_kernel"),
}


def case(options: Options) -> Case:
    """Serves requests now, and reports."""
    config = SHAPES[options.shape]
    slots, budget, new_tokens = (128, 2048, 128) if options.on_gpu else (16, 128, 32)
    dtype = options.all_dtypes[0]
    model = Mamba2LM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    # Two shapes alone: each is compiled, which takes a large model minutes.
    engine = Engine(
        model,
        num_slots=slots,
        max_tokens_per_step=budget,
        max_prefills_per_step=budget // 128,
        token_buckets=[budget],
        decode_buckets=[slots],
    )
    engine.warmup()
    name = f"Mamba2 {options.shape}, {slots} slots"
    row = functools.partial(Row, "engine", name, slots, dtype)
    # Prompts of one token: all rows decode from the second step on.
    submit(engine, config, slots, new_tokens, longest=1)
    engine.run()
    decode = _row(engine, row, "decode step")
    engine.stats.steps.clear()
    submit(engine, config, 2 * slots, new_tokens, longest=255)
    engine.run()
    rows = [decode, _row(engine, row, "step with prefill"), _throughput(engine, row)]
    if options.on_gpu:
        shares = _shares_by_profile(engine, config, slots)
        how = "of the durations of all kernels"
    else:
        shares = {
            "conv": _share_alone(config, slots, dtype, decode.microseconds or 0.0)
        }
        how = "the convs run alone"
    for op, share in shares.items():
        note = f"{share:.1%}, {how}" if share else "none of our kernels ran: by XLA"
        rows.append(row(f"{op} in a decode step", note=note))
    return Case("engine", name, slots, dtype, {}, rows=tuple(rows))


def submit(engine: Engine, config: Mamba2Config, requests: int, new: int, longest: int):
    """Requests for `new` tokens each, with random prompts of up to `longest`."""
    rng = np.random.default_rng(0)
    for _ in range(requests):
        prompt = rng.integers(0, config.vocab_size, rng.integers(1, longest + 1))
        engine.submit(Request(prompt, max_new_tokens=new))


def _row(engine: Engine, row: Callable[..., Row], name: str) -> Row:
    """Wall time of the steps that only decode in full batches, or of all others."""
    steps = list(engine.stats.steps)
    if name == "decode step":
        slots = max(step.running for step in steps)
        own = [step for step in steps if step.decode_tokens == slots]
    else:
        own = [step for step in steps if step.prefill_tokens]
    low, median, high = np.percentile([s.seconds for s in own], [10, 50, 90]) * 1e6
    tokens = statistics.mean(s.decode_tokens + s.prefill_tokens for s in own)
    host = statistics.median(s.host_seconds for s in own) * 1e6
    note = f"{tokens:.0f} tokens; the host's part {host:,.0f} us"
    return row(name, median, low, high, len(own), "wall", note=note)


def _throughput(engine: Engine, row: Callable[..., Row]) -> Row:
    steps = list(engine.stats.steps)
    seconds = sum(s.seconds for s in steps)
    drawn = sum(s.decode_tokens for s in steps)
    read = sum(s.prefill_tokens for s in steps)
    note = (
        f"{drawn / seconds:,.0f} decoded and {read / seconds:,.0f} prompt tokens a "
        f"second, over {seconds:.1f} s"
    )
    return row("throughput", note=note)


def _shares_by_profile(
    engine: Engine, config: Mamba2Config, slots: int
) -> dict[str, float]:
    submit(engine, config, slots, 64, longest=1)
    for _ in range(5):
        engine.step()
    _, kernels = timing.device_kernels(Prepared(engine.step, lambda _: None), 20)
    engine.run()
    everything = sum(map(sum, kernels.values()))
    return {
        op: sum(sum(times) for name, times in kernels.items() if pattern.search(name))
        / everything
        for op, pattern in _KERNELS.items()
    }


def _share_alone(config: Mamba2Config, slots: int, dtype: str, step: float) -> float:
    dim = config.d_inner + 2 * config.n_groups * config.d_state
    work = Workload("packed", (1,) * slots, dim, config.d_conv, dtype, slots + 1)
    metadata = build_metadata(work.offsets, work.tokens)

    @functools.partial(jax.jit, donate_argnums=0)
    def convs(caches, x, weight, bias):
        results = [
            causal_conv1d_fn(
                x,
                weight,
                bias,
                cache,
                work.offsets,
                cache_indices=work.cache_indices,
                has_initial_state=work.has_initial_state,
                metadata=metadata,
            )
            for cache in caches
        ]
        return [out for out, _ in results], [cache for _, cache in results]

    holder = [[work.states() for _ in range(config.n_layers)]]

    def call():
        outs, holder[0] = convs(holder[0], work.x, work.weight, work.bias)
        return outs

    timing.median_seconds(call, 3)
    return timing.median_seconds(call, 50) * 1e6 / step
