"""The reference itself, against numbers computed by hand."""

import numpy as np

from tests.support import reference


def column(*values):
    return np.array(values, np.float32)[:, None]


def test_packed_reference_gives_the_numbers_computed_by_hand():
    # Slot 1 holds 1, 2 (newest last). Sequence 0 owns tokens 1 and 2, sequence 1 none,
    # sequence 2 owns token 3 and is new. Token 0 belongs to nobody.
    out, states = reference.causal_conv1d_fn(
        x=column(9, 3, 4, 5),
        weight=np.array([[100, 10, 1]], np.float32),
        bias=np.array([0.5], np.float32),
        conv_states=np.stack([column(7, 8), column(1, 2), column(6, 6)]),
        query_start_loc=[1, 3, 3, 4],
        cache_indices=[1, 0, 2],
        has_initial_state=[True, True, False],
        activation=None,
    )
    assert out[:, 0].tolist() == [0, 123.5, 234.5, 5.5]
    assert states[:, :, 0].tolist() == [[7, 8], [3, 4], [0, 5]]


def test_packed_reference_rolls_rejected_drafts_back():
    # The slot held 1 2 3 4; the last two were rejected: history is 0 0 1 2.
    out, states = reference.causal_conv1d_fn(
        x=column(5),
        weight=np.array([[100, 10, 1]], np.float32),
        bias=None,
        conv_states=column(1, 2, 3, 4)[None],
        query_start_loc=[0, 1],
        has_initial_state=[True],
        num_rejected_tokens=[2],
        activation=None,
    )
    assert out[:, 0].tolist() == [125]
    assert states[0, :, 0].tolist() == [0, 1, 2, 5]


def test_update_reference_treats_the_slot_as_a_circular_buffer_when_asked():
    # Positions 5 and 6 of a buffer of 4 rows: rows 1 and 2; history is rows 3 and 0.
    arguments = {
        "x": column(7, 8)[None],
        "conv_state": column(2, 3, 4, 1)[None],
        "weight": np.array([[100, 10, 1]], np.float32),
    }
    out, state = reference.causal_conv1d_update(**arguments, cache_seqlens=[5])
    assert out[0, :, 0].tolist() == [127, 278]
    assert state[0, :, 0].tolist() == [2, 7, 8, 1]
    out, state = reference.causal_conv1d_update(**arguments)
    assert out[0, :, 0].tolist() == [417, 178]
    assert state[0, :, 0].tolist() == [4, 1, 7, 8]


def test_metadata_reference_gives_the_table_computed_by_hand():
    # 11 tokens in blocks of 4; sequences of 5, 0 and 2 tokens after a head of 1.
    chunk_seq, chunk_offset = reference.build_metadata([1, 6, 6, 8], 11, 4)
    assert chunk_seq.tolist() == [0, 0, 2, -1, -1, -1]
    assert chunk_offset.tolist() == [0, 1, 0, 0, 1, 2]


def test_offsets_are_clipped_then_made_increasing():
    assert reference.clean_offsets([-3, 4, 2, 99, 5], 10) == [0, 4, 4, 10, 10]
