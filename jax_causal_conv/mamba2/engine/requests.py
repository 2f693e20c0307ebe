"""What to generate, what has become of it so far, and the events on the way."""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from ...operands import PAD_SLOT_ID
from ..sampling import GREEDY, SamplingParams, integer
from .validation import brief, prompt_of, stops_of

FinishReason = Literal["stop", "length", "cancelled"]


class QueueFull(RuntimeError):
    """As many requests wait already as the engine lets wait: try again later."""


class Event(NamedTuple):
    """What a step did to a request: a new token, its end, or both at once.

    Attributes:
        id: number of the request.
        token: the new token, or None if the request was cancelled.
        finish_reason: why the request ended, in its last event; None in all others.
    """

    id: int
    token: int | None
    finish_reason: FinishReason | None = None


@dataclass(frozen=True, eq=False)
class Request:
    """What to generate.

    `Engine.submit` checks it against the model and takes its own copy of everything, so
    the same request may be submitted many times, and the prompt reused.

    Attributes:
        prompt: at least one token: a sequence of integers of any kind, or a
            one-dimensional array of an integer dtype.
        max_new_tokens: at least 1; the last one has `finish_reason` "length".
        sampling: how tokens are drawn; greedily, by default.
        stop_token_ids: drawing one of these ends the request with "stop". It is the
            last of its tokens. A list, tuple, set, range or one-dimensional array of
            tokens of the vocabulary; empty for none. A generator is refused, as it can
            be read once only.
        on_event: called by `Engine.step` with each event of this request, in order. It
            may submit and cancel requests. If it raises an error, `step` raises that
            error, and the next step delivers the events that come after this one.
    """

    prompt: Sequence[int] | np.ndarray
    max_new_tokens: int = 64
    sampling: SamplingParams = GREEDY
    stop_token_ids: Collection[int] = ()
    on_event: Callable[[Event], None] | None = None


class Terms(NamedTuple):
    """What a request asks for, checked and copied by `Engine.submit`.

    Attributes:
        prompt: `(P,)` int32, read-only.
        max_new_tokens, sampling, on_event: as in `Request`.
        stop_token_ids: as in `Request`.
    """

    prompt: np.ndarray
    max_new_tokens: int
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    on_event: Callable[[Event], None] | None

    @classmethod
    def of(cls, request: Request, vocab_size: int) -> "Terms":
        """Raises TypeError and ValueError as `Engine.submit` says."""
        if not isinstance(request, Request):
            raise TypeError(f"request must be a Request, got {brief(request)}")
        prompt = prompt_of(request.prompt)
        if prompt.min() < 0 or prompt.max() >= vocab_size:
            raise ValueError(
                f"tokens must be in [0, {vocab_size}), got a prompt with "
                f"{prompt.min()} to {prompt.max()}"
            )
        prompt = prompt.astype(np.int32)
        prompt.flags.writeable = False
        max_new_tokens = integer("max_new_tokens", request.max_new_tokens)
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        if not isinstance(request.sampling, SamplingParams):
            raise TypeError(
                f"sampling must be SamplingParams, got {brief(request.sampling)}"
            )
        stops = stops_of(request.stop_token_ids)
        if outside := [t for t in stops if not 0 <= t < vocab_size]:
            raise ValueError(
                f"stop_token_ids must be in [0, {vocab_size}), got {min(outside)}, "
                "which is never drawn"
            )
        if request.on_event is not None and not callable(request.on_event):
            raise TypeError(
                f"on_event must be callable or None, got {brief(request.on_event)}"
            )
        return cls(prompt, max_new_tokens, request.sampling, stops, request.on_event)

    def sample(self, i: int) -> "Terms":
        """The same for the i-th of several samples, which has a seed of its own."""
        if (seed := self.sampling.seed) is None:
            return self
        return self._replace(
            sampling=dataclasses.replace(self.sampling, seed=(seed + i) % 2**32)
        )


@dataclass(eq=False)
class Generation:
    """The state of a request, which `Engine.submit` returns. For reading only.

    Times are those of `time.perf_counter`.

    Attributes:
        id: number of the request in its engine.
        request: the request.
        terms: what it asks for, as `Engine.submit` has read it.
        text: `(L,)` int32, what has to be read before the next token is drawn: the
            prompt and, where the engine had to read the request again after an
            interruption, what had been drawn by then.
        digests: of the prompt's blocks, for the prefix cache.
        tokens: drawn so far.
        token_times: when each of them reached the host.
        finish_reason: None until the end.
        slot: its slot in the caches, PAD_SLOT_ID while it has none.
        share: of the engine's slots, to which it belongs: 0, or a device's number along
            the data axis.
        scheduled: tokens (of the prompt, then drawn ones) that were given to the model,
            or that a snapshot spared it, but for drafts that were not accepted.
        rejected: drafts that were given to the model behind those, which the next step
            takes back from the slot's states.
        reused: tokens of the prompt that the last snapshot it started from spared it.
        paused: whether it is.
        saved: its states on the host, from pausing it until it has a slot again.
        drafts: whether drafts are asked for it: until they fail.
        arrival: when it was submitted.
        admitted: when it got a slot.
        finished: when it ended.
        delivered: events that `on_event` has been called with, or `step` returns.
    """

    id: int
    request: Request
    terms: Terms
    arrival: float
    text: np.ndarray
    digests: list[bytes] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    slot: int = PAD_SLOT_ID
    share: int = 0
    scheduled: int = 0
    rejected: int = 0
    reused: int = 0
    paused: bool = False
    saved: Any = None
    drafts: bool = True
    admitted: float | None = None
    finished: float | None = None
    delivered: int = 0

    @property
    def prompt(self) -> np.ndarray:
        """`(P,)` int32, read-only."""
        return self.terms.prompt

    @functools.cached_property
    def sampling(self) -> SamplingParams:
        """How it draws, with a seed even where the request has none."""
        return dataclasses.replace(self.terms.sampling, seed=self.seed)

    @property
    def seed(self) -> int:
        """The seed of its draws, which depend on it and on their positions alone."""
        seed = self.terms.sampling.seed
        return self.id % 2**32 if seed is None else seed

    def all_tokens(self) -> np.ndarray:
        """`(P + D,)` int32, the prompt and what has been drawn."""
        return np.concatenate([self.prompt, np.array(self.tokens, np.int32)])

    @property
    def first_token(self) -> float | None:
        """When the first token reached the host."""
        return self.token_times[0] if self.token_times else None

    @property
    def prompt_left(self) -> int:
        """Tokens of the prompt (of `text`, to be exact) that no step has taken yet."""
        return max(len(self.text) - self.scheduled, 0)

    @property
    def draws_scheduled(self) -> int:
        """Tokens drawn so far, including those that have not reached the host yet."""
        read_again = len(self.text) - len(self.prompt)
        return read_again + max(self.scheduled - len(self.text) + 1, 0)

    @property
    def num_events(self) -> int:
        """How many events there have been: one per token, one if it was cancelled."""
        return len(self.tokens) + (self.finish_reason == "cancelled")

    def event(self, index: int) -> Event:
        """The event of that number, counted from 0."""
        if index == len(self.tokens):
            return Event(self.id, None, "cancelled")
        last = index == len(self.tokens) - 1 and self.finish_reason != "cancelled"
        reason = self.finish_reason if last else None
        return Event(self.id, self.tokens[index], reason)

    def up_to_end(self, drawn: list[int]) -> list[int]:
        """Of the tokens that come next, those up to the one that ends it, if any."""
        most = self.terms.max_new_tokens - len(self.tokens)
        stops = self.terms.stop_token_ids
        if not stops.isdisjoint(drawn):
            first = next(i for i, token in enumerate(drawn) if token in stops)
            most = min(most, first + 1)
        return drawn[:most]

    def reason_to_end(self) -> FinishReason | None:
        """Why its last token ends it, if that does."""
        if self.tokens and self.tokens[-1] in self.terms.stop_token_ids:
            return "stop"
        if len(self.tokens) == self.terms.max_new_tokens:
            return "length"
        return None
