"""SSM states that move: forks, snapshots, new states that go elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal_conv import ssd_packed
from tests.support import ssd_cases
from tests.support.draws import exhaustive, ints
from tests.support.ssd_cases import BFLOAT16, FLOAT32

pytestmark = pytest.mark.forward_only

LENGTHS = (0, 1, 1, 2, 15, 16, 17, 33, 40)


@pytest.mark.parametrize(
    "most, writes, snapshots",
    [(None, True, True), (0, True, True), (1, True, False), (None, False, True)],
)
def test_random_batches(implementation, most, writes, snapshots):
    for seed in range(6 if exhaustive(implementation) else 2):
        case = ssd_cases.draw_packed(
            [seed, 5],
            malformed=seed % 2 == 1,
            lengths=LENGTHS,
            num_tokens=90,
            num_slots=12,
            max_prefills=most,
            write_indices=writes,
            snapshots=snapshots,
            state=(FLOAT32, BFLOAT16)[seed % 2],
        )
        ssd_cases.check(case, implementation)


@pytest.mark.parametrize("x", [FLOAT32, BFLOAT16])
def test_snapshots_around_chunks(implementation, x):
    # Ends at the first and the last token, and at, before and behind edges of chunks.
    ends = [0, 1, 15, 16, 17, 32, 33, 48, 49]
    lengths = [33, 5, 16, 16, 17, 48, 48, 48, 48]
    case = ssd_cases.batch(lengths, num_slots=20, snapshots=True, x=x, B=x, C=x, seed=3)
    case = case.replace(
        cache_indices=ints(*range(9)),
        snapshot_ends=ints(*ends),
        snapshot_indices=ints(*range(9, 18)),
    )
    rng = np.random.default_rng(0)
    ssd_cases.check(case, implementation)
    ssd_cases.check(ssd_cases.with_extreme_steps(case, rng), implementation)


@pytest.mark.parametrize("most", [None, 0])
def test_donated_cache_is_not_copied(most):
    # XLA for CPUs alone; what it makes for GPUs is looked at elsewhere.
    states, seqs = jnp.zeros((32, 2, 4, 8)), 6
    x, dt = jnp.ones((20, 2, 4)), jnp.ones((20, 2))
    B = jnp.ones((20, 1, 8))

    def step(states):
        return ssd_packed(
            *(x, dt, -jnp.ones(2), B, B, None, states),
            jnp.array([0, 1, 2, 3, 10, 15, 20]),
            cache_indices=jnp.arange(seqs),
            write_indices=jnp.arange(seqs) + 10,
            snapshot_ends=jnp.ones(seqs, int),
            snapshot_indices=jnp.arange(seqs) + 20,
            max_prefills=most,
        )

    text = jax.jit(step, donate_argnums=0).lower(states).compile().as_text()
    whole = [line for line in text.splitlines() if "f32[32,2,4,8]" in line]
    assert not [line for line in whole if " copy(" in line], whole


def test_errors_name_the_argument():
    case = ssd_cases.draw_packed(0, write_indices=True, snapshots=True)
    for name, value, error, message in (
        ("write_indices", np.zeros(3, np.int32), ValueError, "must have shape"),
        ("snapshot_indices", np.zeros(5), TypeError, "integer dtype"),
        ("snapshot_ends", None, ValueError, "given together"),
    ):
        with pytest.raises(error, match=f"{name} .*{message}"):
            ssd_cases.call(case.replace(**{name: value}), "xla")
