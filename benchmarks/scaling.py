"""The suite of several devices: an engine's decode steps on one, and on all of them.

Requests have prompts of one token, so that all steps but the first few are decodes in
full batches. There is one engine at a time, so that a device need hold no other's
parameters and states.
"""

import functools
import gc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks import serving
from benchmarks.cases import Case, Options, Row
from jax_causal_conv.mamba2 import (
    Engine,
    Mamba2Config,
    Mamba2LM,
    Request,
    StepStats,
    tensor_parallel,
)


def case(options: Options) -> Case:
    """One for all ways to use the devices; it serves when its turn has come."""
    count = len(jax.devices())
    if count < 2:
        raise ValueError(f"needs several devices, got {jax.devices()}")
    slots, new = (128, 128) if options.on_gpu else (4, 8)
    name, dtype = f"Mamba2 {options.shape}, {slots} slots", options.all_dtypes[0]
    row = functools.partial(Row, "scaling", name, count, dtype)
    config = serving.SHAPES[options.shape]
    measure = functools.partial(_measure, config, dtype, slots, new, row)
    return Case("scaling", name, count, dtype, {}, measure=measure)


def _measure(
    config: Mamba2Config, dtype: str, slots: int, new: int, row: Callable[..., Row]
) -> list[Row]:
    devices = np.array(jax.devices())
    count = len(devices)
    # A model's heads may not divide among all devices.
    parts = np.gcd(count, config.expand * config.d_model // config.headdim)
    model = Mamba2LM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    by_requests = {"mesh": Mesh(devices, ("data",)), "data_axis": "data"}
    heads = Mesh(devices[:parts], ("model",))
    ways: dict[str, Callable[[], Engine]] = {
        "1 device": lambda: _engine(model, slots),
        f"{count} devices by requests": lambda: _engine(model, slots, **by_requests),
        f"{parts} devices by heads": lambda: _engine(
            tensor_parallel(model, heads, "model"), slots
        ),
    }
    rows: list[Row] = []
    alone = 0.0
    for how, made in ways.items():
        requests, full = _full_steps(made, config, slots, new)
        low, median, high = np.percentile([1e6 * s.seconds for s in full], [10, 50, 90])
        speed = requests / median * 1e6
        alone = alone or speed
        note = f"{speed / alone:.2f} of one device's; {serving.by_host(full)}"
        rows.append(
            row(
                how,
                median,
                low,
                high,
                len(full),
                "wall",
                note=note,
                tokens_per_second=speed,
            )
        )
    return rows


def _full_steps(
    made: Callable[[], Engine], config: Mamba2Config, slots: int, new: int
) -> tuple[int, list[StepStats]]:
    """How many requests an engine serves at a time, and its steps with all of them."""
    gc.collect()  # the caches of the engine before, which must go first
    engine = made()
    requests = slots * max(step.devices for step in engine.stats.steps)
    engine.stats.steps.clear()
    _submit(engine, config, requests, new)
    engine.run()
    return requests, [s for s in engine.stats.steps if s.decode_tokens == requests]


def _engine(model: Mamba2LM, slots: int, **options: Any) -> Engine:
    """An engine that has compiled its decode step."""
    engine = Engine(
        model,
        num_slots=slots,
        max_tokens_per_step=slots,
        token_buckets=[slots],
        decode_buckets=[slots],
        **options,
    )
    _submit(engine, model.config, slots, 2)
    engine.run()
    return engine


def _submit(engine: Engine, config: Mamba2Config, requests: int, new: int) -> None:
    rng = np.random.default_rng(0)
    for token in rng.integers(0, config.vocab_size, requests):
        engine.submit(Request([token], max_new_tokens=new))
