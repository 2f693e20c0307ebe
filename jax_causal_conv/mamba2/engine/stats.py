"""What the engine has done: its most recent steps and finished requests."""

from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

from .batches import Row
from .buckets import Bucket
from .requests import Generation


@dataclass(frozen=True)
class StepStats:
    """What a step was made of, and how long it took.

    Attributes:
        bucket: the shape it ran in, on each device.
        devices: how many there were along the data axis.
        decode_tokens: rows of one drawn token each, not counting drafts.
        draft_tokens: drafts in these rows.
        accepted_tokens: drafts that turned out right.
        prefill_tokens: tokens of prompts.
        prefill_rows: the rows that these came in.
        prefix_hits: prompts that started from a snapshot.
        prefix_tokens: tokens that these did not have to read.
        running: requests with a slot.
        waiting: requests without one.
        start: when the host began to plan it (`time.perf_counter`).
        host_seconds: planning and packing.
        dispatch_seconds: handing it to the device. On a GPU much of it may be waiting
            for steps before it.
        seconds: until its tokens were on the host, counted from `start` or from the end
            of the step before it, whichever is later: these add up to the busy time.
    """

    bucket: Bucket
    devices: int
    decode_tokens: int
    draft_tokens: int
    accepted_tokens: int
    prefill_tokens: int
    prefill_rows: int
    prefix_hits: int
    prefix_tokens: int
    running: int
    waiting: int
    start: float
    host_seconds: float
    dispatch_seconds: float
    seconds: float

    @classmethod
    def of(cls, rows: list[Row], **attributes: Any) -> "StepStats":
        """Of a step of these rows, whose tokens are not on the host yet."""
        decodes = sum(row.decodes for row in rows)
        hits = [row.start for row in rows if row.source is not None]
        return cls(
            decode_tokens=decodes,
            draft_tokens=sum(row.num_drafts for row in rows),
            accepted_tokens=0,
            prefill_tokens=sum(row.length for row in rows if not row.decodes),
            prefill_rows=len(rows) - decodes,
            prefix_hits=len(hits),
            prefix_tokens=sum(hits),
            seconds=0.0,
            **attributes,
        )

    @property
    def padding(self) -> int:
        """Tokens of the buckets that belong to nobody."""
        used = self.decode_tokens + self.draft_tokens + self.prefill_tokens
        return self.devices * self.bucket.tokens - used


class Stats(NamedTuple):
    """The most recent steps and finished requests, oldest first."""

    steps: deque[StepStats]
    requests: deque[Generation]

    @property
    def prefix_hits(self) -> int:
        """Prompts that started from a snapshot."""
        return sum(step.prefix_hits for step in self.steps)

    @property
    def prefix_tokens(self) -> int:
        """Tokens of prompts that snapshots spared."""
        return sum(step.prefix_tokens for step in self.steps)

    @property
    def acceptance(self) -> float:
        """The share of drafts that turned out right; NaN if there were none."""
        drafts = sum(step.draft_tokens for step in self.steps)
        accepted = sum(step.accepted_tokens for step in self.steps)
        return accepted / drafts if drafts else float("nan")

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a decoding request drew in a step; NaN if none decoded."""
        rows = sum(step.decode_tokens for step in self.steps)
        accepted = sum(step.accepted_tokens for step in self.steps)
        return (rows + accepted) / rows if rows else float("nan")
