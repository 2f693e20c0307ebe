r"""Benchmarks: `python -m benchmarks [SUITE ...]`, by default all, on what is here.

    python -m benchmarks                          # a few minutes on a CPU
    python -m benchmarks mixed --dtype bfloat16
    python -m benchmarks ssd --case "256 x 1" --peer-path vllm=FOLDER
    python -m benchmarks decode prefill --json gpu.json --plots plots \
        --peer-path vllm=.peers/vllm_causal_conv1d.py
    python -m benchmarks plot gpu.json plots      # draws what --json wrote
    python -m benchmarks tune                     # tile sizes; compiles them on a CPU

Results are compared with float64 before anything is timed. Peers take part where they
are installed, or with --peer-path NAME=PATH: a file, a folder or a wheel.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from benchmarks import machine, tune
from benchmarks.cases import FALLBACK, Options, Row, run_case
from benchmarks.machine_code import expect_no_gpu
from benchmarks.suites import PACKAGES, PEERS, SUITES

_COLUMNS = ("us", "p10-p90", "GB/s", "{}", "x ours", "error", "kernels")


def table(suite: str, rows: list[Row]) -> Table:
    """The rows of a suite, cases apart from each other."""
    title = suite
    if warning := fallbacks(rows):
        title = f"{suite} [bold red]{warning}[/bold red]"
    made = Table(title=title, title_justify="left")
    for heading in ("case", "dtype", "who"):
        made.add_column(heading, no_wrap=True)
    yardstick = next((r.candidate for r in rows if r.of_yardstick == 1), "yardstick")
    for heading in _COLUMNS:
        made.add_column(heading.format(f"x {yardstick}"), justify="right")
    serves = any(row.tokens_per_second for row in rows)
    if serves:
        made.add_column("tokens/s", justify="right")
    made.add_column("note", overflow="fold")
    last = None
    for row in rows:
        key = (row.case, row.dtype)
        if last not in (None, key):
            made.add_section()
        made.add_row(*(key if key != last else ("", "")), *_cells(row, serves))
        last = key
    return made


def fallbacks(rows: list[Row]) -> str:
    """What is to be said, loudly, where XLA stood in for kernels; else nothing."""
    count = sum(row.fell_back for row in rows)
    if not count:
        return ""
    return (
        f"{FALLBACK} in {count} of {len(rows)} rows: is jax-triton installed? "
        "(python -m jax_causal_conv says what is missing)"
    )


def _cells(row: Row, serves: bool) -> tuple[str, ...]:
    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    spread = "" if row.low is None else f"{row.low:,.1f}-{row.high:,.1f}"
    by = f" ({row.implementation})" if row.implementation else ""
    memory = f"{row.memory / 2**30:,.2f} GiB" if row.memory else ""
    errors = [number(row.error, ".0e")]
    if row.state_error:  # often states are copied, and exact
        errors.append(f"states {row.state_error:.0e}")
    return (
        row.candidate + by,
        number(row.microseconds, ",.1f"),
        spread,
        number(row.gigabytes_per_second, ",.0f"),
        number(row.of_yardstick, ".2f"),
        number(row.of_ours, ".2f"),
        ", ".join(filter(None, errors)),
        number(row.kernels, ".1f"),
        *([number(row.tokens_per_second, ",.0f")] if serves else []),
        ", ".join(filter(None, (memory, row.note, _clock(row)))),
    )


def _clock(row: Row) -> str:
    """How it was timed, where that is not how all are."""
    return "" if row.clock in ("", "wall", "jax.profiler") else f"by {row.clock}"


def _peer_path(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not separator or name not in PACKAGES:
        raise argparse.ArgumentTypeError(
            f"want NAME=PATH with one of the names {', '.join(PACKAGES)}, got {text!r}"
        )
    return name, Path(path).resolve()


def parser() -> argparse.ArgumentParser:
    about = {
        name: (suite.__doc__ or "").split("\n")[0] for name, suite in SUITES.items()
    }
    suites = "\n".join(f"  {name:10}{line}" for name, line in about.items())
    made = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog=f"suites:\n{suites}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("suites", nargs="*", metavar="SUITE", help="default: all")
    made.add_argument(
        "--case",
        nargs="+",
        default=("",),
        metavar="TEXT",
        help="only cases with one of these texts in their names",
    )
    made.add_argument("--long", action="store_true", help="more sizes, more time")
    made.add_argument("--seconds", type=float, help="for each case (default 2; long 8)")
    made.add_argument(
        "--dtype", nargs="+", default=(), choices=("float32", "bfloat16", "float16")
    )
    made.add_argument(
        "--shape",
        default="tiny",
        choices=("tiny", "130m", "780m", "2.7b"),
        help="of the engine's model",
    )
    made.add_argument(
        "--peer-path",
        type=_peer_path,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help=f"where a peer is: {', '.join(PACKAGES)}",
    )
    made.add_argument("--no-peers", action="store_true", help="ours and yardsticks")
    made.add_argument("--json", type=Path, help="write all results to this file")
    made.add_argument("--plots", type=Path, help="draw PNG and SVG into this folder")
    return made


def run(arguments: list[str], console: Console) -> dict[str, Any]:
    """Runs suites and returns what `--json` writes."""
    made = parser()
    given = made.parse_args(arguments)
    names = given.suites or list(SUITES)
    if unknown := set(names) - SUITES.keys():
        made.error(f"no such suite: {', '.join(sorted(unknown))}")
    options = Options(
        long=given.long,
        seconds=given.seconds or (8.0 if given.long else 2.0),
        dtypes=tuple(given.dtype),
        shape=given.shape,
        paths=dict(given.peer_path),
        with_peers=not given.no_peers,
    )
    result: dict[str, Any] = {"machine": machine.describe(), "rows": []}
    console.print(machine.title(result["machine"]))
    rows: list[Row] = []
    with Progress(console=console, transient=True) as progress:
        for name in names:
            own: list[Row] = []
            cases = _cases(name, SUITES[name], options)
            if not isinstance(cases, list):
                console.print(f"[red]{name}: {cases}[/red]")
                continue
            cases = [c for c in cases if any(text in c.name for text in given.case)]
            task = progress.add_task(name, total=len(cases))
            while cases:  # and let go of its arrays
                case = cases.pop(0)
                progress.update(task, description=f"{name}: {case.name}, {case.dtype}")
                found = run_case(case, options)
                own += found
                result["rows"] += [
                    dataclasses.asdict(r)
                    | {"gigabytes_per_second": r.gigabytes_per_second}
                    for r in found
                ]
                if given.json:  # after each case: what is there stays
                    given.json.write_text(json.dumps(result, indent=1))
                if not console.is_terminal:  # where no progress is to be seen
                    console.print(_line(found))
                progress.advance(task)
            progress.remove_task(task)
            rows += own
            console.print(table(name, own))
    summary = _summary(rows)
    if summary.row_count:
        console.print(summary)
    result["warning"] = fallbacks(rows)
    if given.json:
        given.json.write_text(json.dumps(result, indent=1))
    if result["warning"]:
        console.print(f"[bold red]{result['warning']}[/bold red]")
    if given.plots:
        _draw(result, given.plots, console)
    return result


def _draw(result: dict[str, Any], folder: Path, console: Console) -> None:
    from benchmarks import plots  # noqa: PLC0415 (needs matplotlib)

    for path in plots.draw(result, folder):
        console.print(f"drawn: {path}")


def _cases(name: str, suite, options) -> list | str:
    """All cases of a suite, or why there are none."""
    try:
        return list(suite(options))
    except Exception as error:  # the other suites' results must not be lost
        return f"not run: {type(error).__name__}: {error}"


def _line(rows: list[Row]) -> str:
    """All times of a case."""
    times = [
        (f"{r.candidate} {r.microseconds:,.1f}" if r.microseconds else r.candidate)
        + (f" ({FALLBACK})" if r.fell_back else "")
        for r in rows
    ]
    where = f"{rows[0].suite}, {rows[0].case}, {rows[0].dtype}: " if rows else ""
    return where + ", ".join(times) + " us"


def _summary(rows: list[Row]) -> Table:
    """This package's time over that of each peer."""
    timed = [row for row in rows if row.candidate in PEERS]
    names = [name for name in PEERS if any(row.candidate == name for row in timed)]
    made = Table(title="our time over that of", title_justify="left")
    for heading in ("suite", "case", "dtype"):
        made.add_column(heading, no_wrap=True)
    for name in names:
        made.add_column(name, justify="right")
    ratios: dict[tuple[str, str, str], dict[str, float]] = {}
    for row in timed:
        if row.of_ours:
            of_case = ratios.setdefault((row.suite, row.case, row.dtype), {})
            of_case[row.candidate] = 1 / row.of_ours
    for key, own in ratios.items():
        made.add_row(*key, *(f"{own[n]:.2f}" if n in own else "" for n in names))
    return made


def main() -> int:
    console = Console(width=None if sys.stdout.isatty() else 170)
    arguments = sys.argv[1:]
    if not Path("/proc/driver/nvidia/version").exists():
        expect_no_gpu()
    match arguments:
        case ["plot", source, folder]:
            _draw(json.loads(Path(source).read_text()), Path(folder), console)
        case ["tune", *rest]:
            tune.main(rest, console)
        case _:
            run(arguments, console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
