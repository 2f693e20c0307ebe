"""The engine: what a server calls, and a step from its plan to its events."""

import itertools
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..model import Mamba2LM
from ..sampling import integer
from .batches import Row, pack
from .buckets import Bucket, Buckets
from .delivery import Delivery
from .device import Device
from .recovery import settle
from .requests import Event, FinishReason, Generation, QueueFull, Request, Terms
from .schedule import Schedule
from .stats import Stats, StepStats


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
        self._max_waiting = max_waiting
        self._vocab_size = model.config.vocab_size
        self._buckets = Buckets(
            num_slots,
            max_tokens_per_step,
            max_prefills_per_step,
            token_buckets,
            decode_buckets,
        )
        self._device = Device(model, num_slots, cache_dtype, ssm_dtype)
        self._schedule = Schedule(num_slots, max_tokens_per_step, max_prefills_per_step)
        self._intact = True
        self._ids = itertools.count()
        self._active: dict[int, Generation] = {}  # all that have not ended
        self._flights: deque[Flight] = deque()  # two at most, the oldest first
        self._delivery = Delivery()
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
        if self.num_waiting >= self._max_waiting + len(self._schedule.free):
            raise QueueFull(f"{self.num_waiting} requests wait already")
        generation = Generation(
            next(self._ids), request, terms, time.perf_counter(), terms.prompt
        )
        self._intact = False
        self._active[generation.id] = generation
        self._schedule.waiting.append(generation)
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
        return self._delivery.take()

    def run(self) -> list[Event]:
        """Steps until the engine is idle, and returns all events, as `step` does."""
        while self._busy:
            self._advance()
        return self._delivery.take()

    @property
    def idle(self) -> bool:
        """Whether a step would do nothing."""
        return not self._busy and (
            self._delivery.in_callback or not self._delivery.returning
        )

    @property
    def num_running(self) -> int:
        """Requests that have a slot."""
        return len(self._schedule.running)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._schedule.waiting)

    @property
    def stats(self) -> Stats:
        """The most recent steps and finished requests."""
        return self._stats

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        """The shapes that a step may have."""
        return self._buckets.all

    @property
    def num_compilations(self) -> int:
        """Compiled steps so far, at most one per bucket."""
        return len(self._device.executables)

    def warmup(self) -> None:
        """Compiles all buckets, so that no request has to wait for that."""
        self._mend()
        for bucket in self.buckets:
            self._device.executable(bucket)

    # ---- A step --------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        return bool(self._active or self._flights or self._delivery.news)

    def _advance(self) -> None:
        """A step, but for the returning of its events."""
        self._mend()
        while len(self._flights) > 1:  # The step before was interrupted.
            self._collect()
        under_way = bool(self._flights)
        self._dispatch()
        if under_way:
            self._collect()
        self._delivery.deliver()

    def _dispatch(self) -> None:
        """Plans a step and hands it to the device, without waiting for anything."""
        start = time.perf_counter()
        schedule = self._schedule
        if schedule.free and schedule.waiting:
            self._intact = False
            schedule.admit(start)
            self._intact = True
        running = self.num_running
        if not (rows := schedule.plan()):
            return
        bucket = self._buckets.fit([row.length for row in rows])
        batch = pack(rows, bucket)
        executable = self._device.executable(bucket)
        # From here until the results are in their places, an interruption loses the
        # caches: they are donated.
        self._intact = False
        tokens = self._device.step(executable, batch)
        schedule.took(rows)
        host_seconds = time.perf_counter() - start
        self._flights.append(
            Flight(rows, tokens, bucket, running, self.num_waiting, start, host_seconds)
        )
        self._intact = True

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
            generation.token_times.append(now)  # before the token: see `recovery`
            generation.tokens.append(drawn)
            if (reason := generation.reason_to_end()) is not None:
                self._finish(generation, reason, now)
            else:
                self._delivery.news.append(generation)
        self._record(flight, now)
        self._intact = True

    def _finish(self, generation: Generation, reason: FinishReason, now: float) -> None:
        generation.finished = now
        generation.finish_reason = reason  # after `finished`: see `recovery`
        self._delivery.news.append(
            generation
        )  # before it leaves `_active`: see `recovery`
        self._stats.requests.append(generation)
        del self._active[generation.id]
        self._schedule.remove(generation)

    def _mend(self) -> None:
        """Puts all in order after an exception in the midst of a change.

        It may be interrupted itself, and starts anew then.
        """
        if self._intact:
            return
        settle(self._active, self._delivery, self._stats)
        self._flights.clear()
        self._schedule.reset(list(self._active.values()))
        self._device.reset()
        self._intact = True

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
