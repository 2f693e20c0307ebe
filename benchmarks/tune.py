"""Tries tile sizes: `python -m benchmarks tune`.

For real convs and the usual kinds of batches, every sensible change of the tiles that
`kernels/tiles.py` chooses is timed on a GPU, results compared first. Without a GPU the
kernels are compiled instead, for sm_90, and their registers, spills and instructions
per output are listed. Nothing is written: the winners are for `kernels/tiles.py`.
"""

import argparse
import contextlib
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import peers, timing
from benchmarks.model_shapes import MODELS, ModelShape
from benchmarks.workload import Workload
from jax_causal_conv.kernels import tiles

DEFAULT_MODELS = ("Mamba2-2.7B",)
BATCHES: dict[str, Callable[[ModelShape], Workload]] = {
    "prefill": lambda m: Workload("packed", (8192,), m.dim, m.width, slots=64),
    "long prefill": lambda m: Workload("packed", (65536,), m.dim, m.width, slots=64),
    "mixed": lambda m: Workload(
        "packed", (1,) * 252 + (449,) * 4, m.dim, m.width, slots=512
    ),
    "packed decode": lambda m: Workload(
        "packed", (1,) * 256, m.dim, m.width, slots=512
    ),
    "many decodes": lambda m: Workload(
        "packed", (1,) * 1792 + (64,) * 4, m.dim, m.width, slots=2048
    ),
    "short prefill": lambda m: Workload("packed", (128,), m.dim, m.width, slots=64),
    "decode": lambda m: Workload("update", (1,) * 256, m.dim, m.width, slots=512),
    "dense": lambda m: Workload("dense", (2048,) * 8, m.dim, m.width),
    "gradient": lambda m: Workload("gradient", (2048,) * 8, m.dim, m.width),
}
# What of `kernel_report` compiles the kernel that a batch runs in.
_REPORTED = {
    "prefill": "packed",
    "mixed": "packed",
    "decode": "update",
    "dense": "dense",
    "gradient": "dense gradient",
}


@dataclasses.dataclass(frozen=True)
class Change:
    """What is different from the package's own choice; None is left as it is.

    Attributes:
        block_n: channels a program.
        num_warps: warps a program.
        group: rows of an unrolled step of the token loop.
        block_m: tokens of a chunk.
    """

    block_n: int | None = None
    num_warps: int | None = None
    group: int | None = None
    block_m: int | None = None

    def __str__(self) -> str:
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        changed = ", ".join(f"{name} {value}" for name, value in named if value)
        return changed or "as chosen now"


_BLOCK_M = (8, 16, 32, 64, 128)


def changes(batch: str) -> list[Change]:
    """Tiles to be tried for a kind of batch, chunks as long as they are now.

    The first is no change at all.
    """
    # One token a sequence: no loop.
    groups = (None,) if batch in ("decode", "packed decode") else (1, 4, 8)
    return [Change()] + [
        Change(block_n, num_warps, group)
        for block_n, num_warps, group in itertools.product(
            (128, 256, 512, 1024), (1, 2, 4), groups
        )
        # 2 to 16 channels a thread: less wastes accesses, more spills.
        if 2 <= block_n // (32 * num_warps) <= 16
    ]


@contextlib.contextmanager
def applied(change: Change) -> Iterator[None]:
    """Within, kernels are launched with the changed tiles."""

    def wrap(choose: Callable) -> Callable:
        def chosen(*args: Any, **kwargs: Any):
            tile = choose(*args, **kwargs)
            new = {
                name: getattr(change, name)
                for name in ("block_n", "num_warps", "group")
                if getattr(change, name) and hasattr(tile, name)
            }
            if "block_n" in new and hasattr(tile, "slot_n"):
                new["slot_n"] = min(tile.slot_n, new["block_n"])
            return dataclasses.replace(tile, **new)

        return chosen

    def block_m(default: Callable) -> Callable:
        return lambda *args, **kwargs: change.block_m or default(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for name, wrapper in (
            ("choose", wrap),
            ("choose_backward", wrap),
            ("default_block_m", block_m),
            ("backward_block_m", block_m),
        ):
            original = getattr(tiles, name, None)
            if original is not None:
                stack.enter_context(_replaced(original, wrapper(original)))
        jax.clear_caches()  # tiles are chosen while jax lowers
        yield
    jax.clear_caches()


@contextlib.contextmanager
def _replaced(original: Any, replacement: Any) -> Iterator[None]:
    """Replaces a function under all its names in the package."""
    places = [
        (module, name)
        for module_name, module in list(sys.modules.items())
        if module_name.startswith("jax_causal_conv") and module is not None
        for name, value in list(vars(module).items())
        if value is original
    ]
    for module, name in places:
        setattr(module, name, replacement)
    try:
        yield
    finally:
        for module, name in places:
            setattr(module, name, original)


Outcome = timing.Timing | str
"""How long it took, or what went wrong (on a CPU, what came of compiling it)."""


def time_change(work: Workload, change: Change, seconds: float) -> Outcome:
    """Device time with a change, if the results are right."""
    failures = []
    try:
        with applied(change):
            one = peers.ours(work, implementation="triton")
            result = one.call()
            one.wait(result)
            if one.view is not None:
                work.errors(one.view(result))
            times = timing.measure(
                {"ours": one},
                seconds=seconds,
                on_error=lambda _, error: failures.append(error),
            )
            if failures:
                raise failures[0]
            return times["ours"]
    except Exception as error:  # too many registers, a wrong result, …
        return f"{type(error).__name__}: {str(error)[:80]}"


def compile_change(batch: str, model: ModelShape, change: Change) -> Outcome:
    """Registers, spills and instructions per output with a change, on sm_90."""
    from benchmarks import kernel_report  # noqa: PLC0415 (needs Triton)

    (case,) = [c for c in kernel_report.KERNELS if c.name == _REPORTED[batch]]
    try:
        with applied(change):
            row = kernel_report.compile_row(case, model, 90)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:80]}"
    return (
        f"{row.code.registers} registers, {row.code.spills} B spilled, "
        f"{row.per_output:.1f} instructions an output"
    )


def search(
    tried: list[Change], outcome: Callable[[Change], Outcome], lengths: tuple[int, ...]
) -> Iterator[tuple[Change, Outcome]]:
    """All changes; then the best three with chunks of other lengths."""
    timed = {}
    for change in tried:
        found = outcome(change)
        if isinstance(found, timing.Timing):
            timed[change] = found.median
        yield change, found
    for change in sorted(timed, key=lambda change: timed[change])[:3]:
        for block_m in lengths:
            longer = dataclasses.replace(change, block_m=block_m)
            yield longer, outcome(longer)


def main(arguments: list[str], console: Console) -> None:
    """The command line of `python -m benchmarks tune`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune")
    by_name = {m.name: m for m in MODELS}
    parser.add_argument("--model", nargs="+", choices=by_name, default=DEFAULT_MODELS)
    parser.add_argument("--batch", nargs="+", choices=BATCHES, default=list(BATCHES))
    parser.add_argument("--seconds", type=float, default=0.5, help="for each change")
    parser.add_argument("--limit", type=int, help="try no more changes than this")
    parser.add_argument("--list", action="store_true", help="say what would be tried")
    given = parser.parse_args(arguments)
    on_gpu = jax.default_backend() == "gpu"
    for batch, name in itertools.product(given.batch, given.model):
        tried = changes(batch)[: given.limit]
        if given.list:
            console.print(f"{batch}, {name}: " + "; ".join(map(str, tried)))
            continue
        model, outcome = by_name[name], None
        if on_gpu:
            outcome = functools.partial(
                time_change, BATCHES[batch](model), seconds=given.seconds
            )
        elif batch in _REPORTED:
            outcome = functools.partial(compile_change, batch, model)
        if outcome is None:
            continue
        has_chunks = batch not in ("decode", "packed decode")
        lengths = _BLOCK_M if has_chunks else ()
        found = {}
        total = len(tried) + 3 * len(lengths) * on_gpu
        with Progress(console=console, transient=True) as progress:
            task = progress.add_task(f"{batch}, {name}", total=total)
            for change, result in search(tried, outcome, lengths):
                found[change] = result
                progress.advance(task)
        console.print(_table(f"{batch}, {name}", found))


def _table(title: str, found: dict) -> Table:
    """The fastest first; what failed at the end."""
    made = Table(title=title, title_justify="left")
    made.add_column("tiles")
    made.add_column("result", justify="right")
    timed = {c: t for c, t in found.items() if isinstance(t, timing.Timing)}
    for change, t in sorted(timed.items(), key=lambda item: item[1].median)[:12]:
        made.add_row(str(change), f"{t.median:.1f} us ({t.low:.1f}-{t.high:.1f})")
    now = timed.get(Change())
    if now is not None:
        made.add_section()
        made.add_row(str(Change()), f"{now.median:.1f} us")
    for change, text in found.items():
        if isinstance(text, str):
            made.add_row(str(change), text)
    return made
