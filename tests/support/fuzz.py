"""Differential fuzzing over the whole contract.

A *configuration* is everything static (one compilation); it is run with many random
*cases*. Every case goes through XLA, one in ten through the interpreted kernels, on a
GPU every one through the compiled ones as well. All must give what the float64
reference gives: outputs within the error of float32 sums, states bit for bit. A case
is named by three numbers, `seed configuration case`. Every fourth configuration is
one of the SSD, whose states are rounded once and not copied.

    python -m tests.support.fuzz --cases 100000            # long; --jobs 2: two cores
    python -m tests.support.fuzz --seconds 60 --seed 7     # a time-boxed run
    python -m tests.support.fuzz --seed 7 --start 431      # go on where it was stopped
    python -m tests.support.fuzz --seed 7 --replay 431 12  # one case again
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import itertools
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

import jax_causal_conv
from jax_causal_conv import build_metadata
from tests.support import cases, checks, reference, ssd_cases
from tests.support.cases import Case, PackedShape, UpdateShape, choose
from tests.support.platforms import HAS_TRITON

CASES_PER_CONFIGURATION = 50
INTERPRET_EVERY = 10  # an interpreted case takes 100 times as long as a compiled one
SSD_EVERY = 4  # configurations
CLEAR_CACHES_EVERY = 50  # configurations; compiled programs pile up otherwise

CHANNELS = (1, 2, 3, 5, 8, 17, 33, 40)
INDEX_DTYPES = (
    *4 * ("int32",),
    "int8",
    "uint8",
    "int16",
    "uint16",
    "uint32",
    "int64",
    "uint64",
)
FLOAT64, BFLOAT16 = np.dtype("float64"), cases.FLOATS[2]
OLD_XLA = jax.__version_info__ < (0, 11)
# float32 sums may overflow or underflow where float64 sums do not.
HUGE, TINY = 1e30, 1e-30


# Configurations.


def kernel_shape(rng) -> PackedShape | UpdateShape:
    """A random shape that the kernels take, small enough for their interpreter."""
    draw = cases.packed_shape if rng.random() < 0.6 else cases.update_shape
    shape = draw(rng, small=True, index_dtypes=INDEX_DTYPES)
    changes: dict[str, Any] = {
        "channels": int(choose(rng, CHANNELS)),
        "width": int(shape.width),
        "state_len": int(shape.state_len),
    }
    unusual = rng.random()
    if unusual < 0.08:  # few channels a program: several blocks of channels
        width = int(choose(rng, (9, 16, 33, 64)))
        changes |= {"width": width, "dilation": int(choose(rng, (1, 1, 3)))}
        least = (width - 1) * changes["dilation"]
        changes["state_len"] = least + int(rng.integers(3))
        changes["channels"] = int(choose(rng, (3, 65, 130)))
    elif unusual < 0.16:  # the slot is moved in pieces
        length = int(choose(rng, (32, 63, 300)))
        changes["state_len"] = max(length, cases.reach(shape))
    shape = dataclasses.replace(shape, **changes)
    if isinstance(shape, PackedShape):
        least = max(cases.reach(shape), 1)
        blocks = (None, None, least, least + 1, max(least, 8), 16, shape.num_tokens + 3)
        block_m = choose(rng, blocks)
        if block_m is not None:
            block_m = max(int(block_m), least)
        shape = dataclasses.replace(shape, block_m=block_m)
    elif rng.random() < 0.1:  # more inputs than rows
        shape = dataclasses.replace(shape, num_queries=int(choose(rng, (9, 16, 23))))
    return shape


@dataclasses.dataclass(frozen=True)
class Configuration:
    """What one compilation serves.

    Attributes:
        x64: run in jax's 64-bit mode, where wide integers are clamped in the graph.
        snapshot: None, or the `state_len` of `varlen_conv_states`, tested instead.
        ends: whether that gets `ends`.
        metadata: "host" or "graph": where `build_metadata` runs.
    """

    shape: PackedShape | UpdateShape
    x64: bool = False
    snapshot: int | None = None
    ends: bool = False
    metadata: str = "host"

    @property
    def for_kernels(self) -> bool:
        return self.snapshot is None and self.shape.x_dtype != FLOAT64


def draw_configuration(rng) -> Configuration:
    shape = kernel_shape(rng)
    packed = isinstance(shape, PackedShape)
    x64 = rng.random() < 0.12
    if x64 and rng.random() < 0.5:
        names = ["x_dtype", "weight_dtype", "bias_dtype", "state_dtype"]
        doubles = {name: FLOAT64 for name in names if rng.random() < 0.6}
        if shape.bias_dtype is None:
            doubles.pop("bias_dtype", None)
        shape = dataclasses.replace(shape, **doubles)
    if rng.random() < 0.04:
        sizes = ["num_slots", "channels"]
        sizes += ["num_tokens", "num_seqs"] if packed else ["num_rows"]
        size = choose(rng, sizes)
        indices = "cache_indices" if packed else "conv_state_indices"
        shape = dataclasses.replace(shape, **{size: 0, indices: True})
    snapshot = None
    if packed and rng.random() < 0.12:
        snapshot = int(choose(rng, (0, 1, shape.state_len, shape.state_len + 3)))
    metadata = "graph" if rng.random() < 0.25 else "host"
    return Configuration(shape, x64, snapshot, rng.random() < 0.7, metadata)


@dataclasses.dataclass(frozen=True)
class SSDConfiguration:
    """The same of the SSD.

    Attributes:
        tile: changes to the tiles of the interpreted kernels: short stretches.
    """

    shape: ssd_cases.PackedShape | ssd_cases.RowsShape
    x64: bool
    tile: tuple[tuple[str, int], ...]

    @property
    def for_kernels(self) -> bool:
        return self.shape.x != FLOAT64


def draw_ssd_configuration(rng) -> SSDConfiguration:
    packed = rng.random() < 0.7
    if packed:
        shape = ssd_cases.random_packed_shape(rng, INDEX_DTYPES)
    else:
        shape = ssd_cases.random_rows_shape(rng)
    x64 = bool(rng.random() < 0.12)
    if x64 and rng.random() < 0.5:
        doubles = [name for name in ("x", "dt", "A", "B", "C") if rng.random() < 0.6]
        if shape.state is not None and rng.random() < 0.6:
            doubles.append("state")
        shape = dataclasses.replace(shape, **dict.fromkeys(doubles, FLOAT64))
    if rng.random() < 0.04:
        sizes = ["dim", "size", "num_tokens"]
        sizes += ["num_seqs", "num_slots"] if packed else ["num_rows"]
        indices = {"cache_indices": True} if packed else {}
        shape = dataclasses.replace(shape, **{choose(rng, sizes): 0}, **indices)
    tile: dict[str, int] = {}
    if rng.random() < 0.7:
        tile = {"chunk": 16, "stretch": int(rng.integers(3))}
    return SSDConfiguration(shape, x64, tuple(tile.items()))


# Cases.


def value_case(shape, rng, *, malformed: bool) -> Case:
    """A random case of a shape, with values that no test would think of."""
    packed = isinstance(shape, PackedShape)
    fill = cases.packed_case if packed else cases.update_case
    case = fill(shape, rng, malformed=malformed)
    case = case.replace(**_other_floats(case, rng))
    slots = case.arrays["cache_indices" if packed else "conv_state_indices"]
    moving = shape.write_indices or (packed and shape.snapshots)
    if slots is not None and len(slots) > 1 and rng.random() < 0.1 and not moving:
        slots = slots.copy()  # perhaps two live sequences on one slot
        slots[rng.integers(len(slots))] = slots[rng.integers(len(slots))]
        name = "cache_indices" if packed else "conv_state_indices"
        case = case.replace(**{name: slots})
    return case


def _other_floats(case: Case, rng) -> dict[str, np.ndarray]:
    """Now and then infinities and NaN in x and the states, or any bits in states."""
    state = "conv_states" if isinstance(case.shape, PackedShape) else "conv_state"
    kind = rng.random()
    if kind < 0.25:
        changed = {}
        for name in ("x", state):
            array = case.arrays[name].copy()
            rows = rng.random(array.shape[:-1]) < choose(rng, (0.1, 0.5))
            array[rows] = choose(rng, (np.nan, np.inf, -np.inf))
            changed[name] = array
        return changed
    if kind < 0.35:
        array = case.arrays[state]
        return {state: cases.random_patterns(rng, array.shape, array.dtype)}
    return {}


def owners(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """(rows, slots): bool masks of rows of out, and slots, that the contract specifies.

    Unspecified are two live sequences on one slot: their own tokens, and that slot.
    """
    rows = np.ones(len(case.arrays["x"]), bool)
    slots = np.ones(len(_states(case)), bool)
    for slot, spans in _live_sequences(case).items():
        if len(spans) > 1 and not case.shape.write_indices:  # then they write others
            slots[slot] = False
            for first, last in spans:
                rows[first:last] = False
    return rows, slots


def _states(case: Case) -> np.ndarray:
    packed = isinstance(case.shape, PackedShape)
    return case.arrays["conv_states" if packed else "conv_state"]


def _live_sequences(case: Case) -> dict[int, list[tuple[int, int]]]:
    """slot -> the spans of rows of x of the live sequences that name it."""
    arrays, shape = case.arrays, case.shape
    if isinstance(shape, PackedShape):
        offsets = reference.clean_offsets(arrays["query_start_loc"], len(arrays["x"]))
        spans = list(itertools.pairwise(offsets))
        slots = arrays["cache_indices"]
    else:
        spans = [(i, i + 1) for i in range(len(arrays["x"]))]
        slots = arrays["conv_state_indices"]
        if arrays["x"].ndim == 3 and arrays["x"].shape[1] == 0:
            spans = []
    found = collections.defaultdict(list)
    for i, (first, last) in enumerate(spans):
        slot = i if slots is None else int(slots[i])
        usable = reference.is_slot(
            slot, shape.num_slots, case.options.get("pad_slot_id", -1)
        )
        if last > first and usable:
            found[slot].append((first, last))
    return found


# Comparing.


class Expected:
    """The reference's results of a case, computed once."""

    def __init__(self, case: Case):
        self.out, self.states, self.magnitude = checks.expected(case)
        self.rows, self.slots = owners(case)


def compare(case: Case, got: tuple, expected: Expected, what: str) -> None:
    """Raises unless out and states are what the contract specifies."""
    out, states = got
    what = f"{what}: {case}"
    assert out.dtype == case.arrays["x"].dtype, f"out.dtype {out.dtype}\n{what}"
    assert out.shape == expected.out.shape, f"out.shape {out.shape}\n{what}"
    rows, magnitude = expected.rows, expected.magnitude
    values, exact = out.copy(), expected.out.copy()
    values[magnitude > HUGE] = exact[magnitude > HUGE] = 0
    tiny = (magnitude < TINY) & (magnitude > 0)
    tiny &= abs(values.astype(np.float64)) < TINY
    values[tiny] = exact[tiny] = 0
    checks.assert_output(
        values[rows],
        exact[rows],
        magnitude[rows],
        case.arrays["weight"].shape[1],
        case.options["activation"],
        what,
        case.options["residual"],
    )
    kept = expected.slots
    same_states(case, states[kept], expected.states[kept], what)


def same_states(case: Case, got: np.ndarray, want: np.ndarray, what: str) -> None:
    """Bit for bit, save for the payloads of NaN in two cases (see below)."""
    assert got.dtype == want.dtype, f"state dtype {got.dtype}\n{what}"
    # A new row that is NaN has no particular bits after a conversion. And XLA:CPU of
    # jax 0.10 takes whole bfloat16 caches through float32 and back.
    converted = case.arrays["x"].dtype != want.dtype
    if converted or (OLD_XLA and want.dtype == BFLOAT16 and "xla" in what[:3]):
        both = np.isnan(got) & np.isnan(want)
        got = np.where(both, want, got)
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and want.dtype == BFLOAT16 and "xla" in what[:3]:
        # XLA:CPU may select bfloat16 rows in float32 and flush subnormals (README).
        tiny = abs(want.astype(np.float32)) < np.finfo(np.float32).tiny
        got = np.where(tiny & (got == 0), want, got)
    if on_cpu and (case.arrays["x"].dtype, want.dtype) == (np.float64, np.float16):
        # XLA:CPU rounds such a new row by way of float32 (README).
        ulps = got.view(np.int16).astype(int) - want.view(np.int16)
        got = np.where(abs(ulps) <= 1, want, got)
    checks.assert_same_bits(got, want, what)


def compare_unnamed_slots(case: Case, states: np.ndarray, what: str) -> None:
    """With metadata of another batch: slots without a live sequence are unchanged."""
    unnamed = np.ones(len(states), bool)
    unnamed[list(_live_sequences(case))] = False
    for name in ("write_indices", "snapshot_indices"):
        if (slots := case.arrays.get(name)) is not None:
            slots = [int(slot) for slot in slots if 0 <= slot < len(states)]
            unnamed[slots] = False
    checks.assert_same_bits(states[unnamed], _states(case)[unnamed], f"{what}: {case}")


# Running.


@functools.cache
def _graph_metadata() -> Callable:
    return jax.jit(build_metadata, static_argnames=("num_tokens", "block_m"))


def _metadata(configuration: Configuration, case: Case) -> Any:
    """Metadata of a packed case, itself compared with the reference."""
    shape, offsets = case.shape, case.arrays["query_start_loc"]
    if shape.block_m is None:
        return None
    build = build_metadata
    narrow = configuration.x64 or offsets.dtype.itemsize < 8
    if configuration.metadata == "graph" and narrow:
        build = _graph_metadata()
    built = build(offsets, num_tokens=shape.num_tokens, block_m=shape.block_m)
    want = reference.build_metadata(offsets, shape.num_tokens, shape.block_m)
    for name, array in zip(("chunk_seq", "chunk_offset"), want, strict=True):
        got = np.asarray(getattr(built, name))
        assert got.dtype == np.int32, f"metadata.{name} is {got.dtype}"
        assert np.array_equal(got, array), f"metadata.{name} {got}, not {array}\n{case}"
    return built


def _check_snapshot(configuration: Configuration, case: Case, rng) -> None:
    length, given = configuration.snapshot, case.arrays
    names = (
        "conv_states",
        "cache_indices",
        "has_initial_state",
        "num_rejected_tokens",
    )
    arrays = {name: given[name] for name in names}
    if configuration.metadata == "graph":
        arrays = dict.fromkeys(names)
    if configuration.ends:
        pool = [0, 1, 2, 5, shape_tokens := case.shape.num_tokens, shape_tokens + 1]
        pool += [-1, *cases.far_values(case.shape.index_dtype)]
        pool = cases.representable(pool, case.shape.index_dtype)
        drawn = [choose(rng, pool) for _ in range(case.shape.num_seqs)]
        arrays["ends"] = cases.integers(drawn, case.shape.index_dtype)
    function = jax_causal_conv.varlen_conv_states
    if configuration.x64 or case.shape.index_dtype.itemsize < 8:
        function = _jitted_snapshot()
    got = np.asarray(function(given["x"], given["query_start_loc"], length, **arrays))
    # The helper has no pad_slot_id: it skips PAD_SLOT_ID.
    want = reference.varlen_conv_states(
        given["x"], given["query_start_loc"], length, **arrays
    )
    what = f"varlen_conv_states({length}): {case}\n  {arrays.get('ends')}"
    if arrays["conv_states"] is None:
        checks.assert_same_bits(got, want, what)
    else:
        same_states(case, got, want, what)


@functools.cache
def _jitted_snapshot() -> Callable:
    return jax.jit(jax_causal_conv.varlen_conv_states, static_argnames=("state_len",))


def case_of(
    seed: int, number: int, index: int
) -> tuple[Configuration | SSDConfiguration, Case | ssd_cases.Case, Any]:
    """A configuration, its case, and the generator for whatever else is random."""
    if number % SSD_EVERY == SSD_EVERY - 1:
        of_ssd = draw_ssd_configuration(np.random.default_rng([seed, number]))
        rng = np.random.default_rng([seed, number, index + 1])
        return of_ssd, ssd_cases.random_case(of_ssd.shape, rng), rng
    configuration = draw_configuration(np.random.default_rng([seed, number]))
    rng = np.random.default_rng([seed, number, index + 1])
    case = value_case(configuration.shape, rng, malformed=rng.random() < 0.5)
    return configuration, case, rng


def _run_ssd_case(
    configuration: SSDConfiguration, case: ssd_cases.Case, *, interpret: bool
) -> bool:
    expected = ssd_cases.Expected(case)
    ssd_cases.compare(case, ssd_cases.call(case, "xla"), expected)
    if configuration.for_kernels and HAS_TRITON and jax.default_backend() == "gpu":
        got = ssd_cases.call(case, "triton")
        ssd_cases.compare(case, got, expected, "triton")
    empty = 0 in (*case.arrays["x"].shape, *case.arrays["B"].shape)
    empty |= case.packed and 0 in (case.shape.num_seqs, case.shape.num_slots)
    if empty or not (interpret and configuration.for_kernels and HAS_TRITON):
        return False
    from tests.support import guard, ssd_launches

    got = ssd_launches.launch(case, guard.caller(), **dict(configuration.tile))
    ssd_cases.compare(case, got, expected, "interpret")
    return True


def run_case(seed: int, number: int, index: int, *, interpret: bool) -> bool:
    """Runs and checks one case. Returns whether it was interpreted too."""
    configuration, case, rng = case_of(seed, number, index)
    mode = jax.enable_x64(True) if configuration.x64 else contextlib.nullcontext()
    with mode:
        if isinstance(configuration, SSDConfiguration):
            return _run_ssd_case(configuration, case, interpret=interpret)
        if configuration.snapshot is not None:
            _check_snapshot(configuration, case, rng)
            return False
        metadata = None
        if isinstance(case.shape, PackedShape):
            metadata = _metadata(configuration, case)
        expected = Expected(case)
        got = checks.call(case, "xla", metadata=metadata)
        compare(case, got, expected, "xla")
        on_gpu = HAS_TRITON and jax.default_backend() == "gpu"
        if configuration.for_kernels and on_gpu:
            got = checks.call(case, "triton", metadata=metadata)
            compare(case, got, expected, "triton")
        if not (interpret and configuration.for_kernels and HAS_TRITON):
            return False
        from tests.support import guard

        got = guard.call_now(case, guard.caller(), metadata=metadata)
        compare(case, got, expected, "interpret")
        return True


@dataclasses.dataclass
class Tally:
    """Counts of a run, and the texts of its failures."""

    configurations: int = 0
    cases: int = 0
    interpreted: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)

    def add(self, other: "Tally") -> None:
        for field in dataclasses.fields(self):
            total = getattr(self, field.name) + getattr(other, field.name)
            setattr(self, field.name, total)

    def __str__(self):
        return (
            f"{self.configurations} configurations, {self.cases} cases, "
            f"{self.interpreted} of them interpreted, {len(self.failures)} failures"
        )


def run_configuration(seed: int, number: int, count: int) -> Tally:
    """Runs `count` cases of a configuration; gives up after its first failure."""
    tally = Tally(configurations=1)
    for index in range(count):
        tally.cases += 1
        try:
            interpret = (index + number) % INTERPRET_EVERY == 0
            tally.interpreted += run_case(seed, number, index, interpret=interpret)
        except Exception:
            tally.failures.append(
                f"python -m tests.support.fuzz --seed {seed} --replay {number} "
                f"{index}\n"
                f"{traceback.format_exc()}"
            )
            break
    if (number + 1) % CLEAR_CACHES_EVERY == 0:
        jax.clear_caches()
    return tally


def run(
    seed: int,
    *,
    start: int = 0,
    count: int | None = None,
    seconds: float | None = None,
    jobs: int = 1,
    report: Callable[[Tally, int], None] = lambda tally, done: None,
) -> Tally:
    """Runs configurations `start, start + 1, …` until `count` cases or `seconds`.

    Args:
        report: called after each configuration, with the tally and the number of the
            first configuration that is not known to be done.
    """
    end = None if seconds is None else time.monotonic() + seconds
    tally = Tally()

    def work() -> Iterator[tuple[int, int]]:
        left, number = count, start
        while left is None or left > 0:
            if end is not None and time.monotonic() > end:
                return
            size = CASES_PER_CONFIGURATION
            size = size if left is None else min(size, left)
            yield number, size
            number, left = number + 1, None if left is None else left - size

    if jobs == 1:
        for number, size in work():
            tally.add(run_configuration(seed, number, size))
            report(tally, number + 1)
        return tally

    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, context) as pool:
        todo, pending = work(), collections.deque()
        while True:
            while len(pending) < 2 * jobs and (item := next(todo, None)):
                future = pool.submit(run_configuration, seed, *item)
                pending.append((item[0], future))
            if not pending:
                return tally
            number, future = pending.popleft()
            try:
                tally.add(future.result())
            except concurrent.futures.process.BrokenProcessPool:
                running = [number, *(other for other, _ in pending)]
                tally.failures.append(
                    f"a process died in one of the configurations {running} of "
                    f"seed {seed}; run them with --jobs 1"
                )
                return tally
            report(tally, number + 1)


# The command line.


def _reporter(seed: int, total: int | None) -> Callable[[Tally, int], None]:
    """A bar where somebody watches and rich is there, else a line every 10 seconds."""
    began, printed, shown = time.monotonic(), [0.0], [0]
    bar = _rich_bar(total) if sys.stdout.isatty() else None

    def report(tally: Tally, following: int) -> None:
        for failure in tally.failures[shown[0] :]:
            print(f"\nFAILED: {failure}", flush=True)
        shown[0] = len(tally.failures)
        elapsed = time.monotonic() - began
        if bar is not None:
            bar(tally, elapsed)
        elif elapsed - printed[0] > 10:
            printed[0] = elapsed
            print(
                f"{elapsed:6.0f} s, {tally.cases / elapsed:5.0f} cases/s: {tally}; "
                f"resume with --seed {seed} --start {following}",
                flush=True,
            )

    return report


def _rich_bar(total: int | None) -> Callable[[Tally, float], None] | None:
    try:
        from rich import progress
    except ImportError:
        return None
    bar = progress.Progress(
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}"),
    )
    task = bar.add_task("", total=total)
    bar.start()

    def update(tally: Tally, elapsed: float) -> None:
        bar.update(task, completed=tally.cases, description=str(tally))
        if total is not None and tally.cases >= total:
            bar.stop()

    return update


def main(arguments: Sequence[str] | None = None) -> int:
    """Differential fuzzing: XLA and the interpreted kernels against the reference."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start", type=int, default=0, help="the first configuration")
    parser.add_argument("--cases", type=int, help="stop after so many")
    parser.add_argument("--seconds", type=float, help="stop after so long")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument(
        "--replay",
        type=int,
        nargs=2,
        metavar=("CONFIGURATION", "CASE"),
        help="run one case, interpreted too, and show what it is",
    )
    options = parser.parse_args(arguments)
    if options.replay:
        configuration, case, _ = case_of(options.seed, *options.replay)
        print(f"{configuration}\n{case}")
        run_case(options.seed, *options.replay, interpret=True)
        print("passed")
        return 0
    if options.cases is None and options.seconds is None:
        options.cases = 10_000
    print(f"seed {options.seed}", flush=True)
    began = time.monotonic()
    tally = run(
        options.seed,
        start=options.start,
        count=options.cases,
        seconds=options.seconds,
        jobs=options.jobs,
        report=_reporter(options.seed, options.cases),
    )
    print(f"seed {options.seed}: {tally} in {time.monotonic() - began:.0f} s")
    return bool(tally.failures)


if __name__ == "__main__":
    sys.exit(main())
