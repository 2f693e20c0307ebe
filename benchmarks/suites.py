"""The named suites: what is run, in which sizes, beside whom.

A suite yields `Case`s. `run_case` prepares all its candidates, checks their results,
times those that are right and returns a `Row` for each.
"""

import dataclasses
import functools
import itertools
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_causal_conv
from benchmarks import peers, timing
from benchmarks.peers import OURS, Absent, Candidate
from benchmarks.timing import Prepared
from benchmarks.workload import Workload, WrongResult
from jax_causal_conv import build_metadata, causal_conv1d_fn

DIM, WIDTH, TOKENS = 5376, 4, 2048
_LAYERS = 24
_CUT = "cut around it"
_PACKAGE = str(Path(jax_causal_conv.__file__).parent)


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
        error: largest difference from float64 over the largest value, if compared.
        of_yardstick: time over that of the yardstick in the same case, see
            `Timing.over`.
        of_ours: time over this package's, likewise.
        note: what else there is to say; why it failed.
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
    error: float | None = None
    of_yardstick: float | None = None
    of_ours: float | None = None
    note: str = ""

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
        rows: to be reported beside the timed ones.
    """

    suite: str
    name: str
    axis: float
    dtype: str
    prepare: Mapping[str, Callable[[], Prepared]]
    work: Workload | None = None
    yardstick: str = ""
    rows: tuple[Row, ...] = ()


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
            error = None
            if case.work is not None and one.view is not None:
                error = case.work.error(one.view(result))
            nbytes = one.nbytes
            if nbytes is None:
                nbytes = case.work.nbytes if case.work else 0
            # The candidates' place in the table, whether or not timing succeeds.
            rows[name] = blank(
                name,
                nbytes=nbytes,
                error=error,
                note=one.note,
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
        rows[name] = dataclasses.replace(
            rows[name],
            microseconds=found.median,
            low=found.low,
            high=found.high,
            samples=found.samples,
            clock=found.clock,
            kernels=found.kernels,
            of_yardstick=over(name, case.yardstick),
            of_ours=over(name, OURS),
        )
    return [*rows.values(), *case.rows]


def _summary(error: Exception) -> str:
    if isinstance(error, WrongResult):
        return f"wrong: {error}"
    lines = str(error).strip().splitlines() or [""]
    return f"failed: {type(error).__name__}: {lines[0][:200]}"


def _workload_case(
    suite: str,
    name: str,
    axis: float,
    work: Workload,
    options: Options,
    *,
    yardstick: str = "copy",
    with_peers: bool = True,
) -> Case:
    candidates: list[Candidate] = [peers.YARDSTICKS[yardstick]]
    if yardstick == "copy" and not options.on_gpu:
        candidates.append(peers.YARDSTICKS["memcpy"])
    if work.op == "update" and options.on_gpu:
        candidates.append(peers.YARDSTICKS["empty kernel"])
    for one in peers.CANDIDATES:
        is_ours = one.name.startswith(OURS)
        if one.takes(work) and (is_ours or (with_peers and options.with_peers)):
            candidates.append(one)
    prepare = {
        one.name: functools.partial(one.prepare, work, options.paths.get(one.package))
        for one in candidates
    }
    return Case(suite, name, axis, work.dtype, prepare, work, yardstick)


def _evenly(total: int, parts: int) -> list[int]:
    """`total` tokens in so many sequences of nearly one length."""
    return [total // parts + (i < total % parts) for i in range(parts)]


# ---- Suites of the ops -------------------------------------------------------------


def decode(options: Options) -> Iterator[Case]:
    """One token for each of 1 to 1,024 requests; caches of up to 32,768 slots."""
    sizes = [1, 4, 16, 64, 256, 1024]
    if options.long or options.on_gpu:
        sizes = [2**i for i in range(11)]
    case = functools.partial(_workload_case, "decode", options=options)
    for dtype, batch in itertools.product(options.all_dtypes, sizes):
        work = Workload("update", (1,) * batch, DIM, WIDTH, dtype, slots=2048)
        yield case(f"{batch:,} x 1", batch, work)
    for dtype, slots in itertools.product(options.all_dtypes, (512, 4096, 32768)):
        work = Workload("update", (1,) * 256, DIM, WIDTH, dtype, slots=slots)
        yield case(f"256 x 1, {slots:,} slots", 256, work, with_peers=False)


def mixed(options: Options) -> Iterator[Case]:
    """2,048 tokens of decodes and prefills; first 252 decodes and 4 prefills of 449."""
    shares: list[float] = [0, 25, 50, 75, 100]
    if options.long or options.on_gpu:
        shares = [0, 12.5, 25, 50, 75, 87.5, 100]
    batches: dict[str, tuple[float, list[int]]] = {
        "252 x 1 + 4 x 449": (88, [1] * 252 + [449] * 4)
    }
    for share in shares:
        prefill_tokens = int(TOKENS * share / 100)
        prompts = _evenly(prefill_tokens, 4) if share else []
        lengths = [1] * min(TOKENS - prefill_tokens, 2000) + prompts
        batches[f"{share:g} % prefill"] = share, lengths
    yardstick = "copy" if options.on_gpu else "silu(x)"
    for dtype, (name, (share, lengths)) in itertools.product(
        options.all_dtypes, batches.items()
    ):
        slots = 512 if len(lengths) < 512 else 2048
        work = Workload("packed", tuple(lengths), DIM, WIDTH, dtype, slots)
        yield _workload_case("mixed", name, share, work, options, yardstick=yardstick)


def prefill(options: Options) -> Iterator[Case]:
    """One prompt of 128 to 131,072 tokens (8,192 on a CPU) without history."""
    lengths = [128, 512, 2048, 8192]
    if options.on_gpu:
        lengths += [8000, 32768, 131072]
    elif options.long:
        lengths += [32768]
    yardstick = "copy" if options.on_gpu else "silu(x)"
    for dtype, length in itertools.product(options.all_dtypes, sorted(lengths)):
        work = Workload("packed", (length,), DIM, WIDTH, dtype, slots=64, seen=False)
        name = f"{length:,} tokens"
        yield _workload_case(
            "prefill", name, length, work, options, yardstick=yardstick
        )


def widths(options: Options) -> Iterator[Case]:
    """One prompt with 1,024 to 16,384 channels: 8,192 tokens, or 512 on a CPU."""
    dims = [1024, 2048, 4096, 5376, 8192, 10240, 16384]
    tokens = 8192
    if not options.on_gpu:
        dims, tokens = [1024, 4096, 16384], 512
    yardstick = "copy" if options.on_gpu else "silu(x)"
    for dtype, dim in itertools.product(options.all_dtypes, dims):
        work = Workload("packed", (tokens,), dim, WIDTH, dtype, slots=64, seen=False)
        name = f"{dim:,} channels"
        yield _workload_case("widths", name, dim, work, options, yardstick=yardstick)


def training(options: Options) -> Iterator[Case]:
    """Forward and backward of the dense op, of rows of 2,048 tokens."""
    batches = [1, 8, 32] if options.on_gpu else [1]
    for dtype, batch in itertools.product(options.all_dtypes, batches):
        work = Workload("gradient", (TOKENS,) * batch, DIM, WIDTH, dtype)
        yield _workload_case(
            "training", f"{batch} x {TOKENS:,} tokens", batch, work, options
        )


# ---- Suites of what surrounds the ops ----------------------------------------------


def columns(options: Options) -> Iterator[Case]:
    """x, B and C of a Mamba2 in-projection: by the op itself, or cut around it."""
    d_inner, d_state, heads = 5120, 128, 80
    split = (d_inner, d_state, d_state)
    width = d_inner + sum(split) + heads
    batches = {"252 x 1 + 4 x 449": (1,) * 252 + (449,) * 4, "256 x 1": (1,) * 256}
    for dtype, (name, lengths) in itertools.product(
        options.all_dtypes, batches.items()
    ):
        work = Workload("packed", lengths, sum(split), WIDTH, dtype, slots=512)
        prepare = {
            who: functools.partial(
                peers.projected, work, d_inner, width, split, cut=cut
            )
            for who, cut in ((_CUT, True), (OURS, False))
        }
        yield Case("columns", name, len(lengths), dtype, prepare, work, _CUT)


def metadata(options: Options) -> Iterator[Case]:
    """`build_metadata` of 16 to 4,096 sequences, on the host and in the graph."""
    for num_seqs in (16, 256, 4096):
        tokens = 8 * num_seqs
        offsets = np.arange(0, tokens + 1, 8, dtype=np.int32)

        def on_host(offsets=offsets, tokens=tokens):
            call = functools.partial(build_metadata, offsets, tokens)
            return Prepared(call, lambda _: None, clock="wall")

        def in_graph(offsets=offsets, tokens=tokens):
            build = jax.jit(functools.partial(build_metadata, num_tokens=tokens))
            return Prepared(functools.partial(build, jnp.asarray(offsets)))

        prepare = {"on the host (NumPy)": on_host, "in the graph": in_graph}
        yield Case("metadata", f"{num_seqs:,} sequences", num_seqs, "int32", prepare)


def layers(options: Options) -> Iterator[Case]:
    """What a jitted decode step of 24 convs costs the host, beside an empty step.

    On a CPU the calling thread computes small programs itself: there the whole step is
    compared with the empty one.
    """
    dim, rows = (DIM, 256) if options.on_gpu else (256, 8)
    work = Workload("packed", (1,) * rows, dim, WIDTH, "bfloat16", slots=512)
    arguments = {
        "x": work.x,
        "filters": [(work.weight + 0, work.bias + 0) for _ in range(_LAYERS)],
        "offsets": work.offsets,
        "slots": work.cache_indices,
        "seen": work.has_initial_state,
        "metadata": build_metadata(work.offsets, work.tokens),
    }

    def full(caches, x, filters, offsets, slots, seen, metadata):
        updated = []
        for (weight, bias), cache in zip(filters, caches, strict=True):
            x, cache = causal_conv1d_fn(  # noqa: PLW2901 (the old cache is gone)
                x,
                weight,
                bias,
                cache,
                offsets,
                cache_indices=slots,
                has_initial_state=seen,
                metadata=metadata,
            )
            updated.append(cache)
        return x, updated

    def empty(caches, x, filters, offsets, slots, seen, metadata):
        return seen, caches

    def prepared(step: Callable, clock: timing.Clock) -> Prepared:
        step = jax.jit(step, donate_argnums=0, keep_unused=True)
        holder = [[work.states() for _ in range(_LAYERS)]]

        def call():
            out, holder[0] = step(holder[0], **arguments)
            return out

        jax.block_until_ready((call(), call()))
        note = f"{calls_into(_PACKAGE, call)} Python calls into the package"
        return Prepared(call, clock=clock, note=note)

    def on_host() -> Prepared:
        call = functools.partial(build_metadata, work.offsets, work.tokens)
        return Prepared(call, lambda _: None, clock="wall")

    clocks: dict[str, timing.Clock] = {}
    if options.on_gpu:
        clocks |= {"on the device": "device", "dispatch": "dispatch"}
    clocks["until finished"] = "wall"
    prepare: dict[str, Callable[[], Prepared]] = {
        f"{kind}, {name}": functools.partial(prepared, step, clock)
        for kind, step in ((f"{_LAYERS} convs", full), ("empty step", empty))
        for name, clock in clocks.items()
        if (step, clock) != (empty, "device")
    }
    prepare["build_metadata"] = on_host
    name = f"{rows} rows, {dim:,} channels"
    yield Case("layers", name, rows, "bfloat16", prepare)


def calls_into(folder: str, function: Callable[[], Any]) -> int:
    """How many Python functions of files under a folder run in one call."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(folder)

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        jax.block_until_ready(function())
    finally:
        sys.setprofile(before)
    return count


def engine(options: Options) -> Iterator[Case]:
    """A Mamba2 model with random weights, served by the example's engine."""
    from benchmarks import serving  # noqa: PLC0415 (needs flax)

    yield serving.case(options)


_ALL = (
    decode,
    mixed,
    prefill,
    widths,
    training,
    columns,
    metadata,
    layers,
    engine,
)
SUITES: dict[str, Callable[[Options], Iterator[Case]]] = {s.__name__: s for s in _ALL}


def best_peers(rows: list[Row]) -> dict[tuple[str, str, str], Row]:
    """The fastest peer of each (suite, case, dtype) in which one was timed."""
    names = {one.name for one in peers.CANDIDATES if not one.name.startswith(OURS)}
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        key = row.suite, row.case, row.dtype
        if row.candidate in names and row.microseconds is not None:
            best[key] = min(
                (row, best.get(key, row)), key=lambda r: r.microseconds or 0.0
            )
    return best


def conv_kernels() -> re.Pattern:
    """How the kernels of this package are called in a profile."""
    return re.compile(r"(packed|update|dense|rows)(_backward)?_kernel")
