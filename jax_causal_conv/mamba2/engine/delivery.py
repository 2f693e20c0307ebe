"""How events reach the requests' callbacks, and those who call `Engine.step`."""

from collections import deque

from .requests import Event, Generation


class Delivery:
    """Events on their way. An exception in the midst of it loses none.

    Attributes:
        news: a request is in here once for each of its events that is to be delivered.
        returning: events (by number) that are delivered, but that no step has returned.
        in_callback: whether a callback is being called.
    """

    def __init__(self):
        self.news: deque[Generation] = deque()
        self.returning: list[tuple[Generation, int]] = []
        self.in_callback = False

    def deliver(self) -> None:
        """Calls the requests' callbacks with their events, and notes what to return."""
        while self.news:
            generation = self.news[0]
            index, on_event = generation.delivered, generation.terms.on_event
            if index == generation.num_events:  # delivered by an interrupted step
                self.news.popleft()
            elif on_event is None:
                # In this order no interruption can lose the event or deliver it twice.
                if self.returning[-1:] != [(generation, index)]:
                    self.returning.append((generation, index))
                generation.delivered = index + 1
                self.news.popleft()
            else:
                event = generation.event(index)
                generation.delivered = index + 1
                self.news.popleft()
                self.in_callback = True
                try:
                    on_event(event)
                finally:
                    self.in_callback = False
                self.returning.append((generation, index))

    def take(self) -> list[Event]:
        """What a step returns."""
        events = [generation.event(index) for generation, index in self.returning]
        self.returning = []
        return events
