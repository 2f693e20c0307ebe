"""States that move: forks, snapshots, and sequences whose new state goes elsewhere."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal_conv import causal_conv1d_fn, causal_conv1d_update, validate_batch
from jax_causal_conv.compat import CPU_LOOPS_UPDATE_IN_PLACE
from tests.support import checks
from tests.support.cases import FLOATS
from tests.support.draws import (
    PACKED_SHAPE,
    RING_SHAPE,
    UPDATE_SHAPE,
    draw_packed,
    draw_update,
    exhaustive,
    ints,
    offsets_of,
)

pytestmark = pytest.mark.forward_only

PACKED = dataclasses.replace(PACKED_SHAPE, num_slots=11, num_tokens=60)
UPDATE = dataclasses.replace(UPDATE_SHAPE, num_slots=9)
RING = dataclasses.replace(RING_SHAPE, num_slots=9)


@pytest.mark.parametrize(
    "extra, writes, snapshots",
    [(0, True, True), (2, True, True), (2, True, False), (0, False, True)],
)
def test_packed(implementation, extra, writes, snapshots):
    for seed in range(20 if exhaustive(implementation) else 2):
        case = draw_packed(
            [seed, extra],
            PACKED,
            malformed=seed % 2 == 1,
            state_len=PACKED.width - 1 + extra,
            num_rejected_tokens=extra > 0,
            state_dtype=FLOATS[seed % 3],
            x_dtype=FLOATS[(seed + extra) % 3],
            block_m=8,
            write_indices=writes,
            snapshots=snapshots,
        )
        checks.check(case, implementation)


@pytest.mark.parametrize("shape", [UPDATE, RING], ids=["rolled", "ring"])
@pytest.mark.parametrize("extra", [0, 2])
def test_update(implementation, extra, shape):
    for seed in range(20 if exhaustive(implementation) else 2):
        case = draw_update(
            [seed, extra],
            shape,
            malformed=seed % 2 == 1,
            state_len=shape.width - 1 + extra,
            num_queries=(1, 2, 7)[seed % 3],
            conv_state_indices=seed % 4 < 3,
            state_dtype=FLOATS[seed % 3],
            x_dtype=FLOATS[(seed + extra) % 3],
            write_indices=True,
        )
        checks.check(case, implementation)


@pytest.mark.parametrize("indices", ["write_indices", "snapshot_indices"])
def test_all_of_a_fork_read_what_was_there(implementation, indices):
    # Slot 0 is read by all, and rewritten by none; each sequence writes its own slot.
    lengths = [1, 9, 1, 20]
    case = draw_packed(
        3,
        num_tokens=sum(lengths),
        write_indices=True,
        snapshots=True,
        block_m=8,
        arrays={
            "query_start_loc": offsets_of(lengths),
            "cache_indices": ints(0, 0, 0, 0),
            "has_initial_state": np.ones(4, bool),
            "num_rejected_tokens": ints(0, 1, 2, 0),
            "write_indices": ints(1, 2, 3, 4),
            "snapshot_indices": ints(-1, -1, -1, -1),
            "snapshot_ends": ints(1, 4, 0, 20),
        },
    )
    if indices == "snapshot_indices":  # only these are stored
        case = case.replace(
            snapshot_indices=case.arrays["write_indices"],
            write_indices=case.arrays["snapshot_indices"],
        )
    checks.check(case, implementation)


def test_snapshot_is_what_a_call_that_ended_there_leaves(implementation):
    case = draw_packed(
        4,
        num_tokens=40,
        num_seqs=2,
        num_slots=4,
        snapshots=True,
        arrays={
            "query_start_loc": ints(0, 30, 40),
            "cache_indices": ints(2, 0),
            "has_initial_state": np.array([True, False]),
            "num_rejected_tokens": ints(1, 0),
            "snapshot_indices": ints(1, 3),
        },
    )
    x = case.arrays["x"]
    for ends in ((1, 10), (2, 3), (17, 1)):
        got = checks.call(case.replace(snapshot_ends=ints(*ends)), implementation)[1]
        starts = ((0, 30), (30, 40))
        short = dataclasses.replace(case.shape, snapshots=False)
        ended = dataclasses.replace(case, shape=short).replace(
            x=np.concatenate(
                [x[a : a + end] for (a, _), end in zip(starts, ends, strict=True)]
            ),
            query_start_loc=offsets_of(ends),
            snapshot_ends=None,
            snapshot_indices=None,
        )
        want = checks.call(ended, implementation)[1]
        checks.assert_same_bits(got[[1, 3]], want[[2, 0]], str(ends))


@pytest.mark.parametrize("op", ["packed", "update", "ring"])
def test_donated_cache_is_not_copied(op):
    if op == "ring" and not CPU_LOOPS_UPDATE_IN_PLACE:
        pytest.skip("this XLA copies such a cache, wherever it is written")
    rng = np.random.default_rng(0)
    states = jnp.asarray(rng.normal(size=(64, 5, 16)), jnp.float32)
    x, weight = jnp.ones((12, 16)), jnp.ones((16, 4))
    writes = jnp.arange(20, 32)

    def step(states):
        if op == "packed":
            return causal_conv1d_fn(
                x,
                weight,
                None,
                states,
                jnp.arange(13),
                cache_indices=jnp.arange(12),
                write_indices=writes,
                snapshot_ends=jnp.ones(12, int),
                snapshot_indices=writes + 20,
            )
        ring = {"cache_seqlens": jnp.arange(12)} if op == "ring" else {}
        return causal_conv1d_update(
            x,
            states,
            weight,
            conv_state_indices=jnp.arange(12),
            conv_state_write_indices=writes,
            **ring,
        )

    text = jax.jit(step, donate_argnums=0).lower(states).compile().as_text()
    whole = [line for line in text.splitlines() if "f32[64,5,16]" in line]
    assert not [line for line in whole if " copy(" in line], whole


def test_snapshots_need_both_arguments():
    case = draw_packed(0, snapshots=True)
    with pytest.raises(ValueError, match="together, got None for snapshot_indices"):
        checks.call(case.replace(snapshot_indices=None), "xla")
    with pytest.raises(ValueError, match="together, got None for snapshot_ends"):
        checks.call(case.replace(snapshot_ends=None), "xla")


@pytest.mark.parametrize(
    "name, value, error, message",
    [
        ("write_indices", np.zeros(3, np.int32), ValueError, "must have shape"),
        ("write_indices", np.zeros(4), TypeError, "integer dtype"),
        ("snapshot_indices", np.zeros(5, np.int32), ValueError, "must have shape"),
        ("snapshot_ends", np.zeros((4, 1), np.int32), ValueError, "must have shape"),
        ("snapshot_ends", np.zeros(4, bool), TypeError, "integer dtype"),
    ],
)
def test_errors_name_the_argument(name, value, error, message):
    case = draw_packed(0, write_indices=True, snapshots=True).replace(**{name: value})
    with pytest.raises(error, match=f"{name} .*{message}"):
        checks.call(case, "xla")


def test_update_error_names_the_argument():
    case = draw_update(0, write_indices=True)
    case = case.replace(conv_state_write_indices=np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="conv_state_write_indices must have shape"):
        checks.call(case, "xla")


VALID = {
    "query_start_loc": [0, 2, 3, 3, 5],
    "cache_indices": [0, 0, 7, 1],
    "num_tokens": 5,
    "num_slots": 6,
    "write_indices": [2, 3, 0, 1],
    "snapshot_indices": [4, -1, 0, 5],
}


def test_validate_batch_accepts_forks_and_snapshots():
    validate_batch(**VALID)
    validate_batch(**VALID | {"write_indices": [2, 3, 2, -1]})  # an empty one, and none
    validate_batch(
        **VALID | {"snapshot_indices": [2, -1, 9, 1]}
    )  # where its state goes


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"write_indices": [2, 2, 0, 1]}, "write_indices.1. = 2 is already written"),
        ({"write_indices": [2, 6, 0, 1]}, "write_indices.1. = 6 is outside"),
        ({"write_indices": [1, 3, 0, 4]}, "snapshot_indices.0. = 4 is already written"),
        ({"write_indices": [0, 3, 0, 1]}, "cache_indices.1. = 0 is written by .* 0"),
        ({"snapshot_indices": [1, -1, 0, 5]}, "snapshot_indices.0. = 1 is already"),
        ({"snapshot_indices": [0, -1, 0, 5]}, "cache_indices.1. = 0 is written by"),
        ({"write_indices": None}, "write_indices.1. = 0|cache_indices.1. = 0"),
        ({"write_indices": [2, 3]}, "write_indices must have shape"),
    ],
)
def test_validate_batch_names_what_gets_in_the_way(changes, message):
    with pytest.raises(ValueError, match=message):
        validate_batch(**VALID | changes)
