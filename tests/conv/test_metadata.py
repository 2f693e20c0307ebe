"""`build_metadata`, `ConvMetadata` and `validate_batch`."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal_conv import (
    PAD_SLOT_ID,
    ConvMetadata,
    build_metadata,
    causal_conv1d_fn,
    validate_batch,
)
from tests.support import cases, checks, quick, reference
from tests.support.cases import INT_MAX, INT_MIN
from tests.support.draws import draw_packed, ints, offsets_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


def random_offsets(rng, num_tokens, num_seqs):
    pool = [INT_MIN, -1, *range(num_tokens + 2), INT_MAX]
    offsets = rng.choice(pool, num_seqs + 1)
    return (offsets if rng.random() < 0.3 else np.sort(offsets)).astype(np.int32)


@pytest.mark.parametrize("block_m", [1, 3, 8, 16, 1000])
def test_host_and_graph_build_the_same_table_as_a_loop(block_m):
    for num_tokens, num_seqs in ((0, 0), (0, 3), (5, 0), (17, 1), (40, 7), (64, 30)):
        rng = np.random.default_rng([num_tokens, num_seqs, block_m])
        in_graph = quick.jit(
            lambda q, num_tokens=num_tokens: build_metadata(
                q, num_tokens, block_m=block_m
            )
        )
        for _ in range(10):
            offsets = random_offsets(rng, num_tokens, num_seqs)
            seq, offset = reference.build_metadata(offsets, num_tokens, block_m)
            assert len(seq) == num_tokens // block_m + num_seqs + 1
            for metadata in (
                build_metadata(offsets, num_tokens, block_m=block_m),
                in_graph(offsets),
            ):
                assert metadata.block_m == block_m
                np.testing.assert_array_equal(metadata.chunk_seq, seq, str(offsets))
                np.testing.assert_array_equal(
                    metadata.chunk_offset, offset, str(offsets)
                )
                assert (
                    metadata.chunk_seq.dtype == metadata.chunk_offset.dtype == "int32"
                )


def test_default_block_gives_the_same_table_on_host_and_in_graph():
    for num_tokens, num_seqs in ((0, 1), (1, 1), (64, 64), (300, 3), (3000, 2)):
        rng = np.random.default_rng(num_tokens)
        offsets = np.sort(rng.integers(0, num_tokens + 1, num_seqs + 1)).astype("int32")
        host = build_metadata(offsets, num_tokens)
        graph = quick.jit(lambda q, t=num_tokens: build_metadata(q, t))(offsets)
        seq, offset = reference.build_metadata(offsets, num_tokens, host.block_m)
        assert graph.block_m == host.block_m
        for metadata in (host, graph):
            np.testing.assert_array_equal(metadata.chunk_seq, seq)
            np.testing.assert_array_equal(metadata.chunk_offset, offset)


def test_programs_cover_every_token_exactly_once():
    rng = np.random.default_rng(1)
    for _ in range(50):
        num_tokens, num_seqs, block_m = rng.integers((0, 0, 1), (60, 8, 20)).tolist()
        offsets = random_offsets(rng, num_tokens, num_seqs)
        q = reference.clean_offsets(offsets, num_tokens)
        uncovered = [*range(q[0]), *range(q[-1], num_tokens)]  # head, then tail
        table = build_metadata(offsets, num_tokens, block_m=block_m)
        covered = []
        for seq, block in zip(table.chunk_seq, table.chunk_offset, strict=True):
            tokens = uncovered if seq == PAD_SLOT_ID else range(q[seq], q[seq + 1])
            covered += tokens[block * block_m : (block + 1) * block_m]
        assert sorted(covered) == list(range(num_tokens)), str(offsets)


def test_numpy_offsets_stay_on_the_host_and_traced_ones_in_the_graph():
    offsets = offsets_of([5, 1])
    with jax.transfer_guard("disallow"):
        host = build_metadata(offsets, 8, block_m=4)
    assert isinstance(host.chunk_seq, np.ndarray)
    assert isinstance(host.chunk_offset, np.ndarray)
    on_device = jnp.asarray(offsets)
    with jax.transfer_guard_device_to_host("disallow"):
        graph = build_metadata(on_device, 8, block_m=4)
    assert isinstance(graph.chunk_seq, jax.Array)
    text = str(jax.make_jaxpr(lambda q: build_metadata(q, 8, block_m=4))(offsets))
    assert "callback" not in text


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32", "int64", "uint64"])
def test_offsets_of_any_integer_dtype(dtype):
    dtype = np.dtype(dtype)
    for values in ([0, 5, 9, 20], [0, *cases.far_values(dtype), 7]):
        offsets = cases.integers(values, dtype)
        seq, offset = reference.build_metadata(offsets, 20, 8)
        host = build_metadata(offsets, 20, block_m=8)
        with jax.enable_x64(True):
            graph = quick.jit(lambda q: build_metadata(q, 20, block_m=8))(offsets)
        for metadata in (host, graph):
            np.testing.assert_array_equal(metadata.chunk_seq, seq)
            np.testing.assert_array_equal(metadata.chunk_offset, offset)
            assert metadata.chunk_seq.dtype == metadata.chunk_offset.dtype == "int32"


def test_metadata_is_immutable():
    metadata = build_metadata(offsets_of([5, 1]), 8)
    with pytest.raises((AttributeError, dataclasses.FrozenInstanceError)):
        metadata.block_m = 3


def test_metadata_is_a_pytree_of_two_arrays_with_a_static_block():
    metadata = build_metadata(offsets_of([5, 1]), 8, block_m=4)
    leaves, tree = jax.tree.flatten(metadata)
    assert [leaf.shape for leaf in leaves] == [(5,), (5,)]
    again = jax.tree.unflatten(tree, leaves)
    assert isinstance(again, ConvMetadata)
    assert again.block_m == 4


def test_one_compilation_serves_every_batch_of_a_bucket(implementation):
    traces = []

    @quick.jit
    def step(x, weight, states, q, metadata):
        traces.append(q)
        first, states = causal_conv1d_fn(
            x, weight, None, states, q, metadata=metadata, implementation=implementation
        )
        return causal_conv1d_fn(
            first,
            weight,
            None,
            states,
            q,
            metadata=metadata,
            implementation=implementation,
        )

    case = draw_packed(2, bias_dtype=None, cache_indices=False, has_initial_state=False)
    x, weight, states = (case.arrays[n] for n in ("x", "weight", "conv_states"))
    for offsets in ([0, 6, 6, 6, 24], [5, 6, 7, 8, 9], [0, 0, 0, 0, 0]):
        q = ints(*offsets)
        metadata = build_metadata(q, 24, block_m=8)
        got, _ = checks.to_host(step(x, weight, states, q, metadata))
        between, _ = causal_conv1d_fn(
            x, weight, None, states, q, implementation=implementation
        )
        again = case.replace(
            x=np.asarray(between),
            query_start_loc=q,
            has_initial_state=None,
            num_rejected_tokens=None,
        )
        exact, _, magnitude = checks.expected(again)
        checks.assert_output(got, exact, magnitude, 4, "silu", offsets)
    assert len(traces) == 1


def mangled(metadata, chunk_seq=None, chunk_offset=None):
    return ConvMetadata(
        chunk_seq=metadata.chunk_seq if chunk_seq is None else chunk_seq,
        chunk_offset=metadata.chunk_offset if chunk_offset is None else chunk_offset,
        block_m=metadata.block_m,
    )


def live_slots(case):
    a = case.arrays
    q = reference.clean_offsets(a["query_start_loc"], len(a["x"]))
    pairs = zip(a["cache_indices"].tolist(), np.diff(q).tolist(), strict=True)
    return {slot for slot, length in pairs if length > 0}


@pytest.mark.forward_only
def test_metadata_of_another_batch_touches_no_slot_that_is_not_live(implementation):
    case = draw_packed(
        3,
        arrays={
            "query_start_loc": offsets_of([9, 0, 3, 8], head=1),
            "cache_indices": ints(4, 1, -1, 2),
        },
    )
    states = cases.random_patterns(
        np.random.default_rng(3), (6, 5, 16), cases.FLOATS[0]
    )
    case = case.replace(conv_states=states)
    untouched = sorted(set(range(6)) - live_slots(case))
    assert untouched == [0, 1, 3, 5]
    for lengths in ([1, 1, 1, 1], [0, 0, 24, 0], [0, 24, 0, 0], [0, 0, 0, 0]):
        wrong = build_metadata(offsets_of(lengths), 24, block_m=8)
        out, got = checks.call(case, implementation, metadata=wrong)
        assert out.shape == (24, 16)
        checks.assert_same_bits(got[untouched], states[untouched], lengths)


@pytest.mark.forward_only
@pytest.mark.parametrize("value", [INT_MIN, -2, 4, 5, 2**28, INT_MAX])
@pytest.mark.parametrize("field", ["chunk_seq", "chunk_offset"])
def test_metadata_entries_out_of_range_do_nothing(implementation, field, value):
    case = draw_packed(4, arrays={"cache_indices": ints(4, 1, 0, 2)})
    metadata = build_metadata(case.arrays["query_start_loc"], 24, block_m=8)
    wrong = mangled(metadata, **{field: np.full_like(metadata.chunk_seq, value)})
    out, states = checks.call(case, implementation, metadata=wrong)
    assert out.shape == (24, 16)
    untouched = sorted(set(range(6)) - live_slots(case))
    old = case.arrays["conv_states"]
    checks.assert_same_bits(states[untouched], old[untouched], value)


@pytest.mark.forward_only
def test_surplus_entries_out_of_range_change_nothing(implementation):
    """Programs that have nothing to do may hold any numbers out of range."""
    case = draw_packed(5, arrays={"query_start_loc": ints(0, 6, 7, 9, 24)})
    metadata = build_metadata(case.arrays["query_start_loc"], 24, block_m=8)
    spare = np.flatnonzero(metadata.chunk_seq == PAD_SLOT_ID)
    assert len(spare) > 0
    for seq, offset in ((INT_MIN, 0), (4, 0), (INT_MAX, 1), (-1, INT_MAX), (0, 2**29)):
        chunk_seq, chunk_offset = (
            metadata.chunk_seq.copy(),
            metadata.chunk_offset.copy(),
        )
        chunk_seq[spare], chunk_offset[spare] = seq, offset
        checks.check(
            case, implementation, metadata=mangled(metadata, chunk_seq, chunk_offset)
        )


# validate_batch


def valid(**changes):
    arguments = {
        "query_start_loc": ints(0, 5, 5, 8),
        "cache_indices": ints(2, 2, 0),
        "num_tokens": 10,
        "num_slots": 3,
    }
    return arguments | changes


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"cache_indices": None},
        {"cache_indices": ints(2, 99, 0)},  # empty sequences are exempt
        {"cache_indices": ints(-1, 1, -1)},
        {"cache_indices": ints(7, 1, 7), "pad_slot_id": 7},
        {"query_start_loc": ints(0), "cache_indices": ints()},
        {"query_start_loc": [0, 5, 5, 10]},
        {"query_start_loc": np.array([0, 5, 5, 8], np.int64)},
        {"query_start_loc": jnp.array([0, 5, 5, 8])},
    ],
    ids=str,
)
def test_sound_batch_passes(changes):
    assert validate_batch(**valid(**changes)) is None


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"query_start_loc": ints(1, 5, 5, 8)}, ["query_start_loc", "0", "1"]),
        ({"query_start_loc": ints(0, 5, 4, 8)}, ["query_start_loc", "2", "4", "5"]),
        ({"query_start_loc": ints(0, 5, 5, 11)}, ["query_start_loc", "3", "11", "10"]),
        ({"query_start_loc": ints(-1, 5, 5, 8)}, ["query_start_loc", "0", "-1"]),
        ({"cache_indices": ints(2, 2, 3)}, ["cache_indices", "2", "3"]),
        ({"cache_indices": ints(-2, 2, 0)}, ["cache_indices", "0", "-2"]),
        ({"cache_indices": ints(1, 2, 1)}, ["cache_indices", "2", "1", "0"]),
        ({"cache_indices": ints(-1, 1, 0), "pad_slot_id": 7}, ["cache_indices", "-1"]),
        ({"cache_indices": None, "num_slots": 2}, ["2"]),
        (
            {"cache_indices": np.array([2**32 + 1, 2, 0])},
            ["cache_indices", "0", str(2**32 + 1)],
        ),
        ({"cache_indices": ints(2, 2)}, ["cache_indices", "2", "3"]),
    ],
    ids=str,
)
def test_unsound_batch_is_named_with_its_first_offending_entry(changes, named):
    with pytest.raises(ValueError) as error:
        validate_batch(**valid(**changes))
    for fragment in named:
        assert fragment in str(error.value)


def test_first_of_several_offending_slots_is_named():
    with pytest.raises(ValueError, match=r"\b1\b.*\b9\b"):
        validate_batch(
            ints(0, 1, 2, 3, 4), ints(0, 9, 0, -5), num_tokens=4, num_slots=3
        )
    with pytest.raises(ValueError, match=r"\b2\b.*\b0\b"):
        validate_batch(ints(0, 1, 2, 3, 4), ints(0, 1, 0, 9), num_tokens=4, num_slots=3)


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"query_start_loc": ints(5, 2, 3, 0)}, None),  # a zero is no length
        ({"query_start_loc": ints(5, 2, 3)}, ["np.cumsum([0, *lengths])", "5"]),
        ({"num_rejected_tokens": ints(2, 9, 0), "state_len": 4, "width": 3}, []),
        (
            {"num_rejected_tokens": ints(3, 0, 0), "state_len": 4, "width": 3},
            ["num_rejected_tokens[0] = 3", "5 rows", "state_len = 4"],
        ),
        ({"num_rejected_tokens": ints(0, 0, 9), "state_len": 4}, []),  # no history
        ({"num_rejected_tokens": ints(-1, 0, 0)}, ["num_rejected_tokens[0]", "-1"]),
        ({"num_rejected_tokens": ints(0, 0)}, ["num_rejected_tokens", "(3,)", "(2,)"]),
        ({"has_initial_state": np.ones(2, bool)}, ["has_initial_state", "(2,)"]),
        ({"metadata": build_metadata(ints(0, 5, 5, 8), 10)}, []),
        ({"metadata": build_metadata(ints(0, 5, 5, 8), 10, block_m=2)}, []),
        ({"metadata": build_metadata(ints(0, 1, 2, 8), 10)}, ["metadata", "chunk_seq"]),
        ({"metadata": build_metadata(ints(0, 5, 5, 8), 999)}, ["metadata", "shape"]),
    ],
)
def test_what_else_the_op_gets_is_checked(changes, named):
    seen = {"has_initial_state": np.array([True, True, False])}
    if named == []:
        validate_batch(**valid(**seen | changes))
        return
    with pytest.raises(ValueError) as error:
        validate_batch(**valid(**seen | changes))
    for fragment in named or ["query_start_loc[0] must be 0, got 5"]:
        assert fragment in str(error.value)
    assert named is not None or "lengths" not in str(error.value)


def test_decodes_without_a_history_are_warned_of():
    batch = {"query_start_loc": ints(0, 1, 2), "num_tokens": 4, "num_slots": 3}
    seen = np.array([False, True])
    for history in (None, ~seen & False):
        with pytest.warns(UserWarning, match="all 2 live sequences .* has_initial_st"):
            validate_batch(**batch, has_initial_state=history)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        validate_batch(**batch, has_initial_state=seen)
        validate_batch(ints(0, 1), num_tokens=1, num_slots=1)  # a prompt of one token
        validate_batch(ints(0, 1, 3), num_tokens=4, num_slots=3)
