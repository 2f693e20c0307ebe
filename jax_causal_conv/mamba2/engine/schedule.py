"""Who has a slot, who waits for one, and who takes part in the next step."""

from collections import deque

from ...operands import PAD_SLOT_ID
from .batches import Row
from .requests import Generation


class Schedule:
    """The queue, the slots and the plan of each step.

    Requests get slots in the order of their arrival. In each step, decoding requests
    come first, with one token each, so that no prompt holds them up; prompts share the
    rest of the budget, the oldest first, in chunks.

    Attributes:
        free: slots that nobody has.
        waiting: requests without a slot, in the order of their arrival.
        running: requests with one by their number, in the order of admission.
    """

    def __init__(self, num_slots: int, budget: int, max_prefills: int):
        self._num_slots = num_slots
        self._budget = budget
        self._max_prefills = max_prefills
        self.free = deque(range(num_slots))
        self.waiting: deque[Generation] = deque()
        self.running: dict[int, Generation] = {}

    def admit(self, now: float) -> None:
        """Gives the free slots to requests that wait."""
        while self.free and self.waiting:
            generation = self.waiting.popleft()
            generation.slot = self.free.popleft()
            if generation.admitted is None:
                generation.admitted = now
            self.running[generation.id] = generation

    def plan(self) -> list[Row]:
        """Who takes part in the step, with how many tokens."""
        rows, prompts = [], []
        for generation in self.running.values():
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

    def took(self, rows: list[Row]) -> None:
        """The device has been given these."""
        for generation, _, length, _ in rows:
            generation.scheduled += length
            # Its last token is on its way, so the next step may give the slot away.
            if generation.draws_scheduled == generation.terms.max_new_tokens:
                self.release(generation)

    def remove(self, generation: Generation) -> None:
        """The request has ended: it waits no more, and has no slot."""
        if generation in self.waiting:
            self.waiting.remove(generation)
        self.release(generation)

    def release(self, generation: Generation) -> None:
        """Frees the slot, if there is one.

        A step that is still under way may write to it. That does no harm: the device
        takes the steps in turn, and a new request does not read what it finds there.
        """
        if self.running.pop(generation.id, None) is not None:
            self.free.append(generation.slot)
            generation.slot = PAD_SLOT_ID

    def reset(self, waiting: list[Generation]) -> None:
        """All slots are free, and these wait."""
        self.running.clear()
        self.free = deque(range(self._num_slots))
        self.waiting = deque(waiting)
