"""Every wrong rank, size, dtype, option and combination, one row each.

The call must raise at trace time, and the message must name the argument, say what was
got and what was expected.
"""

import jax
import numpy as np
import pytest

from jax_causal_conv import (
    ConvMetadata,
    build_metadata,
    causal_conv1d_fn,
    causal_conv1d_update,
    layer_slots,
    target_compute_capability,
    validate_batch,
    varlen_conv_states,
)
from tests.support.errors import NO_FLOATS, NO_INTEGERS, array, raises, shape_id

f32, i32 = np.float32, np.int32


# Sizes that differ from each other: T=24, N=3, S=6, D=16, W=4, L=5, B=3, Q=2.
PACKED = {
    "x": array(24, 16),
    "weight": array(16, 4),
    "bias": array(16),
    "conv_states": array(6, 5, 16),
    "query_start_loc": array(4, dtype=i32),
    "cache_indices": array(3, dtype=i32),
    "has_initial_state": array(3, dtype=bool),
    "num_rejected_tokens": array(3, dtype=i32),
}
UPDATE = {
    "x": array(3, 2, 16),
    "conv_state": array(6, 5, 16),
    "weight": array(16, 4),
    "bias": array(16),
    "conv_state_indices": array(3, dtype=i32),
}
VARLEN = {
    "x": array(24, 16),
    "query_start_loc": array(4, dtype=i32),
    "state_len": 5,
    "conv_states": array(6, 5, 16),
    "cache_indices": array(3, dtype=i32),
    "has_initial_state": array(3, dtype=bool),
    "num_rejected_tokens": array(3, dtype=i32),
    "ends": array(3, dtype=i32),
}


def test_unchanged_arguments_of_the_tables_are_fine():
    out, states = jax.eval_shape(lambda kw: causal_conv1d_fn(**kw), PACKED)
    assert (out.shape, states.shape) == ((24, 16), (6, 5, 16))
    out, states = jax.eval_shape(lambda kw: causal_conv1d_update(**kw), UPDATE)
    assert (out.shape, states.shape) == ((3, 2, 16), (6, 5, 16))
    assert varlen_conv_states(**VARLEN).shape == (3, 5, 16)


# argument, wrong value, error, and what its message must contain beside the name
PACKED_SHAPES = [
    ("x", array(24), ["(T, D)", "(24,)"]),
    ("x", array(1, 24, 16), ["(T, D)", "(1, 24, 16)"]),
    ("weight", array(16), ["(D, W)", "(16,)"]),
    ("weight", array(16, 1, 4), ["(D, W)", "(16, 1, 4)"]),
    ("weight", array(4, 16), ["(D, W)", "16", "(4, 16)"]),
    ("weight", array(16, 0), ["(D, W)", "(16, 0)"]),
    ("bias", array(16, 1), ["(D,)", "16", "(16, 1)"]),
    ("bias", array(15), ["(D,)", "16", "(15,)"]),
    ("bias", array(), ["(D,)", "16", "()"]),
    ("conv_states", array(5, 16), ["(S, L, D)", "(5, 16)"]),
    ("conv_states", array(6, 16, 5), ["(S, L, D)", "16", "(6, 16, 5)"]),
    ("conv_states", array(6, 2, 16), ["L", "3", "(6, 2, 16)"]),
    ("query_start_loc", array(dtype=i32), ["(N+1,)", "()"]),
    ("query_start_loc", array(2, 4, dtype=i32), ["(N+1,)", "(2, 4)"]),
    ("query_start_loc", array(0, dtype=i32), ["(N+1,)", "(0,)"]),
    ("cache_indices", array(4, dtype=i32), ["(N,)", "3", "(4,)"]),
    ("cache_indices", array(3, 1, dtype=i32), ["(N,)", "3", "(3, 1)"]),
    ("cache_indices", array(dtype=i32), ["(N,)", "3", "()"]),
    ("has_initial_state", array(4, dtype=bool), ["(N,)", "3", "(4,)"]),
    ("has_initial_state", array(1, 3, dtype=bool), ["(N,)", "3", "(1, 3)"]),
    ("num_rejected_tokens", array(2, dtype=i32), ["(N,)", "3", "(2,)"]),
    ("num_rejected_tokens", array(3, 3, dtype=i32), ["(N,)", "3", "(3, 3)"]),
]
UPDATE_SHAPES = [
    ("x", array(16), ["(B, D)", "(B, Q, D)", "(16,)"]),
    ("x", array(1, 3, 2, 16), ["(B, D)", "(B, Q, D)", "(1, 3, 2, 16)"]),
    ("x", array(3, 2, 15), ["16", "15"]),
    ("conv_state", array(5, 16), ["(S, L, D)", "(5, 16)"]),
    ("conv_state", array(6, 16, 5), ["(S, L, D)", "16", "(6, 16, 5)"]),
    ("conv_state", array(6, 2, 16), ["L", "3", "(6, 2, 16)"]),
    ("weight", array(16), ["(D, W)", "(16,)"]),
    ("weight", array(4, 16), ["(D, W)", "16", "(4, 16)"]),
    ("weight", array(16, 0), ["(D, W)", "(16, 0)"]),
    ("bias", array(15), ["(D,)", "16", "(15,)"]),
    ("conv_state_indices", array(4, dtype=i32), ["(B,)", "3", "(4,)"]),
    ("conv_state_indices", array(3, 1, dtype=i32), ["(B,)", "3", "(3, 1)"]),
    ("cache_seqlens", array(4, dtype=i32), ["(B,)", "3", "(4,)"]),
    ("cache_seqlens", array(dtype=i32), ["(B,)", "3", "()"]),
    ("num_rejected_tokens", array(6, dtype=i32), ["(B,)", "3", "(6,)"]),
    ("num_rejected_tokens", array(3, 2, dtype=i32), ["(B,)", "3", "(3, 2)"]),
]
VARLEN_SHAPES = [
    ("x", array(24), ["(T, D)", "(24,)"]),
    ("query_start_loc", array(2, 2, dtype=i32), ["(N+1,)", "(2, 2)"]),
    ("query_start_loc", array(0, dtype=i32), ["(N+1,)", "(0,)"]),
    ("state_len", -1, ["0", "-1"]),
    ("conv_states", array(5, 16), ["(S, L, D)", "(5, 16)"]),
    ("conv_states", array(6, 5, 15), ["(S, L, D)", "16", "(6, 5, 15)"]),
    ("cache_indices", array(4, dtype=i32), ["(N,)", "3", "(4,)"]),
    ("has_initial_state", array(4, dtype=bool), ["(N,)", "3", "(4,)"]),
    ("num_rejected_tokens", array(2, dtype=i32), ["(N,)", "3", "(2,)"]),
    ("ends", array(4, dtype=i32), ["(N,)", "3", "(4,)"]),
]


@pytest.mark.parametrize("name, value, fragments", PACKED_SHAPES, ids=shape_id)
def test_wrong_shape_in_the_packed_op(name, value, fragments):
    fragments = [name, *fragments]
    raises(causal_conv1d_fn, PACKED, {name: value}, ValueError, fragments)


@pytest.mark.parametrize("name, value, fragments", UPDATE_SHAPES, ids=shape_id)
def test_wrong_shape_in_the_update_op(name, value, fragments):
    # x gives D: whether x or the others are wrong cannot be told from D alone.
    fragments = fragments if name == "x" else [name, *fragments]
    raises(causal_conv1d_update, UPDATE, {name: value}, ValueError, fragments)


@pytest.mark.parametrize("name, value, fragments", VARLEN_SHAPES, ids=shape_id)
def test_wrong_shape_in_varlen_conv_states(name, value, fragments):
    fragments = [name, *fragments]
    raises(varlen_conv_states, VARLEN, {name: value}, ValueError, fragments)


NO_BOOLS = [i32, np.uint8, f32]


def dtype_table(arguments):
    wrong = {"f": NO_FLOATS, "i": NO_INTEGERS, "b": NO_BOOLS}
    return [
        (name, value.astype(dtype))
        for name, value in arguments.items()
        if isinstance(value, np.ndarray)
        for dtype in wrong[value.dtype.kind]
    ]


def dtype_id(value):
    return str(value.dtype) if isinstance(value, np.ndarray) else None


@pytest.mark.parametrize("name, value", dtype_table(PACKED), ids=dtype_id)
def test_wrong_dtype_in_the_packed_op(name, value):
    fragments = [name, str(value.dtype)]
    raises(causal_conv1d_fn, PACKED, {name: value}, TypeError, fragments)


RING = {"cache_seqlens": array(3, dtype=i32)}
ROLLBACK = {"num_rejected_tokens": array(3, dtype=i32)}


@pytest.mark.parametrize(
    "name, value", dtype_table(UPDATE | RING | ROLLBACK), ids=dtype_id
)
def test_wrong_dtype_in_the_update_op(name, value):
    fragments = [name, str(value.dtype)]
    raises(causal_conv1d_update, UPDATE, {name: value}, TypeError, fragments)


@pytest.mark.parametrize("name, value", dtype_table(VARLEN), ids=dtype_id)
def test_wrong_dtype_in_varlen_conv_states(name, value):
    fragments = [name, str(value.dtype)]
    raises(varlen_conv_states, VARLEN, {name: value}, TypeError, fragments)


OPTIONS = [
    ({"activation": "elu"}, ValueError, ["activation", "elu", "silu", "swish"]),
    ({"dilation": 0}, ValueError, ["dilation", "0", "1"]),
    ({"dilation": 2.0}, TypeError, ["dilation", "2.0", "int"]),
    ({"dilation": 2}, ValueError, ["L >= (W-1) * dilation = 6"]),
    ({"dilation": 2**31}, ValueError, ["dilation must be at most", str(2**31)]),
    ({"residual": 1}, TypeError, ["residual", "True or False", "1"]),
    ({"activation": "SiLU"}, ValueError, ["activation", "SiLU", "silu"]),
    ({"activation": 3}, ValueError, ["activation", "3", "silu"]),
    (
        {"implementation": "cuda"},
        ValueError,
        ["implementation", "cuda", "xla", "triton", "interpret"],
    ),
    ({"implementation": True}, ValueError, ["implementation", "True", "xla"]),
    ({"pad_slot_id": 1.5}, TypeError, ["pad_slot_id", "1.5", "int"]),
    ({"pad_slot_id": None}, TypeError, ["pad_slot_id", "None", "int"]),
    ({"pad_slot_id": i32(3) * np.ones((), i32)}, TypeError, ["pad_slot_id", "int"]),
    ({"pad_slot_id": "pad"}, TypeError, ["pad_slot_id", "pad", "int"]),
]


@pytest.mark.parametrize(
    "function, arguments",
    [(causal_conv1d_fn, PACKED), (causal_conv1d_update, UPDATE)],
    ids=["fn", "update"],
)
@pytest.mark.parametrize("change, error, fragments", OPTIONS, ids=str)
def test_wrong_option(function, arguments, change, error, fragments):
    raises(function, arguments, change, error, fragments)


@pytest.mark.parametrize("name", ["x", "weight", "conv_states", "query_start_loc"])
def test_missing_array_in_the_packed_op(name):
    raises(causal_conv1d_fn, PACKED, {name: None}, TypeError, [name, "None"])


@pytest.mark.parametrize("name", ["x", "weight", "conv_state"])
def test_missing_array_in_the_update_op(name):
    raises(causal_conv1d_update, UPDATE, {name: None}, TypeError, [name, "None"])


def test_fewer_slots_than_sequences_need_cache_indices():
    few = {"conv_states": array(2, 5, 16), "cache_indices": None}
    fragments = ["conv_states", "cache_indices", "2", "3"]
    raises(causal_conv1d_fn, PACKED, few, ValueError, fragments)
    raises(varlen_conv_states, VARLEN, few, ValueError, fragments)
    few = {"conv_state": array(2, 5, 16), "conv_state_indices": None}
    fragments = ["conv_state", "conv_state_indices", "2", "3"]
    raises(causal_conv1d_update, UPDATE, few, ValueError, fragments)


def test_ring_and_rollback_exclude_each_other():
    fragments = ["cache_seqlens", "num_rejected_tokens"]
    raises(causal_conv1d_update, UPDATE, RING | ROLLBACK, ValueError, fragments)


def test_metadata_for_another_number_of_tokens_or_sequences():
    offsets = np.array([0, 5, 9, 24], i32)
    assert len(build_metadata(offsets, 24, block_m=8).chunk_seq) == 7
    for wrong in (
        build_metadata(offsets, 40, block_m=8),
        build_metadata(offsets[:3], 24, block_m=8),
    ):
        fragments = ["metadata", "7", str(len(wrong.chunk_seq))]
        raises(causal_conv1d_fn, PACKED, {"metadata": wrong}, ValueError, fragments)


def test_metadata_arrays_of_wrong_shape_or_dtype():
    good = array(7, dtype=i32)
    for chunk_seq, chunk_offset, error, fragments in (
        (good, array(8, dtype=i32), ValueError, ["chunk_offset", "7", "(8,)"]),
        (array(7, 1, dtype=i32), good, ValueError, ["chunk_seq", "7", "(7, 1)"]),
        (array(7), good, TypeError, ["chunk_seq", "int32", "float32"]),
        (good, array(7, dtype=bool), TypeError, ["chunk_offset", "int32", "bool"]),
    ):
        wrong = ConvMetadata(chunk_seq, chunk_offset, 8)
        raises(causal_conv1d_fn, PACKED, {"metadata": wrong}, error, fragments)


def test_metadata_must_be_conv_metadata():
    pair = (array(7, dtype=i32), array(7, dtype=i32))
    fragments = ["metadata", "ConvMetadata", "tuple"]
    raises(causal_conv1d_fn, PACKED, {"metadata": pair}, TypeError, fragments)


def test_block_shorter_than_the_history():
    metadata = build_metadata(np.array([0, 5, 9, 24], i32), 24, block_m=2)
    fragments = ["block_m", "2", "3"]
    raises(causal_conv1d_fn, PACKED, {"metadata": metadata}, ValueError, fragments)
    metadata = build_metadata(np.array([0, 5, 9, 24], i32), 24, block_m=3)
    out, _ = causal_conv1d_fn(**PACKED, metadata=metadata)
    assert out.shape == (24, 16)


@pytest.mark.parametrize(
    "change, error, fragments",
    [
        ({"query_start_loc": array(2, 2, dtype=i32)}, ValueError, ["(2, 2)"]),
        ({"query_start_loc": array(0, dtype=i32)}, ValueError, ["(0,)"]),
        ({"query_start_loc": array(4)}, TypeError, ["query_start_loc", "float32"]),
        ({"num_tokens": -1}, ValueError, ["num_tokens", "-1"]),
        ({"num_tokens": 2.0}, TypeError, ["num_tokens", "2.0"]),
        ({"block_m": 0}, ValueError, ["block_m", "0"]),
        ({"block_m": -8}, ValueError, ["block_m", "-8"]),
        ({"block_m": 8.0}, TypeError, ["block_m", "8.0"]),
        ({"block_m": "8"}, TypeError, ["block_m", "8"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("trace", [False, True], ids=["host", "graph"])
def test_wrong_argument_of_build_metadata(change, error, fragments, trace):
    arguments = {"query_start_loc": array(4, dtype=i32), "num_tokens": 24}
    raises(build_metadata, arguments, change, error, fragments, trace)


def test_num_tokens_of_metadata_must_be_static():
    with pytest.raises(TypeError, match="num_tokens"):
        jax.jit(build_metadata)(array(4, dtype=i32), 24)


@pytest.mark.parametrize(
    "change, error, fragments",
    [
        ({"slots": array(3)}, TypeError, ["slots", "float32"]),
        ({"layer": 1.5}, TypeError, ["layer", "float"]),
        ({"layer": array(2, dtype=i32)}, ValueError, ["layer", "(2,)"]),
        ({"num_slots": -1}, ValueError, ["num_slots", "-1"]),
        ({"num_slots": 6.0}, TypeError, ["num_slots", "6.0"]),
        ({"pad_slot_id": 1.5}, TypeError, ["pad_slot_id", "1.5"]),
    ],
    ids=str,
)
def test_wrong_argument_of_layer_slots(change, error, fragments):
    arguments = {"slots": array(3, dtype=i32), "layer": 1, "num_slots": 6}
    raises(layer_slots, arguments, change, error, fragments)


@pytest.mark.parametrize(
    "change, error, fragments",
    [
        ({"query_start_loc": array(4)}, TypeError, ["query_start_loc", "float32"]),
        ({"query_start_loc": array(0, dtype=i32)}, ValueError, ["query_start_loc"]),
        ({"cache_indices": array(3)}, TypeError, ["cache_indices", "float32"]),
        ({"num_tokens": 2.5}, TypeError, ["num_tokens", "2.5"]),
        ({"num_slots": -1}, ValueError, ["num_slots", "-1"]),
        ({"pad_slot_id": 1.5}, TypeError, ["pad_slot_id", "1.5"]),
    ],
    ids=str,
)
def test_wrong_argument_of_validate_batch(change, error, fragments):
    arguments = {
        "query_start_loc": array(4, dtype=i32),
        "cache_indices": np.arange(3, dtype=i32),
        "num_tokens": 24,
        "num_slots": 6,
    }
    raises(validate_batch, arguments, change, error, fragments, trace=False)


def test_validate_batch_says_that_it_cannot_look_at_tracers():
    arguments = {"query_start_loc": array(4, dtype=i32), "num_tokens": 1}
    fragments = ["query_start_loc", "jit"]
    raises(validate_batch, arguments, {"num_slots": 3}, TypeError, fragments)


@pytest.mark.parametrize("value", [9.0, "sm_90", None, (9, 0)])
def test_compute_capability_is_an_int(value):
    wrong = pytest.raises(TypeError, match="compute_capability")
    with wrong, target_compute_capability(value):
        pass


@pytest.mark.parametrize("value", [-1, 0, 9])
def test_compute_capability_is_ten_times_the_version(value):
    wrong = pytest.raises(ValueError, match=f"compute_capability.*{value}")
    with wrong, target_compute_capability(value):
        pass


def test_arguments_that_switch_things_on_are_keyword_only():
    names = ("x", "weight", "bias", "conv_states", "query_start_loc", "cache_indices")
    with pytest.raises(TypeError, match="positional"):
        causal_conv1d_fn(*(PACKED[name] for name in names))
    names = ("x", "conv_state", "weight", "bias")
    with pytest.raises(TypeError, match="positional"):
        causal_conv1d_update(
            *(UPDATE[name] for name in names), None, UPDATE["conv_state_indices"]
        )
