"""Runs kernels now, on memory and in an order that the test chooses.

Triton's interpreter follows real addresses. So arrays are placed in address space
that allows no access, each flush against forbidden pages, and an access that misses
them ends the process with SIGSEGV. Inputs are read-only. The parent process starts a
child, sees it die, and names the seed of the case:

    python -m tests.support.guard --cases 200  # sweep, in a child
    python -m tests.support.guard --seed 123   # replay one, with the kernel's stack
    python -m tests.support.guard --ssd        # the same of the SSD's kernels
"""

import argparse
import contextlib
import ctypes
import dataclasses
import faulthandler
import functools
import mmap
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from jax_causal_conv.kernels import interpreter, record
from jax_causal_conv.kernels.entry import arrays, replaced
from jax_causal_conv.kernels.record import Call, Launch
from jax_causal_conv.op import gradients
from jax_causal_conv.op.ops import DENSE, PACKED_BACKWARD, ROWS_BACKWARD
from jax_causal_conv.op.record import Op
from jax_causal_conv.operands import (
    ConvSpec,
    DenseOperands,
    PackedBackwardOperands,
    RowsBackwardOperands,
)
from tests.support import (
    REPOSITORY,
    cases,
    checks,
    quick,
    reference,
    ssd_backward,
    ssd_cases,
    ssd_launches,
)
from tests.support.cases import Case, choose

CASES_PER_CONFIGURATION = 4  # consecutive seeds share a shape, thus one compilation
SSD_CASES_PER_CONFIGURATION = 3  # of the SSD's sweep, likewise
PLACEMENTS = ("end", "start")

# Running kernels.


@contextlib.contextmanager
def program_order(programs: Sequence[int]):
    """The interpreter's program number i is `programs[i]`."""

    def set_grid_idx(x, y, z):
        interpreter_builder.grid_idx = (int(programs[x]), y, z)

    with mock.patch.object(interpreter_builder, "set_grid_idx", set_grid_idx):
        yield


def buffers(launch: Launch) -> tuple[Any, Any]:
    """A launch's inputs as NumPy arrays, and outputs full of NaN."""
    results = [np.full(out.shape, np.nan, out.dtype) for out in arrays(launch.outputs)]
    inputs = replaced(launch.inputs, map(np.asarray, arrays(launch.inputs)))
    return inputs, replaced(launch.outputs, results)


def results_of(launch: Launch, inputs: Any, outputs: Any) -> tuple[np.ndarray, ...]:
    """What a `Call` returns."""
    return *arrays(outputs), *(getattr(inputs, name) for name in launch.in_place)


def run_programs(
    launch: Launch, inputs: Any, outputs: Any, programs: Sequence[int]
) -> None:
    """Runs some programs of a launch on these buffers, in this order."""
    with program_order(programs):
        some = dataclasses.replace(launch, grid=len(programs))
        interpreter.run(some, inputs, outputs)


def caller(order: Callable[[int], Sequence[int]] = range) -> Call:
    """A `Call` that runs a launch now, on a copy of what is updated in place.

    Args:
        order: from the number of programs to the programs to run, in order.
    """

    def call(launch: Launch) -> tuple[np.ndarray, ...]:
        inputs, outputs = buffers(launch)
        updated = {name: getattr(inputs, name).copy() for name in launch.in_place}
        inputs = inputs._replace(**updated)
        run_programs(launch, inputs, outputs, order(launch.grid))
        return results_of(launch, inputs, outputs)

    return call


def call_now(case: Case, call: Call, *, metadata=None) -> tuple:
    """A case by the public op, whose kernels are launched at once through `call`."""
    traced = gradients.call

    def run(op, implementation, spec, operands):
        if implementation != "interpret":  # no state, no kernel
            return traced(op, implementation, spec, operands)
        operands = jax.tree.map(jnp.asarray, operands)
        return record.run(op.launches()(spec, operands), call)

    with (
        # Between the checks and the primitive, where tracing begins.
        mock.patch.object(gradients, "call", run),
        mock.patch.object(checks, "jitted", lambda function: function),
    ):
        return checks.call(case, "interpret", metadata=metadata)


# Guard pages.

_PROT_NONE = 0  # the mmap module does not name it
_MADV_DONTNEED = 4
MAP_NORESERVE = 0x4000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    [ctypes.c_void_p, ctypes.c_size_t] + 3 * [ctypes.c_int] + [ctypes.c_long]
)
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


def _check(status: int) -> None:
    if status != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Arena:
    """Address space without access, with arrays far apart in it.

    The neighbourhood of an array is forbidden as far as any int32 offset of rows
    reaches, so a wild access cannot land in somebody else's memory.
    """

    SIZE = 1 << 44
    PLACES = 32

    def __init__(self):
        self.size = self.SIZE
        while True:
            self.base = _libc.mmap(
                None,
                self.size,
                _PROT_NONE,
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE,
                -1,
                0,
            )
            if self.base != ctypes.c_void_p(-1).value:
                break
            if self.size < 1 << 30:
                _check(-1)
            self.size //= 2  # where address space is limited, a smaller moat
        self.used: list[tuple[int, int]] = []

    def __enter__(self) -> "Arena":
        return self

    def __exit__(self, *_):
        """Forbids everything again and gives the pages back."""
        for address, size in self.used:
            _check(_libc.mprotect(address, size, _PROT_NONE))
            _check(_libc.madvise(address, size, _MADV_DONTNEED))
        self.used.clear()

    def _middle_of_next_place(self, size: int) -> int:
        place = self.size // self.PLACES
        assert len(self.used) < self.PLACES and size < place // 2
        address = self.base + len(self.used) * place + place // 2
        return address - address % mmap.PAGESIZE

    def place(self, array: np.ndarray, at: str, *, writable: bool) -> np.ndarray:
        """A copy whose last ("end") or first ("start") byte meets a forbidden page."""
        pages = max(1, -(-array.nbytes // mmap.PAGESIZE)) * mmap.PAGESIZE
        address = self._middle_of_next_place(pages)
        self.used.append((address, pages))
        _check(_libc.mprotect(address, pages, mmap.PROT_READ | mmap.PROT_WRITE))
        start = address if at == "start" else address + pages - array.nbytes
        copy = _array_at(start, array)
        copy[...] = array
        if not writable:
            _check(_libc.mprotect(address, pages, mmap.PROT_READ))
        return copy


def _array_at(address: int, like: np.ndarray) -> np.ndarray:
    memory = (ctypes.c_char * like.nbytes).from_address(address)
    return np.ndarray(like.shape, like.dtype, memory)


def guarded_caller(arena: Arena, at: str) -> Call:
    """As `caller`, on guarded memory."""

    def call(launch: Launch) -> tuple[np.ndarray, ...]:
        inputs, outputs = buffers(launch)
        updated = {id(getattr(inputs, name)) for name in launch.in_place}

        def placed(array, writable=True):
            return arena.place(array, at, writable=writable)

        with arena:
            given = [placed(a, id(a) in updated) for a in arrays(inputs)]
            inputs = replaced(inputs, given)
            outputs = replaced(outputs, map(placed, arrays(outputs)))
            interpreter.run(launch, inputs, outputs)
            results = results_of(launch, inputs, outputs)
            return tuple(result.copy() for result in results)

    return call


# Cases: adversarial values, metadata that fits by size alone.


def adversarial_case(seed: int) -> tuple[Case, Any, bool]:
    """(case, metadata or None, whether the metadata belongs to the case)."""
    from tests.support import fuzz

    configuration, index = divmod(seed, CASES_PER_CONFIGURATION)
    shape = fuzz.kernel_shape(np.random.default_rng([4, configuration]))
    rng = np.random.default_rng([5, configuration, index])
    case = fuzz.value_case(shape, rng, malformed=True)
    metadata, own = None, True
    if isinstance(shape, fuzz.PackedShape) and index % 2:
        case, metadata = _with_foreign_metadata(case, rng)
        own = False
    return case, metadata, own


def _with_foreign_metadata(case: Case, rng) -> tuple[Case, Any]:
    """Metadata of another batch of equal sizes, or of arbitrary integers, or both."""
    from tests.support import fuzz

    shape, count = case.shape, case.shape.num_tokens
    if shape.block_m is None:
        shape = dataclasses.replace(shape, block_m=max(8, cases.reach(shape)))
        case = dataclasses.replace(case, shape=shape)
    other = fuzz.value_case(shape, rng, malformed=rng.random() < 0.5)
    offsets = other.arrays["query_start_loc"]
    metadata = fuzz.build_metadata(offsets, count, block_m=shape.block_m)
    seq, chunk = np.array(metadata.chunk_seq), np.array(metadata.chunk_offset)
    if rng.random() < 0.6:
        far = [-(2**31), 2**31 - 1, -2, -1, 0, 1, 2**30, -(2**30), 2**16, 1 << 27]
        seqs = [*far[:4], *range(shape.num_seqs + 2)]
        some = rng.random(len(seq)) < choose(rng, (0.2, 1.0))
        seq = np.where(some, rng.choice(seqs, len(seq)), seq).astype(np.int32)
        some = rng.random(len(seq)) < choose(rng, (0.0, 0.3, 1.0))
        chunk = np.where(some, rng.choice(far, len(seq)), chunk).astype(np.int32)
    return case, dataclasses.replace(metadata, chunk_seq=seq, chunk_offset=chunk)


@dataclasses.dataclass(frozen=True)
class InnerCase:
    """A call of an op that the public ones call: dense, or a backward pass.

    Attributes:
        own: whether metadata, if any, belongs to the case.
    """

    op: Op
    spec: ConvSpec
    operands: Any
    own: bool = True

    def launch(self, call: Call) -> list[np.ndarray]:
        operands = jax.tree.map(jnp.asarray, self.operands)
        results = record.run(self.op.launches()(self.spec, operands), call)
        return [np.asarray(result) for result in results]

    def __str__(self):
        sizes = jax.tree.map(lambda array: array.shape, self.operands)
        return f"{self.op}{sizes}, {self.spec}"


def inner_case(seed: int) -> InnerCase:
    """A random inner case; consecutive seeds share a shape."""
    configuration, index = divmod(seed, CASES_PER_CONFIGURATION)
    rng = np.random.default_rng([6, configuration])
    op = choose(rng, (DENSE, PACKED_BACKWARD, ROWS_BACKWARD))
    width, dim = int(rng.integers(1, 7)), int(choose(rng, (1, 3, 17, 33)))
    if rng.random() < 0.1:
        width, dim = 33, 65  # several blocks of channels
    tokens, count = int(choose(rng, (1, 7, 20, 41))), int(rng.integers(1, 4))
    dilation = int(choose(rng, (1, 2, 3))) if width > 1 else 1
    reach = (width - 1) * dilation
    state_len = max(reach, 1) + int(rng.integers(4))
    residual, has_bias, has_slots, has_segments, has_live = rng.random(5) < 0.6
    activation = choose(rng, (None, "silu", "silu", "gelu", "sigmoid", "tanh"))
    spec = ConvSpec(activation, dilation=dilation, residual=bool(residual))

    rng = np.random.default_rng([7, configuration, index])

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    filters = (normal(dim, width), normal(dim) if has_bias else None)
    dslots = normal(count, state_len, dim) if has_slots else None
    if op is PACKED_BACKWARD:
        from tests.support import fuzz

        block_m = max(reach, 8)
        shape = cases.PackedShape(
            tokens,
            count,
            count,
            dim,
            width,
            state_len,
            dilation=dilation,
            block_m=block_m,
        )
        case = fuzz.value_case(shape, rng, malformed=rng.random() < 0.7)
        metadata = None
        if index % 2:
            case, metadata = _with_foreign_metadata(case, rng)
        offsets = case.arrays["query_start_loc"]
        lengths = np.diff(reference.clean_offsets(offsets, tokens))
        live = (rng.random(count) < 0.8) & (lengths > 0)
        x, dy = normal(tokens, dim), normal(tokens, dim)
        history = normal(count, reach, dim)
        operands = PackedBackwardOperands(
            x, *filters, history, (dy,), dslots, offsets, live, metadata
        )
        return InnerCase(op, spec, operands, metadata is None)

    segments = None
    if has_segments:
        ids = rng.choice([-1, 0, 1, cases.INT_MIN, cases.INT_MAX], (count, tokens))
        starts = rng.random((count, tokens)) < choose(rng, (0.1, 0.5, 1.0))
        starts[:, 0] = True
        run = np.maximum.accumulate(np.where(starts, np.arange(tokens), 0), axis=1)
        segments = np.take_along_axis(ids, run, axis=1).astype(np.int32)
    x, dy = normal(count, tokens, dim), normal(count, tokens, dim)
    if op is DENSE:
        initial = normal(count, state_len, dim) if has_slots else None
        return InnerCase(op, spec, DenseOperands(x, *filters, initial, segments))
    live = rng.random(count) < 0.7 if has_live else None
    history = normal(count, reach, dim)
    operands = RowsBackwardOperands(x, *filters, history, (dy,), dslots, live, segments)
    return InnerCase(op, spec, operands)


@functools.cache
def _xla_twin(op: Op, spec: ConvSpec) -> Callable:
    return jax.jit(functools.partial(op.xla, spec))


def check_inner_case(seed: int, arena: Arena, placements: Sequence[str]) -> None:
    """As `check_case`, for `inner_case`."""
    case = inner_case(seed)
    twin = _xla_twin(case.op, case.spec)
    want = [np.asarray(array) for array in twin(case.operands)]
    for at in placements:
        print(f"case {seed} {at}", flush=True)
        got = case.launch(guarded_caller(arena, at))
        for one, other in zip(got, want, strict=True):
            assert one.shape == other.shape, f"{one.shape}, {other.shape}: {case}"
            if case.own:
                np.testing.assert_allclose(
                    one, other, rtol=1e-4, atol=1e-3, err_msg=str(case)
                )


def check_case(seed: int, arena: Arena, placements: Sequence[str]) -> None:
    """Runs a seed on guarded memory; compares it with XLA's twin and the reference."""
    from tests.support import fuzz

    configuration = seed // CASES_PER_CONFIGURATION
    if configuration % 4 == 3:
        check_inner_case(seed, arena, placements)
        return
    case, metadata, own = adversarial_case(seed)
    expected = fuzz.Expected(case)
    fuzz.compare(case, checks.call(case, "xla"), expected, "xla")
    for at in placements:
        print(f"case {seed} {at}", flush=True)
        got = call_now(case, guarded_caller(arena, at), metadata=metadata)
        what = f"interpreted, arrays flush at their {at}"
        if own:
            fuzz.compare(case, got, expected, what)
        else:
            fuzz.compare_unnamed_slots(case, got[1], what)


# The SSD.


def ssd_case(seed: int) -> tuple[ssd_cases.Case, dict[str, int]]:
    """A random case, full of far integers, and changes to its tiles: short stretches.

    Consecutive seeds share a shape: rows, a decode step, or any two batches; every
    other step and second batch has drafts.
    """
    configuration, index = divmod(seed, SSD_CASES_PER_CONFIGURATION)
    rng = np.random.default_rng([8, configuration])
    if configuration % 4 == 0:
        shape = ssd_cases.random_rows_shape(rng)
    else:
        shape = ssd_cases.random_packed_shape(rng)
    if configuration % 4 == 1:
        shape = dataclasses.replace(shape, max_prefills=0)
    if configuration % 4:
        drafts = 2 if configuration % 8 in (3, 5) else 0
        shape = dataclasses.replace(shape, drafts=drafts)
    tile = {"chunk": 16, "stretch": int(rng.integers(3))} if rng.random() < 0.7 else {}
    rng = np.random.default_rng([9, configuration, index])
    case = ssd_cases.random_case(shape, rng, malformed=True)
    return case, tile


def check_ssd_case(seed: int, arena: Arena, placements: Sequence[str]) -> None:
    """Runs a seed on guarded memory; compares it with the recurrence."""
    case, tile = ssd_case(seed)
    expected = ssd_cases.Expected(case)
    for at in placements:
        print(f"case {seed} {at}", flush=True)
        got = ssd_launches.launch(case, guarded_caller(arena, at), **tile)
        ssd_cases.compare(case, got, expected, "interpret")
        # The gradient's six kernels take longest: each seed has one place for them.
        if not case.packed and at == placements[seed % len(placements)]:
            spec, operands = ssd_backward.operands_of(case)
            changes = {"chunk": 16, "tiles": 2} if tile else {}
            ssd_backward.launch(spec, operands, guarded_caller(arena, at), **changes)


# Planted bugs, to show that the harness sees what it is for.


class One(NamedTuple):
    array: Any


@dataclasses.dataclass(frozen=True)
class PlantedConstants:
    FAST: bool = True


@triton.jit
def _reads_before_start(inputs, outputs, C: tl.constexpr):
    tl.store(outputs.array, tl.load(inputs.array - 1))


@triton.jit
def _reads_after_end(inputs, outputs, C: tl.constexpr):
    tl.store(outputs.array, tl.load(inputs.array + 8))


@triton.jit
def _masks_one_lane_too_many(inputs, outputs, C: tl.constexpr):
    cols = tl.arange(0, 16)
    tl.store(
        outputs.array + cols, tl.load(inputs.array + cols, mask=cols < 8), mask=cols < 9
    )


@triton.jit
def _writes_far_away(inputs, outputs, C: tl.constexpr):
    tl.store(outputs.array + (1 << 33), tl.load(inputs.array))


@triton.jit
def _writes_an_input(inputs, outputs, C: tl.constexpr):
    tl.store(inputs.array, 1.0)


@triton.jit
def _correct(inputs, outputs, C: tl.constexpr):
    cols = tl.arange(0, 16)
    tl.store(
        outputs.array + cols, tl.load(inputs.array + cols, mask=cols < 8), mask=cols < 8
    )


PLANTED = {  # kernel, and the placement that shows its bug
    "reads_before_start": (_reads_before_start, "start"),
    "reads_after_end": (_reads_after_end, "end"),
    "masks_one_lane_too_many": (_masks_one_lane_too_many, "end"),
    "writes_far_away": (_writes_far_away, "start"),
    "writes_an_input": (_writes_an_input, "start"),
    "correct": (_correct, "end"),
}


def run_planted(name: str, arena: Arena) -> None:
    kernel, at = PLANTED[name]
    x = np.arange(8, dtype=np.float32)
    print(f"case {name} {at}", flush=True)
    launch = Launch(kernel, One(x), One(x), 1, 1, PlantedConstants())
    guarded_caller(arena, at)(launch)


# The child, and its parent.


@dataclasses.dataclass
class Outcome:
    """What became of a child.

    Attributes:
        last: "SEED PLACEMENT" that it announced last.
        error: None, or why the child did not finish: a signal's name or a message.
        output: what it printed, the stack of a crash included.
        sweep: the option that says what cases these are, if any.
    """

    last: str
    error: str | None
    output: str
    sweep: str = ""

    def __str__(self):
        seed = self.last.split()[0] if self.last else "none"
        return (
            f"case {self.last or 'none'}: {self.error}; replay it by\n"
            f"    python -m tests.support.guard {self.sweep}--seed {seed}\n"
            f"{self.output[-6000:]}"
        )


def run_child(arguments: Sequence[str], timeout: float = 600) -> Outcome:
    """Runs this module in a child process that may crash."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.support.guard", "--child", *arguments]
    try:
        child = subprocess.run(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        status, output = child.returncode, child.stdout
    except subprocess.TimeoutExpired as expired:
        status, output = f"no end after {timeout:.0f} s", expired.stdout or b""
        output = output if isinstance(output, str) else output.decode()
    cases = [line[5:] for line in output.splitlines() if line.startswith("case ")]
    error = None
    if isinstance(status, str):
        error = status
    elif status < 0:
        error = f"killed by {signal.Signals(-status).name}"
    elif status:
        error = "wrong result"
    rest = [line for line in output.splitlines() if not line.startswith("case ")]
    sweep = "--ssd " if "--ssd" in arguments else ""
    return Outcome(cases[-1] if cases else "", error, "\n".join(rest), sweep)


def _child(options) -> int:
    faulthandler.enable()
    arena = Arena()
    if options.planted:
        run_planted(options.planted, arena)
        return 0
    placements = PLACEMENTS if options.placement is None else (options.placement,)
    check = check_ssd_case if options.ssd else check_case
    for seed in range(options.seed, options.seed + options.cases):
        try:
            with quick.compilation():
                check(seed, arena, placements)
        except Exception:
            traceback.print_exc()
            print(f"case {seed} compared", flush=True)
            return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line, see the module's docstring."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--seed", type=int, default=0, help="the (first) case")
    parser.add_argument("--cases", type=int, default=1, help="how many, from --seed on")
    parser.add_argument("--placement", choices=PLACEMENTS, help="default: both")
    parser.add_argument("--ssd", action="store_true", help="the SSD's kernels")
    parser.add_argument("--planted", choices=PLANTED, help="a kernel with a known bug")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        return _child(options)
    passed_on = ["--placement", options.placement] if options.placement else []
    passed_on += ["--ssd"] if options.ssd else []
    if options.planted:
        outcome = run_child(["--planted", options.planted])
        print(outcome if outcome.error else "no crash")
        return bool(outcome.error)
    seed, end, failures = options.seed, options.seed + options.cases, 0
    while seed < end:
        outcome = run_child(
            ["--seed", str(seed), "--cases", str(end - seed), *passed_on], timeout=36000
        )
        if outcome.error is None:
            break
        print(outcome)
        failures += 1
        if not outcome.last:
            break
        seed = int(outcome.last.split()[0]) + 1
    print(f"{options.cases} cases from seed {options.seed}: {failures} failed")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
