"""The engine: what a server calls, and a step from its plan to its events."""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Iterable
from typing import Any, NamedTuple, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ...operands import PAD_SLOT_ID
from ..model import Mamba2LM
from ..sampling import integer
from .batches import Features, Row, pack
from .buckets import Bucket, Buckets
from .delivery import Delivery
from .device import Device
from .drafts import Draft, Drafting, ModelDraft
from .prefixes import Blocks, Prefixes
from .recovery import settle
from .requests import Event, FinishReason, Generation, QueueFull, Request, Terms
from .schedule import Schedule, Slots
from .stats import Stats, StepStats
from .validation import brief


class Flight(NamedTuple):
    """A step that the device may still be working on.

    Attributes:
        rows: who takes part, on each of the devices.
        tokens: `(devices * M,)`, what the rows of each draw, one after another.
        stats: what is known of it before its tokens are.
    """

    rows: list[list[Row]]
    tokens: jax.Array
    stats: StepStats


class Engine:
    """Serves a model to many requests at once; synchronous, for one thread.

    Any call may end with an exception, even one that a signal's handler raises
    (Ctrl-C): no request loses a token by it, and the next call goes on. If it came
    while the device had the caches, the next call allocates new ones and reads the
    running requests again, which takes time but changes nothing else. A `submit` or
    `cancel` that such an exception ends has done all or nothing. Handlers of signals
    must not call the engine themselves.

    Requests get slots in the order of their arrival. In each step, decoding requests
    come first, with one token each (and its drafts), so that no prompt holds them up;
    prompts share the rest of the budget, the oldest first, in chunks.

    What a request generates depends on the request alone (up to the last bits of
    floating point, which XLA may round differently in another bucket; and up to the
    rounding of states in a narrower dtype, which are stored once a step).

    On a mesh of devices, a model that `tensor_parallel` has divided is served by all of
    them together. With a `data_axis` each device along it has the model, and slots and
    requests of its own. One call a step serves all devices, and nothing crosses that
    axis. The mesh may have both kinds of axes (on GPUs not with kernels). Where several
    processes share a mesh, each must have an engine like the others', and make the same
    calls in the same order: each gets all tokens. An exception in one of them alone
    parts them for good.

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
        prefix_slots: int = 0,
        prefix_block: int = 64,
        draft: Draft | Mamba2LM | None = None,
        max_drafts: int = 4,
        mesh: Mesh | None = None,
        data_axis: str | None = None,
    ):
        """Allocates the caches; compiles nothing yet.

        Args:
            model: a `Mamba2LM`, or anything with its `config.vocab_size`, `packed` and
                `init_cache`. Its parameters are read once.
            num_slots: requests that run at a time.
            max_tokens_per_step: budget of a step, at least `num_slots`; with drafts, at
                least `num_slots * (1 + max_drafts)`.
            max_prefills_per_step: chunks of prompts in a step, but for those of one
                token, or, with drafts, of up to `1 + max_drafts`.
            token_buckets: sizes T of steps with such chunks. The largest must be
                `max_tokens_per_step`. None: it and its halves, down to 16.
            decode_buckets: sizes N of steps without, one token per row; with drafts
                there are steps of `N * (1 + max_drafts)` tokens, too. The largest must
                be `num_slots`. None: it and its halves, down to 1.
            max_waiting: requests that may wait for a slot.
            cache_dtype: of the conv states, `dtype` of the model's `init_cache`.
            ssm_dtype: of the SSM states. bfloat16 halves what a decode step moves, and
                rounds the states at each.
            history: how many steps and finished requests `stats` remembers.
            prefix_slots: size of the prefix cache, in slots that no request gets. Of
                more snapshots the least recently used ones are dropped.
            prefix_block: what prompts have in common is found in blocks of so many
                tokens.
            draft: guesses the next tokens, of which the model verifies several in one
                step. A function (`NgramDraft()` is one) of a sequence of
                `DraftRequest`s, which returns as many sequences of tokens; or a
                smaller model of the same vocabulary. What requests generate is the
                same; each step waits for the one before it, and slots remember their
                last `max_drafts` tokens in `cache_dtype`, which can be taken back (see
                `DraftStates`); one that is narrower than the model's rounds them.
                If it raises an error, or returns what it must not, `step` raises an
                error, and the requests concerned go on without drafts.
            max_drafts: how many guesses a request gets in a step.
            mesh: the devices; None is where the model is. With it comes
            data_axis: the mesh's axis along which each device has its own requests.
                `num_slots`, `prefix_slots` and all sizes of a step are for each. A
                request goes to a device that has no more than its share of them; of
                such, to the one with the longest snapshot of its prompt, or the fewest
                requests. The model is on this mesh and not divided over the axis, or on
                a single device, from which it is copied to all. On GPUs a model that is
                divided over other axes needs `implementation="xla"`.

        Raises:
            TypeError: a size is not an integer, `draft` is neither callable nor a
                model, or `mesh` is no mesh.
            ValueError: a size is out of its range, the draft's vocabulary is not the
                model's, `mesh` or `data_axis` is missing beside the other, the mesh has
                no such axis, or the model is on another mesh, divided over the axis, or
                divided where kernels cannot be.
        """
        if min(num_slots, max_prefills_per_step) < 1 or min(max_waiting, history) < 0:
            raise ValueError(
                "num_slots and max_prefills_per_step must be >= 1, max_waiting and "
                f"history >= 0, got {num_slots}, {max_prefills_per_step}, "
                f"{max_waiting}, {history}"
            )
        prefix_slots = integer("prefix_slots", prefix_slots)
        if prefix_slots < 0 or integer("prefix_block", prefix_block) < 1:
            raise ValueError(
                "prefix_slots must be >= 0 and prefix_block >= 1, got "
                f"{prefix_slots}, {prefix_block}"
            )
        if integer("max_drafts", max_drafts) < 1:
            raise ValueError(f"max_drafts must be at least 1, got {max_drafts}")
        if draft is None:
            max_drafts = 0
        if max_tokens_per_step < (least := num_slots * (1 + max_drafts)):
            name = "num_slots * (1 + max_drafts)" if max_drafts else "num_slots"
            raise ValueError(
                f"max_tokens_per_step must be at least {name}, got "
                f"{max_tokens_per_step} < {least}"
            )
        self._max_waiting = max_waiting
        self._vocab_size = model.config.vocab_size
        self._buckets = Buckets(
            num_slots,
            max_tokens_per_step,
            max_prefills_per_step,
            token_buckets,
            decode_buckets,
            max_drafts,
        )
        total = num_slots + prefix_slots
        self._features = Features(moves=prefix_slots > 0, max_drafts=max_drafts)
        self._device = Device(
            model, total, self._features, cache_dtype, ssm_dtype, mesh, data_axis
        )
        self._keeps_prefixes = prefix_slots > 0
        self._blocks = Blocks(prefix_block)
        self._drafting = None
        if isinstance(draft, Mamba2LM):
            if draft.config.vocab_size != self._vocab_size:
                raise ValueError(
                    "the draft's vocabulary must be the model's, got "
                    f"{draft.config.vocab_size} and {self._vocab_size}"
                )
            # The snapshot of a text must survive until the next one, which starts from
            # it, has left its own.
            engine = Engine(
                draft,
                num_slots=num_slots,
                max_tokens_per_step=max_tokens_per_step,
                max_prefills_per_step=num_slots,
                token_buckets=token_buckets,
                decode_buckets=decode_buckets,
                max_waiting=num_slots,
                history=0,
                prefix_slots=2 * num_slots,
                mesh=mesh,
                data_axis=data_axis,
            )
            draft = ModelDraft(engine)
        if draft is not None:
            if not callable(draft):
                raise TypeError(
                    f"draft must be callable, a model or None, got {brief(draft)}"
                )
            self._drafting = Drafting(draft, max_drafts, self._vocab_size)
        self._schedule = Schedule(
            [
                Slots(
                    num_slots,
                    max_tokens_per_step,
                    max_prefills_per_step,
                    self._buckets.short,
                    Prefixes(range(num_slots, total), self._blocks),
                    tokens_on_host=self._drafting is not None,
                )
                for _ in range(self._device.placement.shares)
            ]
        )
        self._intact = True
        self._ids = itertools.count()
        self._active: dict[int, Generation] = {}  # all that have not ended
        self._flights: deque[Flight] = deque()  # two at most, the oldest first
        self._delivery = Delivery()
        self._last_collect = 0.0
        self._stats = Stats(deque(maxlen=history), deque(maxlen=history))

    # ---- What a server calls -------------------------------------------------------

    @overload
    def submit(self, request: Request, n: None = None) -> Generation: ...
    @overload
    def submit(self, request: Request, n: int) -> list[Generation]: ...
    def submit(
        self, request: Request, n: int | None = None
    ) -> Generation | list[Generation]:
        """Queues a request.

        Args:
            request: what to generate.
            n: how many samples of it, as so many requests. One of them reads the
                prompt; the others start from the snapshot that it leaves, which needs
                an engine with `prefix_slots`. With a seed, they take that seed and
                those that follow it.

        Returns:
            Its `Generation`, which fills up as the engine steps; with `n`, a list.

        Raises:
            QueueFull: not all may wait, beside the requests that wait already.
            TypeError: an attribute is not of the kind that `Request` asks for.
            ValueError: the prompt is empty, has more than one dimension or something
                other than integers, or it or `stop_token_ids` has tokens outside the
                vocabulary, or `max_new_tokens` < 1, or `n` < 1, or `n` > 1 without a
                prefix cache.
        """
        terms = Terms.of(request, self._vocab_size)
        samples = [terms]
        if n is not None:
            if (count := integer("n", n)) < 1:
                raise ValueError(f"n must be at least 1, got {n}")
            if count > 1 and not self._keeps_prefixes:
                raise ValueError(f"n > 1 needs an engine with prefix_slots, got n={n}")
            samples = [terms.sample(i) for i in range(count)]
        self._mend()
        # The next step moves as many of the waiting requests into slots as are free.
        room = self._max_waiting + self._schedule.num_free - self.num_waiting
        if len(samples) > room:
            raise QueueFull(f"{self.num_waiting} requests wait already")
        digests = self._blocks.digests(terms.prompt) if self._keeps_prefixes else []
        now = time.perf_counter()
        new = [
            Generation(next(self._ids), request, terms, now, terms.prompt, digests)
            for terms in samples
        ]
        self._intact = False
        self._active.update({generation.id: generation for generation in new})
        self._schedule.waiting.extend(new)
        self._blocks.saw(digests)
        self._intact = True
        return new[0] if n is None else new

    def pause(self, id: int) -> bool:
        """Takes a request's slot away, and keeps its states on the host.

        Waits for the step that is under way. A request that has no slot yet waits no
        more. A paused request does not keep `run` from returning, and may be cancelled.

        Returns:
            False if there is no such request, or it is paused or has ended.

        Raises:
            TypeError: `id` is not an integer.
        """
        id = integer("id", id)
        self._mend()
        if (generation := self._active.get(id)) is None or generation.paused:
            return False
        while self._flights:
            self._collect()
        if generation.finish_reason is not None:
            return False
        saved = generation.saved  # of one that was resumed, and waits for a slot again
        if generation.slot != PAD_SLOT_ID and generation.scheduled:
            saved = self._device.save(generation.share, generation.slot)
        self._intact = False
        generation.saved = saved
        generation.paused = True
        self._schedule.remove(generation)
        self._intact = True
        return True

    def resume(self, id: int) -> bool:
        """Puts a paused request into the queue, at its place by order of arrival.

        Nothing is read again: when it gets a slot, its states come back into it.

        Returns:
            False if there is no such request, or it is not paused.

        Raises:
            TypeError: `id` is not an integer.
        """
        id = integer("id", id)
        self._mend()
        if (generation := self._active.get(id)) is None or not generation.paused:
            return False
        self._intact = False
        generation.paused = False
        self._schedule.wait(generation)
        self._intact = True
        return True

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
    def num_paused(self) -> int:
        """Requests that are paused."""
        return sum(generation.paused for generation in self._active.values())

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
        """Compiled steps so far: at most one per bucket, on a GPU two for decodes."""
        return len(self._device.executables)

    def warmup(self) -> None:
        """Compiles all buckets, so that no request has to wait for that."""
        self._mend()
        for bucket in self.buckets:
            for greedy in (True, False):
                self._device.executable(bucket, greedy)
        if self._drafting is not None and isinstance(self._drafting.draft, ModelDraft):
            self._drafting.draft.engine.warmup()

    # ---- A step --------------------------------------------------------------------

    @property
    def _busy(self) -> bool:
        working = any(not generation.paused for generation in self._active.values())
        return bool(working or self._flights or self._delivery.news)

    def _advance(self) -> None:
        """A step, but for the returning of its events."""
        self._mend()
        # There are two if the step before was interrupted. Drafts need to know all that
        # was drawn.
        while len(self._flights) > (self._drafting is None):
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
        if schedule.num_free and schedule.waiting:
            self._intact = False
            for generation in schedule.admit(start):
                if generation.saved is not None:
                    place = generation.share, generation.slot
                    self._device.load(*place, generation.saved)
                    generation.saved = None
            self._intact = True
        guesses = {}
        if self._drafting is not None:
            guesses = self._drafting.ask(schedule.running)
        running = self.num_running
        self._intact = False
        rows = schedule.plan(guesses)
        self._intact = True
        if not any(rows):
            return
        bucket = self._buckets.fit([[row.length for row in own] for own in rows])
        batches = [pack(own, bucket, self._features) for own in rows]
        greedy = not any(batch.draws.temperature.any() for batch in batches)
        executable = self._device.executable(bucket, greedy)
        # From here until the results are in their places, an interruption loses the
        # caches: they are donated.
        self._intact = False
        planned = time.perf_counter()
        tokens = self._device.step(executable, batches)
        dispatched = time.perf_counter()
        schedule.took(rows)
        stats = StepStats.of(
            list(itertools.chain(*rows)),
            bucket=bucket,
            devices=len(rows),
            running=running,
            waiting=self.num_waiting,
            start=start,
            host_seconds=planned - start,
            dispatch_seconds=dispatched - planned,
        )
        self._flights.append(Flight(rows, tokens, stats))
        self._intact = True

    def _collect(self) -> None:
        """Waits for the oldest step's tokens, and gives them to their requests."""
        flight = self._flights[0]
        try:
            # An interruption here changes nothing: the tokens can be waited for again.
            tokens = np.asarray(flight.tokens).reshape(len(flight.rows), -1).tolist()
        except Exception:
            # The device has failed, and with this step's tokens its caches are lost.
            self._intact = False
            raise
        now = time.perf_counter()
        self._intact = False
        self._flights.popleft()
        accepted = 0
        drawn_by_row = (
            (row, list(itertools.islice(draws, row.num_drafts + 1)))
            for rows, draws in zip(flight.rows, map(iter, tokens), strict=True)
            for row in rows
        )
        news = self._delivery.news
        for row, drawn in drawn_by_row:
            generation = row.generation
            # The request may have been cancelled, or stopped by the previous step's
            # token, while this step was under way.
            if not row.draws or generation.finish_reason is not None:
                continue
            right = row.right_guesses(drawn)
            generation.scheduled += right
            generation.rejected -= right
            new = generation.up_to_end(drawn[: right + 1])
            accepted += len(new) - 1  # The last token is the model's own.
            # Before the tokens: see `recovery`.
            generation.token_times.extend([now] * len(new))
            generation.tokens.extend(new)
            news.extend([generation] * (len(new) - 1))
            if (reason := generation.reason_to_end()) is not None:
                self._finish(generation, reason, now)
            else:
                news.append(generation)
        self._stats.steps.append(
            dataclasses.replace(
                flight.stats,
                accepted_tokens=accepted,
                seconds=now - max(flight.stats.start, self._last_collect),
            )
        )
        self._last_collect = now
        self._intact = True

    def _finish(self, generation: Generation, reason: FinishReason, now: float) -> None:
        generation.finished = now
        generation.finish_reason = reason  # after `finished`: see `recovery`
        self._delivery.news.append(
            generation
        )  # before it leaves `_active`: see `recovery`
        generation.paused, generation.saved = False, None
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
        self._schedule.reset([g for g in self._active.values() if not g.paused])
        self._device.reset()
        self._intact = True
