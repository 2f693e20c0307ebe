"""Orders of a grid's programs, and what hides hazards: who reads and writes what."""

import dataclasses
from unittest import mock

import numpy as np
from triton.runtime.interpreter import interpreter_builder

from tests.support import guard

# From the number of programs to all of them in an order. Of any two programs, each
# comes first in one of the first two.
ORDERS = {
    "forward": range,
    "reverse": lambda grid: range(grid)[::-1],
    "shuffled": lambda grid: np.random.default_rng(0).permutation(grid),
}


@dataclasses.dataclass
class Access:
    """One load or store of a program: addresses, and barriers passed before it."""

    program: int
    is_store: bool
    addresses: np.ndarray
    barriers: int


class Recorder:
    """Notes what each program of an interpreted kernel reads and writes."""

    def __init__(self):
        self.accesses: list[Access] = []
        self._barriers = 0

    def caller(self):
        call, builder = guard.caller(), interpreter_builder
        load, store = builder.create_masked_load, builder.create_masked_store

        def note(pointers, mask, is_store):
            lanes = np.broadcast_to(mask.data, pointers.data.shape)
            program = builder.grid_idx[0]
            addresses = pointers.data[lanes].ravel()
            self.accesses.append(Access(program, is_store, addresses, self._barriers))

        def masked_load(pointers, mask, *rest):
            note(pointers, mask, False)
            return load(pointers, mask, *rest)

        def masked_store(pointers, value, mask, *rest):
            note(pointers, mask, True)
            return store(pointers, value, mask, *rest)

        def barrier():
            self._barriers += 1

        def recording_call(launch):
            with mock.patch.multiple(
                builder,
                create_masked_load=masked_load,
                create_masked_store=masked_store,
                create_barrier=barrier,
            ):
                return call(launch)

        return recording_call


def race(accesses, barriers_needed=True, rereads=False):  # noqa: PLR0911, PLR0912 (a case each)
    """None, or a sentence about the first hazard among a kernel's accesses.

    Args:
        accesses: of one launch.
        barriers_needed: False where a program only writes over what it has read if what
            it writes is computed from it: then a write waits for the read.
        rereads: True where a program may read what it has written, behind a barrier.
    """
    writer: dict[int, tuple[int, int]] = {}  # address -> program, barriers before it
    for access in accesses:
        if not access.is_store:
            continue
        for address in access.addresses.tolist():
            program, barriers = writer.get(address, (access.program, -1))
            if program != access.program:
                return (
                    f"programs {program} and {access.program} both write {address:#x}"
                )
            if barriers == access.barriers:
                return (
                    f"program {program} writes {address:#x} twice without a barrier "
                    "between"
                )
            writer[address] = program, access.barriers
    read: dict[int, int] = {}  # address -> barriers before its last read
    written: dict[int, int] = {}  # address -> barriers before its last write
    for access in accesses:
        for address in access.addresses.tolist():
            if address not in writer:
                continue
            program, _ = writer[address]
            if program != access.program:
                return (
                    f"program {access.program} reads {address:#x}, which program "
                    f"{program} writes"
                )
            if not access.is_store:
                if address in written and not rereads:
                    return f"program {program} reads {address:#x} after its write"
                if written.get(address, -1) == access.barriers:
                    return (
                        f"program {program} has no barrier between its write and its "
                        f"read of {address:#x}"
                    )
                read[address] = access.barriers
                continue
            written[address] = access.barriers
            if barriers_needed and read.get(address, -1) == access.barriers:
                return (
                    f"program {program} has no barrier between its read and its write "
                    f"of {address:#x}"
                )
    return None
