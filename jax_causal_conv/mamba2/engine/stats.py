"""What the engine has done: its most recent steps and finished requests."""

from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

from .buckets import Bucket
from .requests import Generation


@dataclass(frozen=True)
class StepStats:
    """What a step was made of, and how long it took.

    Attributes:
        bucket: the shape it ran in.
        decode_tokens: rows of one drawn token each.
        prefill_tokens: tokens of prompts.
        prefill_rows: the rows that these came in.
        running: requests with a slot.
        waiting: requests without one.
        start: when the host began to plan it (`time.perf_counter`).
        host_seconds: planning, packing and dispatching.
        seconds: until its tokens were on the host, counted from `start` or from the end
            of the step before it, whichever is later: these add up to the busy time.
    """

    bucket: Bucket
    decode_tokens: int
    prefill_tokens: int
    prefill_rows: int
    running: int
    waiting: int
    start: float
    host_seconds: float
    seconds: float

    @property
    def padding(self) -> int:
        """Tokens of the bucket that belong to nobody."""
        return self.bucket.tokens - self.decode_tokens - self.prefill_tokens


class Stats(NamedTuple):
    """The most recent steps and finished requests, oldest first."""

    steps: deque[StepStats]
    requests: deque[Generation]
