"""What an op's record says of it is what its implementation in XLA does."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest

from jax_causal_conv.chunks import ConvMetadata
from jax_causal_conv.columns import Columns
from jax_causal_conv.op.ops import (
    DENSE,
    OPS,
    PACKED,
    PACKED_BACKWARD,
    ROWS_BACKWARD,
    SSD,
    SSD_BACKWARD,
    SSD_PACKED,
    SSD_REPLAY,
    UPDATE,
)
from jax_causal_conv.operands import ConvSpec, SSDSpec

pytestmark = pytest.mark.usefixtures("quick_compilation")

T, N, S, L, D, W, B, Q = 23, 5, 7, 6, 12, 4, 3, 2
H, P, G, K = 6, 5, 3, 7
SSD_OPS = (SSD, SSD_BACKWARD, SSD_PACKED, SSD_REPLAY)
CONV_OPS = tuple(op for op in OPS if op not in SSD_OPS)
COLUMNS = (Columns(), Columns(5), Columns(split=(4, 8)), Columns(5, (4, 4, 4)))
DTYPES = (jnp.float32, jnp.bfloat16)


def array(*shape, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(shape, dtype)


def operands_of(op, x_dtype, state_dtype, columns, optional: bool):
    """The operands of an op: with every optional array, or with none."""
    wide = D if columns.offset is None else D + columns.offset + 3
    ints = functools.partial(array, dtype=jnp.int32)
    bools = functools.partial(array, dtype=jnp.bool_)
    rows = {PACKED: (T,), PACKED_BACKWARD: (T,), UPDATE: (B, Q)}.get(op, (B, T))
    x = array(*rows, wide, dtype=x_dtype)
    dy = tuple(array(*rows, size, dtype=x_dtype) for size in columns.sizes(D))
    states, chunks = array(S, L, D, dtype=state_dtype), ints(4)
    every = {
        PACKED: {
            "states": states,
            "query_start_loc": ints(N + 1),
            "slots": ints(N),
            "has_initial_state": bools(N),
            "num_rejected": ints(N),
            "metadata": ConvMetadata(chunks, chunks, 8),
            "write_slots": ints(N),
            "snapshot_slots": ints(N),
            "snapshot_ends": ints(N),
        },
        UPDATE: {
            "states": states,
            "slots": ints(B),
            "cache_seqlens": ints(B),
            "num_rejected": ints(B),
            "write_slots": ints(B),
        },
        DENSE: {
            "states": array(B, L, D, dtype=state_dtype),
            "segment_ids": ints(B, T),
        },
        PACKED_BACKWARD: {
            "history": array(N, W - 1, D, dtype=state_dtype),
            "dy": dy,
            "dslots": array(N, L, D, dtype=state_dtype),
            "query_start_loc": ints(N + 1),
            "live": bools(N),
            "metadata": ConvMetadata(chunks, chunks, 8),
            "dsnapshots": array(N, L, D, dtype=state_dtype),
            "snapshot_ends": ints(N),
        },
        ROWS_BACKWARD: {
            "history": array(B, W - 1, D, dtype=state_dtype),
            "dy": dy,
            "dslots": array(B, L, D, dtype=state_dtype),
            "live": bools(B),
            "segment_ids": ints(B, T),
        },
    }[op]
    needed = {"history", "dy", "query_start_loc"}
    if op in (PACKED, UPDATE):
        needed.add("states")
    if op is PACKED_BACKWARD:
        needed |= {"live", "dslots"}
    if op is UPDATE:  # rows that are rolled back are in no circular buffer
        every.pop("num_rejected")
    if not optional:
        every = {name: every[name] for name in every if name in needed}
    fields = dict.fromkeys(type(op.dims)._fields) | every
    weight = array(D, W, dtype=x_dtype)
    bias = array(D, dtype=jnp.float32) if optional else None
    return type(op.dims)(**fields | {"x": x, "weight": weight, "bias": bias})


def ssd_operands(op, x_dtype, state_dtype, optional: bool):
    packed = op in (SSD_PACKED, SSD_REPLAY)
    rows = (T,) if packed else (B, T)
    groups = array(*rows, G, K, dtype=x_dtype)
    needed = {
        "x": array(*rows, H, P, dtype=x_dtype),
        "dt": array(*rows, H, dtype=jnp.float32),
        "A": array(H, dtype=jnp.float32),
        "B": groups,
        "C": groups,
    }
    options = {
        "D": array(H, P, dtype=jnp.float32),
        "dt_bias": array(H, dtype=x_dtype),
    }
    if op is SSD_BACKWARD:
        needed["dy"] = needed["x"]
        options["dfinal"] = array(B, H, P, K, dtype=state_dtype)
    if not packed:
        options["states"] = array(B, H, P, K, dtype=state_dtype)
        options["segment_ids"] = array(B, T)
    else:
        needed["states"] = array(S, H, P, K, dtype=state_dtype)
        needed["query_start_loc"] = array(N + 1)
        for name in ("slots", "write_slots", "snapshot_slots", "snapshot_ends"):
            options[name] = array(N)
        options["has_initial_state"] = array(N, dtype=jnp.bool_)
    if op is SSD_REPLAY:
        needed["recent_x"] = array(S, Q, H, P, dtype=x_dtype)
        needed["recent_dt"] = array(S, Q, H, dtype=jnp.float32)
        needed["recent_B"] = array(S, Q, G, K, dtype=state_dtype)
        options["num_rejected"] = array(N)
    fields = dict.fromkeys(type(op.dims)._fields) | needed
    return type(op.dims)(**fields | (options if optional else {}))


def shapes(results):
    return [(result.shape, result.dtype) for result in results]


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("op", SSD_OPS, ids=str)
def test_results_of_the_ssd_have_the_shapes_that_the_record_says(op, optional):
    for x_dtype, state_dtype in itertools.product(DTYPES, DTYPES):
        operands = ssd_operands(op, x_dtype, state_dtype, optional)
        for final in (False, True):
            spec = SSDSpec(8, max_prefills=2 * optional, final_state=final)
            done = jax.eval_shape(functools.partial(op.xla, spec), operands)
            assert shapes(op.result_shapes(spec, operands)) == shapes(done)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("columns", COLUMNS, ids=str)
@pytest.mark.parametrize("op", CONV_OPS, ids=str)
def test_results_have_the_shapes_that_the_record_says(op, columns, optional):
    for x_dtype, state_dtype in itertools.product(DTYPES, DTYPES):
        operands = operands_of(op, x_dtype, state_dtype, columns, optional)
        final = L if optional else W - 1
        for final_state_len in (None, final) if op is DENSE else (None,):
            spec = ConvSpec("silu", columns, final_state_len=final_state_len)
            said = op.result_shapes(spec, operands)
            done = jax.eval_shape(functools.partial(op.xla, spec), operands)
            assert shapes(said) == shapes(done)


def call_of(op):
    """A spec and operands of any op, with all that is optional."""
    if op in CONV_OPS:
        spec = ConvSpec("silu", final_state_len=L if op is DENSE else None)
        return spec, operands_of(op, *DTYPES, Columns(), optional=True)
    return SSDSpec(8, final_state=True), ssd_operands(op, *DTYPES, optional=True)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_every_dimension_has_a_name(op):
    spec, operands = call_of(op)
    for name, arrays, dims in zip(op.dims._fields, operands, op.dims, strict=True):
        for leaf in jax.tree.leaves(arrays):
            (names,) = set(jax.tree.leaves(dims))
            assert len(names.split()) == leaf.ndim, name
    results = op.result_shapes(spec, operands)
    assert len(results) == len(op.result_dims)
    for dims, result in zip(op.result_dims, results, strict=True):
        assert len(dims.split()) == len(result.shape)


@pytest.mark.parametrize("op", OPS, ids=str)
def test_tracing_for_kernels_runs_nothing_of_the_xla_implementation(op, monkeypatch):
    from jax_causal_conv.op import primitive

    def must_not_run(*_):
        raise AssertionError("the XLA implementation ran")

    spec, operands = call_of(op)
    monkeypatch.setitem(op.__dict__, "xla", must_not_run)
    run = functools.partial(primitive.run, op, "triton", spec)
    results = jax.eval_shape(run, operands)
    assert results[0].shape == operands.x.shape
