"""Rollback of SSM states: drafts that are taken back, in batches of every kind."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.test_util import check_grads

from jax_causal_conv import ssd_packed
from jax_causal_conv.mamba2 import DraftStates, Mamba2Config, Mamba2LM, Mamba2Mixer
from tests.support import quick
from tests.support import ssd_reference as reference

pytestmark = pytest.mark.forward_only

HEADS, DIM, GROUPS, SIZE, SLOTS, DRAFTS = 2, 3, 1, 5, 7, 3
STATIC = ("dt_softplus", "dt_limit", "implementation", "max_prefills", "chunk_size")
step = quick.jit(ssd_packed, static_argnames=STATIC)


def no_history(drafts=DRAFTS, dtype="float32"):
    lead = SLOTS, drafts
    return DraftStates(
        jnp.zeros((SLOTS, HEADS, DIM, SIZE)),
        jnp.zeros((*lead, HEADS, DIM), dtype),
        jnp.zeros((*lead, HEADS)),
        jnp.zeros((*lead, GROUPS, SIZE), dtype),
    )


class Requests:
    """Requests in slots: all of their tokens that were not taken back."""

    def __init__(self, seed, dtype="float32"):
        self.rng = rng = np.random.default_rng(seed)
        self.dtype = jnp.dtype(dtype)
        self.tokens = {}
        self.A = -rng.uniform(0.1, 4, HEADS).astype("f")
        self.D = rng.normal(size=HEADS).astype("f")
        self.bias = rng.normal(size=HEADS).astype("f")

    def draw(self, count):
        normal = self.rng.normal
        return (
            normal(size=(count, HEADS, DIM)).astype(self.dtype),
            self.rng.uniform(-2, 1, (count, HEADS)).astype("f"),
            normal(size=(count, GROUPS, SIZE)).astype(self.dtype),
            normal(size=(count, GROUPS, SIZE)).astype(self.dtype),
        )

    def after(self, tokens):
        """y and the state in float64, with the options of `run`."""
        x, dt, B, C = tokens
        dt = reference.step_sizes(dt, self.bias, True, (0.05, 2.0))
        zero = np.zeros((HEADS, DIM, SIZE))
        return reference.recurrence(x, dt, self.A, B, C, self.D, zero)

    def run(self, tokens, states, offsets, implementation, **batch):
        x, dt, B, C = tokens
        return step(
            *(x, dt, self.A, B, C, self.D, states, offsets),
            **batch,
            dt_bias=self.bias,
            dt_softplus=True,
            dt_limit=(0.05, 2.0),  # so that a step of zero is not one of nothing
            implementation=implementation,
        )


def joined(first, second):
    return tuple(np.concatenate(pair) for pair in zip(first, second, strict=True))


def cut(tokens, end):
    return tuple(rows[:end] for rows in tokens)


def far(rejected, rng):
    """Numbers that mean the same: those out of range are clamped."""
    rejected = np.array(rejected, np.int32)
    return np.where((rejected == 0) & (rng.random(len(rejected)) < 0.3), -9, rejected)


@pytest.mark.parametrize(
    "most, dtype", [(None, "bfloat16"), (0, "float32"), (1, "float32")]
)
def test_tokens_that_are_taken_back_leave_no_trace(implementation, most, dtype):
    """Prompts, decodes and drafts, each slot against all of its request at once."""
    requests = Requests(5, dtype)
    rng, states = requests.rng, no_history(dtype=dtype)
    pending = dict.fromkeys(range(SLOTS), 0)  # tokens of the last step
    for _ in range(6 if implementation is None else 3):
        slots = rng.permutation(SLOTS)[:4].astype(np.int32)
        lengths = [int(rng.choice([1, 1 + rng.integers(DRAFTS + 1), 9])) for _ in slots]
        lengths[rng.integers(4)] = 0
        tokens = requests.draw(30)
        offsets = np.cumsum([1, *lengths], dtype=np.int32)
        seen = np.array([slot in requests.tokens for slot in slots])
        rejected = [
            int(rng.integers(0, min(DRAFTS, pending[slot] - 1) + 1))
            if pending[slot]
            else 0
            for slot in slots
        ]
        y, states = requests.run(
            *(tokens, states, offsets, implementation),
            cache_indices=slots,
            has_initial_state=seen,
            num_rejected_tokens=far(rejected, rng),
            max_prefills=most,
        )
        y, long, covered = np.asarray(y).astype(float), 0, np.zeros(len(y), bool)
        for i, slot in enumerate(slots):
            own = slice(offsets[i], offsets[i + 1])
            long += lengths[i] > 1 + DRAFTS
            if lengths[i] == 0 or (
                lengths[i] > 1 + DRAFTS and most is not None and long > most
            ):
                continue  # skipped: nothing of its slot may change
            covered[own] = True
            new = tuple(rows[own] for rows in tokens)
            if slot in requests.tokens:
                kept = len(requests.tokens[slot][0]) - rejected[i]
                new = joined(cut(requests.tokens[slot], kept), new)
            requests.tokens[slot], pending[slot] = new, lengths[i]
            want, _ = requests.after(new)
            want = want[len(want) - lengths[i] :]
            rtol = 1e-2 if dtype == "bfloat16" else 2e-5
            np.testing.assert_allclose(y[own], want, rtol=rtol, atol=rtol)
        assert not y[~covered].any()
        for slot, all_of_it in requests.tokens.items():
            behind = max(len(all_of_it[0]) - DRAFTS, 0)
            _, want = requests.after(cut(all_of_it, behind))
            if pending[slot] >= DRAFTS:  # else rejected ones are missing from the ring
                np.testing.assert_allclose(
                    np.asarray(states.states)[slot], want, rtol=2e-5, atol=2e-5
                )


def test_forks_and_snapshots_take_their_drafts_along(implementation):
    requests = Requests(6)
    first = requests.draw(8)
    _, states = requests.run(
        *(first, no_history(), np.array([0, 8], np.int32), implementation),
        cache_indices=np.array([2], np.int32),
    )
    tokens = requests.draw(9)
    offsets = np.array([0, 1, 5, 9], np.int32)
    _, states = requests.run(
        *(tokens, states, offsets, implementation),
        cache_indices=np.array([2, 2, 2], np.int32),
        has_initial_state=np.ones(3, bool),
        num_rejected_tokens=np.array([0, 1, 3], np.int32),
        write_indices=np.array([0, 1, -1], np.int32),
        snapshot_indices=np.array([3, 4, 5], np.int32),
        snapshot_ends=np.array([0, 2, 4], np.int32),
    )
    histories = {
        0: joined(first, cut(tokens, 1)),
        1: joined(cut(first, 7), tuple(rows[1:5] for rows in tokens)),
        2: first,
        3: first,
        4: joined(cut(first, 7), tuple(rows[1:3] for rows in tokens)),
        5: joined(cut(first, 5), tuple(rows[5:9] for rows in tokens)),
    }
    last = requests.draw(6)
    y, _ = requests.run(  # one more token each, with what can be taken back taken back
        *(last, states, np.arange(7, dtype=np.int32), implementation),
        cache_indices=np.arange(6, dtype=np.int32),
        has_initial_state=np.ones(6, bool),
        num_rejected_tokens=np.array([0, 3, 2, 1, 1, 2], np.int32),
    )
    for slot, rejected in enumerate((0, 3, 2, 1, 1, 2)):
        kept = cut(histories[slot], len(histories[slot][0]) - rejected)
        one = tuple(rows[slot : slot + 1] for rows in last)
        want, _ = requests.after(joined(kept, one))
        np.testing.assert_allclose(y[slot], want[-1], rtol=2e-5, atol=2e-5)


def test_nothing_foreign_is_seen(implementation):
    """NaN in other slots, in rejected tokens and in skipped sequences."""
    requests = Requests(7)
    tokens = requests.draw(6)
    offsets = np.array([0, 4, 6], np.int32)
    batch = {
        "cache_indices": np.array([1, -1], np.int32),
        "has_initial_state": np.array([True, True]),
        "num_rejected_tokens": np.array([2, 1], np.int32),
    }
    states = DraftStates(
        *(jnp.asarray(requests.rng.uniform(0, 1, a.shape), "f") for a in no_history())
    )
    clean, (want, *_) = requests.run(tokens, states, offsets, implementation, **batch)
    others = np.arange(SLOTS) != 1
    bad = DraftStates(
        *(
            jnp.where(others.reshape(-1, *[1] * (a.ndim - 1)), jnp.nan, a)
            for a in states
        )
    )
    bad = bad._replace(
        **{
            name: getattr(bad, name).at[1, DRAFTS - 2 :].set(jnp.nan)
            for name in ("x", "dt", "B")
        }
    )
    foul = tuple(rows.copy() for rows in tokens)
    for rows in foul:
        rows[4:] = np.nan
    y, (got, *recent) = requests.run(foul, bad, offsets, implementation, **batch)
    np.testing.assert_array_equal(y, clean)
    np.testing.assert_array_equal(got[1], want[1])
    assert not any(jnp.isnan(rows[1]).any() for rows in recent)
    assert all(jnp.isnan(rows[others]).all() for rows in (got, *recent))


def test_gradients():
    with jax.enable_x64(True), quick.compilation():
        requests = Requests(8, "float64")
        tokens = tuple(rows.astype(float) for rows in requests.draw(9))
        states = DraftStates(
            *(
                jnp.asarray(requests.rng.uniform(0, 1, a.shape), float)
                for a in no_history()
            )
        )

        def run(tokens, states, A, D):
            x, dt, B, C = tokens
            return ssd_packed(
                *(x, dt, A, B, C, D, states, np.array([0, 1, 3, 9])),
                cache_indices=np.array([1, 1, 2]),
                has_initial_state=np.ones(3, bool),
                num_rejected_tokens=np.array([0, 2, 1]),
                write_indices=np.array([0, 3, 2]),
                snapshot_indices=np.array([4, 5, -1]),
                snapshot_ends=np.array([0, 1, 1]),
                dt_softplus=True,
                chunk_size=4,
            )

        given = tokens, states, requests.A.astype(float), requests.D.astype(float)
        check_grads(jax.jit(run), given, order=1, modes=["rev"], rtol=1e-5, atol=1e-5)


def test_under_vmap_each_is_alone(implementation):
    requests = Requests(9)
    tokens = [requests.draw(5) for _ in range(2)]
    states = DraftStates(
        *(jnp.asarray(requests.rng.uniform(0, 1, a.shape), "f") for a in no_history())
    )
    rejected = np.array([[1, 0], [3, 2]], np.int32)

    def run(tokens, rejected):
        return requests.run(
            *(tokens, states, np.array([0, 4, 5], np.int32), implementation),
            cache_indices=np.array([2, 0], np.int32),
            has_initial_state=np.ones(2, bool),
            num_rejected_tokens=rejected,
        )

    got = jax.vmap(run)(jax.tree.map(lambda *a: jnp.stack(a), *tokens), rejected)
    for i in range(2):
        want = run(tokens[i], rejected[i])
        for mapped, alone in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=1):
            np.testing.assert_allclose(mapped[i], alone, rtol=1e-5, atol=1e-6)


def test_errors_name_the_argument():
    requests = Requests(1)
    tokens, offsets = requests.draw(4), np.array([0, 4], np.int32)
    rejected = {"num_rejected_tokens": np.array([1], np.int32)}
    states = no_history()
    with pytest.raises(ValueError, match=r"num_rejected_tokens needs .* DraftStates"):
        requests.run(tokens, states.states, offsets, "xla", **rejected)
    for name in ("x", "dt", "B"):
        wrong = states._replace(**{name: getattr(states, name)[:, :2, ..., :-1]})
        with pytest.raises(ValueError, match=f"ssm_states.{name} must have shape"):
            requests.run(tokens, wrong, offsets, "xla", **rejected)
    with pytest.raises(ValueError, match="max_drafts must be at least 0, got -1"):
        Mamba2Mixer(8, headdim=4, d_state=4, rngs=nnx.Rngs(0)).init_cache(
            2, max_drafts=-1
        )


def test_model_forgets_rejected_drafts():
    """Logits after drafts were taken back are those of a model that never saw them."""
    config = Mamba2Config(
        vocab_size=32, d_model=16, n_layers=1, headdim=8, d_state=8, n_groups=1
    )
    model, drafts = Mamba2LM(config, rngs=nnx.Rngs(0)), 2
    rng = np.random.default_rng(drafts)
    compiled = quick.jit(model.packed)
    prompt, wrong, right = (rng.integers(0, 32, n) for n in (9, drafts, 2))

    def run(cache, tokens, seen=True, rejected=0):
        logits, cache = compiled(
            np.resize(np.array(tokens, np.int32), 12),
            cache,
            np.array([0, len(tokens)], np.int32),
            cache_indices=np.array([1], np.int32),
            has_initial_state=np.array([seen]),
            num_rejected_tokens=np.array([rejected], np.int32),
        )
        return np.asarray(logits), cache

    cache = model.init_cache(2, max_drafts=drafts)
    _, cache = run(cache, prompt[:-1], seen=False)
    _, cache = run(cache, [prompt[-1], *wrong])
    got, cache = run(cache, [right[0]], rejected=drafts)
    want, other = run(
        model.init_cache(2, max_drafts=drafts), [*prompt, right[0]], seen=False
    )
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    got, _ = run(cache, [right[1]])
    want, _ = run(other, [right[1]])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_cache_without_drafts_is_as_ever():
    mixer = Mamba2Mixer(8, headdim=4, d_state=4, rngs=nnx.Rngs(0))
    cache = mixer.init_cache(3, max_drafts=0)
    assert jax.tree.map(jnp.shape, cache) == ((3, 3, 24), (3, 4, 4, 4))
    cache = mixer.init_cache(3, dtype="bfloat16", max_drafts=2)
    assert cache.conv.shape == (3, 5, 24)
    shapes = [(3, 4, 4, 4), (3, 2, 4, 4), (3, 2, 4), (3, 2, 1, 4)]
    assert list(map(jnp.shape, cache.ssm)) == shapes
    kinds = ["float32", "bfloat16", "float32", "bfloat16"]
    assert [a.dtype.name for a in cache.ssm] == kinds
