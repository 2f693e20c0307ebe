"""`channel_offset` and `split`: the conv between its neighbours, without a copy.

The op on columns of a wider x, its output in parts, is the plain op with slices around
it, bit for bit where a kernel computes it (XLA:CPU need not compute the same in two
programs). What lies beside the columns in x is NaN in all these tests, so it is seen as
well that it reaches nothing.
"""

import functools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_causal_conv as jcc
from benchmarks import machine_code
from jax_causal_conv.columns import Columns
from jax_causal_conv.op import ops
from jax_causal_conv.operands import (
    ConvSpec,
    DenseOperands,
    PackedBackwardOperands,
    PackedOperands,
    RowsBackwardOperands,
    UpdateOperands,
)
from tests.support import checks, gpu_compiler, quick
from tests.support.gpu_compiler import Program

WIDTH, STATE_LEN = 4, 5
OFFSETS = np.array([1, 9, 9, 30, 34], np.int32)
SLOTS = np.array([3, 0, 1, -1], np.int32)
SEEN = np.array([True, False, True, True])
REJECTED = np.array([1, 0, 2, 0], np.int32)
IDS = np.repeat([[3, 3, 1, -1, 2], [-1, 0, 0, 5, -1]], 5, axis=1).astype(np.int32)


def packed(x, weight, bias, states, **columns):
    return jcc.causal_conv1d_fn(
        x,
        weight,
        bias,
        states,
        OFFSETS,
        cache_indices=SLOTS,
        has_initial_state=SEEN,
        num_rejected_tokens=REJECTED,
        **columns,
    )


def update(x, weight, bias, states, **columns):
    return jcc.causal_conv1d_update(
        x, states, weight, bias, "silu", conv_state_indices=SLOTS, **columns
    )


def circular(x, weight, bias, states, **columns):
    x = x[:, 0]  # (B, D)
    position = np.array([7, 0, -3, 2], np.int32)
    return jcc.causal_conv1d_update(
        x, states, weight, bias, cache_seqlens=position, **columns
    )


def dense(x, weight, bias, states, **columns):
    return jcc.causal_conv1d(
        x,
        weight,
        bias,
        initial_state=states,
        segment_ids=IDS,
        activation="silu",
        return_final_state=True,
        **columns,
    )


# Rows of x, and slots.
OPS = {
    packed: ((37,), 5),
    update: ((4, 3), 5),
    circular: ((4, 2), 4),
    dense: ((2, 25), 2),
}
# Channels before those of the conv, split, channels behind, dtype. In the kernels a
# block is at most 128 or 256 channels: parts of several blocks, and of one channel.
LAYOUTS = {
    "odd": (7, (1, 130, 169), 4, "float32"),
    "aligned": (8, (264, 8, 16), 16, "bfloat16"),
    "offset alone": (3, None, 0, "float32"),
    "split alone": (None, (5, 15), None, "float16"),
    "a single part": (0, (9,), 1, "bfloat16"),
    "more parts than a kernel writes": (5, (3, 1, 7, 1, 8), 2, "float32"),
}
CASES = [
    (packed, "odd"),
    (packed, "split alone"),
    (update, "aligned"),
    (update, "more parts than a kernel writes"),
    (circular, "offset alone"),
    (dense, "odd"),
    (dense, "a single part"),
]


class Drawn:
    """Operands of an op in a layout, their columns' options, and the plain way."""

    def __init__(self, op, layout, seed=0):
        self.op = op
        before, self.split, behind, dtype = LAYOUTS[layout]
        rows, slots = OPS[op]
        self.dim = sum(self.split) if self.split else 20
        self.offset, sides = before, (before or 0, behind or 0)
        rng = np.random.default_rng([seed, self.dim, sum(sides)])

        def normal(*shape):
            return jnp.asarray(rng.standard_normal(shape), dtype)

        x = normal(*rows, self.dim)
        sides = [(0, 0)] * len(rows) + [sides]
        x = jnp.pad(x, sides, constant_values=np.nan)
        self.operands = (
            x,
            normal(self.dim, WIDTH),
            normal(self.dim),
            normal(slots, STATE_LEN, self.dim),
        )

    def call(self, *operands, **options):
        """Outputs as a list, and states, by the arguments under test."""
        columns = {"channel_offset": self.offset, "split": self.split}
        out, states = self.op(*operands, **columns, **options)
        if self.split is None:
            return [out], states
        assert isinstance(out, tuple)
        return list(out), states

    def around(self, x, *operands, **options):
        """The same by slices around the plain op."""
        out, states = self.op(self.cut(x), *operands, **options)
        if self.split is None:
            return [out], states
        return jnp.split(out, np.cumsum(self.split)[:-1], axis=-1), states

    def cut(self, x):
        first = self.offset or 0
        return x[..., first : first + self.dim]


def all_of(function, operands):
    """Results, and gradients of random cotangents."""

    def run(operands, cotangents):
        results, pullback = jax.vjp(function, *operands)
        return results, pullback(cotangents)

    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(function, *operands)
    cotangents = jax.tree.map(
        lambda s: jnp.asarray(rng.standard_normal(s.shape), s.dtype), shapes
    )
    return checks.to_host(quick.jit(run)(operands, cotangents))


def assert_equal(got, want, exact, what):
    """Bit for bit, or but for the order in which XLA rounds."""
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        if exact:
            checks.assert_same_bits(one, other, what)
            continue
        assert (one.shape, one.dtype) == (other.shape, other.dtype), what
        size = 1 + np.abs(other.astype(np.float64)).max(initial=0)
        eps = max(jnp.finfo(one.dtype).eps, 8 * jnp.finfo(np.float32).eps)
        error = float(eps) * size
        wide = one.astype(np.float64), other.astype(np.float64)
        np.testing.assert_allclose(*wide, 0, error, err_msg=what)


@pytest.mark.parametrize("op, layout", CASES)
def test_equals_slices_around_the_plain_call(op, layout, implementation):
    drawn = Drawn(op, layout)
    options = {"implementation": implementation}
    call = functools.partial(drawn.call, **options)
    got, gradients = all_of(call, drawn.operands)
    around = functools.partial(drawn.around, **options)
    want, expected = all_of(around, drawn.operands)
    kernel = implementation in ("interpret", "triton")
    (out, states), (want_out, want_states) = got, want
    assert_equal(states, want_states, True, "states")
    assert_equal(out, want_out, kernel, "out")
    dx = gradients[0]
    assert dx.shape == drawn.operands[0].shape
    foreign = np.isnan(np.asarray(drawn.operands[0], np.float32))
    assert not np.any(dx[foreign]), "a gradient beside the conv's columns"
    names = ("dx", "dweight", "dbias", "dstates")
    for name, one, other in zip(names, gradients, expected, strict=True):
        assert_equal(one, other, kernel, name)


@pytest.mark.parametrize("op, layout", [(packed, "aligned"), (dense, "odd")])
def test_vmap_equals_slices_around_the_plain_call(op, layout):
    drawn = [Drawn(op, layout, seed) for seed in range(2)]
    batch = jax.tree.map(lambda *a: jnp.stack(a), *(d.operands[::3] for d in drawn))
    weight, bias = drawn[0].operands[1:3]

    def mapped(function):
        each = jax.vmap(lambda x, states: function(x, weight, bias, states))
        return checks.to_host(quick.jit(each)(*batch))

    got, want = mapped(drawn[0].call), mapped(drawn[0].around)
    assert_equal(got, want, False, "result")


@pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="XLA:CPU before jax 0.11 copies a cache that it reads and updates",
)
@pytest.mark.parametrize("op", [packed, update])
def test_donated_states_are_not_copied(op):
    drawn = Drawn(op, "aligned")
    x, weight, bias, states = drawn.operands
    states = jnp.zeros((4096, *states.shape[1:]), jnp.float32)
    jitted = jax.jit(drawn.call, donate_argnums=3)
    compiled = jitted.lower(x, weight, bias, states).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == states.nbytes
    assert memory.temp_size_in_bytes < states.nbytes / 4


def test_exported_for_two_platforms():
    drawn = Drawn(update, "odd")
    call = quick.jit(drawn.call)
    platforms = ("cpu", "cuda") if gpu_compiler.missing_for_kernels() is None else None
    exported = jax.export.export(
        call,
        platforms=platforms,
        disabled_checks=[
            jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call"),
            jax.export.DisabledSafetyCheck.custom_call("triton_kernel_call_ffi"),
        ],
    )(*drawn.operands)
    got, want = exported.call(*drawn.operands), call(*drawn.operands)
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        checks.assert_same_bits(np.asarray(one), np.asarray(other))


def zeros(*shape):
    return np.zeros(shape, np.float32)


def test_nothing_to_do_gives_naturally_shaped_parts():
    weight, states, columns = zeros(9, 4), zeros(3, 3, 9), {"split": (2, 3, 4)}
    columns["channel_offset"] = 5
    offsets = np.zeros(1, np.int32)
    calls = (
        (jcc.causal_conv1d_fn, (zeros(0, 20), weight, None, states, offsets), (0,)),
        (jcc.causal_conv1d_update, (zeros(0, 2, 20), states, weight), (0, 2)),
        (jcc.causal_conv1d, (zeros(2, 0, 20), weight), (2, 0)),
    )
    for op, arguments, rows in calls:
        if op is jcc.causal_conv1d:
            columns["return_final_state"] = True
        out, last = op(*arguments, **columns)
        assert [part.shape for part in out] == [(*rows, size) for size in (2, 3, 4)]
        assert last.shape[1:] == (3, 9)


ARGUMENTS = {
    jcc.causal_conv1d_fn: {
        "x": zeros(24, 40),
        "weight": zeros(16, 4),
        "bias": None,
        "conv_states": zeros(6, 5, 16),
        "query_start_loc": np.zeros(4, np.int32),
    },
    jcc.causal_conv1d_update: {
        "x": zeros(3, 40),
        "weight": zeros(16, 4),
        "conv_state": zeros(6, 5, 16),
    },
    jcc.causal_conv1d: {"x": zeros(2, 24, 40), "weight": zeros(16, 4)},
}
TRACED = "a traced value"
ERRORS = [
    ({}, ValueError, ["weight", "(D, W)", "40", "(16, 4)"]),
    ({"channel_offset": -1}, ValueError, ["channel_offset", "0", "-1"]),
    ({"channel_offset": 25}, ValueError, ["channel_offset", "40", "25", "16"]),
    ({"channel_offset": 2**40}, ValueError, ["channel_offset", "40", str(2**40)]),
    ({"channel_offset": 1.0}, TypeError, ["channel_offset", "1.0"]),
    ({"channel_offset": True}, TypeError, ["channel_offset", "True"]),
    ({"channel_offset": TRACED}, TypeError, ["channel_offset", "static"]),
    ({"channel_offset": 4, "weight": None}, TypeError, ["weight", "None"]),
    ({"channel_offset": 4, "weight": zeros(16)}, ValueError, ["weight", "(16,)"]),
    ({"channel_offset": 4, "split": (8, 9)}, ValueError, ["split", "16", "(8, 9)"]),
    ({"channel_offset": 4, "split": ()}, ValueError, ["split", "16", "()"]),
    ({"channel_offset": 4, "split": (16, 0)}, ValueError, ["split", "1", "0"]),
    ({"channel_offset": 4, "split": (20, -4)}, ValueError, ["split", "1", "-4"]),
    ({"channel_offset": 4, "split": (8.0, 8)}, TypeError, ["split", "8.0"]),
    ({"channel_offset": 4, "split": 16}, TypeError, ["split", "tuple", "16"]),
    ({"channel_offset": 4, "split": "16"}, TypeError, ["split", "tuple", "16"]),
    ({"channel_offset": 4, "split": (TRACED,)}, TypeError, ["split", "static"]),
]


@pytest.mark.parametrize("op", ARGUMENTS, ids=lambda op: op.__name__)
@pytest.mark.parametrize("change, error, fragments", ERRORS, ids=str)
def test_wrong_columns(op, change, error, fragments):
    arguments = ARGUMENTS[op] | change

    def call(traced):
        def given(value):
            if isinstance(value, tuple):
                return tuple(map(given, value))
            return traced if value is TRACED else value

        return op(**{name: given(value) for name, value in arguments.items()})

    with pytest.raises(error) as caught:
        jax.eval_shape(call, jax.ShapeDtypeStruct((), jnp.int32))
    for fragment in fragments:
        assert fragment in str(caught.value), (fragment, str(caught.value))


# Memory safety: the columns of x, and every part, end where memory ends.


def kernel_calls(before, behind):
    """A call of every op of the conv: (op, columns, operands)."""
    rng = np.random.default_rng(4)
    split = (3, 130, 1)
    dim = sum(split)
    columns = Columns(before, split)

    def normal(*shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    def wide(*rows):
        return normal(*rows, before + dim + behind)

    filters = normal(dim, WIDTH), normal(dim)
    states, history = normal(5, STATE_LEN, dim), normal(4, WIDTH - 1, dim)
    live = np.array([True, False, True, True])
    dslots = normal(4, STATE_LEN, dim)
    packed_dy = tuple(normal(37, size) for size in split)
    rows_dy = tuple(normal(2, 25, size) for size in split)
    x = wide(37)
    index = OFFSETS, SLOTS, SEEN, REJECTED
    yield ops.PACKED, columns, PackedOperands(x, *filters, states, *index)
    update = UpdateOperands(
        wide(4, 3), *filters, states, slots=SLOTS, num_rejected=REJECTED
    )
    yield ops.UPDATE, columns, update
    backward = x, *filters, history, packed_dy, dslots, OFFSETS, live
    yield ops.PACKED_BACKWARD, columns, PackedBackwardOperands(*backward)
    x = wide(2, 25)
    yield ops.DENSE, columns, DenseOperands(x, *filters, states[:2], IDS)
    backward = x, *filters, history[:2], rows_dy, dslots[:2], None, IDS
    yield ops.ROWS_BACKWARD, columns, RowsBackwardOperands(*backward)


def check_guarded_launches():
    """What the child process runs: kernels on guarded memory, and on slices."""
    from jax_causal_conv.kernels import record
    from tests.support import guard

    arena = guard.Arena()
    for at, sides in (("end", (6, 0)), ("start", (0, 5))):
        for op, columns, given in kernel_calls(*sides):
            operands = jax.tree.map(jnp.asarray, given)
            launches = op.launches()(ConvSpec("silu", columns), operands)
            got = record.run(launches, guard.guarded_caller(arena, at))
            x = columns.of(operands.x, len(operands.weight))
            plain = operands._replace(x=x)
            if "dy" in operands._fields:
                plain = plain._replace(dy=(columns.joined(operands.dy),))
            launches = op.launches()(ConvSpec("silu"), plain)
            want = record.run(launches, guard.caller())
            if "dy" not in operands._fields:
                want = *columns.parts(jnp.asarray(want[0])), *want[1:]
            assert_equal(*map(checks.to_host, (got, want)), True, (op, at))


def test_kernels_touch_nothing_beside_their_columns_and_parts():
    pytest.importorskip("triton")
    command = (
        "from tests.conv import test_columns; test_columns.check_guarded_launches()"
    )
    child = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", command],
        check=False,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, child.stderr[-4000:]


# Machine code, for Mamba2-2.7B: columns z, x, B, C, dt in bfloat16.

D_INNER, D_STATE, HEADS = 5120, 128, 80
CHANNELS = D_INNER + 2 * D_STATE
PROJECTED = D_INNER + CHANNELS + HEADS
XBC = {"channel_offset": D_INNER, "split": (D_INNER, D_STATE, D_STATE)}
needs_kernels = pytest.mark.skipif(
    gpu_compiler.missing_for_kernels() is not None,
    reason=str(gpu_compiler.missing_for_kernels()),
)
needs_programs = pytest.mark.skipif(
    gpu_compiler.missing_for_programs() is not None,
    reason=str(gpu_compiler.missing_for_programs()),
)


def struct(*shape, dtype="bfloat16"):
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


FILTERS = struct(CHANNELS, WIDTH), struct(CHANNELS)


def mamba2_packed(x, weight, bias, states, offsets, slots, seen):
    return jcc.causal_conv1d_fn(
        x,
        weight,
        bias,
        states,
        offsets,
        cache_indices=slots,
        has_initial_state=seen,
        **XBC,
    )


def mamba2_update(x, weight, bias, states, slots):
    return jcc.causal_conv1d_update(
        x, states, weight, bias, "silu", conv_state_indices=slots, **XBC
    )


def mamba2_dense(x, weight, bias):
    return jcc.causal_conv1d(x, weight, bias, activation="silu", **XBC)


def batch_of(sequences):
    rows = struct(sequences, dtype="int32")
    return struct(sequences + 1, dtype="int32"), rows, struct(sequences, dtype="bool")


CODE = {
    "packed": (
        mamba2_packed,
        (struct(2048, PROJECTED), *FILTERS, struct(128, 3, CHANNELS), *batch_of(64)),
    ),
    "update": (
        mamba2_update,
        (
            *(struct(64, PROJECTED), *FILTERS),
            *(struct(128, 3, CHANNELS), struct(64, dtype="int32")),
        ),
    ),
    "dense": (mamba2_dense, (struct(2, 2048, PROJECTED), *FILTERS)),
}


@needs_kernels
@pytest.mark.parametrize("name", CODE)
def test_mamba2_columns_are_read_and_written_by_wide_accesses(name):
    """Of 4 channels a thread in loops over tokens, else of 8."""
    function, arguments = CODE[name]
    (code,) = machine_code.compile_kernels(function, arguments, 90)
    assert code.name == f"{name}_kernel"
    assert (code.spills, code.stack, code.local_accesses()) == (0, 0, 0)
    if (loop := code.steady_loop()) is not None:
        assert set(code.accesses("STG")) <= {8, 16}, code.accesses("STG")
        assert set(loop.accesses("STG")) == {8}, loop.accesses("STG")
        assert set(loop.accesses("LDG")) == {8}, loop.accesses("LDG")
        outputs = sum(loop.accesses("STG")) / 2
        assert len(loop.instructions) / outputs < 14
    else:  # but for the slot's number
        assert set(code.accesses("STG")) == {16}, code.accesses("STG")
        assert set(code.accesses("LDG")) == {16, 4}, code.accesses("LDG")


# Whole programs, compiled for GPUs.


def mixer(way):
    """A serving step of Mamba2's mixer, its SSD replaced by one chunk of it."""
    tokens = 256

    def step(u, in_proj, filters, states, batch, metadata, out_proj):
        offsets, slots, seen = batch
        projected = u @ in_proj
        x = projected if way == "columns" else projected[:, D_INNER:-HEADS]
        out, states = jcc.causal_conv1d_fn(
            x,
            *filters,
            states,
            offsets,
            cache_indices=slots,
            has_initial_state=seen,
            metadata=metadata,
            **(XBC if way == "columns" else {}),
        )
        if way != "columns":
            out = jnp.split(out, np.cumsum(XBC["split"])[:-1], axis=-1)
        x, b, c = out
        gate, dt = projected[:, :D_INNER], jax.nn.softplus(projected[:, -HEADS:])
        heads = x.reshape(tokens, HEADS, -1) * dt[..., None]
        y = jnp.einsum("ts,shp->thp", jnp.tril(c @ b.T), heads)
        return (y.reshape(x.shape) * jax.nn.silu(gate)) @ out_proj, states

    batch = batch_of(16)
    metadata = jax.eval_shape(lambda q: jcc.build_metadata(q, tokens), batch[0])
    arguments = (
        *(struct(tokens, 2560), struct(2560, PROJECTED), FILTERS),
        *(struct(2048, 3, CHANNELS), batch, metadata, struct(D_INNER, 2560)),
    )
    return Program(step, arguments, (3,), 1)


def sharded(what, kind):
    """The dense op, or its gradient, with rows sharded over four GPUs."""

    def loss(x, weight, bias):
        parts = mamba2_dense(x, weight, bias)
        return sum(jnp.square(part.astype(jnp.float32)).sum() for part in parts)

    function = mamba2_dense if what == "output" else jax.grad(loss, (0, 1, 2))
    rows = jax.sharding.PartitionSpec("gpu")
    whole = jax.sharding.PartitionSpec()
    arguments = (struct(4, 256, PROJECTED), *FILTERS)
    return Program(
        function,
        arguments,
        (),
        1,
        mesh={"gpu": 4},
        specs=(rows, whole, whole),
        explicit=kind == "explicit",
    )


SHARDED = ["sharded-output-automatic", "sharded-gradient-explicit"]


@pytest.fixture(scope="module")
def compiled():
    names = ["mixer-columns", "mixer-slices", *SHARDED]
    return gpu_compiler.compile_programs(__name__, names, donate=[True])


@needs_programs
def test_nothing_is_copied_between_projections_and_kernel(compiled):
    program = compiled["mixer-columns", True]
    around = compiled["mixer-slices", True]
    (kernel,) = program.kernels()
    x = kernel.text.split("custom-call(%")[1].split(",")[0]
    makers = [i.text for i in program.instructions if i.text.startswith(f"%{x} = ")]
    assert len(makers) == 1 and "dot" in makers[0], makers
    assert len(program.launches()) < len(around.launches())
    copies = [
        i.text[:200]
        for i in program.launches()
        if "wrapped_slice" in i.text or "concatenate" in i.text
    ]
    assert not copies, copies
    assert not program.cache_copies()
    assert program.alias_bytes == program.cache_bytes


@needs_programs
@pytest.mark.parametrize("name", SHARDED)
def test_sharded_rows_are_local(compiled, name):
    program = compiled[name, True]
    kernels = {"output": 1, "gradient": 2}[name.split("-")[1]]
    assert len(program.kernels()) == kernels
    assert all("bf16[1,256," in kernel.text for kernel in program.kernels())
    sums = [i for i in program.collectives() if not i.opcode.startswith("all-reduce")]
    assert not sums, [i.text[:200] for i in sums]
