"""The suite of several devices: an engine's decode steps on one, and on all of them.

Requests have prompts of one token, so that all steps but the first few are decodes in
full batches. Engines are prepared at the same time, as compiling them takes longest.
"""

import statistics
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from benchmarks import serving
from benchmarks.cases import Case, Options, Row
from jax_causal_conv.mamba2 import Engine, Mamba2LM, tensor_parallel


def case(options: Options) -> Case:
    """Serves requests now, and reports."""
    count = len(jax.devices())
    if count < 2:
        raise ValueError(f"needs several devices, got {jax.devices()}")
    config, dtype = serving.SHAPES[options.shape], options.all_dtypes[0]
    slots, new = (128, 128) if options.on_gpu else (4, 8)
    # A model's heads may not divide among all devices.
    parts = np.gcd(count, config.expand * config.d_model // config.headdim)
    devices = np.array(jax.devices())
    model = Mamba2LM(config, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    by_requests = {"mesh": Mesh(devices, ("data",)), "data_axis": "data"}
    heads = Mesh(devices[:parts], ("model",))
    engines = {
        "1 device": lambda: _engine(model, slots),
        f"{count} devices by requests": lambda: _engine(model, slots, **by_requests),
        f"{parts} devices by heads": lambda: _engine(
            tensor_parallel(model, heads, "model"), slots
        ),
    }
    with ThreadPoolExecutor() as pool:
        prepared = dict(
            zip(engines, pool.map(lambda made: made(), engines.values()), strict=True)
        )
    name, rows = f"Mamba2 {options.shape}, {slots} slots a device", []
    alone = None
    for how, engine in prepared.items():
        requests = slots * max(step.devices for step in engine.stats.steps)
        engine.stats.steps.clear()
        serving.submit(engine, config, requests, new, longest=1)
        engine.run()
        full = [s for s in engine.stats.steps if s.decode_tokens == requests]
        low, median, high = np.percentile([s.seconds for s in full], [10, 50, 90])
        host = statistics.median(s.host_seconds for s in full) * 1e6
        speed = requests / median
        alone = alone or speed
        note = (
            f"{speed:,.0f} tokens a second, {speed / alone:.2f} of one device's; the "
            f"host's part {host:,.0f} us"
        )
        times = (1e6 * median, 1e6 * low, 1e6 * high)
        rows.append(
            Row(
                "scaling", name, count, dtype, how, *times, len(full), "wall", note=note
            )
        )
    return Case("scaling", name, count, dtype, {}, rows=tuple(rows))


def _engine(model: Mamba2LM, slots: int, **options) -> Engine:
    """An engine that has compiled its decode step."""
    engine = Engine(
        model,
        num_slots=slots,
        max_tokens_per_step=slots,
        token_buckets=[slots],
        decode_buckets=[slots],
        **options,
    )
    serving.submit(engine, model.config, slots, 2, longest=1)
    engine.run()
    return engine
