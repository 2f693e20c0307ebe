"""Arrays of more than 2**31 elements: the kernels are right at the far end.

The arrays lie on memory that the kernel reserves but does not back; only touched pages
cost anything. Of the millions of programs that such arrays would need, a handful is
chosen: those of sequences at the far end, of a late chunk of a long sequence, and the
last one that zeroes uncovered tokens.

The interpreter computes offsets in the dtypes of the compiled kernel, and numpy's int32
wraps like a GPU's. Only its loops count in Python integers, so here they are made to
count in int32 as well.
"""

import contextlib
import mmap
from unittest import mock

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton.runtime.interpreter import TensorHandle

from jax_causal_conv import build_metadata
from jax_causal_conv.kernels import (
    backward,
    dense,
    interpreter,
    launch,
    offsets,
    packed,
    record,
    rows,
    stores,
    tiles,
    update,
    walks,
)
from jax_causal_conv.kernels.entry import arrays, replaced
from jax_causal_conv.operands import (
    ConvSpec,
    DenseOperands,
    PackedOperands,
    RowsBackwardOperands,
    UpdateOperands,
)
from jax_causal_conv.xla import backward as xla_backward
from jax_causal_conv.xla import forward as xla
from tests.support import checks, guard, reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

KERNELS = (backward, dense, packed, update, offsets, rows, stores, walks)
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
ELEMENTS = 2**31
SILU = ConvSpec("silu")


def sparse(shape, dtype):
    """Zeros of any size that cost memory where they are written."""
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | guard.MAP_NORESERVE
    try:
        memory = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"no {size / 2**30:.0f} GiB of address space: {error}")
    return np.ndarray(shape, dtype, memory)


def resident_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * mmap.PAGESIZE


@pytest.fixture(autouse=True)
def memory_stays_sparse():
    before = resident_bytes()
    yield
    grown = (resident_bytes() - before) / 2**20
    assert grown < 512, f"the process grew by {grown:.0f} MiB"


def int32_range(*bounds):
    """`range` as compiled code has it: the loop variable is an int32 tensor."""
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


def in_place_caller(programs=None, *given):
    """A `Call` that runs some programs (None: all) on the arrays themselves.

    Outputs are `given` where they have to be sparse.
    """

    def call(wanted):
        chosen = range(wanted.grid) if programs is None else programs
        chosen = [program % wanted.grid for program in chosen]  # -1 is the last one
        inputs, like = wanted.inputs, arrays(wanted.outputs)
        inputs = replaced(inputs, map(np.asarray, arrays(inputs)))
        results = list(given) or [np.full(o.shape, np.nan, o.dtype) for o in like]
        for result, out in zip(results, like, strict=True):
            assert (result.shape, result.dtype) == (out.shape, out.dtype)
        outputs = replaced(wanted.outputs, results)
        guard.run_programs(wanted, inputs, outputs, chosen)
        return guard.results_of(wanted, inputs, outputs)

    return call


def programs_of(metadata, *pairs):
    """The programs that serve (sequence, chunk) pairs, one block of channels each."""
    seqs, chunks = metadata.chunk_seq.tolist(), metadata.chunk_offset.tolist()
    numbers = {pair: i for i, pair in enumerate(zip(seqs, chunks, strict=True))}
    return [numbers[pair] for pair in pairs]


def assert_outputs(got, want, width, what, residual=False):
    exact, magnitude = want
    checks.assert_output(got, exact, magnitude, width, "silu", what, residual)


def outputs_of(history, tokens, weight, bias, **options):
    exact = reference.convolve(history, tokens, weight, bias, "silu", **options)
    magnitude = reference.convolve(
        abs(history), abs(tokens), abs(weight), abs(bias), None, **options
    )
    return exact, magnitude


def parameters(rng, dim, width):
    weight = rng.standard_normal((dim, width)).astype(np.float32)
    return weight, rng.standard_normal(dim).astype(np.float32)


def normal(rng, shape):
    return rng.standard_normal(shape).astype(BFLOAT16)


@pytest.mark.parametrize(
    "elements, dilation",
    [(ELEMENTS, 1), (2 * ELEMENTS, 1), (ELEMENTS, 3)],
    ids=["2**31", "2**32", "dilated"],
)
def test_packed_tokens_at_the_far_end(elements, dilation):
    """Short and long sequences, covered and uncovered tokens behind 2**31 elements."""
    rng = np.random.default_rng(0)
    dim, width, block_m = 32, 4, 1 << 20
    reach = (width - 1) * dilation
    state_len, options = reach + 2, {"dilation": dilation, "residual": dilation > 1}
    tokens = elements // dim + 5000
    assert tokens * dim > elements
    x, out = (sparse((tokens, dim), BFLOAT16) for _ in range(2))
    weight, bias = parameters(rng, dim, width)
    states = normal(rng, (4, state_len, dim))
    old = states.copy()

    # Sequence 0 ends with a late chunk of 7 tokens; 1 and 2 are short; then 9 tokens
    # that nobody owns.
    long = (tokens - 100) // block_m * block_m + 7
    offsets = np.array([0, long, long + 3, tokens - 9], np.int32)
    slots = np.array([2, 0, 3], np.int32)
    seen = np.array([True, True, False])
    metadata = build_metadata(offsets, tokens, block_m=block_m)
    programs = programs_of(metadata, (0, long // block_m), (1, 0), (-1, 0))
    sample = slice(long - 7 - reach, tokens)
    x[sample] = normal(rng, x[sample].shape)
    out[sample] = np.nan

    call = in_place_caller(programs, out)
    operands = PackedOperands(
        x, weight, bias, states, offsets, slots, seen, metadata=metadata
    )
    record.run(launch.packed(ConvSpec("silu", **options), operands), call)

    first, short, residual = long - 7, slice(long, long + 3), dilation > 1
    want = outputs_of(x[first - reach : first], x[first:long], weight, bias, **options)
    what = "the last chunk of a long sequence"
    assert_outputs(out[first:long], want, width, what, residual)
    want = outputs_of(old[0], x[short], weight, bias, **options)
    assert_outputs(out[short], want, width, "a short sequence", residual)
    np.testing.assert_array_equal(out[-9:], 0)
    assert np.isnan(out[first - 3 : first].astype(np.float32)).all()
    want = np.concatenate([old[0], x[long : long + 3]])[-state_len:]
    checks.assert_same_bits(states[0], want)
    for untouched in (1, 2, 3):  # 2: program (0, 0) did not run
        checks.assert_same_bits(states[untouched], old[untouched])


def test_packed_uncovered_tokens_and_skipped_chunks_at_the_far_end():
    dim, block_m = 32, 1 << 20
    # The last block of uncovered tokens has 5 in the head and 2 in the tail, the last
    # chunk of the skipped sequence between them 3.
    head = ELEMENTS // dim // block_m * block_m + 5
    tail = head + block_m + 3
    tokens = tail + 2
    assert head * dim > ELEMENTS
    x, out = (sparse((tokens, dim), BFLOAT16) for _ in range(2))
    weight, bias = parameters(np.random.default_rng(1), dim, 4)
    states = np.ones((2, 3, dim), BFLOAT16)
    offsets = np.array([head, tail], np.int32)
    slots, seen = np.array([7], np.int32), np.array([True])  # no such slot: skipped
    metadata = build_metadata(offsets, tokens, block_m=block_m)
    programs = programs_of(metadata, (-1, (head + 2) // block_m), (0, 1))
    out[head - 6 : head + 1] = out[tail - 4 :] = np.nan
    call = in_place_caller(programs, out)
    operands = PackedOperands(
        x, weight, bias, states, offsets, slots, seen, metadata=metadata
    )
    record.run(launch.packed(SILU, operands), call)
    zeros = [*range(head - 5, head), *range(tail - 3, tokens)]
    np.testing.assert_array_equal(out[zeros].astype(np.float32), 0)
    assert np.isnan(out[[head - 6, head, tail - 4]].astype(np.float32)).all()
    np.testing.assert_array_equal(states.astype(np.float32), 1)


@pytest.mark.parametrize("elements", [ELEMENTS, 2 * ELEMENTS], ids=["2**31", "2**32"])
def test_packed_slots_at_the_far_end(elements):
    rng = np.random.default_rng(2)
    dim, width, state_len = 40, 4, 9
    slots_count = elements // (state_len * dim) + 3
    states = sparse((slots_count, state_len, dim), BFLOAT16)
    weight, bias = parameters(rng, dim, width)
    far = slots_count - 1
    states[far - 2 :] = normal(rng, (3, state_len, dim))
    old = states[far - 2 :].copy()
    x = normal(rng, (8, dim))
    offsets = np.array([0, 2, 5, 8], np.int32)
    slots = np.array([far, far - 1, slots_count], np.int32)
    seen, rejected = np.ones(3, bool), np.array([0, 4, 0], np.int32)
    operands = PackedOperands(x, weight, bias, states, offsets, slots, seen, rejected)
    out, states = record.run(launch.packed(SILU, operands), in_place_caller())
    shifted = reference.without_rejected(old[1], 4)
    assert_outputs(out[:2], outputs_of(old[2], x[:2], weight, bias), width, "slot -1")
    assert_outputs(
        out[2:5], outputs_of(shifted, x[2:5], weight, bias), width, "slot -2"
    )
    np.testing.assert_array_equal(out[5:].astype(np.float32), 0)
    checks.assert_same_bits(states[far], reference.shift_in(old[2], x[:2]))
    checks.assert_same_bits(states[far - 1], reference.shift_in(shifted, x[2:5]))
    checks.assert_same_bits(states[far - 2], old[0])
    # Where a product in 32 bits would land, if within the array at all.
    wrapped = far * state_len * dim % 2**32 // (state_len * dim)
    assert wrapped == far or not states[wrapped - 1 : wrapped + 2].any()


def test_states_move_between_far_slots():
    rng = np.random.default_rng(4)
    dim, width, state_len = 40, 4, 9
    slots_count = ELEMENTS // (state_len * dim) + 3
    states = sparse((slots_count, state_len, dim), BFLOAT16)
    weight, bias = parameters(rng, dim, width)
    far = slots_count - 1
    states[far] = normal(rng, (state_len, dim))
    old, x = states[far].copy(), normal(rng, (5, dim))

    def slot(number):
        return np.array([number], np.int32)

    operands = PackedOperands(
        *(x, weight, bias, states, np.array([0, 5], np.int32), slot(far)),
        has_initial_state=np.ones(1, bool),
        write_slots=slot(far - 1),
        snapshot_slots=slot(far - 2),
        snapshot_ends=slot(2),
    )
    record.run(launch.packed(SILU, operands), in_place_caller())
    checks.assert_same_bits(states[far], old)
    checks.assert_same_bits(states[far - 1], reference.shift_in(old, x))
    checks.assert_same_bits(states[far - 2], reference.shift_in(old, x[:2]))
    for seqlens in (None, slot(7)):
        operands = UpdateOperands(
            *(x[None], weight, bias, states, slot(far), seqlens),
            write_slots=slot(far - 2),
        )
        record.run(launch.update(SILU, operands), in_place_caller())
        want = reference.shift_in(old, x)
        if seqlens is not None:
            want = old.copy()
            want[[7, 8, 0, 1, 2]] = x
        checks.assert_same_bits(states[far - 2], want)
    checks.assert_same_bits(states[far], old)
    assert not states[:5].any()


@pytest.mark.parametrize("circular", [False, True])
@pytest.mark.parametrize("elements", [ELEMENTS, 2 * ELEMENTS], ids=["2**31", "2**32"])
def test_update_rows_and_slots_at_the_far_end(elements, circular):
    """x, out and the cache are all larger than 2**31 elements."""
    rng = np.random.default_rng(3)
    dim, width, state_len, query = 40, 4, 9, 5
    batch = elements // (query * dim) + 3
    slots_count = elements // (state_len * dim) + 3
    x, out = (sparse((batch, query, dim), BFLOAT16) for _ in range(2))
    states = sparse((slots_count, state_len, dim), BFLOAT16)
    slots, extra = (sparse((batch,), np.dtype("int32")) for _ in range(2))
    weight, bias = parameters(rng, dim, width)
    x[-3:], states[-3:] = normal(rng, x[-3:].shape), normal(rng, states[-3:].shape)
    out[-3:] = np.nan
    old, tokens = states[-3:].copy(), x[-3:].copy()
    slots[-3:] = slots_count - 1, -1, slots_count - 3
    extra[-3:] = 2**31 - 1, 0, 2  # positions, or rejected rows
    call = in_place_caller([-1, -2, -3], out)
    seqlens, rejected = (extra, None) if circular else (None, extra)
    operands = UpdateOperands(x, weight, bias, states, slots, seqlens, rejected)
    record.run(launch.update(SILU, operands), call)
    want_out, want = reference.causal_conv1d_update(
        tokens,
        old,
        weight,
        bias,
        "silu",
        cache_seqlens=extra[-3:] if circular else None,
        conv_state_indices=[2, -1, 0],
        num_rejected_tokens=None if circular else extra[-3:],
    )
    magnitude, _ = reference.causal_conv1d_update(
        abs(tokens),
        abs(old),
        abs(weight),
        abs(bias),
        None,
        cache_seqlens=extra[-3:] if circular else None,
        conv_state_indices=[2, -1, 0],
        num_rejected_tokens=None if circular else extra[-3:],
    )
    assert_outputs(out[-3:], (want_out, magnitude), width, f"circular={circular}")
    checks.assert_same_bits(states[-3:], want)
    assert not states[:5].any()


@pytest.mark.parametrize("circular", [False, True])
def test_a_row_of_more_than_two_to_the_31_inputs(circular):
    """Q * D of one request does not fit in int32; more inputs than rows of the slot."""
    rng = np.random.default_rng(5)
    width, state_len, dim, query = 4, 9, 1 << 27, 24
    assert query * dim > ELEMENTS
    update_wide_row(rng, width, state_len, dim, query, circular)


def test_a_weight_of_more_than_two_to_the_31_elements():
    rng = np.random.default_rng(6)
    width, state_len, dim = 8, 7, 300_000_000
    assert width * dim > ELEMENTS > state_len * dim
    update_wide_row(rng, width, state_len, dim, 1, circular=False)


@pytest.mark.parametrize("circular", [False, True])
def test_a_slot_of_almost_two_to_the_31_elements(circular):
    """L * D just fits in int32."""
    rng = np.random.default_rng(4)
    width, state_len = 4, 7
    update_wide_row(rng, width, state_len, (2**31 - 1) // state_len, 1, circular)


def update_wide_row(rng, width, state_len, dim, query, circular):
    """Decodes the last of two requests, in the last block of channels."""
    filters = tiles.Filters(dim, width, itemsize=2, alignment=dim)
    block_n = tiles.update(filters, state_len, query, batch=2).block_n
    blocks = -(-dim // block_n)
    last = slice((blocks - 1) * block_n, dim)
    x, out = (sparse((2, query, dim), BFLOAT16) for _ in range(2))
    states = sparse((2, state_len, dim), BFLOAT16)
    weight, bias = sparse((dim, width), BFLOAT16), sparse((dim,), BFLOAT16)
    for array in (weight, bias, *x[1], *states[1]):
        array[last] = normal(rng, array[last].shape)
    tokens, old = x[1:, :, last].copy(), states[1:, :, last].copy()
    out[:, :, last] = np.nan
    positions = np.array([0, 6], np.int32) if circular else None
    call = in_place_caller([-1], out)
    operands = UpdateOperands(x, weight, bias, states, cache_seqlens=positions)
    record.run(launch.update(SILU, operands), call)
    ring = {"cache_seqlens": [6]} if circular else {}
    exact, want = reference.causal_conv1d_update(
        tokens, old, weight[last], bias[last], "silu", **ring
    )
    magnitude, _ = reference.causal_conv1d_update(
        abs(tokens), abs(old), abs(weight[last]), abs(bias[last]), None, **ring
    )
    assert_outputs(out[1:, :, last], (exact, magnitude), width, "the last request")
    checks.assert_same_bits(states[1:, :, last], want)
    assert not states[0, :, last].any()
    assert np.isnan(out[0, :, last].astype(np.float32)).all()


@pytest.mark.parametrize(
    "segments, dilation", [(False, 1), (True, 1), (False, 3)], ids=str
)
def test_dense_tokens_at_the_far_end(segments, dilation):
    """The last chunk of the second row, forward and backward."""
    rng = np.random.default_rng(7)
    dim, width, tail = 32, 4, 200
    reach = (width - 1) * dilation
    spec = ConvSpec("silu", dilation=dilation, residual=dilation > 1)
    length = ELEMENTS // dim // 2 + 1064  # 40 rows in the last chunk of both kernels
    assert 2 * length * dim > ELEMENTS
    x, dy, out, dx = (sparse((2, length, dim), BFLOAT16) for _ in range(4))
    weight, bias = parameters(rng, dim, width)
    history = normal(rng, (2, reach, dim))
    ids = None
    if segments:
        ids = sparse((2, length), np.dtype("int32"))
        ids[:, -tail:] = rng.integers(-1, 2, tail)
    for array in (x, dy):
        array[1, -tail:] = normal(rng, (tail, dim))
    out[1, -tail:] = dx[1, -tail:] = np.nan
    end = slice(1, 2), slice(-tail, None)  # the same, of a row that is short
    short = None if ids is None else ids[end]

    operands = DenseOperands(x, weight, bias, segment_ids=ids)
    record.run(launch.dense(spec, operands), in_place_caller([-1], out))
    operands = DenseOperands(x[end], weight, bias, segment_ids=short)
    (want,) = xla.dense(spec, jax.tree.map(jnp.asarray, operands))
    written = ~np.isnan(out[1, -tail:].astype(np.float32)).all(axis=1)
    rows = np.flatnonzero(written)
    assert 0 < len(rows) < tail - 10
    assert rows.tolist() == list(range(tail - len(rows), tail))
    assert_near(out[1, -tail:][rows], want[0][rows])

    filters = tiles.Filters(dim, width, itemsize=2, alignment=dim)
    plain = ids is None
    chunks = -(-length // tiles.rows_backward(filters, dim, 2, length, plain).block_m)
    partial = sparse((2 * chunks, width + 1, dim), np.dtype("float32"))
    dhistory = np.zeros((2, reach, dim), np.float32)
    call = in_place_caller([-1], dx, dhistory, partial)
    operands = RowsBackwardOperands(x, weight, bias, history, (dy,), segment_ids=ids)
    _, dweight, dbias, _ = record.run(launch.rows_backward(spec, operands), call)

    def expected():
        operands = RowsBackwardOperands(
            x[end], weight, bias, history[1:], (dy[end],), segment_ids=short
        )
        return xla_backward.rows_backward(spec, jax.tree.map(jnp.asarray, operands))

    want = expected()
    assert_near(dx[1, -tail:][rows], want[0][0][rows])
    assert np.isnan(dx[1, -tail:][: rows[0]].astype(np.float32)).all()
    dy[1, -tail : -len(rows)] = 0  # the sums are those of this program's own tokens
    want = expected()
    np.testing.assert_allclose(dweight, want[1], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(dbias, want[2], rtol=1e-3, atol=1e-3)


def assert_near(got, want):
    got, want = np.asarray(got, np.float32), np.asarray(want, np.float32)
    np.testing.assert_allclose(got, want, rtol=2e-2, atol=2e-2)
