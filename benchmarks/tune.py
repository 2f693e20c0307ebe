"""Tries tile sizes: `python -m benchmarks tune`.

For real convs and the usual kinds of batches, every sensible change of the tiles that
`kernels/tiles.py` chooses is timed on a GPU, results compared first. Without a GPU the
kernels are compiled instead, for sm_90, and their registers, spills and instructions
per output are listed. Nothing is written: the winners are for `kernels/tiles.py`.
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import peers, timing
from benchmarks.model_shapes import MODELS, ModelShape
from benchmarks.timing import Prepared
from benchmarks.workload import Workload
from jax_causal_conv.chunks import chunk_metadata
from jax_causal_conv.kernels import tiles
from jax_causal_conv.kernels.tiles import Tiles
from jax_causal_conv.op.primitive import (
    DEFAULT_COMPUTE_CAPABILITY,
    visible_compute_capability,
)
from jax_causal_conv.operands import (
    ConvSpec,
    DenseOperands,
    PackedOperands,
    RowsBackwardOperands,
    UpdateOperands,
)

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

    def of(self, chosen: Tiles) -> Tiles:
        """These tiles, changed."""
        changes = {name: v for name, v in dataclasses.asdict(self).items() if v}
        changed = dataclasses.replace(chosen, **changes)
        return dataclasses.replace(changed, slot_n=min(changed.slot_n, changed.block_n))

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


def default_tiles(work: Workload) -> Tiles:
    """The package's own choice."""
    itemsize = jnp.dtype(work.dtype).itemsize
    filters = tiles.Filters(work.dim, work.width, itemsize, alignment=work.dim)
    batch, length, _ = work.rows
    match work.op:
        case "packed":
            return tiles.packed(filters, work.width - 1, work.tokens, batch)
        case "update":
            return tiles.update(filters, work.width - 1, length)
        case "dense":
            return tiles.dense(filters, batch, length)
        case "gradient":
            plain = work.dtype == "bfloat16" and work.dim % 2 == 0
            return tiles.rows_backward(filters, work.dim, batch, length, plain)


def operands(work: Workload, chosen: Tiles) -> Any:
    """What the kernel of a workload is launched with: for a gradient its backward."""
    filters = work.weight, work.bias
    x = work.x if work.op == "packed" else work.x.reshape(work.rows)
    match work.op:
        case "packed":
            offsets = work.offsets
            table = chunk_metadata(offsets, work.tokens, chosen.block_m)
            return PackedOperands(
                x,
                *filters,
                work.states(),
                jnp.asarray(offsets),
                jnp.asarray(work.cache_indices),
                jnp.asarray(work.has_initial_state),
                metadata=jax.tree.map(jnp.asarray, table),
            )
        case "update":
            slots = jnp.asarray(work.cache_indices)
            return UpdateOperands(x, *filters, work.states(), slots)
        case "dense":
            return DenseOperands(x, *filters)
        case "gradient":
            history = jnp.zeros((len(x), work.width - 1, work.dim), work.dtype)
            dy = (work.dy.reshape(work.rows),)
            return RowsBackwardOperands(x, *filters, history, dy)


def launcher(work: Workload, chosen: Tiles, call: Callable) -> Callable:
    """The kernel of a workload alone, as a function of its operands.

    `call` runs a launch: on a GPU, or in the interpreter.
    """
    from jax_causal_conv.kernels import launch, record  # noqa: PLC0415 (needs Triton)

    name = {"gradient": "rows_backward"}.get(work.op, work.op)
    launches, spec = getattr(launch, name), ConvSpec("silu")
    return lambda operands: record.run(launches(spec, operands, chosen), call)


def prepared(work: Workload, chosen: Tiles, call: Callable) -> Prepared:
    """The kernel with its inputs in place, and a cache that it may overwrite."""
    run, inputs = launcher(work, chosen, call), operands(work, chosen)
    if work.has_states:

        def update(states, rest):
            out, states = run(rest._replace(states=states))
            return out.reshape(work.x.shape), states

        return peers.with_states(work, update, inputs._replace(states=None))

    def view(results):
        if work.op == "dense":
            return {"out": work.pick(results[0].reshape(work.x.shape))}
        dx, dweight, dbias, _ = results
        return {
            "dx": work.pick(dx.reshape(work.x.shape)),
            "dweight": work.pick(dweight, 0),
            "dbias": work.pick(dbias),
        }

    return Prepared(functools.partial(jax.jit(run), inputs), view=view)


def _on_gpu(capability: int) -> Callable:
    from jax_causal_conv.kernels import bridge  # noqa: PLC0415 (needs jax-triton)

    return functools.partial(bridge.call, compute_capability=capability)


Outcome = timing.Timing | str
"""How long it took, or what went wrong (on a CPU, what came of compiling it)."""


def time_change(work: Workload, change: Change, seconds: float) -> Outcome:
    """Device time with a change, if the results are right."""
    failures = []
    try:
        capability = visible_compute_capability() or DEFAULT_COMPUTE_CAPABILITY
        one = prepared(work, change.of(default_tiles(work)), _on_gpu(capability))
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
    from benchmarks import kernel_report, machine_code  # noqa: PLC0415 (needs Triton)

    (case,) = [c for c in kernel_report.KERNELS if c.name == _REPORTED[batch]]
    work = BATCHES[batch](model)
    chosen = change.of(default_tiles(work))
    try:
        # Of a copy: what a workload keeps must not come from a trace.
        shapes = jax.eval_shape(lambda: operands(dataclasses.replace(work), chosen))
        run = launcher(work, chosen, _on_gpu(90))
        (code,) = machine_code.compile_kernels(run, (shapes,), 90)
        row = kernel_report.measure(case, model, 90, work.tokens * work.dim, code)
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
