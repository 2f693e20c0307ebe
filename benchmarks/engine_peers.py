"""What a user of PyTorch would run instead of the engine: mamba_ssm's model and loop.

It serves one batch of equally long prompts from beginning to end: no request joins or
leaves, nothing is drafted or cached. Its decode steps are replayed as a CUDA graph, and
its states have the dtype of its weights.
"""

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks import imports
from benchmarks.cases import Options, Row
from benchmarks.tensors import Torch
from jax_causal_conv.mamba2 import Mamba2Config

_STEPS = 64
_REPEATS = 5


def measure(
    config: Mamba2Config,
    slots: int,
    prompts: tuple[int, int],
    options: Options,
    row: Callable[..., Row],
) -> list[Row]:
    """Greedy decode steps, and a batch of prompts; wall time.

    Args:
        config: of a model with random weights.
        slots: sequences that are decoded at a time.
        prompts: how many are read at a time, and of how many tokens each.
        options: where the packages are, and the weights' dtype.
        row: makes a row of the results.
    """
    if not (options.with_peers and options.on_gpu):
        return []
    try:
        return list(_rows(config, slots, prompts, options, row))
    except imports.Absent:
        return []
    except Exception as error:  # a peer may fail in any way
        return [row("mamba_ssm", note=f"failed: {type(error).__name__}: {error}")]


def _rows(
    config: Mamba2Config,
    slots: int,
    prompts: tuple[int, int],
    options: Options,
    row: Callable[..., Row],
) -> Iterator[Row]:
    torch, dtype = Torch().torch, options.all_dtypes[0]
    with _modules(options) as (sizes, models):
        model = models.MambaLMHeadModel(
            _as_theirs(config, sizes.MambaConfig),
            device="cuda",
            dtype=getattr(torch, dtype),
        )

        def seconds(count: int, length: int, new: int, **graph: bool) -> float:
            """Of a batch: its prompts are read, and so many tokens drawn for each."""
            tokens = torch.randint(config.vocab_size, (count, length), device="cuda")
            torch.cuda.synchronize()
            began = time.perf_counter()
            model.generate(tokens, length + new, top_k=1, **graph)
            torch.cuda.synchronize()
            return time.perf_counter() - began

        def step() -> float:
            short, long = (seconds(slots, 1, n, cg=True) for n in (8, 8 + _STEPS))
            return (long - short) / _STEPS

        def read() -> float:
            return seconds(*prompts, 1)

        seconds(slots, 1, 8 + _STEPS, cg=True)  # The longest first: it fixes the graph.
        for name, tokens, call in (
            ("decode step of mamba_ssm", slots, step),
            ("prompts of mamba_ssm", prompts[0] * prompts[1], read),
        ):
            call()  # compiles, and chooses among its kernels
            times = sorted(1e6 * call() for _ in range(_REPEATS))
            median = statistics.median(times)
            yield row(
                name,
                median,
                times[0],
                times[-1],
                _REPEATS,
                "wall",
                note=f"{tokens:,} tokens; {dtype} states",
                tokens_per_second=tokens / median * 1e6,
            )


def _as_theirs(config: Mamba2Config, made: Callable[..., Any]) -> Any:
    mixer = {
        "layer": "Mamba2",
        "d_state": config.d_state,
        "d_conv": config.d_conv,
        "expand": config.expand,
        "headdim": config.headdim,
        "ngroups": config.n_groups,
    }
    return made(
        d_model=config.d_model,
        n_layer=config.n_layers,
        vocab_size=config.vocab_size,
        ssm_cfg=mixer,
        tie_embeddings=config.tie_embeddings,
    )


@contextlib.contextmanager
def _modules(options: Options) -> Iterator[tuple[Any, Any]]:
    """The modules of its configuration and of its model.

    From a path, a source tree will do: only Mamba1 needs the compiled extension.
    """
    path = options.paths.get("mamba-ssm")
    if "causal-conv1d" in options.paths:
        imports.load("causal_conv1d", options.paths["causal-conv1d"])
    with contextlib.ExitStack() as stack:
        if path is not None:
            stack.enter_context(imports.stand_in("mamba_ssm", {}, path))
            stack.enter_context(imports.stand_in("selective_scan_cuda", {}))
        yield (
            imports.load("mamba_ssm.models.config_mamba", path),
            imports.load("mamba_ssm.models.mixer_seq_simple", path),
        )
