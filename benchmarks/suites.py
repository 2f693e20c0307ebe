"""The named suites: what is run, in which sizes, beside whom. Each yields `Case`s."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jax_causal_conv
from benchmarks import peers, programs, ssd_peers, ssd_steps, timing, whole_layer
from benchmarks.cases import BY_XLA, OURS, Candidate, Case, Options, Work
from benchmarks.ours import projected
from benchmarks.ssd_workload import SsdWorkload
from benchmarks.timing import Prepared
from benchmarks.workload import Workload
from benchmarks.yardsticks import YARDSTICKS
from jax_causal_conv import build_metadata, causal_conv1d_fn

DIM, WIDTH, TOKENS = 5376, 4, 2048
_LAYERS = 24
_CUT = "cut around it"
_PACKAGE = str(Path(jax_causal_conv.__file__).parent)


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
    candidates: list[Candidate] = [YARDSTICKS[yardstick]]
    if yardstick == "copy" and not options.on_gpu:
        candidates.append(YARDSTICKS["memcpy"])
    if work.op == "update" and options.on_gpu:
        candidates.append(YARDSTICKS["empty kernel"])
    for one in peers.CANDIDATES:
        is_ours = one.name.startswith(OURS)
        if one.takes(work) and (is_ours or (with_peers and options.with_peers)):
            candidates.append(one)
    prepare = _prepare(candidates, work, options)
    return Case(suite, name, axis, work.dtype, prepare, work, yardstick)


def _prepare(
    candidates: list[Candidate], work: Work, options: Options
) -> dict[str, Callable[[], Prepared]]:
    return {
        one.name: functools.partial(one.prepare, work, options.paths.get(one.package))
        for one in candidates
    }


def _evenly(total: int, parts: int) -> list[int]:
    """`total` tokens in so many sequences of nearly one length."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _mixture(tokens: int, share: float) -> list[int]:
    """Up to 2,000 decodes, and four prompts with so many per cent of the tokens."""
    prefill_tokens = int(tokens * share / 100)
    prompts = _evenly(prefill_tokens, 4) if share else []
    return [1] * min(tokens - prefill_tokens, 2000) + prompts


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
        batches[f"{share:g} % prefill"] = share, _mixture(TOKENS, share)
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
    """Forward and backward of the dense op, of rows of 2,048 tokens and of 8,192."""
    rows = {f"{n} x {TOKENS:,} tokens": ((TOKENS,) * n, DIM) for n in (1, 8, 32)}
    for count, length in ((1, 8192), (4, TOKENS)):
        name = f"{count} x {length:,} tokens of 2,048 channels"
        rows[name] = (length,) * count, 2048
    if not options.on_gpu:
        rows = dict(itertools.islice(rows.items(), 1))
    for dtype, (name, (lengths, dim)) in itertools.product(
        options.all_dtypes, rows.items()
    ):
        work = Workload("gradient", lengths, dim, WIDTH, dtype)
        yield _workload_case("training", name, len(lengths), work, options)


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
            who: functools.partial(projected, work, d_inner, width, split, cut=cut)
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

        by = programs.implementation(step.lower(holder[0], **arguments))
        jax.block_until_ready((call(), call()))
        note = f"{calls_into(_PACKAGE, call)} Python calls into the package"
        return Prepared(call, clock=clock, note=note, implementation=by)

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
    ours = tuple(f"{_LAYERS} convs, {clock}" for clock in clocks)
    yield Case("layers", name, rows, "bfloat16", prepare, ours=ours)


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


# The layer of Mamba2-2.7B; a tenth of its heads on a CPU.
_SSD_BATCHES = {
    "1 x 1": (1,),
    "16 x 1": (1,) * 16,
    "64 x 1": (1,) * 64,
    "128 x 1": (1,) * 128,
    "256 x 1": (1,) * 256,
    "1,024 x 1": (1,) * 1024,
    "252 x 1 + 4 x 449": (1,) * 252 + (449,) * 4,
    "100 x 1 + 2 x 800": (1,) * 100 + (800,) * 2,
    "4 x 512": (512,) * 4,
    "16 x 512": (512,) * 16,
    "64 x 128": (128,) * 64,
    "1 x 2,048": (2048,),
    "1 x 8,192": (8192,),
}
_SSD_BATCHES_CPU = ("16 x 1", "64 x 1", "100 x 1 + 2 x 800", "4 x 512", "1 x 2,048")


def ssd(options: Options) -> Iterator[Case]:
    """The SSD of Mamba2: decodes, mixed batches, prompts and dense rows."""
    batches, heads, rows = list(_SSD_BATCHES), 80, 8
    state_dtypes = ["float32", "bfloat16"]
    if not options.on_gpu:
        batches, heads, rows, state_dtypes = list(_SSD_BATCHES_CPU), 8, 1, ["float32"]
    for dtype in options.all_dtypes:
        work = SsdWorkload("ssd", (TOKENS,) * rows, dtype, heads=heads)
        yield _ssd_case(f"dense {rows} x {TOKENS:,}", work, options)
        for state_dtype, name in itertools.product(state_dtypes, batches):
            lengths = _SSD_BATCHES[name]
            work = SsdWorkload("ssd_packed", lengths, dtype, state_dtype, heads)
            yield _ssd_case(f"{name}, {state_dtype} states", work, options)


def _ssd_case(name: str, work: SsdWorkload, options: Options) -> Case:
    candidates = [YARDSTICKS["copy"]]
    for one in ssd_peers.CANDIDATES:
        is_ours = one.name.startswith(OURS)
        # There is nothing to be rounded in a decode step, and XLA takes its time.
        superfluous = (one.name == ssd_peers.ROUNDING and not work.prompts) or (
            one.name == BY_XLA and not options.long
        )
        if one.takes(work) and (is_ours or options.with_peers) and not superfluous:
            candidates.append(one)
    return Case(
        "ssd",
        name,
        work.tokens,
        work.dtype,
        _prepare(candidates, work, options),
        work,
        "copy",
    )


def ssd_training(options: Options) -> Iterator[Case]:
    """The SSD's forward and backward of dense rows."""
    heads = 80 if options.on_gpu else 4
    for rows, length in ((8, TOKENS), (1, TOKENS), (1, 8192), (4, 512)):
        if options.on_gpu or rows * length <= TOKENS:
            for dtype in options.all_dtypes:
                work = SsdWorkload("ssd", (length,) * rows, dtype, heads=heads)
                yield ssd_steps.training_case(f"{rows} x {length:,}", work, options)


def training_step(options: Options) -> Iterator[Case]:
    """Whole training steps of Mamba2 models, by what `jax.checkpoint` keeps."""
    from benchmarks import training_steps  # noqa: PLC0415 (needs flax and optax)

    shapes = ("130m", "780m") if options.on_gpu else ("tiny",)
    for shape in shapes:
        yield training_steps.case(shape, options.all_dtypes[0], options)


def mixer(options: Options) -> Iterator[Case]:
    """A whole Mamba2 mixer in float32: forward, gradients, and packed prefill."""
    from benchmarks import mixers  # noqa: PLC0415 (needs flax)

    for op, length in itertools.product(mixers.OPS, (512, TOKENS)):
        yield mixers.case(mixers.MixerWorkload(op, 2, length), options)


def layer(options: Options) -> Iterator[Case]:
    """A Mamba2 layer's conv and SSD together: 2,048 tokens of decodes and prompts."""
    tokens, heads = (TOKENS, 80) if options.on_gpu else (256, 8)
    for dtype, share in itertools.product(
        options.all_dtypes, (0, 12.5, 25, 50, 75, 100)
    ):
        work = whole_layer.LayerWorkload(
            tuple(_mixture(tokens, share)), dtype, heads=heads
        )
        candidates = [YARDSTICKS["copy"]] + [
            one
            for one in whole_layer.CANDIDATES
            if one.takes(work)
            and (one.name.startswith(OURS) or options.with_peers)
            and (one.name != ssd_peers.ROUNDING or work.ssd.prompts)
        ]
        prepare = _prepare(candidates, work, options)
        name = f"{share:g} % prefill"
        yield Case("layer", name, share, dtype, prepare, work, "copy")


def moves(options: Options) -> Iterator[Case]:
    """Forks, snapshots and rollback of SSM states, beside a plain step."""
    heads = 80 if options.on_gpu else 4
    for name in ("16 x 1", "128 x 1", "100 x 1 + 2 x 800"):
        for dtype in options.all_dtypes:
            work = SsdWorkload("ssd_packed", _SSD_BATCHES[name], dtype, heads=heads)
            yield ssd_steps.moves_case(name, work, drafts=3)


def engine(options: Options) -> Iterator[Case]:
    """A Mamba2 model with random weights, served by the example's engine."""
    from benchmarks import serving  # noqa: PLC0415 (needs flax)

    yield from serving.cases(options)


def scaling(options: Options) -> Iterator[Case]:
    """The engine's decode steps on one device, and on all by requests and by heads."""
    from benchmarks import scaling  # noqa: PLC0415 (needs flax)

    yield scaling.case(options)


_ALL = (
    decode,
    mixed,
    prefill,
    widths,
    training,
    columns,
    metadata,
    layers,
    ssd,
    ssd_training,
    training_step,
    mixer,
    layer,
    moves,
    engine,
    scaling,
)
SUITES: dict[str, Callable[[Options], Iterator[Case]]] = {s.__name__: s for s in _ALL}

CANDIDATES = (*peers.CANDIDATES, *ssd_peers.CANDIDATES)
PEERS = tuple(dict.fromkeys(c.name for c in CANDIDATES if not c.name.startswith(OURS)))
"""Candidates that are neither this package nor a yardstick."""

PACKAGES = tuple(dict.fromkeys(c.package for c in CANDIDATES if c.package))
"""Names of peers in `--peer-path`."""
