"""Draws what `python -m benchmarks --json` wrote: a PNG and an SVG for each suite."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, NullLocator

from benchmarks.cases import FALLBACK, OURS
from benchmarks.machine import title
from benchmarks.suites import CANDIDATES, DIM, TOKENS, WIDTH

# Suites with a line over a size: what the size is, what is drawn over it, and what a
# batch is otherwise.
_OF_LAYER = f"{DIM:,} channels, width {WIDTH}"
_LINES = {
    "decode": ("rows of one token", "us", f"a decode step of {_OF_LAYER}"),
    "mixed": (
        "share of prefill tokens, %",
        "us",
        f"batches of {TOKENS:,} tokens, decodes and prompts, {_OF_LAYER}",
    ),
    "layer": (
        "share of prefill tokens, %",
        "us",
        f"conv and SSD of a Mamba2-2.7B layer, batches of {TOKENS:,} tokens",
    ),
    "prefill": ("tokens of the prompt", "GB/s", f"one prompt, {_OF_LAYER}"),
    "widths": ("channels", "GB/s", f"one prompt, width {WIDTH}"),
    "metadata": ("sequences", "us", "build_metadata, 8 tokens per sequence"),
}
_ABOUT = {"engine": "what the time of a step of the Mamba2 engine goes to"}
_YARDSTICKS = {
    "copy": ("0.25", ""),
    "silu(x)": ("0.25", ""),
    "memcpy": ("0.6", ""),
    "empty kernel": ("0.6", ""),
}
# Colours that stay apart for most eyes; this package is always the first.
_COLOURS = (
    "#0072b2",
    "#56b4e9",
    "#009e73",
    "#cc79a7",
    "#d55e00",
    "#8c564b",
    "#bcbd22",
    "#e69f00",
    "#9467bd",
    "#e7298a",
    "#117733",
    "#999933",
)
_MARKERS = "osD^vP*X"


def draw(result: dict[str, Any], folder: Path) -> Iterator[Path]:
    """Draws all suites of a result into a folder; yields the files' paths."""
    folder.mkdir(parents=True, exist_ok=True)
    timed = [row for row in result["rows"] if row["microseconds"]]
    for suite, group in itertools.groupby(timed, lambda row: row["suite"]):
        figure = _figure(suite, list(group), title(result["machine"]))
        for kind in ("png", "svg"):
            path = folder / f"{suite}.{kind}"
            figure.savefig(path, dpi=150, bbox_inches="tight")
            yield path
        plt.close(figure)


def _figure(suite: str, rows: list[dict], where: str):
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    figure, axes = plt.subplots(
        1, len(dtypes), figsize=(6.2 * len(dtypes) + 1, 4.6), squeeze=False
    )
    style = _styles(rows)
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        own = [row for row in rows if row["dtype"] == dtype]
        parts = [row for row in own if ": " in row["candidate"]]
        if suite in _LINES:
            _lines(axis, suite, own, style)
        elif parts:
            _stacked(axis, parts)
        else:
            _bars(axis, suite, own, style)
        axis.set_title(dtype, fontsize=10)
    what = _LINES[suite][2] if suite in _LINES else _ABOUT.get(suite, suite)
    if any(row.get("fell_back") for row in rows):
        where += f"\n{FALLBACK}"
    figure.suptitle(f"{what}\n{where}", fontsize=11)
    figure.tight_layout()
    return figure


def _styles(rows: list[dict]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each candidate, the same in all suites."""
    order = [one.name for one in CANDIDATES]
    order += [row["candidate"] for row in rows if row["candidate"] not in order]
    pairs = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)
    styles = dict(zip(dict.fromkeys(order), pairs, strict=False)) | _YARDSTICKS
    present = {row["candidate"] for row in rows}
    return {name: style for name, style in styles.items() if name in present}


def _lines(axis, suite: str, rows: list[dict], style) -> None:
    label, unit, _ = _LINES[suite]
    for name, (colour, marker) in style.items():
        # Of several cases of one size the first counts: the sweep itself.
        points = {r["axis"]: r for r in rows[::-1] if r["candidate"] == name}
        if not points:
            continue
        sizes = sorted(points)
        values = {
            key: [_value(points[size], key, unit) for size in sizes]
            for key in ("microseconds", "low", "high")
        }
        is_ours = name == OURS
        axis.plot(
            sizes,
            values["microseconds"],
            color=colour,
            marker=marker or None,
            linestyle="--" if name in _YARDSTICKS else "-",
            linewidth=2.4 if is_ours else 1.3,
            markersize=5,
            zorder=3 if is_ours else 2,
            label=name,
        )
        # How far the runs lie apart: below every line, a yardstick's barely visible.
        axis.fill_between(
            sizes,
            values["low"],
            values["high"],
            color=colour,
            alpha=0.06 if name in _YARDSTICKS else 0.15,
            linewidth=0,
            zorder=0 if name in _YARDSTICKS else 1,
        )
    if suite not in ("mixed", "layer"):
        axis.set_xscale("log", base=2)
        axis.set_xticks(_apart(sorted({row["axis"] for row in rows})))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(
            axis="x", labelrotation=45 if len(axis.get_xticks()) > 7 else 0
        )
    axis.set_yscale("log")
    _plain_ticks(axis.yaxis)
    axis.set_xlabel(label)
    axis.set_ylabel("time of a call, us" if unit == "us" else "GB/s that must move")
    axis.grid(True, alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _apart(sizes: list[float]) -> list[float]:
    """Those that are two fifths larger than the one before: labels need some room."""
    kept = sizes[:1]
    for size in sizes[1:]:
        if size >= 1.4 * kept[-1]:
            kept.append(size)
    return kept


def _plain_ticks(axis) -> None:
    """Ticks of a logarithmic axis as plain numbers: 20, 30, 60, 100."""
    low, high = sorted(axis.get_view_interval())
    steps = (1, 2, 3, 6) if high < 30 * low else (1, 3)
    axis.set_major_locator(LogLocator(subs=steps, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:,.9g}")


def _value(row: dict, key: str, unit: str) -> float:
    return row[key] if unit == "us" else row["nbytes"] / row[key] / 1e3


def _bars(axis, suite: str, rows: list[dict], style) -> None:
    names = [row["candidate"] for row in rows]
    if len({row["case"] for row in rows}) > 1:
        names = [f"{row['candidate']}\n{row['case']}" for row in rows]
    times = [row["microseconds"] for row in rows]
    colours = [style[row["candidate"]][0] for row in rows]
    places = range(len(rows))
    spread = [
        [row["microseconds"] - row["low"] for row in rows],
        [row["high"] - row["microseconds"] for row in rows],
    ]
    axis.barh(places, times, color=colours, xerr=spread, error_kw={"ecolor": "0.3"})
    for place, row in zip(places, rows, strict=True):
        text = f" {row['microseconds']:,.0f}"
        axis.annotate(text, (row["high"], place), va="center", fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xlim(min(times) / 3, max(row["high"] for row in rows) * 3)
    _plain_ticks(axis.xaxis)
    axis.set_xlabel("time of a call, us")
    axis.grid(True, axis="x", alpha=0.3)


def _stacked(axis, rows: list[dict]) -> None:
    """A bar for each step, of the parts that its time goes to."""
    bars: dict[str, dict[str, float]] = {}
    for row in rows:
        step, _, part = row["candidate"].partition(": ")
        bar = bars.setdefault(f"{step}\n{row['case'].rpartition(', ')[2]}", {})
        bar[part] = row["microseconds"] / 1e3
    left = dict.fromkeys(bars, 0.0)
    longest = max(sum(bar.values()) for bar in bars.values())
    parts = dict.fromkeys(part for bar in bars.values() for part in bar)
    for part, colour in zip(parts, itertools.cycle(_COLOURS), strict=False):
        times = [bar.get(part, 0.0) for bar in bars.values()]
        places = range(len(bars))
        axis.barh(places, times, left=list(left.values()), color=colour, label=part)
        for place, name in enumerate(bars):
            share = times[place] / sum(bars[name].values())
            if times[place] > 0.04 * longest:
                middle = left[name] + times[place] / 2
                axis.annotate(
                    f"{share:.0%}",
                    (middle, place),
                    ha="center",
                    va="center",
                    fontsize=8,
                )
            left[name] += times[place]
    for place, total in enumerate(left.values()):
        axis.annotate(f" {total:,.1f} ms", (total, place), va="center", fontsize=8)
    axis.set_yticks(range(len(bars)), bars, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.15 * longest)
    axis.set_xlabel("time of a step, ms")
    axis.grid(True, axis="x", alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
