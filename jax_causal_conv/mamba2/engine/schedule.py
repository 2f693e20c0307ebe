"""Who has a slot, who waits for one, and who takes part in the next step."""

from collections import deque
from collections.abc import Mapping, Sequence

from ...operands import PAD_SLOT_ID
from .batches import Row
from .prefixes import Prefixes, Snapshot
from .requests import Generation


class Slots:
    """The slots of a device, and the plan of its part of each step.

    Decoding requests come first, with one token each and its drafts, so that no prompt
    holds them up; prompts share the rest of the budget, the oldest first, in chunks. A
    prompt that begins with what another one is just reading waits until that has left
    a snapshot.

    Attributes:
        free: slots that nobody has.
        running: requests with one by their number, in the order of admission.
        prefixes: the snapshots on the device.
    """

    def __init__(
        self,
        num_slots: int,
        budget: int,
        max_prefills: int,
        short: int,
        prefixes: Prefixes,
        tokens_on_host: bool,
    ):
        """All slots are free.

        Args:
            num_slots: how many there are.
            budget: tokens of a step.
            max_prefills: rows of a step that have more tokens than `short`.
            short: tokens of a row up to which it is no prefill; see `Buckets`.
            prefixes: the snapshots.
            tokens_on_host: whether decodes take their tokens from there.
        """
        self._num_slots = num_slots
        self._budget = budget
        self._max_prefills = max_prefills
        self._short = short
        self._tokens_on_host = tokens_on_host
        self.prefixes = prefixes
        self.clear()

    def clear(self) -> None:
        """All slots are free, and no snapshot is left."""
        self.free = deque(range(self._num_slots))
        self.running: dict[int, Generation] = {}
        self.prefixes.clear()

    def spared(self, generation: Generation) -> int:
        """Tokens of its prompt that a request need not read here."""
        if generation.scheduled or not self.prefixes.enabled:
            return 0
        snapshot = self.prefixes.find(generation)
        return 0 if snapshot is None else len(snapshot.tokens)

    def take(self, generation: Generation) -> None:
        """Gives it a free slot."""
        generation.slot = self.free.popleft()
        self.running[generation.id] = generation

    def plan(self, guesses: Mapping[int, Sequence[int]]) -> list[Row]:
        """Who takes part in the step, with how many tokens.

        Args:
            guesses: drafts of decoding requests, by number.
        """
        rows, prompts = [], []
        for generation in self.running.values():
            if generation.prompt_left:
                prompts.append(generation)
            else:
                rows.append(self._decode(generation, guesses.get(generation.id, ())))
        # The budget has a token and its drafts for every slot, and each prompt holds a
        # slot that takes no part in decoding: if there are prompts, there are tokens
        # left for them.
        left = self._budget - sum(row.length for row in rows)
        prefills = 0
        reading: set[int] = set()
        for generation in prompts:
            if left == 0:
                break
            start, source = generation.scheduled, None
            if start == 0 and self.prefixes.enabled:
                source = self.prefixes.find(generation)
                if source is not None and not source.ready:
                    if not self.prefixes.has_begun(generation):
                        continue  # It waits for that snapshot.
                    source = None
                if source is not None:
                    start = len(source.tokens)
            length = min(len(generation.text) - start, left)
            if length > self._short and prefills == self._max_prefills:
                continue
            if source is not None:
                reading.add(source.slot)
            length, leaves = self._leaves(generation, start, length, reading)
            rows.append(
                Row(
                    generation,
                    start,
                    length,
                    draws=start + length == len(generation.text),
                    tokens=generation.text[start : start + length],
                    source=source,
                    leaves=leaves,
                )
            )
            left -= length
            prefills += length > self._short
        return rows

    def _decode(self, generation: Generation, guess: Sequence[int]) -> Row:
        """A row of the newest token and what is guessed to follow it."""
        start = generation.scheduled
        if not self._tokens_on_host:
            return Row(generation, start, 1, True)
        tokens = [generation.tokens[-1], *guess]
        return Row(generation, start, len(tokens), True, tokens, len(guess))

    def _leaves(
        self, generation: Generation, start: int, length: int, reading: set[int]
    ) -> tuple[int, Snapshot | None]:
        """The snapshot that a chunk of a prompt leaves.

        Returns:
            The length of the chunk, shorter if a second snapshot would be due in it,
            and the snapshot if there is one.
        """
        if not self.prefixes.enabled:
            return length, None
        if generation.scheduled == 0:
            self.prefixes.promise(generation, start)
        due = [len(s.tokens) for s in self.prefixes.due(generation)]
        self.prefixes.drop(generation, sum(end <= start for end in due))
        due = [end for end in due if start < end <= start + length]
        if not due:
            return length, None
        snapshot = self.prefixes.due(generation)[0]
        if not self.prefixes.place(snapshot, reading):
            self.prefixes.drop(generation, 1)
            return length, None
        return (due[0] - start if len(due) > 1 else length), snapshot

    def took(self, rows: list[Row]) -> None:
        """The device has been given these."""
        for row in rows:
            generation = row.generation
            # Guesses are wrong until they are known to be right: see `Generation`.
            generation.scheduled = row.start + row.length - row.num_drafts
            generation.rejected = row.num_drafts
            if row.source is not None:
                generation.reused = row.start
                self.prefixes.used(row.source)
            if row.leaves is not None:
                self.prefixes.keep(generation, row.leaves)
            # Its last token is on its way, so the next step may give the slot away.
            if generation.draws_scheduled == generation.terms.max_new_tokens:
                self.release(generation)

    def release(self, generation: Generation) -> None:
        """Frees the slot, if there is one.

        A step that is still under way may write to it. That does no harm: the device
        takes the steps in turn, and a new request does not read what it finds there.
        """
        if self.running.pop(generation.id, None) is not None:
            self.free.append(generation.slot)
            generation.slot = PAD_SLOT_ID
            self.prefixes.drop(generation)


class Schedule:
    """The queue, and who gets a slot of which device.

    Requests get slots in the order of their arrival. As all devices take a step
    together, they are to have equally many of them.

    Attributes:
        shares: the slots of each device.
        waiting: requests without a slot, in the order of their arrival.
    """

    def __init__(self, shares: Sequence[Slots]):
        self.shares = shares
        self.waiting: deque[Generation] = deque()

    @property
    def num_free(self) -> int:
        """Slots that nobody has."""
        return sum(len(slots.free) for slots in self.shares)

    @property
    def running(self) -> list[Generation]:
        """Requests with a slot, in the order of admission on each device."""
        return [g for slots in self.shares for g in slots.running.values()]

    def wait(self, generation: Generation) -> None:
        """Puts it into the queue, where the order of arrival wants it."""
        later = []
        while self.waiting and self.waiting[-1].id > generation.id:
            later.append(self.waiting.pop())
        self.waiting.append(generation)
        self.waiting.extend(reversed(later))

    def admit(self, now: float) -> list[Generation]:
        """Gives the free slots to requests that wait, and says to which."""
        count = min(self.num_free, len(self.waiting))
        even = -(-(len(self.running) + count) // len(self.shares))
        admitted = []
        for _ in range(count):
            generation = self.waiting.popleft()
            generation.share = self._share_for(generation, even)
            self.shares[generation.share].take(generation)
            if generation.admitted is None:
                generation.admitted = now
            admitted.append(generation)
        return admitted

    def _share_for(self, generation: Generation, even: int) -> int:
        """Where to give it a slot: on a device with less than an even share.

        Of these, the one that has read most of its prompt already; then the one with
        the fewest requests.
        """
        able = [i for i, slots in enumerate(self.shares) if len(slots.running) < even]
        if len(able) == 1:  # so that nothing need be searched for
            return able[0]
        return max(
            able,
            key=lambda i: (
                self.shares[i].spared(generation),
                -len(self.shares[i].running),
            ),
        )

    def plan(self, guesses: Mapping[int, Sequence[int]]) -> list[list[Row]]:
        """Who takes part in the step on each device; see `Slots.plan`."""
        return [slots.plan(guesses) for slots in self.shares]

    def took(self, rows: Sequence[list[Row]]) -> None:
        """The devices have been given these."""
        for slots, own in zip(self.shares, rows, strict=True):
            slots.took(own)

    def remove(self, generation: Generation) -> None:
        """The request has ended or is paused: it waits no more, and has no slot."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        self.shares[generation.share].release(generation)

    def reset(self, waiting: list[Generation]) -> None:
        """All slots are free, no snapshot is left, and these requests wait."""
        for slots in self.shares:
            slots.clear()
        self.waiting = deque(waiting)
