"""What sampling keeps and draws, against sorting in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_causal_conv.mamba2.sampling import (
    SamplingParams,
    _from_distribution,
    filtered,
    sample,
)
from tests.support import quick

VOCAB = 61
jitted_sample = quick.jit(sample)
weigh = quick.jit(filtered)


def sorted_reference(logits, temperature, top_k, top_p):
    """The weights of one row, the plain way: sort, cut, add up."""
    logits = np.asarray(logits, np.float64)
    order = np.argsort(-logits, kind="stable")
    weights = np.exp((logits - logits.max()) / temperature)
    if 0 < top_k < logits.size:
        weights[order[top_k:]] = 0
    if top_p < 1:
        share = weights[order] / weights.sum()
        before = np.cumsum(share) - share
        weights[order[(before >= top_p) & (np.arange(order.size) > 0)]] = 0
    return weights


def rows(logits, *, seeds=0, positions=0, temperature=1.0, top_k=0, top_p=1.0):
    """The arguments of `sample` for `(N, V)` logits, scalars repeated."""
    n = len(logits)
    return (
        jnp.asarray(logits, jnp.float32),
        np.broadcast_to(np.asarray(seeds, np.uint32), n),
        np.broadcast_to(np.asarray(positions, np.int32), n),
        np.broadcast_to(np.asarray(temperature, np.float32), n),
        np.broadcast_to(np.asarray(top_k, np.int32), n),
        np.broadcast_to(np.asarray(top_p, np.float32), n),
    )


def weights_of(logits, **settings):
    logits, _, _, *settings = rows(logits, **settings)
    return np.asarray(weigh(logits, *settings))


def assert_drawn_from(expected, tokens):
    """Pearson's chi-squared over the tokens that can be expected, and no others."""
    assert not np.setdiff1d(tokens, np.flatnonzero(expected)).size
    mean = expected / expected.sum() * len(tokens)
    common = mean >= 5
    counts = np.bincount(tokens, minlength=len(expected))
    # Rare tokens are counted together.
    observed = np.append(counts[common], counts[~common].sum())
    mean = np.append(mean[common], mean[~common].sum())
    chi2 = ((observed - mean) ** 2 / np.maximum(mean, 1e-9)).sum()
    freedom = common.sum()
    # Five standard deviations; the seeds are fixed.
    assert chi2 < freedom + 5 * np.sqrt(2 * freedom), (chi2, freedom)


@pytest.mark.parametrize("quantum", [0, 0.5])  # 0.5: many tokens tie
def test_what_is_kept_equals_sorting_in_float64(quantum):
    rng = np.random.default_rng(0)
    n = 256
    logits = rng.normal(scale=2, size=(n, VOCAB)).astype(np.float32)
    if quantum:
        logits = np.round(logits / quantum) * np.float32(quantum)
    temperature = rng.choice([0.3, 1.0, 2.5], n).astype(np.float32)
    top_k = rng.choice([0, 1, 2, 5, 20, VOCAB - 1, VOCAB, 1000], n)
    top_p = rng.choice([1.0, *rng.uniform(0.02, 0.98, 7)], n).astype(np.float32)
    got = weights_of(logits, temperature=temperature, top_k=top_k, top_p=top_p)
    for i in range(n):
        row = logits[i], temperature[i], top_k[i], top_p[i]
        expected = sorted_reference(*row)
        np.testing.assert_array_equal(got[i] > 0, expected > 0, err_msg=str(row[1:]))
        np.testing.assert_allclose(got[i], expected, rtol=1e-5)


def test_of_equal_logits_the_first_are_kept():
    logits = np.zeros((1, 8), np.float32)
    for settings in {"top_k": 3}, {"top_p": 0.375}, {"top_k": 6, "top_p": 0.5}:
        kept = weights_of(logits, **settings)[0] > 0
        assert kept.tolist() == [True] * 3 + [False] * 5, settings
    minus_zero = np.array([[-0.0, 0.0, 0.0, -1.0]])
    kept = weights_of(minus_zero, top_k=2)[0] > 0
    assert kept.tolist() == [True, True, False, False]


def test_greedy_is_the_first_of_the_largest():
    logits = np.array([[1, 3, 3, 0], [-2, -np.inf, -1, -1], [5, 5, 5, 5]])
    assert jitted_sample(*rows(logits, temperature=0)).tolist() == [1, 2, 0]
    assert jitted_sample(*rows(logits, temperature=[0, -1, 0])).tolist() == [1, 2, 0]
    beside = np.concatenate([logits, np.zeros((1, 4))])  # a row that is not greedy
    for position in range(16):
        got = jitted_sample(
            *rows(beside, temperature=[0, -1, 0, 1], positions=position)
        )
        assert got[:3].tolist() == [1, 2, 0]


@pytest.mark.parametrize("settings", [{"top_k": 1}, {"top_p": 1e-9}, {"top_p": 0}])
def test_the_narrowest_filters_are_greedy(settings):
    logits = np.random.default_rng(0).normal(size=(16, VOCAB))
    got = jitted_sample(*rows(logits, temperature=100, positions=range(16), **settings))
    np.testing.assert_array_equal(got, logits.argmax(1))


def test_temperatures_near_zero_are_greedy_and_finite():
    logits = np.random.default_rng(0).normal(scale=50, size=(16, VOCAB))
    for temperature in 1e-6, 1e-30, 1e-44:
        assert np.isfinite(weights_of(logits, temperature=temperature)).all()
        got = jitted_sample(*rows(logits, temperature=temperature, positions=range(16)))
        np.testing.assert_array_equal(got, logits.argmax(1))


def test_filters_that_are_off_keep_the_unlikeliest_token():
    logits = np.zeros((1, VOCAB))
    logits[0, 7] = -60.0  # lost in any float32 sum with the others
    for settings in {}, {"top_k": -3}, {"top_k": VOCAB}, {"top_p": 1.5}:
        # Beside a row that filters, which makes the passes happen.
        beside = {"top_k": [settings.get("top_k", 0), 2]}
        beside["top_p"] = [settings.get("top_p", 1.0), 0.5]
        assert (weights_of(np.repeat(logits, 2, 0), **beside)[0] > 0).all()


def test_impossible_tokens_are_never_drawn():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(1, VOCAB))
    logits[0, rng.permutation(VOCAB)[:50]] = -np.inf
    n = 2048
    tokens = jitted_sample(
        *rows(logits.repeat(n, 0), temperature=1e6, positions=range(n))
    )
    assert np.isfinite(logits[0, np.unique(tokens)]).all()


def test_rounding_of_the_running_sum_draws_no_impossible_token(monkeypatch):
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=1 << 15) * (rng.random(1 << 15) < 0.2)
    weights = jnp.asarray(weights, jnp.float32)
    total = np.asarray(jnp.cumsum(weights))
    rises = np.flatnonzero((weights[1:] == 0) & (total[1:] > total[:-1]))
    if not rises.size:
        pytest.skip("here the running sum rises with tokens of some weight only")
    for share in total[rises[:20]] / total.max():
        monkeypatch.setattr(jax.random, "uniform", lambda _, share=share: share)
        assert weights[_from_distribution(weights, 0, 0)] > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"temperature": 1.7, "top_k": 30, "top_p": 0.9},
    ],
    ids=str,
)
@pytest.mark.parametrize("varied", ["positions", "seeds"])
def test_draws_are_distributed_like_the_softmax(settings, varied):
    logits = np.random.default_rng(1).normal(scale=1.5, size=VOCAB)
    n = 4096
    settings = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings}
    expected = sorted_reference(np.float32(logits), **settings)
    got = jitted_sample(
        *rows(np.tile(logits, (n, 1)), **settings, **{varied: range(n)})
    )
    assert_drawn_from(expected, np.asarray(got))


def test_a_draw_depends_on_seed_and_position_alone():
    rng = np.random.default_rng(2)
    n = 64
    logits = rng.normal(size=(n, VOCAB))
    settings = {
        "seeds": rng.integers(0, 2**32, n),
        "positions": rng.integers(0, 2**31, n),
        "temperature": rng.choice([0, 0.7, 1.5], n),
        "top_k": rng.choice([0, 5, 30], n),
        "top_p": rng.choice([0.5, 0.9, 1.0], n),
    }
    got = np.asarray(jitted_sample(*rows(logits, **settings)))
    order = rng.permutation(n)
    shuffled = {name: values[order] for name, values in settings.items()}
    again = np.asarray(jitted_sample(*rows(logits[order], **shuffled)))
    np.testing.assert_array_equal(again, got[order])
    for i in range(4):  # alone, or beside strangers
        other = {name: values.copy() for name, values in settings.items()}
        strangers = rng.normal(size=(n, VOCAB))
        strangers[0] = logits[i]
        for values in other.values():
            values[0] = values[i]
        assert jitted_sample(*rows(strangers, **other))[0] == got[i]
        one = {name: values[i : i + 1] for name, values in settings.items()}
        assert jitted_sample(*rows(logits[i : i + 1], **one))[0] == got[i]


def test_seeds_and_positions_give_independent_draws():
    flat = np.zeros((4096, VOCAB))
    seeds, positions = np.divmod(np.arange(4096), 64)
    got = np.asarray(jitted_sample(*rows(flat, seeds=seeds, positions=positions)))
    # Pairs of neighbours along either axis are uniform over all pairs of halves.
    grid = (got < VOCAB // 2).reshape(64, 64).astype(int)
    for a, b in (grid[1:], grid[:-1]), (grid[:, 1:], grid[:, :-1]):
        half = (VOCAB // 2) / VOCAB
        chances = np.outer([1 - half, half], [1 - half, half]).ravel()
        assert_drawn_from(chances, (2 * a + b).ravel())


def test_a_greedy_batch_does_no_work_but_argmax_on_a_cpu():
    jaxpr = jax.make_jaxpr(sample)(*rows(np.zeros((4, VOCAB)))).jaxpr
    outside = {eqn.primitive.name for eqn in jaxpr.eqns}
    assert "cond" in outside
    costly = ("scan", "while", "cumsum", "exp", "random", "threefry", "sort")
    assert not [name for name in outside if name.startswith(costly)], outside
    compiled = jax.jit(sample).lower(*rows(np.zeros((4, VOCAB)))).compile().as_text()
    assert " conditional(" in compiled, "it is always done"


def test_one_token_in_the_vocabulary():
    got = jitted_sample(
        *rows(np.zeros((3, 1)), temperature=[0, 1, 2], top_k=1, top_p=0.5)
    )
    assert got.tolist() == [0, 0, 0] and got.dtype == jnp.int32


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": 1e39},
        {"temperature": 10**400},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"seed": -1},
        {"seed": 2**32},
    ],
    ids=str,
)
def test_parameters_out_of_range_are_named(wrong):
    with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
        SamplingParams(**wrong)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", value) for value in ("0.5", None, True, 1j, [1.0])],
        *[("top_k", value) for value in (2.0, "3", None, True, np.True_, [1])],
        *[("top_p", value) for value in ("0.5", None, False, np.ones(1))],
        *[("seed", value) for value in (1.0, "1", True, np.float32(1), [1])],
    ],
    ids=str,
)
def test_parameters_of_a_wrong_type_are_named(name, value):
    with pytest.raises(TypeError, match=f"^{name} must be .*, got "):
        SamplingParams(**{name: value})


def test_numbers_of_arrays_are_kept_as_those_of_python():
    got = SamplingParams(
        np.float32(0.5), np.int64(3), jnp.float32(0.25), np.uint32(2**32 - 1)
    )
    assert got == SamplingParams(0.5, 3, 0.25, 2**32 - 1)
    kept = [got.temperature, got.top_k, got.top_p, got.seed]
    assert list(map(type, kept)) == [float, int, float, int]
    assert type(SamplingParams(temperature=1).temperature) is float
