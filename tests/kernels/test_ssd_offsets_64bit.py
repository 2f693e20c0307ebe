"""The SSD's kernels are right at the far end of arrays of more than 2**31 elements.

As in `test_offsets_64bit`: the arrays lie on memory that is reserved and not backed,
and of the millions of programs those run that serve the last tokens and slots. Here
every array with tokens, chunks, stretches or slots is that large.
"""

import contextlib
import mmap
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from jax_causal_conv.kernels import (
    interpreter,
    launch_ssd,
    launch_ssd_backward,
    record,
    ssd_backward,
    ssd_backward_finish,
    ssd_backward_states,
    ssd_chunks,
    ssd_decode,
    ssd_device,
    ssd_prepare,
    ssd_recent,
)
from jax_causal_conv.kernels.entry import arrays, replaced
from jax_causal_conv.operands import (
    SSDBackwardOperands,
    SSDOperands,
    SSDPackedOperands,
    SSDSpec,
)
from tests.support import guard, ssd_cases, ssd_launches
from tests.support import ssd_backward as gradients
from tests.support import ssd_reference as reference
from tests.support.ssd_cases import BFLOAT16, FLOAT32

pytestmark = pytest.mark.usefixtures("quick_compilation")

HEADS, DIM, GROUPS, SIZE = 512, 4, 32, 64
TOKENS = 2**31 // HEADS + 9000  # even dt is larger than 2**31 elements
SLOTS = 2**31 // (HEADS * DIM * SIZE) + 3
HEAD, GROUP = HEADS - 1, GROUPS - 1  # whose results are looked at
SEEN = 200  # tokens at the end that are not zero


KERNELS = (
    ssd_backward,
    ssd_backward_finish,
    ssd_backward_states,
    ssd_chunks,
    ssd_decode,
    ssd_device,
    ssd_prepare,
    ssd_recent,
)


def sparse(shape, dtype):
    """Zeros of any size that cost memory where they are written."""
    size = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | guard.MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no {size / 2**30:.0f} GiB of address space: {error}")
    return np.ndarray(shape, dtype, memory)


def int32_range(*bounds, num_stages=None):
    """A loop as compiled code has it: its variable is an int32 tensor."""
    del num_stages
    for value in range(*map(int, bounds)):
        yield tl.tensor(TensorHandle(np.array([value], np.int32), tl.int32), tl.int32)


@pytest.fixture(autouse=True)
def loops_count_in_int32():
    with contextlib.ExitStack() as stack:
        for module in KERNELS:
            for function in vars(module).values():
                if isinstance(function, triton.JITFunction):
                    names = interpreter._interpreted(function).__globals__
                    stack.enter_context(mock.patch.dict(names, range=int32_range))
        yield


def tokens_of(rng, *lead):
    """x, dt, B and C, zero but for the last tokens of the last head and group."""
    x, dt = sparse((*lead, HEADS, DIM), BFLOAT16), sparse((*lead, HEADS), FLOAT32)
    B, C = (sparse((*lead, GROUPS, SIZE), BFLOAT16) for _ in range(2))
    end = (-1,) * (len(lead) - 1) + (slice(-min(SEEN, lead[-1]), None),)
    x[(*end, HEAD)] = rng.standard_normal(x[(*end, HEAD)].shape)
    dt[(*end, HEAD)] = rng.uniform(0.01, 0.2, dt[(*end, HEAD)].shape)
    for array in (B, C):
        array[(*end, GROUP)] = rng.standard_normal(array[(*end, GROUP)].shape)
    A = -rng.uniform(1, 4, HEADS).astype(np.float32)
    return x, dt, A, B, C, rng.standard_normal(HEADS).astype(np.float32)


def check(operands, at, state, got, got_state):
    """The last head's y of some tokens, and its state, against the recurrence."""
    x, dt, A, B, C, D, *_ = operands
    inputs = (x[at][:, HEAD:], dt[at][:, HEAD:], A[HEAD:], B[at][:, GROUP:])
    inputs = (*inputs, C[at][:, GROUP:], D[HEAD:])
    y, new = reference.recurrence(*inputs, state[None])
    sizes = [abs(a.astype(np.float64)) for a in inputs]
    sizes[1:3] = inputs[1:3]
    y_size, new_size = reference.recurrence(*sizes, abs(state[None]))
    terms = ssd_cases.TERMS + ssd_cases.CUT
    ssd_cases.assert_close(got[:, None], y, y_size, "y", terms)
    ssd_cases.assert_close(got_state[None], new, new_size, "state", terms)


def caller(choose, poisoned):
    """A `Call` that runs the programs `choose(launch)`, on sparse outputs.

    Args:
        choose: from a launch to its programs.
        poisoned: for outputs by name, where they are NaN before.
    """

    def call(launch):
        inputs = replaced(launch.inputs, map(np.asarray, arrays(launch.inputs)))
        fresh = [sparse(out.shape, out.dtype) for out in arrays(launch.outputs)]
        for out in fresh:
            assert out.size > 2**31 or out.ndim == 2, out.shape
        outputs = replaced(launch.outputs, fresh)
        for name, where in poisoned.items():
            if getattr(outputs, name, None) is not None:
                getattr(outputs, name)[where] = np.nan
        programs = list(choose(launch))
        assert max(programs) < launch.grid
        guard.run_programs(launch, inputs, outputs, programs)
        return guard.results_of(launch, inputs, outputs)

    return call


def programs_for(stretches, chunks, sequences, prefills):
    """Programs of these pieces, for the last head."""

    def of_head(C, numbers):
        return [(number * C.H + HEAD) * C.P_BLOCKS for number in numbers]

    def choose(launch):
        C, inputs = launch.constants, launch.inputs
        assert C.P_BLOCKS == 1
        if launch.kernel is ssd_decode.decode_kernel:
            return of_head(C, sequences)
        if launch.kernel is ssd_recent.recent_kernel:
            blocks = launch.grid // inputs.num_seqs
            last = ((HEADS, DIM), (HEADS, 1), (GROUPS, SIZE))  # of which the last one
            columns = {
                column // C.COLUMNS
                for count, width in last
                for column in range((count - 1) * width, count * width)
            }
            return sorted(blocks * i + block for i in sequences for block in columns)
        if launch.kernel is ssd_chunks.chunks_kernel:
            return of_head(C, stretches if C.STRETCH else prefills)
        blocks = -(-C.H // C.H_BLOCK)
        before = inputs.num_stretches * C.H
        sums = [before + chunk * blocks + blocks - 1 for chunk in chunks]
        before += inputs.num_chunks * blocks
        decodes = [before + program for program in of_head(C, sequences)]
        return [*of_head(C, stretches if C.STRETCH else ()), *sums, *decodes]

    return choose


def packed_operands(rng, offsets, slots):
    tokens = tokens_of(rng, TOKENS)
    states = sparse((SLOTS, HEADS, DIM, SIZE), FLOAT32)
    states[-3:, HEAD] = rng.standard_normal((3, DIM, SIZE))
    for array in (*tokens[:2], tokens[3], states):
        assert array.size > 2**31
    offsets, slots = np.array(offsets, np.int32), np.array(slots, np.int32)
    known = np.ones(len(slots), bool)
    return SSDPackedOperands(*tokens, None, states, offsets, slots, known)


def test_decodes_at_the_far_end():
    offsets = [0, TOKENS - 4, TOKENS - 3, TOKENS - 2]
    operands = packed_operands(np.random.default_rng(0), offsets, [0, -1, SLOTS - 1])
    old = operands.states[-3:, HEAD].copy()
    choose = programs_for((), (), (1, 2), ())
    call = caller(choose, {"y": slice(-SEEN, None)})
    y, states = record.run(launch_ssd.packed(SSDSpec(64), operands), call)
    at = slice(TOKENS - 3, TOKENS - 2)
    check(operands, at, old[2], y[at, HEAD], states[-1, HEAD])
    zeros = np.r_[TOKENS - 4, TOKENS - 2 : TOKENS]
    np.testing.assert_array_equal(y[zeros, HEAD].astype(np.float32), 0)
    np.testing.assert_array_equal(states[-3:-1, HEAD], old[:2])
    assert not states[:3].any()


def test_drafts_at_the_far_end():
    """Slots know of so many tokens that all of their arrays are large, too."""
    drafts, offsets = 260, [0, TOKENS - 6, TOKENS - 5, TOKENS - 2]
    rng = np.random.default_rng(0)
    operands = packed_operands(rng, offsets, [0, -1, SLOTS - 1])
    lead = SLOTS, drafts
    recent = (
        sparse((*lead, HEADS, DIM), BFLOAT16),
        sparse((*lead, HEADS), FLOAT32),
        sparse((*lead, GROUPS, SIZE), BFLOAT16),
    )
    kept = 3  # and tokens, three too: 257 of the first do nothing
    for rows, last in zip(recent, (HEAD, HEAD, GROUP), strict=True):
        assert rows.size > 2**31
        some = rng.uniform(0.1, 1, rows[-1, :kept, last].shape)
        rows[-1, :kept, last] = some
    before = [rows[-1, :kept].copy() for rows in recent]
    operands = operands._replace(
        recent_x=recent[0],
        recent_dt=recent[1],
        recent_B=recent[2],
        num_rejected=np.full(3, drafts - kept, np.int32),
        snapshot_slots=np.array([-1, -1, SLOTS - 2], np.int32),
        snapshot_ends=np.array([0, 0, 2], np.int32),
    )
    old = operands.states[-3:, HEAD].copy()
    call = caller(programs_for((), (), (1, 2), ()), {"y": slice(-SEEN, None)})
    y, states, *new = record.run(launch_ssd.packed(SSDSpec(64), operands), call)
    at = slice(TOKENS - 5, TOKENS - 2)
    own = [array[at] for array in (operands.x, operands.dt, operands.B)]
    x, dt, B = (np.concatenate(pair) for pair in zip(before, own, strict=True))
    C = np.concatenate([np.zeros_like(own[2]), operands.C[at]])
    of_head = x[:, HEAD:], dt[:, HEAD:], operands.A[HEAD:], B[:, GROUP:], C[:, GROUP:]
    want, _ = reference.recurrence(*of_head, operands.D[HEAD:], old[2][None])
    np.testing.assert_allclose(
        y[at, HEAD].astype(float), want[kept:, 0], rtol=1e-2, atol=1e-2
    )
    # Of 260 + 3 tokens the slots' states leave out 260.
    np.testing.assert_array_equal(states[-2:, HEAD], old[[2, 2]])
    np.testing.assert_array_equal(states[-3, HEAD], old[0])
    for rows, all_of_it, last in zip(new, (x, dt, B), (HEAD, HEAD, GROUP), strict=True):
        for slot, end in ((-1, 6), (-2, 5)):
            got = rows[slot, -6:, last].astype(float)
            ours = all_of_it[:end, last].astype(float)
            np.testing.assert_array_equal(got[6 - end :], ours)
            assert not got[: 6 - end].any()
    assert not states[:3].any()


def test_states_move_between_far_slots():
    offsets = [0, TOKENS - 4, TOKENS - 3, TOKENS - 2]
    operands = packed_operands(np.random.default_rng(0), offsets, [0, -1, SLOTS - 1])
    operands = operands._replace(
        write_slots=np.array([-1, -1, SLOTS - 2], np.int32),
        snapshot_slots=np.array([-1, -1, SLOTS - 3], np.int32),
        snapshot_ends=np.zeros(3, np.int32),
    )
    old = operands.states[-3:, HEAD].copy()
    choose = programs_for((), (), (1, 2), ())
    call = caller(choose, {"y": slice(-SEEN, None)})
    y, states = record.run(launch_ssd.packed(SSDSpec(64), operands), call)
    at = slice(TOKENS - 3, TOKENS - 2)
    check(operands, at, old[2], y[at, HEAD], states[-2, HEAD])
    np.testing.assert_array_equal(states[[-1, -3], HEAD], old[[2, 2]])
    assert not states[:3].any()


@pytest.mark.parametrize("stretch", [0, 1])
def test_prompt_leaves_states_in_far_slots(stretch):
    first = TOKENS - 9 - 130
    offsets, slots = [0, first, first + 130], [0, SLOTS - 1]
    operands = packed_operands(np.random.default_rng(1), offsets, slots)
    operands = operands._replace(
        write_slots=np.array([-1, SLOTS - 2], np.int32),
        snapshot_slots=np.array([-1, SLOTS - 3], np.int32),
        snapshot_ends=np.array([0, 100], np.int32),
    )
    old, spec = operands.states[-1, HEAD].copy(), SSDSpec(64, max_prefills=2)
    tile = {"stretch": stretch, "chunk": 64}
    tile = ssd_launches.tile_of("ssd_packed", spec, operands, **tile)
    pieces = range(-(-first // 64), -(-first // 64) + 3)
    choose = programs_for(pieces, pieces, (), (1,))
    inner = slice(pieces.start, pieces.stop)
    where = {"y": slice(-SEEN, None), "sums": (inner, HEAD)}
    where |= dict.fromkeys(("carried", "forget", "weights"), (inner, HEAD))
    y, states = record.run(
        launch_ssd.packed(spec, operands, tile), caller(choose, where)
    )
    for at, slot in ((slice(first, first + 130), -2), (slice(first, first + 100), -3)):
        check(operands, at, old, y[at, HEAD], states[slot, HEAD])
    np.testing.assert_array_equal(states[-1, HEAD], old)
    assert not states[:3].any()


@pytest.mark.parametrize("stretch", [0, 1])
def test_prompts_and_a_decode_at_the_far_end(stretch):
    """The first sequence, which is not run, has nearly all tokens and chunks."""
    first = TOKENS - 9 - 130 - 1
    offsets, slots = [0, first, first + 1, first + 131], [0, SLOTS - 1, SLOTS - 2]
    operands = packed_operands(np.random.default_rng(1), offsets, slots)
    old = operands.states[-3:, HEAD].copy()
    spec = SSDSpec(64, max_prefills=2)
    tile = {"stretch": stretch, "chunk": 64}
    tile = ssd_launches.tile_of("ssd_packed", spec, operands, **tile)
    pieces = range(-(-first // 64), -(-first // 64) + 3)
    choose = programs_for(pieces, pieces, (1, 2), (1,))
    inner = slice(pieces.start, pieces.stop)
    where = {"y": slice(-SEEN, None), "sums": (inner, HEAD)}
    where |= dict.fromkeys(("carried", "forget", "weights"), (inner, HEAD))
    y, states = record.run(
        launch_ssd.packed(spec, operands, tile), caller(choose, where)
    )
    at = slice(first, first + 1)
    check(operands, at, old[2], y[at, HEAD], states[-1, HEAD])
    at = slice(first + 1, first + 131)
    check(operands, at, old[1], y[at, HEAD], states[-2, HEAD])
    np.testing.assert_array_equal(y[-9:, HEAD].astype(np.float32), 0)
    np.testing.assert_array_equal(states[-3, HEAD], old[0])
    assert not states[:3].any()


@pytest.mark.parametrize("segments", [False, True])
def test_rows_at_the_far_end(segments):
    """Very many short ones, of which the last is run."""
    rng, length = np.random.default_rng(2), 64
    rows = TOKENS // length
    tokens, states = tokens_of(rng, rows, length), None
    ids = np.zeros((rows, length), np.int32) if segments else None
    states = sparse((rows, HEADS, DIM, SIZE), FLOAT32)
    states[-1, HEAD] = rng.standard_normal((DIM, SIZE))
    operands = SSDOperands(*tokens, None, states, jnp.asarray(ids) if segments else ids)
    spec = SSDSpec(64, final_state=True)
    tile = ssd_launches.tile_of("ssd", spec, operands, stretch=0, chunk=64)
    choose = programs_for((), (rows - 1,), (), (rows - 1,))
    where = {"y": slice(-length, None), "sums": (-1, HEAD), "states": (-1, HEAD)}
    y, final = record.run(launch_ssd.dense(spec, operands, tile), caller(choose, where))
    in_row = operands._replace(
        **{name: getattr(operands, name)[-1] for name in ("x", "dt", "B", "C")}
    )
    check(in_row, slice(None), states[-1, HEAD], y[-1, :, HEAD], final[-1, HEAD])


def gradient_programs(launch):
    """Those of the last row, whose only group has two tiles, for the last head."""
    C, row = launch.constants, launch.inputs.rows - 1
    groups, pairs = C.G, range(3)
    blocks = -(-C.H // C.H_BLOCK)
    finish = -(-C.H // C.FINISH_HEADS)
    before = {
        "backward_prepare_kernel": 2 * (row + 1) * blocks,
        "backward_finish_kernel": (row + 1) * groups * 4,
    }
    name = launch.kernel.fn.__name__
    head, group = row * C.H + HEAD, row * groups + GROUP
    own = {
        "backward_prepare_kernel": [
            *((2 * row + tile) * blocks + blocks - 1 for tile in range(2)),
            *(before.get(name, 0) + group * 3 + pair for pair in pairs),
        ],
        "backward_states_kernel": [(2 * row + back) * C.H + HEAD for back in range(2)],
        "backward_tokens_kernel": [head * 2 + tile for tile in range(2)],
        "backward_pairs_kernel": [group * 3 + pair for pair in pairs],
        "backward_heads_kernel": [group * 5 + kind for kind in range(5)],
        "backward_finish_kernel": [
            *(group * 4 + i for i in range(4)),
            *(
                before.get(name, 0) + (2 * row + tile) * finish + finish - 1
                for tile in range(2)
            ),
        ],
    }
    return own[name]


def test_gradients_at_the_far_end():
    rng, length = np.random.default_rng(3), 32
    rows = TOKENS // length
    tokens = tokens_of(rng, rows, length)
    states = sparse((rows, HEADS, DIM, SIZE), FLOAT32)
    dfinal = sparse(states.shape, FLOAT32)
    dy = sparse(tokens[0].shape, BFLOAT16)
    for array, part in ((states, (-1, HEAD)), (dfinal, (-1, HEAD))):
        array[part] = rng.standard_normal(array[part].shape)
    dy[-1, :, HEAD] = rng.standard_normal((length, DIM))
    x, dt, A, B, C, D = tokens
    operands = SSDBackwardOperands(
        *(x, dt, A, B, C, D), states=states, dy=dy, dfinal=dfinal
    )
    spec = SSDSpec(16, dt_softplus=True)
    tile = gradients.tile_of(operands, chunk=16, tiles=2, item_block=HEADS // GROUPS)

    def call(launch):
        inputs = replaced(launch.inputs, map(np.asarray, arrays(launch.inputs)))
        fresh = [sparse(out.shape, out.dtype) for out in arrays(launch.outputs)]
        outputs = replaced(launch.outputs, fresh)
        guard.run_programs(launch, inputs, outputs, gradient_programs(launch))
        return guard.results_of(launch, inputs, outputs)

    results = record.run(launch_ssd_backward.backward(spec, operands, tile), call)
    dx, ddt, dA, dB, dC, dbias, dD, dstates = results
    last = slice(HEAD, None)
    want = reference.gradients(
        *(x[-1, :, last], dt[-1, :, last], A[last], B[-1, :, GROUP:]),
        *(C[-1, :, GROUP:], D[last], np.zeros(1), states[-1, last]),
        *(dy[-1, :, last], dfinal[-1, last]),
    )
    got = {
        "x": dx[-1, :, last],
        "dt": ddt[-1, :, last],
        "A": dA[last],
        "B": dB[-1, :, GROUP:],
        "C": dC[-1, :, GROUP:],
        "D": np.asarray(dD)[last].sum(1),
        "dt_bias": dbias[last],
        "state": dstates[-1, last],
    }
    for name, array in got.items():
        scale = abs(want[name]).max()
        assert scale > 0
        error = abs(array.astype(np.float64) - want[name]).max()
        assert error < 1e-2 * scale, name
