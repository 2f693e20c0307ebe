"""A small serving loop: prefill and decode mixed in one jitted call per step.

Requests (texts of Python's own help topics, one token per byte) arrive over time. Each
step packs one token of every decoding request and chunks of the newcomers' prompts into
one batch, and one jitted function runs it through a few causal conv layers. Their
states live in caches with one slot per running request. Decoding is teacher-forced, the
next token being the next byte of the text, so that in the end every request can be
compared with the same text run alone in one go.
"""

import argparse
import functools
import itertools
import random
import sys
import time
from collections import deque
from dataclasses import dataclass, field, replace
from pydoc_data.topics import topics
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from jax_causal_conv import PAD_SLOT_ID, PackedBatch, causal_conv1d_fn, pack_batch

WIDTH = 4  # taps of the filters, as in Mamba


# ---- The model: an embedding, then x + silu(conv(x)) a few times -------------------
# What real models have between the convs does not change how their batches are packed.


class Params(NamedTuple):
    embedding: jax.Array  # (256, D)
    filters: list[tuple[jax.Array, jax.Array]]  # weight (D, W) and bias (D,) per layer


def random_params(dim: int, layers: int) -> Params:
    rng = np.random.default_rng(0)

    def normal(*shape, scale=1.0):
        return jnp.asarray(rng.normal(scale=scale, size=shape), jnp.float32)

    filters = [(normal(dim, WIDTH, scale=0.5), normal(dim)) for _ in range(layers)]
    return Params(normal(256, dim), filters)


def new_caches(slots: int, dim: int, layers: int) -> list[jax.Array]:
    # NaN on purpose: a slot needs no clearing, neither now nor when the next request
    # takes it over, as `has_initial_state` says whether it is read at all.
    shape = (slots, WIDTH - 1, dim)
    return [jnp.full(shape, jnp.nan, jnp.float32) for _ in range(layers)]


def make_step(implementation: str | None):
    """The jitted step, and a list that gets one entry per compilation."""
    compiled = []

    # Donated caches are updated in place; the caller carries on with the returned ones.
    @functools.partial(jax.jit, donate_argnames="caches")
    def step(params, caches, batch):
        compiled.append(batch.tokens.shape)  # Python runs only while jax traces
        x = params.embedding[batch.tokens]
        updated = []
        for (weight, bias), cache in zip(params.filters, caches, strict=True):
            y, new_cache = causal_conv1d_fn(
                x,
                weight,
                bias,
                cache,
                **batch.arguments(),
                implementation=implementation,
            )
            x = x + y
            updated.append(new_cache)
        return x, updated

    return step, compiled


def numpy_float64(params: Params, tokens: np.ndarray) -> np.ndarray:
    """The same model for one request in one go, as plainly as possible."""
    x = np.asarray(params.embedding, np.float64)[tokens]
    for weight, bias in params.filters:
        w, b = np.asarray(weight, np.float64), np.asarray(bias, np.float64)
        u = np.concatenate([np.zeros((WIDTH - 1, x.shape[1])), x])
        y = b + sum(w[:, k] * u[k : k + len(x)] for k in range(WIDTH))
        x = x + y / (1 + np.exp(-y))
    return x


# ---- Requests, and who takes part in a step ----------------------------------------


@dataclass(eq=False)  # two requests for the same text are two requests
class Request:
    name: str
    tokens: np.ndarray  # the whole text
    prompt: int  # this many tokens may be prefilled; the others come one by one
    arrival: int  # the step that it can first take part in
    slot: int = PAD_SLOT_ID
    done: int = 0
    outputs: list[np.ndarray] = field(default_factory=list)


class Row(NamedTuple):
    """A request's share of a step: its tokens [start, stop)."""

    request: Request
    start: int
    stop: int

    @property
    def is_decode(self) -> bool:
        return self.start >= self.request.prompt

    def __str__(self):
        span = self.start if self.is_decode else f"{self.start}:{self.stop}"
        return f"{self.request.name}[{span}]"


class Step:
    """What the log says about a step."""

    def __init__(self, number: int, rows: list[Row], size: int):
        self.number, self.rows, self.size = number, rows, size
        self.tokens = sum(row.stop - row.start for row in rows)
        self.decodes = sum(row.is_decode for row in rows)
        self.prefills = len(rows) - self.decodes

    def __str__(self):
        kinds = f"{self.decodes} decode + {self.prefills} prefill rows"
        return f"step {self.number}: {kinds}, {self.tokens}/{self.size} tokens"


def make_requests(count: int) -> list[Request]:
    """Texts of different lengths, one every few steps."""
    rng = random.Random(0)
    names = sorted(topics)
    requests, arrival = [], 0
    for _ in range(count):
        name, decode = rng.choice(names), rng.randint(8, 120)
        text = topics[name].encode()[: decode + rng.randint(8, 1500)]
        tokens = np.frombuffer(text, np.uint8).astype(np.int32)
        requests.append(Request(name, tokens, len(tokens) - decode, arrival))
        arrival += rng.randint(0, 12)
    return requests


class Scheduler:
    """Hands out the slots, and in each step a budget of tokens."""

    def __init__(self, requests: list[Request], slots: int, budget: int):
        self.waiting = deque(requests)
        self.running: list[Request] = []
        self.free = list(range(slots))
        self.budget = budget

    def plan(self, now: int) -> list[Row]:
        while self.free and self.waiting and self.waiting[0].arrival <= now:
            self.running.append(self.waiting.popleft())
            self.running[-1].slot = self.free.pop()
        # Who decodes comes first, with one token each. Prompts share what is left, none
        # of them taking more than half of the budget.
        rows, left = [], self.budget
        for r in sorted(self.running, key=lambda r: r.done < r.prompt):
            chunk = min(r.prompt - r.done, max(self.budget // 2, 1))
            count = min(chunk if r.done < r.prompt else 1, left)
            if count > 0:
                rows.append(Row(r, r.done, r.done + count))
                left -= count
        return rows

    def finish(self, rows: list[Row], out: np.ndarray) -> None:
        """Hands the outputs to their requests; completed ones free their slots."""
        first = 0
        for r, start, stop in rows:
            r.outputs.append(out[first : first + stop - start])
            first += stop - start
            r.done = stop
            if r.done == len(r.tokens):
                self.running.remove(r)
                self.free.append(r.slot)


def pack(rows: list[Row], num_tokens: int, num_rows: int) -> PackedBatch:
    """Puts rows back to back, then padding: empty rows, and tokens of nobody."""
    return pack_batch(
        [row.request.tokens[row.start : row.stop] for row in rows],
        [row.request.slot for row in rows],
        [row.start > 0 for row in rows],  # has it history?
        num_tokens=num_tokens,
        num_rows=num_rows,
    )


# ---- Serving, checking, reporting --------------------------------------------------


def serve(step, params, caches, scheduler, buckets, on_step) -> list[Step]:
    """Steps until all requests are done, each in the smallest bucket that fits."""
    log = []
    for now in itertools.count():
        if rows := scheduler.plan(now):
            tokens = sum(row.stop - row.start for row in rows)
            fits = ((t, n) for t, n in buckets if t >= tokens and n >= len(rows))
            size, num_rows = next(fits)
            out, caches = step(params, caches, pack(rows, size, num_rows))
            scheduler.finish(rows, np.asarray(out))
            log.append(Step(now, rows, size))
            on_step(log[-1])
        elif not scheduler.waiting:
            return log


def worst_error(requests: list[Request], reference) -> float:
    """The largest |served - reference| / max|reference|; inf if anything is NaN."""
    worst = 0.0
    for r in requests:
        expected = reference(r)
        error = np.abs(np.concatenate(r.outputs) - expected) / np.abs(expected).max()
        worst = max(worst, float(np.nan_to_num(error, nan=np.inf).max()))
    return worst


def one_shot(step, params: Params, r: Request, size: int) -> np.ndarray:
    """The request alone, in one call."""
    caches = new_caches(1, params.embedding.shape[1], len(params.filters))
    row = Row(replace(r, slot=0), 0, len(r.tokens))
    out, _ = step(params, caches, pack([row], size, 1))
    return np.asarray(out)[: row.stop]


def timeline(log: list[Step], utf8: bool) -> Table:
    """What the batches were made of, from the first step to the last."""
    ramp = " ▁▂▃▄▅▆▇█" if utf8 else " .:-=+*#%@"
    table = Table.grid(padding=(0, 1))
    for title, values in {
        "decode rows": [s.decodes for s in log],
        "prefill rows": [s.prefills for s in log],
        "tokens": [s.tokens for s in log],
        "padding": [s.size - s.tokens for s in log],
    }.items():
        means = [part.mean() for part in np.array_split(values, min(54, len(log)))]
        marks = (ramp[round(m / max(*means, 1) * (len(ramp) - 1))] for m in means)
        table.add_row(title, f"|{''.join(marks)}|", f"max {max(values)}")
    return table


def report(console: Console, log: list[Step], facts: dict[str, str]) -> None:
    mixed = max(log, key=lambda s: (min(s.decodes, 2 * s.prefills), s.tokens))
    console.print(f"\nthe most mixed batch, {mixed}")
    console.print("its rows, as topic[token] or topic[start:end]:", markup=False)
    console.print(" ".join(map(str, mixed.rows)), markup=False)
    console.print(f"\nall {len(log)} steps, from left to right:")
    console.print(timeline(log, console.encoding.startswith("utf")))
    table = Table(show_header=False)
    for row in facts.items():
        table.add_row(*row)
    console.print(table)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Serve texts in mixed prefill + decode batches, and check them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = functools.partial(parser.add_argument, type=int, metavar="N")
    add("--requests", default=160, help="texts to serve")
    add("--slots", default=16, help="requests running at a time")
    add("--budget", default=256, help="tokens per step, at least one per slot")
    add("--dim", default=256, help="channels")
    add("--layers", default=3, help="conv layers, each with its own cache")
    parser.add_argument(
        "--implementation",
        choices=["triton", "xla", "interpret"],
        help="None is Triton on CUDA, else XLA; interpret runs the Triton kernels on "
        "the CPU, slowly: try --requests 2 --layers 1",
    )
    args = parser.parse_args()
    if min(args.requests, args.slots, args.dim, args.layers) < 1:
        parser.error("sizes must be positive")
    if args.budget < args.slots:
        parser.error("--budget must be at least --slots")
    return args


def main() -> int:
    args = parse_args()
    console = Console(highlight=False)
    requests = make_requests(args.requests)
    params = random_params(args.dim, args.layers)
    caches = new_caches(args.slots, args.dim, args.layers)
    step, compiled = make_step(args.implementation)

    # Compile every bucket before the first request arrives, with a batch of nothing but
    # padding, which changes no slot.
    sizes = {max(args.budget // k, args.slots) for k in (1, 4, 16)}
    buckets = sorted(itertools.product(sizes, {args.slots, -(-args.slots // 4)}))
    times = [time.perf_counter()]
    with console.status("compiling"):
        for size, num_rows in buckets:
            _, caches = step(params, caches, pack([], size, num_rows))
        jax.block_until_ready(caches)
    times.append(time.perf_counter())

    scheduler = Scheduler(requests, args.slots, args.budget)
    tokens = sum(len(r.tokens) for r in requests)
    with Progress(BarColumn(), TextColumn("{task.description}")) as progress:
        bar = progress.add_task("", total=tokens)

        def on_step(s: Step):
            progress.update(bar, advance=s.tokens, description=str(s))

        log = serve(step, params, caches, scheduler, buckets, on_step)
    times.append(time.perf_counter())
    compiling, serving = np.diff(times)

    with console.status("checking"):
        longest, some = max(len(r.tokens) for r in requests), requests[::8]
        alone, _ = make_step(args.implementation)
        error = worst_error(requests, lambda r: one_shot(alone, params, r, longest))
        error64 = worst_error(some, lambda r: numpy_float64(params, r.tokens))
    # Each layer rounds about 2W times in the filter and a few times around it.
    tolerance = args.layers * (2 * WIDTH + 8) * float(np.finfo(np.float32).eps)
    passed = max(error, error64) <= tolerance

    mixed = sum(s.decodes > 0 and s.prefills > 0 for s in log)
    computed = sum(s.size for s in log)
    facts = {
        "requests": f"{len(requests)} through {args.slots} slots",
        "tokens": f"{tokens:,}, {args.layers} layers of {args.dim} channels",
        "steps": f"{len(log)}, {mixed} of them with prefill and decode rows",
        "compilations": f"{len(compiled)} ({compiling:.1f} s before the first step)",
        "throughput": f"{tokens / serving:,.0f} tokens/s ({serving:.1f} s)",
        "padding": f"{1 - tokens / computed:.0%} of {computed:,} computed tokens",
        "worst relative error": f"{error:.1e} against one call per request (all)",
        "": f"{error64:.1e} against NumPy in float64 ({len(some)} requests)",
        "check": f"{'passed' if passed else 'FAILED'} (tolerance {tolerance:.1e})",
    }
    report(console, log, facts)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
