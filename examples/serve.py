"""Serves a burst of requests with a byte-level Mamba2, and shows what the engine did.

The requests come in over time, with prompts of all lengths that begin with one of a few
texts, as those of a chat begin with its instructions. Half of them are decoded greedily
and half sampled. The first one is streamed to the terminal while the engine works on
all of them. The same requests are also served one at a time, with a prefix cache (what
prompts share is read once), and with drafts as well (what followed the last few bytes
before is guessed to follow again): they have to get the same answers, at other times.
"""

import argparse
import codecs
import dataclasses
import json
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.figure
import numpy as np
from rich.console import Console
from rich.table import Table

from examples.byte_text import END, VOCAB, documents, printable, stop_tokens
from jax_causal_conv.mamba2 import (
    GREEDY,
    Engine,
    Event,
    Generation,
    Mamba2LM,
    NgramDraft,
    Request,
    SamplingParams,
    Stats,
    StepStats,
    load,
)

BATCH_PLOT = "batch.png"
SYSTEMS = 2  # texts that prompts begin with
MAX_DRAFTS = 4


# ---- Requests ----------------------------------------------------------------------


def some_requests(
    count: int, max_new_tokens: int, stop: Sequence[int], system: int, seeds: list[int]
) -> list[Request]:
    """Prompts cut out of the held-out topics; sampled ones and greedy ones in turn.

    Every sampled request has a seed of its own, so that it draws the same again.

    Args:
        count: how many.
        max_new_tokens: at most, of each.
        stop: tokens that end an answer.
        system: how many bytes of the beginning prompts share with each other.
        seeds: of lengths and limits; of the places in the texts.
    """
    rng, places = map(np.random.default_rng, seeds)
    _, texts = documents()
    texts.sort(key=len, reverse=True)
    requests = []
    for i in range(count):
        text = texts[i % len(texts)]
        start = int(places.integers(len(text)))
        length = int(rng.integers(8, 128))
        limit = int(rng.integers(-(-max_new_tokens // 2), max_new_tokens + 1))
        sampled = SamplingParams(temperature=0.7, top_p=0.95, seed=i)
        beginning = texts[i % SYSTEMS][:system]
        requests.append(
            Request(
                prompt=[END, *beginning, *text[start : start + length]],
                max_new_tokens=limit,
                sampling=GREEDY if i % 2 else sampled,
                stop_token_ids=stop,
            )
        )
    return requests


def streamer(write: Callable[[str], object]) -> Callable[[Event], None]:
    """An `on_event` that writes the tokens as text as they come."""
    # Bytes of a character may come one by one; a young model's may be no UTF-8 at all.
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def on_event(event: Event) -> None:
        data = b"" if event.token in (None, END) else bytes([event.token])
        text = decoder.decode(data, final=event.finish_reason is not None)
        write(printable(text))

    return on_event


# ---- A run -------------------------------------------------------------------------


class Run(NamedTuple):
    """What happened to the requests, in the order of their arrival."""

    start: float  # when the first request may come
    arrivals: np.ndarray  # (N,) s after `start`
    generations: list[Generation]
    steps: list[StepStats]
    compiled_before: int
    compiled_meanwhile: int
    num_slots: int

    @property
    def tokens(self) -> list[list[int]]:
        return [generation.tokens for generation in self.generations]

    @property
    def seconds(self) -> float:
        """From the first arrival to the end of the last request."""
        return float((self.arrivals + self.latencies).max() - self.arrivals[0])

    @property
    def first_tokens(self) -> np.ndarray:
        """(N,) s from each request's arrival to its first token."""
        times = np.array([generation.first_token for generation in self.generations])
        return times - self.start - self.arrivals

    @property
    def latencies(self) -> np.ndarray:
        """(N,) s from each request's arrival to its end."""
        times = np.array([generation.finished for generation in self.generations])
        return times - self.start - self.arrivals

    @property
    def tokens_per_second(self) -> float:
        return sum(map(len, self.tokens)) / self.seconds


class Server(NamedTuple):
    """An engine, warm, and how many requests it runs at a time."""

    engine: Engine
    num_slots: int

    @classmethod
    def start(
        cls,
        model: Mamba2LM,
        num_slots: int,
        budget: int,
        max_waiting: int,
        **features: Any,
    ) -> "Server":
        """Compiles few shapes: that is quick, and wastes a little more padding."""
        drafts = features.get("max_drafts", 0)
        budget = max(budget, num_slots * (1 + drafts))
        engine = Engine(
            model,
            num_slots=num_slots,
            max_tokens_per_step=budget,
            max_waiting=max_waiting,
            decode_buckets=[num_slots],
            token_buckets=[budget],
            **features,
        )
        engine.warmup()
        return cls(engine, num_slots)

    def serve(self, requests: Sequence[Request], arrivals: np.ndarray) -> Run:
        """Submits each request when its time has come; returns when all have ended."""
        engine, num_slots = self
        compiled, steps = engine.num_compilations, len(engine.stats.steps)
        generations: list[Generation] = []
        start = time.perf_counter()
        while len(generations) < len(requests) or not engine.idle:
            passed = time.perf_counter() - start
            while (i := len(generations)) < len(requests) and arrivals[i] <= passed:
                generations.append(engine.submit(requests[i]))
            if engine.idle:
                time.sleep(arrivals[len(generations)] - passed)
            else:
                engine.step()
        return Run(
            start,
            arrivals,
            generations,
            list(engine.stats.steps)[steps:],
            compiled,
            engine.num_compilations - compiled,
            num_slots,
        )


# ---- The report --------------------------------------------------------------------


def report(title: str, runs: dict[str, Run]) -> Table:
    """One column per run."""

    def both(times: np.ndarray) -> str:
        p50, p95 = np.percentile(times, [50, 95])
        return f"{p50 * 1e3:,.1f} / {p95 * 1e3:,.1f} ms"

    def column(run: Run) -> dict[str, str]:
        steps = run.steps
        busy = sum(step.seconds for step in steps)
        tokens = sum(step.bucket.tokens for step in steps)
        used = sum(step.running * step.seconds for step in steps) / (
            busy * run.num_slots
        )

        def share(name: str) -> str:
            return f"{sum(getattr(step, name) for step in steps) / tokens:.0%}"

        prompts = sum(len(generation.prompt) for generation in run.generations)
        stats = Stats(deque(steps), deque(run.generations))
        generated = sum(map(len, run.tokens))
        return {
            "requests": f"{len(run.generations)}",
            "prompt tokens": f"{prompts:,}",
            "of these not read again": f"{stats.prefix_tokens / prompts:.0%}",
            "generated tokens": f"{generated:,}",
            "seconds": f"{run.seconds:.2f}",
            "prompt tokens/s": f"{prompts / run.seconds:,.0f}",
            "generated tokens/s": f"{run.tokens_per_second:,.0f}",
            "time to first token, p50 / p95": both(run.first_tokens),
            "latency, p50 / p95": both(run.latencies),
            "steps": f"{len(steps):,}",
            "a step, p50 / p95": both(np.array([step.seconds for step in steps])),
            "compilations, before / meanwhile": (
                f"{run.compiled_before} / {run.compiled_meanwhile}"
            ),
            "tokens per step and request": f"{stats.tokens_per_step:.2f}",
            "drafts accepted": f"{stats.acceptance:.0%}".replace("nan%", "-"),
            "slots in use": f"{used:.0%} of {run.num_slots}",
            "tokens of batches: decoding": share("decode_tokens"),
            "tokens of batches: drafts": share("draft_tokens"),
            "tokens of batches: prompts": share("prefill_tokens"),
            "tokens of batches: padding": share("padding"),
        }

    columns = [column(run) for run in runs.values()]
    table = Table("", *runs, title=title, title_justify="left")
    for column_of_table in table.columns[1:]:
        column_of_table.justify = "right"
    for name in columns[0]:
        table.add_row(name, *(values[name] for values in columns))
    return table


def plot(path: Path, runs: dict[str, Run]) -> None:
    """Draws what the steps of the last run were made of, and when answers began."""
    figure = matplotlib.figure.Figure(figsize=(12, 4.5), layout="constrained")
    axes, waits = figure.subplots(1, 2)
    for name, run in runs.items():
        times = np.sort(run.first_tokens) * 1e3
        waits.step(times, np.arange(1, len(times) + 1), where="post", label=name)
    waits.set(xlabel="ms", ylabel="requests", title="Time to first token, at most")
    waits.legend()
    name, run = list(runs.items())[-1]
    ends = run.steps[-1].start + run.steps[-1].seconds
    times = np.array([step.start for step in run.steps] + [ends]) - run.start
    parts = {
        "decoding": [step.decode_tokens for step in run.steps],
        "drafts": [step.draft_tokens for step in run.steps],
        "prompts": [step.prefill_tokens for step in run.steps],
        "padding": [step.padding for step in run.steps],
    }
    axes.stackplot(
        times * 1e3,
        [[*values, values[-1]] for values in parts.values()],
        labels=list(parts),
        colors=["tab:blue", "tab:cyan", "tab:orange", "lightgray"],
        step="post",
    )
    axes.set(xlabel="ms", ylabel="tokens in a step", title=f"Batches: {name}")
    axes.margins(0)
    axes.legend()
    figure.savefig(path, dpi=120)


# ---- The program -------------------------------------------------------------------


def load_byte_model(path: Path) -> Mamba2LM:
    """Loads a model that reads and writes bytes.

    Raises:
        ValueError: there is none, or it is another kind of model.
        FileNotFoundError: a file of the checkpoint is missing.
    """
    config = path / "config.json"
    if not config.is_file():
        raise ValueError(
            f"no checkpoint in {path}; train one, which takes about two minutes:\n"
            f"  python -m examples.train --out {path}"
        )
    vocab = json.loads(config.read_text(encoding="utf-8")).get("vocab_size")
    if vocab != VOCAB:
        raise ValueError(
            f"the model in {path} has a vocabulary of {vocab} tokens, which needs its "
            f"tokenizer; this program knows bytes only, a vocabulary of {VOCAB}"
        )
    return load(path, dtype="float32")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.serve", description=__doc__.split("\n\n")[0]
    )
    parser.add_argument(
        "checkpoint",
        type=Path,
        nargs="?",
        default=Path("mamba2-bytes"),
        help="directory of a Mamba2 over bytes (default: %(default)s)",
    )
    parser.add_argument("--prompt", help="text of the first request, which is streamed")
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=256, help="per request")
    parser.add_argument(
        "--system", type=int, default=512, help="bytes that prompts share"
    )
    parser.add_argument("--slots", type=int, default=16, help="requests run at a time")
    parser.add_argument("--budget", type=int, default=64, help="tokens per step")
    parser.add_argument(
        "--gap", type=float, default=5.0, help="mean ms between two arrivals"
    )
    parser.add_argument("--rounds", type=int, default=3, help="the best one counts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot", type=Path, help=f"image of the run (CHECKPOINT/{BATCH_PLOT})"
    )
    options = parser.parse_args(argv)
    for name in ("requests", "max_new_tokens", "slots", "budget", "rounds"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("gap", "system"):
        if getattr(options, name) < 0:
            parser.error(f"--{name} must not be negative")
    if options.prompt == "":
        parser.error("--prompt must not be empty")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    try:
        model = load_byte_model(options.checkpoint)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    console = Console(highlight=False)

    stop = stop_tokens(model.config.eos_token_id)
    rng = np.random.default_rng(options.seed)
    gaps = rng.exponential(options.gap / 1e3, options.requests - 1)
    arrivals = np.concatenate([[0.0], np.cumsum(gaps)])

    together = f"up to {options.slots} at a time"
    cache = {"prefix_slots": options.slots + SYSTEMS}
    drafts = {**cache, "draft": NgramDraft(), "max_drafts": MAX_DRAFTS}
    kinds: dict[str, tuple[int, dict]] = {
        together: (options.slots, {}),
        "one at a time": (1, {}),
        "with a prefix cache": (options.slots, cache),
        "and with drafts": (options.slots, drafts),
    }
    with console.status("compiling"):
        servers = {
            name: Server.start(
                model, slots, options.budget, options.requests, **features
            )
            for name, (slots, features) in kinds.items()
        }
    runs: dict[str, list[Run]] = {name: [] for name in servers}
    for i in range(options.rounds):
        # Others may use the machine as well: what counts is the best of a few rounds.
        # Each has other prompts, but for their beginnings: no answer is known already.
        seeds = [options.seed, options.seed + i]
        requests = some_requests(
            options.requests, options.max_new_tokens, stop, options.system, seeds
        )
        if options.prompt is not None:
            prompt = [END, *options.prompt.encode()]
            requests[0] = dataclasses.replace(requests[0], prompt=prompt)
        if i == 0:
            on_event = streamer(lambda text: print(text, end="", flush=True))
            streamed = dataclasses.replace(requests[0], on_event=on_event)
            console.rule("the first request, as it comes")
            prompt = bytes(requests[0].prompt[1:]).decode(errors="replace")
            print(prompt, end="", flush=True)
            runs[together].append(
                servers[together].serve([streamed, *requests[1:]], arrivals)
            )
            print()
            console.rule()
        with console.status("comparing"):
            for name, server in servers.items():
                if len(runs[name]) == i:
                    runs[name].append(server.serve(requests, arrivals))
    best = {
        name: min(of_kind, key=lambda run: run.seconds)
        for name, of_kind in runs.items()
    }

    console.print(report(f"The fastest of {options.rounds} rounds", best))
    many, one, cached, drafted = best.values()
    speedup = many.tokens_per_second / one.tokens_per_second
    console.print(f"{speedup:.1f} times the tokens per second of one at a time")
    waits = [np.median(run.first_tokens) * 1e3 for run in (many, cached, drafted)]
    console.print(
        "time to first token, p50: {:.1f} ms; with the prefix cache {:.1f} ms; and "
        "with drafts {:.1f} ms".format(*waits)
    )
    image = options.plot or options.checkpoint / BATCH_PLOT
    image.parent.mkdir(parents=True, exist_ok=True)
    plot(image, {name: best[name] for name in best if name != "one at a time"})
    console.print(f"the first tokens and the batches: {image}", soft_wrap=True)

    different = sorted(
        {
            i
            for of_kind in runs.values()
            for run, alone in zip(of_kind, runs["one at a time"], strict=True)
            for i, tokens in enumerate(run.tokens)
            if tokens != alone.tokens[i]
        }
    )
    if different:
        console.print(f"[red]requests with other answers than alone: {different}")
        return 1
    console.print("Every request got the answer that it gets alone.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
