"""Draws the pictures of the documentation: `python docs/figures.py`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
# Text stays text: small files, and the reader's own fonts. No date, no random ids.
matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "figures"})

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, Rectangle

IMAGES = Path(__file__).parent / "images"
COLOURS = {
    "A": "#8ecae6",
    "B": "#ffd166",
    "C": "#b7e4c7",
    "D": "#e0b1cb",
    "": "#eeeeee",
}
GREY = "#666666"

# A prompt, a decode, a chunk of a prompt, padding: (request, tokens, slot, history?).
ROWS = [
    ("A", ["A0", "A1", "A2", "A3", "A4"], 3, False),
    ("B", ["B9"], 0, True),
    ("C", ["C4", "C5", "C6"], 5, True),
]
NUM_TOKENS = 11


def cell(axes, x, y, text, request, **style):
    face = COLOURS[request]
    style = {"facecolor": face, "edgecolor": "white", "linewidth": 1.5, **style}
    axes.add_patch(Rectangle((x, y), 1, 1, **style))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=9)


def blank(width, height):
    figure, axes = plt.subplots(figsize=(0.52 * width, 0.52 * (height + 0.3)))
    axes.set(xlim=(0, width), ylim=(height, -0.3), aspect="equal")
    axes.axis("off")
    figure.subplots_adjust(0, 0, 1, 1)
    return figure, axes


def label(axes, x, y, text, **style):
    axes.text(x, y, text, **{"va": "center", "fontsize": 9, "color": GREY, **style})


def packed_batch():
    """One flat array of tokens, and what says whose they are."""
    left = 4.6
    figure, axes = blank(left + NUM_TOKENS + 0.6, 6.6)
    label(axes, 0.1, 1.5, "x  (T = 11 tokens)", color="black")
    label(axes, 0.1, 2.75, "query_start_loc", color="black")
    label(axes, 0.1, 4.0, "cache_indices", color="black")
    label(axes, 0.1, 4.9, "has_initial_state", color="black")
    start = 0
    kinds = ["a new prompt", "a decode", "a prompt goes on"]
    for (name, tokens, slot, seen), kind in zip(ROWS, kinds, strict=True):
        middle = left + start + len(tokens) / 2
        for i, token in enumerate(tokens):
            cell(axes, left + start + i, 1, token, name)
        label(axes, left + start, 2.75, str(start), ha="center")
        label(axes, middle, 4.0, str(slot), ha="center")
        label(axes, middle, 4.9, str(seen), ha="center")
        low = start + len(tokens) == 6  # a narrow row's text gets a line of its own
        label(axes, middle, 0.1 if low else 0.6, kind, ha="center", fontsize=8)
        start += len(tokens)
    for t in range(start, NUM_TOKENS):
        cell(axes, left + t, 1, "", "")
    middle = left + (start + NUM_TOKENS) / 2
    label(axes, middle, 0.6, "padding", ha="center", fontsize=8)
    label(axes, left + start, 2.75, "9 9", ha="center")
    label(axes, middle, 4.0, "-1", ha="center")
    label(axes, middle, 4.9, "False", ha="center")
    label(
        axes,
        0.1,
        6.1,
        "N = 4 rows, the last one empty. Any mix that fits T and N runs in the same "
        "compiled program.",
        fontsize=8.5,
    )
    return figure


def slots():
    """The cache before and after the packed batch of the other picture."""
    before = {
        0: [("B6", "B"), ("B7", "B"), ("B8", "B")],
        2: [("0", ""), ("0", ""), ("D0", "D")],
        5: [("C1", "C"), ("C2", "C"), ("C3", "C")],
    }
    after = before | {
        0: [("B7", "B"), ("B8", "B"), ("B9", "B")],
        3: [("A2", "A"), ("A3", "A"), ("A4", "A")],
        5: [("C4", "C"), ("C5", "C"), ("C6", "C")],
    }
    notes = {
        0: "decoded: moved on by one token",
        1: "free: never read, so it needs no clearing",
        2: "not in this batch: the same bits",
        3: "new: the last L inputs of its prompt",
        4: "free",
        5: "went on: all three rows are new",
    }
    figure, axes = blank(18.6, 8.4)
    label(axes, 2.9, 0.5, "before", ha="center", color="black")
    label(axes, 8.4, 0.5, "after", ha="center", color="black")
    for s in range(6):
        y = 1 + s * 1.1
        label(axes, 0.3, y + 0.5, f"slot {s}", fontsize=8)
        for x, cache in ((1.4, before), (6.9, after)):
            for i, (text, name) in enumerate(cache.get(s, [("", "")] * 3)):
                cell(axes, x + i, y, text, name)
        if before.get(s) != after.get(s):
            ends = (4.6, y + 0.5), (6.7, y + 0.5)
            axes.add_patch(
                FancyArrowPatch(*ends, arrowstyle="->", mutation_scale=12, color=GREY)
            )
        label(axes, 10.3, y + 0.5, notes[s], fontsize=8)
    label(
        axes,
        0.3,
        7.95,
        "A slot is (L, D): the last L inputs, oldest first; 0 before a request's first "
        "token. Here L = W - 1 = 3.",
        fontsize=8.5,
    )
    return figure


def main():
    IMAGES.mkdir(exist_ok=True)
    for draw in (packed_batch, slots):
        figure = draw()
        figure.savefig(
            IMAGES / f"{draw.__name__}.svg", metadata={"Date": None}, facecolor="white"
        )


if __name__ == "__main__":
    main()
