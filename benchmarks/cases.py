"""What suites are made of: options, candidates, cases, and rows of results."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np

from benchmarks import timing
from benchmarks.imports import Absent
from benchmarks.timing import Prepared
from benchmarks.workload import WrongResult

OURS = "jax-causal-conv"
BY_XLA = f"{OURS}, by XLA"
FALLBACK = "XLA, NOT OUR KERNELS"
"""What a row says that should have run kernels and did not."""


class Work(Protocol):
    """What candidates compute: inputs and the exact answer are behind it."""

    @property
    def dtype(self) -> str:
        """Of the data."""

    @property
    def ops(self) -> tuple[str, ...]:
        """Which ops compute it."""

    @property
    def nbytes(self) -> int:
        """Bytes that must be read or written once."""

    def errors(self, got: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Errors of results, by name; raises `WrongResult` if one is too large."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes:
        long: more sizes, and more time for each.
        seconds: for the timing of a case.
        dtypes: to be run; empty for the platform's own choice.
        shape: of the model for the engine.
        paths: of peers, by name.
        with_peers: False times this package and the yardsticks alone.
    """

    long: bool = False
    seconds: float = 2.0
    dtypes: tuple[str, ...] = ()
    shape: str = "tiny"
    paths: Mapping[str, Path] = dataclasses.field(default_factory=dict)
    with_peers: bool = True

    @property
    def on_gpu(self) -> bool:
        return jax.default_backend() == "gpu"

    @property
    def all_dtypes(self) -> tuple[str, ...]:
        default = ("bfloat16",) if self.on_gpu else ("float32", "bfloat16")
        return self.dtypes or default


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Somebody who computes workloads.

    Attributes:
        name: in tables.
        prepare: puts a workload's inputs in place; raises `Absent` where it cannot be.
        ops: what it computes.
        platforms: where it runs.
        package: name of the peer in `--peer-path`.
    """

    name: str
    prepare: Callable[[Any, Path | None], Prepared]
    ops: tuple[str, ...]
    platforms: tuple[str, ...] = ("cpu", "gpu")
    package: str = ""

    def takes(self, work: Work) -> bool:
        """Whether this is something for it."""
        fits = not set(self.ops).isdisjoint(work.ops)
        return fits and jax.default_backend() in self.platforms


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the results: a candidate in a case.

    Attributes:
        suite: its name.
        case: what was computed, in words.
        axis: what varies in the suite, as a number.
        dtype: of the data.
        candidate: who computed it.
        microseconds: median of a call; None if it failed. low and high are the 10th
            and 90th percentile of `samples`.
        clock: how it was timed, see `timing`.
        kernels: device activities of a call.
        nbytes: what must be moved once; 0 where that says nothing.
        memory: bytes that a step takes; 0 where that says nothing.
        error: largest difference from float64 over the largest value, if compared:
            of all results but the states, and of those `state_error`.
        of_yardstick: time over that of the yardstick in the same case, see
            `Timing.over`.
        of_ours: time over this package's, likewise.
        note: what else there is to say; why it failed.
        implementation: of a program of JAX: "Triton", "Mosaic" or "XLA".
        fell_back: whether XLA computed what this package's kernels should have, as
            where jax-triton is missing.
        tokens_per_second: that a server draws, or training reads.
    """

    suite: str
    case: str
    axis: float
    dtype: str
    candidate: str
    microseconds: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    clock: str = ""
    kernels: float | None = None
    nbytes: int = 0
    memory: int = 0
    error: float | None = None
    state_error: float | None = None
    of_yardstick: float | None = None
    of_ours: float | None = None
    note: str = ""
    implementation: str = ""
    fell_back: bool = False
    tokens_per_second: float | None = None

    @property
    def gigabytes_per_second(self) -> float | None:
        if not (self.nbytes and self.microseconds):
            return None
        return self.nbytes / self.microseconds / 1e3


@dataclasses.dataclass(frozen=True)
class Case:
    """Candidates to be timed in turns.

    Attributes:
        prepare: by the candidates' names.
        work: what their results are compared with; None: nothing to compare.
        yardstick: the candidate that times are compared with.
        measure: makes rows that are not about candidates in turns.
        ours: candidates of this package that are not named after it.
    """

    suite: str
    name: str
    axis: float
    dtype: str
    prepare: Mapping[str, Callable[[], Prepared]]
    work: Work | None = None
    yardstick: str = ""
    measure: Callable[[], Sequence[Row]] = tuple
    ours: tuple[str, ...] = ()

    def wants_kernels(self, name: str) -> bool:
        """Whether a candidate is to run this package's kernels on a GPU."""
        return name in self.ours or (name.startswith(OURS) and name != BY_XLA)


def run_case(case: Case, options: Options) -> list[Row]:
    """Prepares, checks and times all candidates of a case."""
    rows: dict[str, Row] = {}
    prepared: dict[str, Prepared] = {}
    blank = functools.partial(Row, case.suite, case.name, case.axis, case.dtype)

    def fail(name: str, error: Exception) -> None:
        rows[name] = blank(name, note=_summary(error))

    for name, prepare in case.prepare.items():
        try:
            one = prepare()
            result = one.call()
            one.wait(result)
            errors = {}
            if case.work is not None and one.view is not None:
                errors = case.work.errors(one.view(result))
            state_error = errors.pop("states", None)
            nbytes = one.nbytes
            if nbytes is None:
                nbytes = case.work.nbytes if case.work else 0
            fell_back = (
                options.on_gpu
                and case.wants_kernels(name)
                and one.implementation != "Triton"
            )
            # The candidates' place in the table, whether or not timing succeeds.
            rows[name] = blank(
                name,
                nbytes=nbytes,
                memory=one.memory,
                error=max(errors.values(), default=None),
                state_error=state_error,
                implementation=one.implementation,
                note=", ".join(filter(None, (FALLBACK * fell_back, one.note))),
                fell_back=fell_back,
            )
            prepared[name] = one
        except Absent:
            continue
        except Exception as error:  # a peer may fail in any way
            fail(name, error)
    times = timing.measure(prepared, seconds=options.seconds, on_error=fail)

    def over(name: str, other: str) -> float | None:
        both = name in times and other in times
        return times[name].over(times[other]) if both else None

    for name, found in times.items():
        tokens = prepared[name].tokens
        rows[name] = dataclasses.replace(
            rows[name],
            tokens_per_second=tokens / found.median * 1e6 if tokens else None,
            microseconds=found.median,
            low=found.low,
            high=found.high,
            samples=found.samples,
            clock=found.clock,
            kernels=found.kernels,
            of_yardstick=over(name, case.yardstick),
            of_ours=over(name, OURS),
        )
    return [*rows.values(), *case.measure()]


def _summary(error: Exception) -> str:
    if isinstance(error, WrongResult):
        return f"wrong: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"
