"""Tries tile sizes: `python -m benchmarks tune`.

For real convs and the usual kinds of batches, every sensible change of the tiles that
`kernels/tiles.py` chooses, or those that `--tiles` names, are timed on a GPU in turns,
results compared first. Without a GPU the kernels are compiled instead, for sm_90, and
their registers, spills and instructions per output are listed. Nothing is written: the
winners are for `kernels/tiles.py`.

    python -m benchmarks tune --batch "prefill 8,192" mixed --tiles 128x1x8 256x2x8
    python -m benchmarks tune --batch "decode 1" --tiles 128x1 64x1 --dim 1024 2048
"""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.interpreters import partial_eval
from rich.console import Console
from rich.table import Table

from benchmarks import jitted, timing
from benchmarks.model_shapes import MODELS, ModelShape
from benchmarks.timing import Prepared
from benchmarks.workload import Op, Workload
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
Batch = Callable[[ModelShape], Workload]


def _batch(op: Op, *lengths: int, slots: int = 0) -> Batch:
    return lambda m: Workload(op, lengths, m.dim, m.width, m.dtype, slots)


BATCHES: dict[str, Batch] = {
    **{
        f"prefill {n:,}": _batch("packed", n, slots=64)
        for n in (128, 512, 2048, 8192, 32768, 131072)
    },
    "mixed": _batch("packed", *[1] * 252, *[449] * 4, slots=512),
    "mixed, 25 %": _batch("packed", *[1] * 1536, *[128] * 4, slots=2048),
    "many decodes": _batch("packed", *[1] * 1792, *[64] * 4, slots=2048),
    "256 x 5": _batch("packed", *[5] * 256, slots=512),
    "64 x 32": _batch("packed", *[32] * 64, slots=512),
    **{
        f"packed decode {n:,}": _batch("packed", *[1] * n, slots=2048)
        for n in (1, 16, 256, 2000)
    },
    **{
        f"decode {n:,}": _batch("update", *[1] * n, slots=2048)
        for n in (1, 4, 16, 64, 256, 1024)
    },
    "dense": _batch("dense", *[2048] * 8),
    "gradient": _batch("gradient", *[2048] * 8),
}
DEFAULT_BATCHES = ("prefill 8,192", "mixed", "decode 256", "dense", "gradient")
# What of `kernel_report` compiles the kernel that a batch runs in.
_REPORTED = {
    "prefill 8,192": "packed",
    "mixed": "packed",
    "decode 256": "update",
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
        ahead: 0 or 1, whether a group's rows are loaded before the one before it.
    """

    block_n: int | None = None
    num_warps: int | None = None
    group: int | None = None
    block_m: int | None = None
    ahead: int | None = None

    def of(self, chosen: Tiles) -> Tiles:
        """These tiles, changed."""
        every = dataclasses.asdict(self).items()
        changes = {name: value for name, value in every if value is not None}
        changed = dataclasses.replace(chosen, **changes)
        return dataclasses.replace(changed, slot_n=min(changed.slot_n, changed.block_n))

    def __str__(self) -> str:
        named = ((f.name, getattr(self, f.name)) for f in dataclasses.fields(self))
        changed = ", ".join(f"{n} {value}" for n, value in named if value is not None)
        return changed or "as chosen now"

    @classmethod
    def parsed(cls, text: str) -> "Change":
        """Of "128x1x8": block_n, num_warps and group; the last may be left out.

        Behind them, "+" loads a group's rows ahead, and "-" does not.
        """
        sizes = [int(size) for size in text.rstrip("+-").split("x")]
        if len(sizes) not in (2, 3) or min(sizes) < 1:
            raise ValueError(f"want BLOCK_NxWARPS or BLOCK_NxWARPSxGROUP, got {text!r}")
        return cls(*sizes, ahead={"+": 1, "-": 0}.get(text[-1]))


_BLOCK_M = (8, 16, 32, 64, 128)


def changes(batch: str) -> list[Change]:
    """Tiles to be tried for a kind of batch, chunks as long as they are now.

    The first is no change at all.
    """
    # One token a sequence: no loop.
    groups = (1, 4, 8) if _has_loop(batch) else (None,)
    return [Change()] + [
        Change(block_n, num_warps, group)
        for block_n, num_warps, group in itertools.product(
            (128, 256, 512, 1024), (1, 2, 4), groups
        )
        # 2 to 16 channels a thread: less wastes accesses, more spills.
        if 2 <= block_n // (32 * num_warps) <= 16
    ]


def _has_loop(batch: str) -> bool:
    return not batch.startswith(("decode", "packed decode"))


def default_tiles(work: Workload) -> Tiles:
    """The package's own choice."""
    itemsize = jnp.dtype(work.dtype).itemsize
    filters = tiles.Filters(work.dim, work.width, itemsize, alignment=work.dim)
    batch, length, _ = work.rows
    match work.op:
        case "packed":
            return tiles.packed(filters, work.width - 1, work.tokens, batch)
        case "update":
            return tiles.update(filters, work.width - 1, length, batch)
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

        return jitted.with_states(work, update, inputs._replace(states=None))

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
    from jax_triton import triton_lib  # noqa: PLC0415 (jax-triton is optional)

    from jax_causal_conv.kernels import bridge  # noqa: PLC0415 (needs jax-triton)

    # A launch in a jitted function, as here and nowhere in the package, is asked what
    # of it is needed. jax 0.12 asks with an argument more than jax-triton 0.4.1 knows.
    partial_eval.dce_rules[triton_lib.triton_kernel_call_p] = lambda used, *rest: (
        [True] * len(rest[-1].invars),
        rest[-1],
    )
    return functools.partial(bridge.call, compute_capability=capability)


Outcome = timing.Timing | str
"""How long it took, or what went wrong (on a CPU, what came of compiling it)."""


def time_changes(
    work: Workload, tried: Iterable[Change], seconds: float
) -> dict[Change, Outcome]:
    """Device times with each change whose results are right, all in turns."""
    capability = visible_compute_capability() or DEFAULT_COMPUTE_CAPABILITY
    ready: dict[str, Prepared] = {}
    found: dict[Change, Outcome] = {}
    by_name = {str(change): change for change in tried}

    def fail(name: str, error: Exception) -> None:
        found[by_name[name]] = f"{type(error).__name__}: {str(error)[:80]}"

    for name, change in by_name.items():
        try:
            one = prepared(work, change.of(default_tiles(work)), _on_gpu(capability))
            result = one.call()
            one.wait(result)
            if one.view is not None:
                work.errors(one.view(result))
            ready[name] = one
        except Exception as error:  # too many registers, a wrong result, …
            fail(name, error)
    seconds *= len(ready)
    times = timing.measure(ready, seconds=seconds, on_error=fail)
    return found | {by_name[name]: time for name, time in times.items()}


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
    tried: list[Change],
    outcomes: Callable[[list[Change]], dict[Change, Outcome]],
    lengths: tuple[int, ...],
) -> dict[Change, Outcome]:
    """All changes; then the best three with chunks of other lengths."""
    found = outcomes(tried)
    timed = {c: t.median for c, t in found.items() if isinstance(t, timing.Timing)}
    best = sorted(timed, key=lambda change: timed[change])[:3]
    longer = [dataclasses.replace(c, block_m=m) for c in best for m in lengths]
    return found | outcomes(longer) if longer else found


def main(arguments: list[str], console: Console) -> None:
    """The command line of `python -m benchmarks tune`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks tune")
    by_name = {m.name: m for m in MODELS}
    parser.add_argument("--model", nargs="+", choices=by_name, default=DEFAULT_MODELS)
    parser.add_argument("--dim", nargs="+", type=int, help="other numbers of channels")
    parser.add_argument("--dtype", nargs="+", help="other dtypes than the models'")
    parser.add_argument(
        "--batch", nargs="+", choices=BATCHES, default=DEFAULT_BATCHES, metavar="BATCH"
    )
    parser.add_argument(
        "--tiles",
        nargs="+",
        type=Change.parsed,
        metavar="BLOCK_NxWARPS[xGROUP][+-]",
        help="try these alone, beside what is chosen now",
    )
    parser.add_argument("--seconds", type=float, default=0.5, help="for each change")
    parser.add_argument("--limit", type=int, help="try no more changes than this")
    parser.add_argument("--list", action="store_true", help="say what would be tried")
    given = parser.parse_args(arguments)
    for batch, name in itertools.product(given.batch, given.model):
        tried = [Change(), *given.tiles] if given.tiles else changes(batch)
        tried = tried[: given.limit]
        if given.list:
            console.print(f"{batch}, {name}: " + "; ".join(map(str, tried)))
            continue
        published = by_name[name]
        for dim, dtype in itertools.product(
            given.dim or [published.dim], given.dtype or [published.dtype]
        ):
            model = dataclasses.replace(published, dim=dim, dtype=dtype)
            # A search; what was asked for by name is all that is tried.
            lengths = _BLOCK_M if _has_loop(batch) and not given.tiles else ()
            if found := _try(batch, model, tried, lengths, given.seconds):
                where = f"{batch}, {dim:,} channels, {dtype}"
                console.print(
                    _table(where, default_tiles(BATCHES[batch](model)), found)
                )


def _try(
    batch: str,
    model: ModelShape,
    tried: list[Change],
    lengths: tuple[int, ...],
    seconds: float,
) -> dict[Change, Outcome]:
    if jax.default_backend() == "gpu":
        time = functools.partial(time_changes, BATCHES[batch](model), seconds=seconds)
        return search(tried, time, lengths)
    if batch in _REPORTED:
        return {change: compile_change(batch, model, change) for change in tried}
    return {}


def _table(title: str, chosen: Tiles, found: dict[Change, Outcome]) -> Table:
    """The fastest first; what failed at the end."""
    now = f"{chosen.block_n}x{chosen.num_warps}x{chosen.group}"
    now += f"{'+' if chosen.ahead else '-'}, chunks {chosen.block_m}"
    title = f"{title} (now {now})"
    made = Table(title=title, title_justify="left")
    made.add_column("tiles")
    made.add_column("result", justify="right")
    timed = {c: t for c, t in found.items() if isinstance(t, timing.Timing)}
    for change, t in sorted(timed.items(), key=lambda item: item[1].median)[:12]:
        made.add_row(str(change), f"{t.median:.2f} us ({t.low:.2f}-{t.high:.2f})")
    if Change() in timed:
        made.add_section()
        made.add_row(str(Change()), f"{timed[Change()].median:.2f} us")
    for change, text in found.items():
        if isinstance(text, str):
            made.add_row(str(change), text)
    return made
