"""Continuous batching for `Mamba2LM`: requests come and go, one jitted call per step.

A step packs one token of every decoding request and, within its budget of tokens, the
next chunks of the prompts that still wait. It runs the model over all of them and draws
the next tokens, in one executable with donated caches. Batches are padded to one of a
few shapes (`Bucket`), each of which is compiled once, by `Engine.warmup` or when it is
first used.

The newest token of each slot stays on the device, where the next step finds it. So the
engine can dispatch a step before the host knows what the previous one has drawn, and
the host works while the device does. The price is that a request which draws a stop
token has already been given a row in the next step. That row's result is thrown away.

An exception may end a step anywhere: a callback's error, the device's, or Ctrl-C
between any two instructions, even after the device took the caches and before it gave
them back. So there is one truth: the requests that have not ended (`Engine._active`)
and the tokens they have on the host. All else can be made from it: queues, slots and
even caches, as a request whose states are lost is read again, with the tokens drawn so
far as part of its prompt. Whoever changes several things at once clears
`Engine._intact` first and sets it last; where it is clear, the next call mends.
"""

import functools
import itertools
import time
from collections import deque
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
    Set,
    Sized,
)
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ..metadata import ConvMetadata, build_metadata
from ..operands import PAD_SLOT_ID
from .model import Mamba2LM
from .sampling import GREEDY, SamplingParams, integer, sample

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
            raise TypeError(f"request must be a Request, got {_brief(request)}")
        prompt = _prompt(request.prompt)
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
                f"sampling must be SamplingParams, got {_brief(request.sampling)}"
            )
        stops = _stops(request.stop_token_ids)
        if outside := [t for t in stops if not 0 <= t < vocab_size]:
            raise ValueError(
                f"stop_token_ids must be in [0, {vocab_size}), got {min(outside)}, "
                "which is never drawn"
            )
        if request.on_event is not None and not callable(request.on_event):
            raise TypeError(
                f"on_event must be callable or None, got {_brief(request.on_event)}"
            )
        return cls(prompt, max_new_tokens, request.sampling, stops, request.on_event)


@dataclass(eq=False)
class Generation:
    """The state of a request, which `Engine.submit` returns. For reading only.

    Times are those of `time.perf_counter`.

    Attributes:
        id: number of the request in its engine.
        request: the request.
        terms: what it asks for, as `Engine.submit` has read it.
        text: `(L,)` int32, the tokens that steps get from the host: the prompt and,
            where the engine had to read the request again after an interruption, what
            had been drawn by then.
        tokens: drawn so far.
        token_times: when each of them reached the host.
        finish_reason: None until the end.
        slot: its slot in the caches, PAD_SLOT_ID while it has none.
        scheduled: tokens (of the prompt, then drawn ones) that were given to the model.
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
    tokens: list[int] = field(default_factory=list)
    token_times: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    slot: int = PAD_SLOT_ID
    scheduled: int = 0
    admitted: float | None = None
    finished: float | None = None
    delivered: int = 0

    @property
    def prompt(self) -> np.ndarray:
        """`(P,)` int32, read-only."""
        return self.terms.prompt

    @property
    def seed(self) -> int:
        """The seed of its draws, which depend on it and on their positions alone."""
        seed = self.terms.sampling.seed
        return self.id % 2**32 if seed is None else seed

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

    def reason_to_end(self) -> FinishReason | None:
        """Why its last token ends it, if that does."""
        if self.tokens and self.tokens[-1] in self.terms.stop_token_ids:
            return "stop"
        if len(self.tokens) == self.terms.max_new_tokens:
            return "length"
        return None


class Bucket(NamedTuple):
    """The static shape of a step.

    Attributes:
        tokens: T, how many tokens it has room for.
        sequences: N, how many rows it has room for.
        prefills: how many of the rows may have more than one token.
    """

    tokens: int
    sequences: int
    prefills: int


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


class Batch(NamedTuple):
    """A step's input from the host, padded to T tokens and N rows.

    `seeds` and what follows up to `top_p` are zero in rows that draw nothing.

    Attributes:
        tokens: `(T,)` int32, 0 where the token is still on the device.
        query_start_loc: `(N+1,)` int32, as for `causal_conv1d_fn`.
        slots: `(N,)` int32, PAD_SLOT_ID in padding.
        has_initial_state: `(N,)` bool, False in the first chunk of a request.
        decodes: `(N,)` bool, whether the row is its slot's newest token.
        draws: `(N,)` bool, whether the row ends with the last known token of its
            request, so that the next one is drawn.
        seeds: `(N,)` uint32.
        positions: `(N,)` int32, of the token to draw.
        temperature: `(N,)` float32.
        top_k: `(N,)` int32.
        top_p: `(N,)` float32.
        metadata: of `query_start_loc`, for the convs of all layers.
    """

    tokens: np.ndarray
    query_start_loc: np.ndarray
    slots: np.ndarray
    has_initial_state: np.ndarray
    decodes: np.ndarray
    draws: np.ndarray
    seeds: np.ndarray
    positions: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    metadata: ConvMetadata


class DeviceState(NamedTuple):
    """What stays on the device from step to step.

    Attributes:
        cache: of the model, S slots.
        newest: `(S,)` int32, the token that each slot's request drew last.
    """

    cache: Any
    newest: jax.Array


class Row(NamedTuple):
    """A generation's share of a step.

    Attributes:
        generation: whose tokens these are.
        start: position of the first of them in the request.
        length: how many there are.
        draws: whether the next token is drawn after the last of them.
    """

    generation: Generation
    start: int
    length: int
    draws: bool

    @property
    def decodes(self) -> bool:
        """Whether its token is on the device, rather than part of the text."""
        return self.start >= len(self.generation.text)


class Flight(NamedTuple):
    """A step that the device may still be working on.

    Attributes:
        rows: who takes part.
        tokens: `(N,)`, what the rows draw.
        bucket, running, waiting, start, host_seconds: as in `StepStats`.
    """

    rows: list[Row]
    tokens: jax.Array
    bucket: Bucket
    running: int
    waiting: int
    start: float
    host_seconds: float


class Engine:
    """Serves a model to many requests at once; synchronous, for one thread.

    Any call may end with an exception, even one that a signal's handler raises
    (Ctrl-C): no request loses a token by it, and the next call goes on. If it came
    while the device had the caches, the next call allocates new ones and reads the
    running requests again, which takes time but changes nothing else. A `submit` or
    `cancel` that such an exception ends has done all or nothing. Handlers of signals
    must not call the engine themselves.

    Requests get slots in the order of their arrival. In each step, decoding requests
    come first, with one token each, so that no prompt holds them up; prompts share the
    rest of the budget, the oldest first, in chunks.

    What a request generates depends on the request alone (up to the last bits of
    floating point, which XLA may round differently in another bucket).

    Example:
        >>> engine = Engine(model, num_slots=16, max_tokens_per_step=256)
        >>> engine.warmup()
        >>> generation = engine.submit(Request(prompt=[1, 2, 3], max_new_tokens=8))
        >>> events = engine.run()
        >>> generation.tokens, generation.finish_reason
    """

    def __init__(
        self,
        model: Mamba2LM,
        *,
        num_slots: int,
        max_tokens_per_step: int,
        max_prefills_per_step: int = 4,
        token_buckets: Iterable[int] | None = None,
        decode_buckets: Iterable[int] | None = None,
        max_waiting: int = 1024,
        cache_dtype: Any = None,
        ssm_dtype: Any = jnp.float32,
        history: int = 100_000,
    ):
        """Allocates the caches; compiles nothing yet.

        Args:
            model: a `Mamba2LM`, or anything with its `config.vocab_size`, `packed` and
                `init_cache`. Its parameters are read once.
            num_slots: requests that run at a time.
            max_tokens_per_step: budget of a step, at least `num_slots`.
            max_prefills_per_step: chunks of more than one token in a step.
            token_buckets: sizes T of steps with such chunks. The largest must be
                `max_tokens_per_step`. None: it and its halves, down to 16.
            decode_buckets: sizes of steps without, one token per row. The largest must
                be `num_slots`. None: it and its halves, down to 1.
            max_waiting: requests that may wait for a slot.
            cache_dtype: of the conv states, `dtype` of the model's `init_cache`.
            ssm_dtype: of the SSM states. bfloat16 halves what a decode step moves, and
                rounds the states at each.
            history: how many steps and finished requests `stats` remembers.

        Raises:
            ValueError: a size is out of its range.
        """
        if min(num_slots, max_prefills_per_step) < 1 or min(max_waiting, history) < 0:
            raise ValueError(
                "num_slots and max_prefills_per_step must be >= 1, max_waiting and "
                f"history >= 0, got {num_slots}, {max_prefills_per_step}, "
                f"{max_waiting}, {history}"
            )
        if max_tokens_per_step < num_slots:
            raise ValueError(
                "max_tokens_per_step must be at least num_slots, got "
                f"{max_tokens_per_step} < {num_slots}"
            )
        self._budget = max_tokens_per_step
        self._max_prefills = max_prefills_per_step
        self._max_waiting = max_waiting
        self._vocab_size = model.config.vocab_size

        decode_sizes = _sizes("decode_buckets", decode_buckets, num_slots, 1)
        mixed_sizes = _sizes("token_buckets", token_buckets, max_tokens_per_step, 16)
        self._decode_buckets = [Bucket(n, n, 0) for n in decode_sizes]
        self._mixed_buckets = [
            Bucket(t, min(t, num_slots), min(t // 2, num_slots, max_prefills_per_step))
            for t in mixed_sizes
            if t > 1
        ]
        # The parameters are a flat list because every step flattens its arguments: that
        # takes 60 us for an nnx.State of 38 arrays, and 2 us for a list.
        graph, params = nnx.split(model)
        self._params, params_tree = jax.tree.flatten(params)
        self._jitted = jax.jit(
            functools.partial(_model_step, graph, params_tree),
            static_argnames="max_prefills",
            donate_argnames="state",
        )
        self._executables: dict[Bucket, jax.stages.Compiled] = {}
        self._state = DeviceState(
            model.init_cache(num_slots, dtype=cache_dtype, ssm_dtype=ssm_dtype),
            jnp.zeros(num_slots, jnp.int32),
        )
        self._state_types = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding),
            self._state,
        )
        self._num_slots = num_slots
        self._intact = True
        self._ids = itertools.count()
        self._free = deque(range(num_slots))
        self._waiting: deque[Generation] = deque()
        self._running: dict[int, Generation] = {}  # in the order of admission
        self._active: dict[int, Generation] = {}  # all that have not ended
        self._flights: deque[Flight] = deque()  # two at most, the oldest first
        # A request is in here once for each of its events that is to be delivered.
        self._news: deque[Generation] = deque()
        # Events (by number) that are delivered, but that no step has returned yet.
        self._returning: list[tuple[Generation, int]] = []
        self._in_callback = False
        self._last_collect = 0.0
        self._stats = Stats(deque(maxlen=history), deque(maxlen=history))

    # ---- What a server calls -------------------------------------------------------

    def submit(self, request: Request) -> Generation:
        """Queues a request.

        Returns:
            Its `Generation`, which fills up as the engine steps.

        Raises:
            QueueFull: `max_waiting` requests wait already.
            TypeError: an attribute is not of the kind that `Request` asks for.
            ValueError: the prompt is empty, has more than one dimension or something
                other than integers, or it or `stop_token_ids` has tokens outside the
                vocabulary, or `max_new_tokens` < 1.
        """
        terms = Terms.of(request, self._vocab_size)
        self._mend()
        # The next step moves as many of the waiting requests into slots as are free.
        if len(self._waiting) >= self._max_waiting + len(self._free):
            raise QueueFull(f"{len(self._waiting)} requests wait already")
        generation = Generation(
            next(self._ids), request, terms, time.perf_counter(), terms.prompt
        )
        self._intact = False
        self._active[generation.id] = generation
        self._waiting.append(generation)
        self._intact = True
        return generation

    def cancel(self, id: int) -> bool:
        """Ends a request, and frees its slot at once.

        Its last event comes with the next step. Tokens still on their way from the
        device are dropped.

        Returns:
            False if there is no such request, or it has ended already.

        Raises:
            TypeError: `id` is not an integer.
        """
        id = integer("id", id)
        self._mend()
        if (generation := self._active.get(id)) is None:
            return False
        self._intact = False
        if generation in self._waiting:
            self._waiting.remove(generation)
        self._finish(generation, "cancelled", time.perf_counter())
        self._intact = True
        return True

    def step(self) -> list[Event]:
        """Dispatches the next batch, then collects what the one before it has drawn.

        Returns:
            The events since the last step, which the requests' `on_event` have seen.
            Empty in the first step, as nothing was under way, and while prompts longer
            than the budget are being read. If an exception ends a step, the next one
            returns its events too, except that of the callback that was being called.
        """
        self._advance()
        return self._take_events()

    def run(self) -> list[Event]:
        """Steps until the engine is idle, and returns all events, as `step` does."""
        while self._busy:
            self._advance()
        return self._take_events()

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._busy and (self._in_callback or not self._returning)

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    @property
    def stats(self) -> Stats:
        """The most recent steps and finished requests."""
        return self._stats

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes that a step may have."""
        return (*self._decode_buckets, *self._mixed_buckets)

    @property
    def num_compilations(self) -> int:
        """Compiled steps so far, at most one per bucket."""
        return len(self._executables)

    def warmup(self) -> None:
        """Compiles all buckets, so that no request has to wait for that."""
        self._mend()
        for bucket in self.buckets:
            self._executable(bucket)

    # ---- A step --------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        return bool(self._active or self._flights or self._news)

    def _advance(self) -> None:
        """A step, but for the returning of its events."""
        self._mend()
        while len(self._flights) > 1:  # The step before was interrupted.
            self._collect()
        under_way = bool(self._flights)
        self._dispatch()
        if under_way:
            self._collect()
        self._deliver()

    def _dispatch(self) -> None:
        """Plans a step and hands it to the device, without waiting for anything."""
        start = time.perf_counter()
        if self._free and self._waiting:
            self._admit(start)
        running = len(self._running)
        if not (rows := self._plan()):
            return
        bucket = self._fit(rows)
        batch = _pack(rows, bucket)
        executable = self._executable(bucket)
        # From here until the results are in their places, an interruption loses the
        # caches: they are donated.
        self._intact = False
        tokens, self._state = executable(self._params, self._state, batch)
        tokens.copy_to_host_async()
        for generation, _, length, _ in rows:
            generation.scheduled += length
            # Its last token is on its way, so the next step may give the slot away.
            if generation.draws_scheduled == generation.terms.max_new_tokens:
                self._release(generation)
        host_seconds = time.perf_counter() - start
        waiting = len(self._waiting)
        self._flights.append(
            Flight(rows, tokens, bucket, running, waiting, start, host_seconds)
        )
        self._intact = True

    def _admit(self, now: float) -> None:
        """Gives the free slots to requests that wait."""
        self._intact = False
        while self._free and self._waiting:
            generation = self._waiting.popleft()
            generation.slot = self._free.popleft()
            if generation.admitted is None:
                generation.admitted = now
            self._running[generation.id] = generation
        self._intact = True

    def _plan(self) -> list[Row]:
        """Who takes part in the step, with how many tokens."""
        rows, prompts = [], []
        for generation in self._running.values():
            if generation.prompt_left:
                prompts.append(generation)
            else:
                rows.append(Row(generation, generation.scheduled, 1, True))
        # The budget has a token for every slot, and each prompt holds a slot that takes
        # no part in decoding: if there are prompts, there are tokens left for them.
        left, prefills = self._budget - len(rows), 0
        for generation in prompts:
            length = min(generation.prompt_left, left)
            if length > 1 and prefills == self._max_prefills:
                continue
            if length == 0:
                break
            draws = length == generation.prompt_left
            rows.append(Row(generation, generation.scheduled, length, draws))
            left -= length
            prefills += length > 1
        return rows

    def _fit(self, rows: list[Row]) -> Bucket:
        """The smallest bucket that holds the rows; its prefills always suffice."""
        tokens = sum(row.length for row in rows)
        decodes_only = tokens == len(rows)
        buckets = self._decode_buckets if decodes_only else self._mixed_buckets
        return next(bucket for bucket in buckets if bucket.tokens >= tokens)

    def _executable(self, bucket: Bucket) -> jax.stages.Compiled:
        if bucket not in self._executables:
            self._executables[bucket] = self._jitted.lower(
                self._params,
                self._state,
                _pack([], bucket),
                max_prefills=bucket.prefills,
            ).compile()
        return self._executables[bucket]

    def _collect(self) -> None:
        """Waits for the oldest step's tokens, and gives them to their requests."""
        flight = self._flights[0]
        try:
            # An interruption here changes nothing: the tokens can be waited for again.
            tokens = np.asarray(flight.tokens).tolist()
        except Exception:
            # The device has failed, and with this step's tokens its caches are lost.
            self._intact = False
            raise
        now = time.perf_counter()
        self._intact = False
        self._flights.popleft()
        for row, drawn in zip(flight.rows, tokens[: len(flight.rows)], strict=True):
            generation = row.generation
            # The request may have been cancelled, or stopped by the previous step's
            # token, while this step was under way.
            if not row.draws or generation.finish_reason is not None:
                continue
            generation.token_times.append(now)  # before the token: see `_mend`
            generation.tokens.append(drawn)
            if (reason := generation.reason_to_end()) is not None:
                self._finish(generation, reason, now)
            else:
                self._news.append(generation)
        self._record(flight, now)
        self._intact = True

    def _deliver(self) -> None:
        """Calls the requests' callbacks with their events, and notes what to return."""
        while self._news:
            generation = self._news[0]
            index, on_event = generation.delivered, generation.terms.on_event
            if index == generation.num_events:  # delivered by an interrupted step
                self._news.popleft()
            elif on_event is None:
                # In this order no interruption can lose the event or deliver it twice.
                if self._returning[-1:] != [(generation, index)]:
                    self._returning.append((generation, index))
                generation.delivered = index + 1
                self._news.popleft()
            else:
                event = generation.event(index)
                generation.delivered = index + 1
                self._news.popleft()
                self._in_callback = True
                try:
                    on_event(event)
                finally:
                    self._in_callback = False
                self._returning.append((generation, index))

    def _take_events(self) -> list[Event]:
        events = [generation.event(index) for generation, index in self._returning]
        self._returning = []
        return events

    def _finish(self, generation: Generation, reason: FinishReason, now: float) -> None:
        generation.finished = now
        generation.finish_reason = reason  # after `finished`: see `_mend`
        self._news.append(generation)  # before it leaves `_active`: see `_mend`
        self._stats.requests.append(generation)
        del self._active[generation.id]
        self._release(generation)

    def _mend(self) -> None:
        """Puts all in order after an exception in the midst of a change.

        It may be interrupted itself, and starts anew then.
        """
        if self._intact:
            return
        for generation in self._active.values():
            # The token is what counts; the other things follow it.
            del generation.token_times[len(generation.tokens) :]
            if generation.finish_reason is None:
                generation.finished = None
                if (reason := generation.reason_to_end()) is not None:
                    generation.finished = generation.token_times[-1]
                    generation.finish_reason = reason
        told = dict.fromkeys([*self._news, *self._active.values()])
        self._news = deque(
            generation
            for generation in told
            for _ in range(generation.num_events - generation.delivered)
        )
        for generation in told:
            generation.slot = PAD_SLOT_ID
            if generation.finish_reason is None:
                generation.scheduled = 0
                tokens = np.array(generation.tokens, np.int32)
                generation.text = np.concatenate([generation.prompt, tokens])
            elif generation.id in self._active:
                if generation not in self._stats.requests:
                    self._stats.requests.append(generation)
                del self._active[generation.id]
        self._flights.clear()
        self._running.clear()
        self._free = deque(range(self._num_slots))
        self._waiting = deque(self._active.values())
        self._state = self._state_types  # The old caches make room for the new ones.
        self._state = jax.tree.map(
            lambda a: jnp.zeros(a.shape, a.dtype, device=a.sharding), self._state_types
        )
        self._intact = True

    def _release(self, generation: Generation) -> None:
        """Frees the slot, if there is one.

        A step that is still under way may write to it. That does no harm: the device
        takes the steps in turn, and a new request does not read what it finds there.
        """
        if self._running.pop(generation.id, None) is not None:
            self._free.append(generation.slot)
            generation.slot = PAD_SLOT_ID

    def _record(self, flight: Flight, now: float) -> None:
        decodes = sum(row.decodes for row in flight.rows)
        tokens = sum(row.length for row in flight.rows)
        self._stats.steps.append(
            StepStats(
                bucket=flight.bucket,
                decode_tokens=decodes,
                prefill_tokens=tokens - decodes,
                prefill_rows=len(flight.rows) - decodes,
                running=flight.running,
                waiting=flight.waiting,
                start=flight.start,
                host_seconds=flight.host_seconds,
                seconds=now - max(flight.start, self._last_collect),
            )
        )
        self._last_collect = now


def _brief(value: Any) -> str:
    """The value and its type, for an error."""
    text = repr(value)
    text = text if len(text) <= 60 else f"{text[:57]}..."
    return f"{text} ({type(value).__name__})"


def _items(
    name: str, value: Any, what: str, refused: tuple = ()
) -> np.ndarray | list[int]:
    """Integers: a one-dimensional array as it is, anything else as a list.

    Args:
        name: of the argument.
        value: what was given.
        what: what it must be, in words.
        refused: types that are not wanted, beside text and what can be read once only.
    """
    refused = (str, bytes, bytearray, Iterator, Mapping, *refused)
    accepted = isinstance(value, Iterable) and isinstance(value, Sized)
    if not accepted or isinstance(value, refused):
        raise TypeError(f"{name} must be {what}, got {_brief(value)}")
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise ValueError(
                f"{name} must be {what}, got {array.dtype} of shape {array.shape}"
            )
        return array
    items = []
    for item in value:
        try:
            items.append(integer(name, item))
        except TypeError:
            raise ValueError(
                f"{name} must be {what}, got {_brief(item)} in it"
            ) from None
    return items


def _prompt(value: Any) -> np.ndarray:
    """The prompt as an array of any integer dtype, or of Python's large integers."""
    what = "a sequence of at least one integer"
    items = _items("prompt", value, what, refused=(Set,))
    if len(items) == 0:
        raise ValueError(f"prompt must be {what}, got {_brief(value)}")
    return np.asarray(items)


def _stops(value: Any) -> frozenset[int]:
    items = _items("stop_token_ids", value, "a collection of integers")
    return frozenset(map(int, items))


def _sizes(
    name: str, sizes: Iterable[int] | None, largest: int, smallest: int
) -> list[int]:
    """The given sizes, sorted; by default `largest` and its halves (rounded up)."""
    if sizes is None:
        sizes = [largest]
        while sizes[-1] > smallest:
            sizes.append(max(-(-sizes[-1] // 2), smallest))
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < 1 or sizes[-1] != largest:
        raise ValueError(f"{name} must be in [1, {largest}] and end there, got {sizes}")
    return sizes


def _pack(rows: list[Row], bucket: Bucket) -> Batch:
    """Puts the rows back to back, followed by empty rows and unused tokens."""
    num_tokens, n, _ = bucket
    tokens = np.zeros(num_tokens, np.int32)
    offsets = np.zeros(n + 1, np.int32)
    slots = np.full(n, PAD_SLOT_ID, np.int32)
    has_initial_state, decodes, draws = np.zeros((3, n), bool)
    positions, top_k = np.zeros((2, n), np.int32)
    temperature, top_p = np.zeros((2, n), np.float32)
    seeds = np.zeros(n, np.uint32)
    end = 0
    for i, row in enumerate(rows):
        generation, start, length = row.generation, row.start, row.length
        if row.decodes:
            decodes[i] = True
        else:
            tokens[end : end + length] = generation.text[start : start + length]
        end += length
        offsets[i + 1] = end
        slots[i] = generation.slot
        has_initial_state[i] = start > 0
        if row.draws:
            sampling = generation.terms.sampling
            draws[i] = True
            seeds[i] = generation.seed
            positions[i] = start + length
            temperature[i] = sampling.temperature
            top_k[i] = sampling.top_k
            top_p[i] = sampling.top_p
    offsets[len(rows) + 1 :] = end
    return Batch(
        tokens=tokens,
        query_start_loc=offsets,
        slots=slots,
        has_initial_state=has_initial_state,
        decodes=decodes,
        draws=draws,
        seeds=seeds,
        positions=positions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        metadata=build_metadata(offsets, num_tokens),
    )


def _model_step(
    graph, params_tree, params, state: DeviceState, batch: Any, *, max_prefills: int
) -> tuple[jax.Array, DeviceState]:
    """The jitted part: completes the tokens, runs the model, draws the next ones."""
    model = nnx.merge(graph, params_tree.unflatten(params))
    outside = batch.tokens.shape[0]
    first = jnp.where(batch.decodes, batch.query_start_loc[:-1], outside)
    tokens = batch.tokens.at[first].set(state.newest[batch.slots], mode="drop")
    logits, cache = model.packed(
        tokens,
        state.cache,
        batch.query_start_loc,
        cache_indices=batch.slots,
        has_initial_state=batch.has_initial_state,
        metadata=batch.metadata,
        max_prefills=max_prefills,
    )
    drawn = sample(
        logits,
        batch.seeds,
        batch.positions,
        batch.temperature,
        batch.top_k,
        batch.top_p,
    )
    outside = state.newest.shape[0]
    slots = jnp.where(batch.draws, batch.slots, outside)
    return drawn, DeviceState(cache, state.newest.at[slots].set(drawn, mode="drop"))
