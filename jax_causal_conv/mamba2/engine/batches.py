"""Who takes part in a step, and the arrays that tell the device so."""

import itertools
from typing import Any, NamedTuple

import numpy as np

from ...operands import PAD_SLOT_ID
from .buckets import Bucket
from .prefixes import Snapshot
from .requests import Generation


class Row(NamedTuple):
    """A generation's share of a step.

    Attributes:
        generation: whose tokens these are.
        start: position of the first of them in the request.
        length: how many there are.
        draws: whether the next token is drawn after the last of them.
        tokens: what they are; None for a single one that is on the device.
        num_drafts: how many of the last tokens are guesses, after each of which (and
            after the token before) a token is drawn.
        source: the snapshot that it starts from instead of its own slot.
        leaves: the snapshot that it leaves, of its tokens up to there.
    """

    generation: Generation
    start: int
    length: int
    draws: bool
    tokens: np.ndarray | list[int] | None = None
    num_drafts: int = 0
    source: Snapshot | None = None
    leaves: Snapshot | None = None

    @property
    def decodes(self) -> bool:
        """Whether its first token was drawn, and has not been part of the text."""
        return self.start >= len(self.generation.text)

    def right_guesses(self, drawn: list[int]) -> int:
        """How many of its drafts, from the first, are what was drawn in their place."""
        if self.tokens is None or self.num_drafts == 0:
            return 0
        guesses = self.tokens[-self.num_drafts :]
        for right, (guess, token) in enumerate(zip(guesses, drawn, strict=False)):
            if guess != token:
                return right
        return self.num_drafts


class Features(NamedTuple):
    """What the batches of an engine have beyond the usual: static, like a bucket.

    Attributes:
        moves: rows may read one slot and write another, and leave snapshots.
        max_drafts: rows may draw so many tokens and one.
    """

    moves: bool
    max_drafts: int

    def draws(self, bucket: Bucket) -> int:
        """How many tokens a step draws, those that nobody asked for included."""
        return min(bucket.tokens, bucket.sequences * (1 + self.max_drafts))


# A token to draw, as in `Draws`.
_DRAW = np.dtype(
    [
        ("slots", np.int32),
        ("seeds", np.uint32),
        ("positions", np.int32),
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
    ]
)


class Draws(NamedTuple):
    """M tokens to draw. `seeds` and what follows are zero where nobody wants one.

    Attributes:
        after: `(M,)` int32, the token of the batch that each comes after, or None:
            the last one of each sequence, M = N.
        slots: `(M,)` int32, whose newest token it is; PAD_SLOT_ID if nobody's.
        seeds: `(M,)` uint32.
        positions: `(M,)` int32, of the token to draw.
        temperature: `(M,)` float32.
        top_k: `(M,)` int32.
        top_p: `(M,)` float32.
    """

    after: np.ndarray | None
    slots: np.ndarray
    seeds: np.ndarray
    positions: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray


class Batch(NamedTuple):
    """A step's input from the host, padded to T tokens and N rows.

    Attributes:
        tokens: `(T,)` int32, 0 where the token is still on the device.
        query_start_loc: `(N+1,)` int32, as for `causal_conv1d_fn`.
        decodes: `(N,)` bool, whether the row is its slot's newest token.
        states: arguments of the model's `packed` by name, each `(N,)`: where states
            come from and go to.
        draws: the tokens to draw.
    """

    tokens: np.ndarray
    query_start_loc: np.ndarray
    decodes: np.ndarray
    states: dict[str, np.ndarray]
    draws: Draws


def pack(rows: list[Row], bucket: Bucket, features: Features) -> Batch:
    """Puts the rows back to back, followed by empty rows and unused tokens."""
    num_tokens, n, _ = bucket
    offsets = [0, *itertools.accumulate(row.length for row in rows)]
    tokens = np.zeros(num_tokens, np.int32)
    for row, start in zip(rows, offsets, strict=False):
        if row.tokens is not None:
            tokens[start : start + row.length] = row.tokens
    slots = [row.generation.slot for row in rows]
    sources = [
        slot if row.source is None else row.source.slot
        for row, slot in zip(rows, slots, strict=True)
    ]
    states = {
        "cache_indices": _padded(sources, n, PAD_SLOT_ID),
        "has_initial_state": _padded([row.start > 0 for row in rows], n, False, bool),
    }
    if features.moves:
        left = [
            (PAD_SLOT_ID, 0)
            if row.leaves is None
            else (row.leaves.slot, len(row.leaves.tokens) - row.start)
            for row in rows
        ]
        states["write_indices"] = _padded(slots, n, PAD_SLOT_ID)
        states["snapshot_indices"] = _padded([slot for slot, _ in left], n, PAD_SLOT_ID)
        states["snapshot_ends"] = _padded([end for _, end in left], n)
    if features.max_drafts:
        rejected = [row.generation.rejected for row in rows]
        states["num_rejected_tokens"] = _padded(rejected, n)
    return Batch(
        tokens=tokens,
        query_start_loc=_padded(offsets, n + 1, offsets[-1]),
        decodes=_padded([row.tokens is None for row in rows], n, False, bool),
        states=states,
        draws=_draws(rows, offsets, features.draws(bucket), features.max_drafts > 0),
    )


def _padded(values: Any, count: int, rest: Any = 0, dtype: Any = np.int32):
    """The values, and as many of the rest as make `count`."""
    array = np.full(count, rest, dtype)
    array[: len(values)] = values
    return array


def _draws(rows: list[Row], offsets: list[int], m: int, several: bool) -> Draws:
    """A token for every row, whether it draws or not, and one more for each draft."""
    counts = np.array([1 + row.num_drafts for row in rows], np.int32)
    ends = np.cumsum(counts)
    owners = np.repeat(np.arange(len(rows)), counts)
    # How many tokens of the same row are drawn after each; rows that do not draw have
    # no drafts.
    later = ends[owners] - 1 - np.arange(len(owners))
    table = np.zeros(m, _DRAW)
    table["slots"] = PAD_SLOT_ID
    wanted = table[: len(owners)]
    wanted[:] = np.array([_last_draw(row) for row in rows], _DRAW)[owners]
    wanted["positions"] -= later
    wanted["slots"][later > 0] = PAD_SLOT_ID
    after = np.array(offsets[1:], np.int32)[owners] - 1 - later
    return Draws(
        after=_padded(after, m) if several else None,
        **{name: table[name] for name in _DRAW.names or ()},
    )


def _last_draw(row: Row) -> tuple:
    """What is drawn after a row's last token."""
    if not row.draws:
        return PAD_SLOT_ID, 0, 0, 0.0, 0, 0.0
    generation, sampling = row.generation, row.generation.terms.sampling
    return (
        generation.slot,
        generation.seed,
        row.start + row.length,
        sampling.temperature,
        sampling.top_k,
        sampling.top_p,
    )
