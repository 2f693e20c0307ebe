"""The end-to-end suite: a Mamba2 model with random weights in the engine.

Decode steps and steps with prompts, with float32 and with bfloat16 states; prompts that
begin alike, with and without hits in the prefix cache; drafts of which a known share is
right; and decode steps and prompts of mamba_ssm's own model.

What a step's time goes to is read from a profile on a GPU: the durations of all kernels
by what they are for, and the rest of the step's wall time, in which the GPU waits for
the host. On a CPU, where XLA fuses the conv with its neighbours, no profile can tell.
There it is the time of a jitted program of the convs alone (all layers, the step's
shapes, donated caches): what the conv would cost by itself.
"""

import contextlib
import dataclasses
import functools
import gc
import itertools
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import engine_peers, timing
from benchmarks.cases import Case, Options, Row
from benchmarks.timing import Prepared
from benchmarks.workload import Workload
from jax_causal_conv import build_metadata, causal_conv1d_fn
from jax_causal_conv.mamba2 import (
    Engine,
    Mamba2Config,
    Mamba2LM,
    NgramDraft,
    Request,
)
from jax_causal_conv.mamba2.engine.stats import StepStats
from jax_causal_conv.mamba2.sampling import sample

# The published sizes of state-spaces/mamba2-*, their vocabulary padded to 50,288.
SHAPES = {
    "tiny": Mamba2Config(vocab_size=1024, d_model=256, n_layers=4, chunk_size=16),
    "130m": Mamba2Config(vocab_size=50288, d_model=768, n_layers=24),
    "780m": Mamba2Config(vocab_size=50288, d_model=1536, n_layers=48),
    "2.7b": Mamba2Config(vocab_size=50288, d_model=2560, n_layers=64),
}

# What kernels of a profile are for, by their names: the first that fits.
_KERNELS = {
    "conv": re.compile(r"^(packed|update|dense|rows)(_backward)?_kernel"),
    "SSD": re.compile(r"^(decode|prepare|chunks|recent)_kernel"),
    "matmuls": re.compile(r"gemm|gemv|nvjet|cutlass|xmma|splitk|dot", re.IGNORECASE),
}
PARTS = (*_KERNELS, "sampling", "other kernels", "host, and gaps")
"""What a step's time is divided into."""

_CYCLE = 8  # divides the vocabularies
_SKIPPED = 3  # steps of a load, before the ones that are timed


@dataclasses.dataclass(frozen=True)
class Load:
    """What is served.

    Attributes:
        slots: requests at a time.
        budget: tokens of a step.
        new_tokens: that a request draws.
        longest: tokens of a prompt, at most.
        shared, own: tokens with which prompts begin alike, and that follow.
        prompts: so many of them.
        block: of the prefix cache.
        drafts: guesses a step.
        steps: that are timed with drafts.
    """

    slots: int
    budget: int
    new_tokens: int
    longest: int = 255
    shared: int = 448
    own: int = 64
    prompts: int = 128
    block: int = 64
    drafts: int = 4
    steps: int = 30


GPU_LOAD = Load(128, 2048, 128)
CPU_LOAD = Load(16, 256, 32, shared=112, own=16, prompts=32, block=16)


def cases(options: Options) -> Iterator[Case]:
    """All cases of the suite; each serves its requests when its turn has come."""
    load = GPU_LOAD if options.on_gpu else CPU_LOAD
    dtype = options.all_dtypes[0]
    serving = Serving(SHAPES[options.shape], load, dtype, options.on_gpu)
    for part, measure in {
        "float32 states": functools.partial(serving.steps, "float32"),
        "bfloat16 states": functools.partial(serving.steps, "bfloat16"),
        "prefix cache": serving.prefixes,
        "drafts": serving.drafts,
        "in PyTorch": functools.partial(serving.beside, options),
    }.items():
        name = f"Mamba2 {options.shape}, {load.slots} slots, {part}"
        row = functools.partial(Row, "engine", name, load.slots, dtype)
        yield Case(
            "engine",
            name,
            load.slots,
            dtype,
            {},
            measure=functools.partial(measure, row),
        )


NewRow = Callable[..., Row]


class Serving:
    """Engines of one model, one at a time."""

    def __init__(self, config: Mamba2Config, load: Load, dtype: str, on_gpu: bool):
        self.config = dataclasses.replace(config, tie_embeddings=False)
        self.load = load
        self.dtype = dtype
        self.on_gpu = on_gpu

    @functools.cached_property
    def model(self) -> Mamba2LM:
        """A model that repeats its text in cycles, so that drafts are right.

        The kernels have the same work as with any weights: what the layers add to the
        embeddings is made small, and the head is the embedding table, in which every
        token stands where the one before it in its cycle would.
        """
        model = Mamba2LM(
            self.config, dtype=self.dtype, param_dtype=self.dtype, rngs=nnx.Rngs(0)
        )
        for layer in model.layers:
            kernel = layer.mixer.out_proj.kernel
            kernel[...] = kernel[...] * 1e-3
        before = _in_cycle(np.arange(self.config.vocab_size), -1)
        model.lm_head.kernel[...] = model.embed.embedding[...][before].T
        return model

    def engine(self, budget: int | None = None, **options: Any) -> Engine:
        """An engine with few shapes: each is compiled, which takes a large model long.

        Shapes are compiled when they are first needed. `without_compiling` makes sure
        that this is before steps are timed, but for decode steps, whose median does not
        see it.
        """
        gc.collect()  # the caches of the engine before, which must go first
        budget = budget or self.load.budget
        return Engine(
            self.model,
            num_slots=self.load.slots,
            max_tokens_per_step=budget,
            token_buckets=[budget],
            decode_buckets=[self.load.slots],
            **options,
        )

    def prompts(self, count: int, longest: int) -> Iterator[np.ndarray]:
        """Random prompts of 1 to so many tokens."""
        rng = np.random.default_rng(0)
        for _ in range(count):
            length = rng.integers(1, longest + 1)
            yield rng.integers(0, self.config.vocab_size, length)

    # ---- Steps ---------------------------------------------------------------------

    def steps(self, ssm_dtype: str, row: NewRow) -> list[Row]:
        """Decode steps, and, for float32 states, steps with prompts; their parts."""
        load = self.load
        engine = self.engine(
            ssm_dtype=ssm_dtype, max_prefills_per_step=max(1, load.budget // 128)
        )
        # Prompts of one token: all rows decode from the second step on.
        self._submit(engine, load.slots, load.new_tokens, longest=1)
        engine.run()
        full = [s for s in engine.stats.steps if s.decode_tokens == load.slots]
        rows = [_timed(row("decode step"), full)]
        if ssm_dtype == "float32":
            # Once to compile the step.
            self._submit(engine, 1, 1, longest=load.longest)
            engine.run()
            with without_compiling(engine) as steps:
                self._submit(engine, 2 * load.slots, load.new_tokens, load.longest)
                engine.run()
            own = [step for step in steps if step.prefill_tokens]
            rows += [_timed(row("step with prompts"), own), _throughput(row, steps)]
        if not self.on_gpu:
            return [*rows, self._conv_alone(row, rows[0])]
        rows += self._parts(engine, row, "decode step", 1)
        if ssm_dtype == "float32":
            rows += self._parts(engine, row, "step with prompts", load.longest)
        return rows

    def _submit(self, engine: Engine, count: int, new: int, longest: int) -> None:
        for prompt in self.prompts(count, longest):
            engine.submit(Request(prompt, max_new_tokens=new))

    def _parts(self, engine: Engine, row: NewRow, what: str, longest: int) -> list[Row]:
        """What the time of steps goes to, with prompts up to so many tokens or none.

        A load is served twice, in the same steps: without a profiler, for the wall
        time, and with one. Steps of the other kind are in neither.
        """

        def begin():
            engine.stats.steps.clear()
            self._submit(engine, 2 * self.load.slots, 64, longest)
            for _ in range(_SKIPPED):
                engine.step()

        begin()
        engine.run()
        alike = itertools.takewhile(
            lambda step: bool(step.prefill_tokens) == (longest > 1),
            list(engine.stats.steps)[_SKIPPED:],
        )
        times = [step.seconds * 1e6 for step in alike][:20]
        count = len(times)
        begin()

        # The step that is under way must end before the profile begins, and the last
        # one in it.
        def wait(_: Any = None) -> None:
            time.sleep(0.3)

        wait()
        kernels = timing.device_kernels(Prepared(engine.step, wait), count)[1]
        engine.run()
        # All requests are greedy: decode steps have no sampler on a GPU.
        sampling = self._sampling(count) if longest > 1 else 0.0
        found = parts(kernels, count, sampling, statistics.mean(times))
        whole = sum(time for time, _ in found.values())
        rows = []
        for part, (spent, names) in found.items():
            ours = part in ("conv", "SSD")
            share = f"{spent / whole:.1%} of the step"
            rows.append(
                row(
                    f"{what}: {part}",
                    spent,
                    spent,
                    spent,
                    count,
                    note=", ".join(filter(None, (share, names))),
                    implementation=("Triton" if spent else "XLA") if ours else "",
                    fell_back=ours and not spent,
                )
            )
        return rows

    def _sampling(self, count: int) -> float:
        """Microseconds of the kernels that draw a token for each slot."""
        logits = jnp.zeros((self.load.slots, self.config.vocab_size), jnp.float32)
        none = jnp.zeros(self.load.slots)
        greedy = none.astype(jnp.uint32), none.astype(jnp.int32), none
        draw = functools.partial(
            jax.jit(sample), logits, *greedy, none.astype(jnp.int32), none + 1
        )
        jax.block_until_ready(draw())
        alone = timing.device_kernels(Prepared(draw), count)[1]
        return sum(map(sum, alone.values())) / count

    def _conv_alone(self, row: NewRow, step: Row) -> Row:
        config, slots = self.config, self.load.slots
        dim = config.d_inner + 2 * config.n_groups * config.d_state
        work = Workload(
            "packed", (1,) * slots, dim, config.d_conv, self.dtype, slots + 1
        )
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
        spent = timing.median_seconds(call, 50) * 1e6
        share = spent / (step.microseconds or spent)
        note = f"run alone, {share:.1%} of a decode step's time"
        return row("convs of a decode step", spent, spent, spent, 50, "wall", note=note)

    # ---- Texts that begin alike, and drafts ------------------------------------------

    def prefixes(self, row: NewRow) -> list[Row]:
        """Prompts of which nothing was read before, and ones that begin alike."""
        load, rng = self.load, np.random.default_rng(1)
        engine = self.engine(
            prefix_slots=max(load.slots // 4, 8),
            prefix_block=load.block,
            max_prefills_per_step=load.budget // load.own,
        )
        rows = []

        def read(count: int, shared: np.ndarray | None) -> None:
            for _ in range(count):
                own = self._tokens(rng, load.own)
                begin = self._tokens(rng, load.shared) if shared is None else shared
                prompt = np.concatenate([begin, own])
                engine.submit(Request(prompt, max_new_tokens=1))
            engine.run()

        common = self._tokens(rng, load.shared)
        for name, shared in (("missed", None), ("hit", common)):
            # Two, so that what they share is known; and all is compiled.
            read(2, shared)
            with without_compiling(engine) as steps:
                read(load.prompts, shared)
            seconds = sum(s.seconds for s in steps)
            tokens = load.prompts * (load.shared + load.own)
            spared = engine.stats.prefix_tokens / tokens
            made = _timed(row(f"steps with prompts, prefixes {name}"), steps)
            note = f"{made.note}; {spared:.1%} of the prompts' tokens from the cache"
            rows.append(
                dataclasses.replace(made, tokens_per_second=tokens / seconds, note=note)
            )
        return rows

    def _tokens(self, rng: np.random.Generator, count: int) -> np.ndarray:
        return rng.integers(0, self.config.vocab_size, count)

    def drafts(self, row: NewRow) -> list[Row]:
        """Decode steps with n-gram drafts, of which so many in each step are right."""
        load, rows = self.load, []
        draft = SpoiledDraft(self.config.vocab_size)
        engine = self.engine(
            load.slots * (1 + load.drafts),
            draft=draft,
            max_drafts=load.drafts,
            max_prefills_per_step=load.slots,
        )
        rng = np.random.default_rng(2)
        for right in dict.fromkeys((0, load.drafts // 2, load.drafts)):
            draft.right = right
            running = []
            for _ in range(load.slots):
                # Twice around the cycle: what follows is known from the first step on.
                steps = np.arange(2 * _CYCLE)
                prompt = _in_cycle(rng.integers(self.config.vocab_size), steps)
                running.append(engine.submit(Request(prompt, max_new_tokens=10**6)))
            while any(generation.prompt_left for generation in running):
                engine.step()
            for _ in range(_SKIPPED):
                engine.step()
            with without_compiling(engine) as steps:
                for _ in range(load.steps):
                    engine.step()
            stats = engine.stats
            made = _timed(
                row(f"decode step, {right} of {load.drafts} drafts right"), steps
            )
            note = (
                f"{made.note}; {stats.acceptance:.1%} of the drafts accepted, "
                f"{stats.tokens_per_step:.2f} tokens a request"
            )
            drawn = sum(s.decode_tokens + s.accepted_tokens for s in steps)
            seconds = sum(s.seconds for s in steps)
            rows.append(
                dataclasses.replace(made, tokens_per_second=drawn / seconds, note=note)
            )
            for generation in running:
                engine.cancel(generation.id)
            engine.run()
        return rows

    # ---- Another framework ---------------------------------------------------------

    def beside(self, options: Options, row: NewRow) -> list[Row]:
        """Decode steps, and as many prompts as a step reads, of mamba_ssm's model."""
        load = self.load
        length = load.shared + load.own
        prompts = load.budget // length, length
        return engine_peers.measure(self.config, load.slots, prompts, options, row)


class SpoiledDraft:
    """An n-gram draft whose guesses are wrong from some number on.

    Attributes:
        right: how many of a request's guesses are left as they are.
    """

    def __init__(self, vocab_size: int):
        self.right = 0
        self._draft = NgramDraft()
        self._vocab_size = vocab_size

    def __call__(self, requests: Sequence[Any]) -> list[np.ndarray]:
        guesses = []
        for guess in self._draft(requests):
            spoiled = np.array(guess)
            spoiled[self.right :] = (spoiled[self.right :] + _CYCLE) % self._vocab_size
            guesses.append(spoiled)
        return guesses


@contextlib.contextmanager
def without_compiling(engine: Engine) -> Iterator[list[StepStats]]:
    """The steps within, once they are done.

    Raises:
        RuntimeError: a step was compiled among them, so that their times mean nothing.
    """
    compiled, steps = engine.num_compilations, list[StepStats]()
    engine.stats.steps.clear()
    yield steps
    if engine.num_compilations > compiled:
        raise RuntimeError("a step was compiled while steps were timed")
    steps += engine.stats.steps


def _in_cycle(tokens, steps):
    """The token so many steps behind another one in its cycle of eight."""
    return tokens // _CYCLE * _CYCLE + (tokens + steps) % _CYCLE


def parts(
    kernels: Mapping[str, Sequence[float]], count: int, sampling: float, wall: float
) -> dict[str, tuple[float, str]]:
    """What a step's time goes to, in microseconds, and the longest kernels of each.

    Args:
        kernels: microseconds of each kernel in a profile.
        count: steps in it.
        sampling: microseconds of the kernels of the sampling, run alone.
        wall: microseconds of a step without a profiler.
    """
    times: dict[str, dict[str, float]] = {part: {} for part in PARTS}
    for name, durations in kernels.items():
        part = next(
            (p for p, of in _KERNELS.items() if of.search(name)), "other kernels"
        )
        times[part][name] = sum(durations) / count
    found = {}
    for part, own in times.items():
        longest = sorted(own, key=lambda name: -own[name])[:4]
        names = ", ".join(f"{name} {own[name]:,.0f} us" for name in longest)
        found[part] = sum(own.values()), names
    rest, names = found["other kernels"]
    found["sampling"] = sampling, "run alone" if sampling else "no sampler"
    found["other kernels"] = max(rest - sampling, 0.0), names
    busy = sum(time for time, _ in found.values())
    found["host, and gaps"] = max(wall - busy, 0.0), "wall time without a profiler"
    return found


def _timed(row: Row, steps: Sequence[StepStats]) -> Row:
    """Wall time of some steps, and the tokens that they drew or read in a second."""
    times = np.array([step.seconds for step in steps])
    low, median, high = np.percentile(times, [10, 50, 90]) * 1e6
    tokens = statistics.mean(s.decode_tokens + s.prefill_tokens for s in steps)
    return dataclasses.replace(
        row,
        microseconds=median,
        low=low,
        high=high,
        samples=len(steps),
        clock="wall",
        tokens_per_second=tokens * 1e6 / median,
        note=f"{tokens:.0f} tokens; {by_host(steps)}",
    )


def by_host(steps: Sequence[StepStats]) -> str:
    """What the host does for a step. To hand it over it may have to wait."""
    planned = statistics.median(s.host_seconds for s in steps) * 1e6
    handed = statistics.median(s.dispatch_seconds for s in steps) * 1e6
    return f"planned in {planned:,.0f} us, handed over in {handed:,.0f} us"


def _throughput(row: NewRow, steps: Sequence[StepStats]) -> Row:
    seconds = sum(s.seconds for s in steps)
    drawn = sum(s.decode_tokens for s in steps)
    read = sum(s.prefill_tokens for s in steps)
    note = (
        f"{drawn / seconds:,.0f} decoded and {read / seconds:,.0f} prompt tokens a "
        f"second, over {seconds:.1f} s"
    )
    return row("prompts and decodes", tokens_per_second=drawn / seconds, note=note)
