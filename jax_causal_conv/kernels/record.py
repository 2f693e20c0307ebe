"""A kernel launch as data, and what runs a series of them."""

import dataclasses
from collections.abc import Callable, Generator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

_Results = TypeVar("_Results")


@dataclasses.dataclass(frozen=True)
class Launch:
    """All there is to know to run a kernel once.

    Attributes:
        kernel: a Triton function `(inputs, outputs, C)`.
        inputs: a named tuple of arrays, then ints; what the caller did not give is
            None, and several arrays of one kind are a tuple.
        outputs: a named tuple of the shapes and dtypes of fresh outputs, likewise.
        grid: number of programs.
        num_warps: warps a program.
        older_num_warps: the same on GPUs before Hopper, whose matrix units want their
            operands in registers: more warps then share a tile. None: no difference.
        constants: what is static, a frozen dataclass; see `Constants`.
        in_place: the fields of `inputs`, arrays, that the kernel updates in place.
        num_stages: of Triton's software pipelining.
    """

    kernel: Any
    inputs: NamedTuple
    outputs: NamedTuple
    grid: int
    num_warps: int
    constants: Any
    in_place: tuple[str, ...] = ()
    num_stages: int = 1
    older_num_warps: int | None = None

    def warps_on(self, compute_capability: int) -> int:
        """Warps a program on such a GPU; 90 is Hopper."""
        if compute_capability < 90 and self.older_num_warps is not None:
            return self.older_num_warps
        return self.num_warps


Call = Callable[[Launch], Sequence[jax.Array]]
"""Runs a launch; returns its outputs, in order, then the updated inputs."""

Launches = Generator[Launch, Sequence[jax.Array], _Results]
"""Yields launches, is sent what `Call` returns of each, and returns an op's results."""


def run(launches: Launches[_Results], call: Call) -> _Results:
    """Runs all launches of an op through `call`; returns the op's results."""
    outputs: Any = None  # what a generator is sent first
    while True:
        try:
            launch = launches.send(outputs)
        except StopIteration as end:
            return end.value
        outputs = call(launch)
