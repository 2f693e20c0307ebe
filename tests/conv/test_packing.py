"""`pack_batch` and `pack_documents`: rows and documents laid back to back."""

import jax
import numpy as np
import pytest

from jax_causal_conv import (
    PAD_SLOT_ID,
    build_metadata,
    causal_conv1d,
    causal_conv1d_fn,
    pack_batch,
    pack_documents,
    validate_batch,
)
from tests.support import quick

D, W = 5, 4


@pytest.mark.parametrize("features", [(), (D,)])
@pytest.mark.parametrize("count", [1, 2, 7])
def test_a_batch_holds_every_row_where_its_offsets_say(features, count):
    rng = np.random.default_rng([count, len(features)])
    lengths = rng.integers(0, 6, count)
    rows = [rng.normal(size=(n, *features)).astype(np.float32) for n in lengths]
    slots = rng.permutation(count + 2)[:count]
    seen = rng.random(count) < 0.5
    size, num_rows = int(lengths.sum()) + 3, count + 2
    batch = pack_batch(rows, slots, seen, num_tokens=size, num_rows=num_rows)
    tokens, q, indices, has, metadata = batch
    assert tokens.shape == (size, *features) and tokens.dtype == np.float32
    for i, row in enumerate(rows):
        np.testing.assert_array_equal(tokens[q[i] : q[i + 1]], row)
    assert not tokens[q[-1] :].any() and (q[count:] == lengths.sum()).all()
    assert indices.tolist() == [*slots, PAD_SLOT_ID, PAD_SLOT_ID]
    assert has.tolist() == [*seen, False, False]
    expected = build_metadata(q, size)
    np.testing.assert_array_equal(metadata.chunk_seq, expected.chunk_seq)
    assert metadata.block_m == expected.block_m
    assert {a.dtype.name for a in (q, indices)} == {"int32"} and has.dtype == bool
    validate_batch(
        q, indices, num_tokens=size, num_slots=count + 2, has_initial_state=has
    )


def test_a_packed_batch_goes_into_the_op_as_it_is():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(D, W)).astype(np.float32)
    rows = [rng.normal(size=(n, D)).astype(np.float32) for n in (5, 1)]
    states = np.zeros((3, W - 1, D), np.float32)

    @quick.jit
    def step(states, batch):
        return causal_conv1d_fn(batch.tokens, weight, None, states, **batch.arguments())

    batch = pack_batch(rows, [2, 0], [False, False], num_tokens=8, num_rows=4)
    out, states = step(states, batch)
    for row, start in zip(rows, (0, 5), strict=True):
        alone = causal_conv1d(row[None], weight, activation="silu")[0]
        np.testing.assert_allclose(out[start : start + len(row)], alone, atol=1e-6)
    assert not np.any(out[6:])
    np.testing.assert_array_equal(states[2], rows[0][-3:])


def test_nothing_packs_into_a_batch_of_padding():
    batch = pack_batch([], [], [], num_tokens=4, num_rows=2)
    assert batch.tokens.tolist() == [0] * 4 and batch.tokens.dtype == np.int32
    assert batch.query_start_loc.tolist() == [0, 0, 0]
    assert batch.cache_indices.tolist() == [PAD_SLOT_ID] * 2
    assert len(jax.tree.leaves(batch)) == 6  # a pytree, for jit


@pytest.mark.parametrize("length", [1, 4, 100])
def test_documents_come_back_by_their_segment_ids(length):
    rng = np.random.default_rng(length)
    documents = [rng.integers(1, 9, n) for n in (0, 3, 9, 1, 4)]
    tokens, ids = pack_documents(documents, length, pad=-7)
    total = sum(map(len, documents))
    assert tokens.shape == ids.shape == (-(-total // length), length)
    assert tokens.dtype == ids.dtype == np.int32
    for i, document in enumerate(documents):
        np.testing.assert_array_equal(tokens[ids == i], document)
    padding = np.arange(ids.size) >= total
    np.testing.assert_array_equal(ids.ravel() == -1, padding)
    assert (tokens.ravel()[padding] == -7).all()


def test_numbers_that_need_64_bits_keep_them():
    assert pack_documents([[2**40]], 1).tokens[0, 0] == 2**40


BATCH = {
    "rows": [[1, 2], [3]],
    "cache_indices": [0, 1],
    "has_initial_state": [True, False],
    "num_tokens": 4,
    "num_rows": 2,
}


@pytest.mark.parametrize(
    ("change", "error", "fragments"),
    [
        ({"num_tokens": 2}, ValueError, ["num_tokens", "3", "2"]),
        ({"num_rows": 1}, ValueError, ["num_rows", "2", "1"]),
        ({"num_rows": 2.0}, TypeError, ["num_rows", "2.0"]),
        ({"cache_indices": [0]}, ValueError, ["cache_indices", "(2,)", "(1,)"]),
        ({"cache_indices": [0.0, 1.0]}, TypeError, ["cache_indices", "float64"]),
        ({"has_initial_state": [1, 0]}, TypeError, ["has_initial_state", "int64"]),
        ({"has_initial_state": True}, ValueError, ["has_initial_state", "()"]),
        ({"rows": [[1, 2], 3]}, ValueError, ["rows[1]", "3"]),
        ({"rows": [np.ones((2, 3)), np.ones((1, 4))]}, ValueError, ["rows[1]", "(4,)"]),
    ],
)
def test_what_does_not_fit_is_named(change, error, fragments):
    pack_batch(**BATCH)
    with pytest.raises(error) as raised:
        pack_batch(**BATCH | change)
    assert all(fragment in str(raised.value) for fragment in fragments), raised.value


def test_documents_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="length must be at least 1, got 0"):
        pack_documents([[1]], 0)
    with pytest.raises(ValueError, match=r"documents\[1\] with \(2,\)"):
        pack_documents([np.ones((1, 3)), np.ones((1, 2))], 4)
