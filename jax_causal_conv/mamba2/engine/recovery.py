"""Putting all in order after an exception in the midst of a change.

An exception may end a step anywhere: a callback's error, the device's, or Ctrl-C
between any two instructions, even after the device took the caches and before it gave
them back. So there is one truth: the requests that have not ended (`Engine._active`)
and the tokens they have on the host. All else can be made from it: queues, slots and
even caches, as a request whose states are lost is read again, with the tokens drawn so
far as part of its prompt. (Who is paused, and the states that such requests have on the
host, is true as well.) Whoever changes several things at once clears
`Engine._intact` first and sets it last; where it is clear, the next call mends.
"""

from collections import deque

from ...operands import PAD_SLOT_ID
from .delivery import Delivery
from .requests import Generation
from .stats import Stats


def settle(active: dict[int, Generation], delivery: Delivery, stats: Stats) -> None:
    """Makes the requests agree with their tokens, and delivery with the requests.

    It may be interrupted itself, and starts anew then. Afterwards `active` has those
    that have not ended; none of them has a slot, and all are to be read again, except
    those that were paused and have their states on the host.
    """
    for generation in active.values():
        # The token is what counts; the other things follow it.
        del generation.token_times[len(generation.tokens) :]
        if generation.finish_reason is None:
            generation.finished = None
            if (reason := generation.reason_to_end()) is not None:
                generation.finished = generation.token_times[-1]
                generation.finish_reason = reason
    told = dict.fromkeys([*delivery.news, *active.values()])
    delivery.news = deque(
        generation
        for generation in told
        for _ in range(generation.num_events - generation.delivered)
    )
    for generation in told:
        generation.slot = PAD_SLOT_ID
        if generation.finish_reason is None:
            if generation.saved is None:  # What is saved is whole, and valid still.
                generation.scheduled = generation.rejected = 0
                generation.text = generation.all_tokens()
        elif generation.id in active:
            generation.paused, generation.saved = False, None
            if generation not in stats.requests:
                stats.requests.append(generation)
            del active[generation.id]
