"""Snapshots of prompts that were read, for prompts that begin in the same way.

A snapshot is a slot of the caches with the states after the first tokens of some
prompt. Nothing is ever copied into one: the step that reads the prompt leaves it there
on its way, and a request with a hit reads the snapshot's slot in its first step and
writes to its own.

A state cannot be cut as a list of keys and values can: it serves those prompts alone
that begin with all of its tokens. So it matters where snapshots are taken. One is one
token before the prompt's end, for forks and repetitions of the prompt (their last token
has to be read, for what is drawn after it) and for texts that continue it. Another is
where the prompt parts from an earlier one, to the block: what two prompts share, as
those with a common system prompt do, a third is likely to begin with.
"""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass

import numpy as np

from ...operands import PAD_SLOT_ID
from .requests import Generation

# How many blocks of earlier prompts are remembered, by their hashes: a few MB.
BLOCKS_REMEMBERED = 1 << 16


@dataclass(eq=False)
class Snapshot:
    """The states after some tokens, or the promise of them.

    Attributes:
        tokens: `(P,)` int32, P >= 1.
        digest: of the whole blocks in it.
        rest: bytes of the tokens behind these, which are compared in less time than
            arrays.
        slot: where the states are; PAD_SLOT_ID until the step that leaves them there.
        ready: whether that step has been given to the device.
    """

    tokens: np.ndarray
    digest: bytes
    rest: bytes
    slot: int = PAD_SLOT_ID
    ready: bool = False


class Blocks:
    """The blocks of which all prompts so far were made.

    Attributes:
        size: tokens in a block.
    """

    def __init__(self, size: int):
        self.size = size
        self._seen: OrderedDict[bytes, int] = OrderedDict()

    def digests(self, prompt: np.ndarray) -> list[bytes]:
        """Hashes of the first 0, 1, 2, ... blocks of a prompt."""
        digests = [b""]
        for end in range(self.size, len(prompt) + 1, self.size):
            block = prompt[end - self.size : end].tobytes()
            digests.append(
                hashlib.blake2b(digests[-1] + block, digest_size=16).digest()
            )
        return digests

    def saw(self, digests: list[bytes]) -> None:
        """There is a prompt of these blocks."""
        for digest in digests[1:]:
            self._seen[digest] = self._seen.get(digest, 0) + 1
            self._seen.move_to_end(digest)
        while len(self._seen) > BLOCKS_REMEMBERED:
            self._seen.popitem(last=False)

    def shared(self, digest: bytes) -> bool:
        """Whether several prompts began with what this is the digest of."""
        return self._seen.get(digest, 0) > 1


class Prefixes:
    """Finds, promises and evicts snapshots, in slots of a device that no request gets.

    Attributes:
        enabled: whether there are any slots.
        free: slots without a snapshot.
    """

    def __init__(self, slots: range, blocks: Blocks):
        self.enabled = len(slots) > 0
        self._slots = slots
        self._blocks = blocks
        self.clear()

    def clear(self) -> None:
        """Forgets all snapshots, but not which prompts there were."""
        self.free = list(self._slots)
        # By the digest of their whole blocks; the least recently used one comes first.
        self._found: dict[bytes, list[Snapshot]] = {}
        self._by_use: OrderedDict[Snapshot, None] = OrderedDict()
        self._promised: dict[int, list[Snapshot]] = {}

    def find(self, generation: Generation) -> Snapshot | None:
        """The longest snapshot, ready or promised by another, that it may start from.

        At least the prompt's last token is left to be read.
        """
        prompt, own = generation.prompt, self._promised.get(generation.id, [])
        size = self._blocks.size
        for k, digest in reversed(list(enumerate(generation.digests))):
            if digest not in self._found:
                continue
            rest = prompt[k * size : (k + 1) * size].tobytes()
            fitting = [
                snapshot
                for snapshot in self._found[digest]
                if rest.startswith(snapshot.rest)
                and len(snapshot.tokens) < len(prompt)
                and snapshot not in own
                and np.array_equal(snapshot.tokens, prompt[: len(snapshot.tokens)])
            ]
            if fitting:
                return max(fitting, key=lambda snapshot: len(snapshot.tokens))
        return None

    def promise(self, generation: Generation, start: int) -> None:
        """It begins to be read from token `start` on, and will leave snapshots."""
        if self.has_begun(generation):
            return  # The step that it was to begin with was interrupted.
        prompt, digests = generation.prompt, generation.digests
        last = len(prompt) - 1
        size = self._blocks.size
        shared = next(
            k
            for k in reversed(range(last // size + 1))
            if k == 0 or self._blocks.shared(digests[k])
        )
        promised = [
            Snapshot(
                prompt[:end],
                digests[end // size],
                prompt[end - end % size : end].tobytes(),
            )
            for end in sorted({shared * size, last})
            if end > start
        ]
        self._promised[generation.id] = promised
        for snapshot in promised:
            self._found.setdefault(snapshot.digest, []).append(snapshot)

    def due(self, generation: Generation) -> list[Snapshot]:
        """What it has promised, the next one first."""
        return self._promised.get(generation.id, [])

    def has_begun(self, generation: Generation) -> bool:
        """Whether it has made its promises."""
        return generation.id in self._promised

    def place(self, snapshot: Snapshot, reading: set[int]) -> bool:
        """Gives a promised snapshot a slot, the least recently used one's if need be.

        Args:
            snapshot: one without a slot, or with one from a plan that was interrupted.
            reading: slots that are read in the same step, which nobody may write to.

        Returns:
            False if there is no slot.
        """
        if snapshot.slot == PAD_SLOT_ID and not self.free:
            for old in self._by_use:
                if old.slot not in reading:
                    self._forget(old)
                    break
        if snapshot.slot == PAD_SLOT_ID and self.free:
            snapshot.slot = self.free.pop()
        return snapshot.slot != PAD_SLOT_ID

    def used(self, snapshot: Snapshot) -> None:
        """A request starts from it."""
        self._by_use.move_to_end(snapshot)

    def keep(self, generation: Generation, snapshot: Snapshot) -> None:
        """The step that leaves it in its slot has been given to the device."""
        self._promised[generation.id].remove(snapshot)
        snapshot.ready = True
        self._by_use[snapshot] = None

    def drop(self, generation: Generation, count: int | None = None) -> None:
        """Its next `count` promises, or all, will not be kept."""
        promised = self._promised.get(generation.id, [])
        for snapshot in promised[:count]:
            self._forget(snapshot)
        del promised[:count]
        if count is None:
            self._promised.pop(generation.id, None)

    def _forget(self, snapshot: Snapshot) -> None:
        self._by_use.pop(snapshot, None)
        siblings = self._found[snapshot.digest]
        siblings.remove(snapshot)
        if not siblings:
            del self._found[snapshot.digest]
        if snapshot.slot != PAD_SLOT_ID:
            self.free.append(snapshot.slot)
