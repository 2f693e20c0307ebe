"""Draws what `python -m benchmarks --json` wrote: a PNG and an SVG for each suite."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from benchmarks.cases import OURS
from benchmarks.machine import title
from benchmarks.suites import CANDIDATES

# Suites with a line over a size: what the size is, and what is drawn over it.
_LINES = {
    "decode": ("rows of one token", "us"),
    "mixed": ("share of prefill tokens, %", "us"),
    "prefill": ("tokens of the prompt", "GB/s"),
    "widths": ("channels", "GB/s"),
    "metadata": ("sequences", "us"),
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
        (_lines if suite in _LINES else _bars)(axis, suite, own, style)
        axis.set_title(dtype, fontsize=10)
    figure.suptitle(f"{suite}: {where}", fontsize=11)
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


_YARDSTICKS = {
    "copy": ("0.25", ""),
    "silu(x)": ("0.25", ""),
    "memcpy": ("0.6", ""),
    "empty kernel": ("0.6", ""),
}


def _lines(axis, suite: str, rows: list[dict], style) -> None:
    label, unit = _LINES[suite]
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
        axis.fill_between(
            sizes, values["low"], values["high"], color=colour, alpha=0.15, linewidth=0
        )
    if suite != "mixed":
        axis.set_xscale("log", base=2)
        axis.set_xticks(sorted({row["axis"] for row in rows}))
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.tick_params(
            axis="x", labelrotation=45 if len(axis.get_xticks()) > 7 else 0
        )
    axis.set_yscale("log")
    axis.set_xlabel(label)
    axis.set_ylabel("time of a call, us" if unit == "us" else "GB/s that must move")
    axis.grid(True, which="major", alpha=0.3)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))


def _value(row: dict, key: str, unit: str) -> float:
    return row[key] if unit == "us" else row["nbytes"] / row[key] / 1e3


def _bars(axis, suite: str, rows: list[dict], style) -> None:
    names = [row["candidate"] for row in rows]
    if suite == "training":
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
    axis.set_xlabel("time of a call, us")
    axis.grid(True, axis="x", alpha=0.3)
