"""Mixers of published models compute what transformers' layers compute.

goldens/families.npz holds whole texts; what is served in pieces must give the same. All
weights are random, those of norms and biases too.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import nnx

from jax_causal_conv.mamba2 import (
    GatedRMSNorm,
    Mamba2Mixer,
    ShortConvMixer,
    mixer_from_hf,
)
from tests.support import make_family_goldens as goldens
from tests.support import quick

TOLERANCE = 3e-6  # of the largest output
SLOTS = (3, 0)


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products in float32: a GPU may otherwise take TF32."""
    with jax.default_matmul_precision("highest"):
        yield


def tensors_of(name, prefix=goldens.PREFIX):
    return {prefix + key: value for key, value in goldens.tensors_of(name).items()}


def load(name, **options):
    config = goldens.config_of(name)
    return mixer_from_hf(config, tensors_of(name), goldens.PREFIX, **options)


def expected(name):
    with np.load(goldens.GOLDENS) as file:
        return file[name]


def assert_close(got, want):
    scale = np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE * scale)


@pytest.mark.parametrize("name", goldens.FAMILIES)
def test_a_whole_text(name):
    mixer, u, want = load(name), goldens.inputs_of(name), expected(name)
    graphdef, params = nnx.split(mixer)

    @quick.jit
    def call(params, u, ids):
        return nnx.merge(graphdef, params)(u, segment_ids=ids)

    assert_close(call(params, u, None), want)
    # Both texts in one row, after and between padding: packed for training.
    u, ids = np.zeros((1, 48, u.shape[2]), np.float32), np.full((1, 48), -1)
    for i, start in enumerate((2, 24)):
        u[0, start : start + goldens.LENGTH] = goldens.inputs_of(name)[i]
        ids[0, start : start + goldens.LENGTH] = i
    out = call(params, u, ids)
    for i, start in enumerate((2, 24)):
        assert_close(out[0, start : start + goldens.LENGTH], want[i])


@pytest.mark.parametrize("name", goldens.FAMILIES)
def test_a_text_served_in_pieces(name):
    """Chunks of prefills and decodes of two requests, in mixed batches.

    Where there are limits of step sizes, they hold in decoding as well.
    """
    mixer = load(name)
    u, want = goldens.inputs_of(name), expected(name)
    cache = mixer.init_cache(5)
    graphdef, params = nnx.split(mixer)

    @quick.jit
    def step(params, u, cache, offsets, seen):
        return nnx.merge(graphdef, params).packed(
            u,
            cache,
            offsets,
            cache_indices=jnp.asarray(SLOTS),
            has_initial_state=seen,
        )

    done, budget = [0, 0], 8
    # Tokens of each request in a step: prefill and wait, decode beside a chunk, …
    for pieces in [(5, 0), (1, 7), (6, 1), (1, 1), (1, 6), (4, 4), (1, 0)]:
        tokens = np.zeros((budget, u.shape[2]), np.float32)
        offsets = np.array([0, pieces[0], sum(pieces)])
        for i, count in enumerate(pieces):
            tokens[offsets[i] : offsets[i + 1]] = u[i, done[i] : done[i] + count]
        out, cache = step(params, tokens, cache, offsets, np.array(done) > 0)
        for i, count in enumerate(pieces):
            part = want[i, done[i] : done[i] + count]
            np.testing.assert_allclose(
                out[offsets[i] : offsets[i + 1]],
                part,
                rtol=0,
                atol=TOLERANCE * np.abs(want).max(),
            )
            done[i] += count
    assert done == [goldens.LENGTH, goldens.LENGTH]


def test_shards_change_the_layout_and_nothing_else():
    name = "nemotron_h"
    mixer = load(name, num_shards=2)
    assert mixer.num_shards == 2
    assert_close(mixer(goldens.inputs_of(name)), expected(name))


def test_what_a_config_leaves_out_has_the_defaults_of_transformers():
    """A config object's file holds only what differs from its class."""
    defaults = {
        "mamba2": (4096, 8192, 128, 8, 128, 4),
        "bamba": (4096, 8192, 128, 1, 256, 4),
        "granitemoehybrid": (4096, 8192, 128, 1, 256, 4),
        "zamba2": (2560, 5120, 8, 1, 64, 4),
        "nemotron_h": (4096, 8192, 128, 8, 128, 4),
        "falcon_h1": (4096, 1024, 128, 1, 256, 4),
    }
    for kind, sizes in defaults.items():
        with pytest.raises(ValueError, match=r"missing: in_proj\.weight"):
            mixer_from_hf({"model_type": kind}, {}, "")
        model, inner, heads, groups, state, width = sizes
        channels = inner + 2 * groups * state
        wrong = {"in_proj.weight": np.zeros((1, 1)), "conv1d.weight": np.zeros(1)}
        with pytest.raises(ValueError) as error:
            mixer_from_hf({"model_type": kind}, wrong, "")
        assert f"expected ({inner + channels + heads}, {model})" in str(error.value)
        assert f"expected ({channels}, 1, {width})" in str(error.value)


def test_dtypes_and_config_objects():
    name = "bamba"

    class Config:
        def to_dict(self):
            limits = [{"__float__": "0.1"}, {"__float__": "Infinity"}]
            return goldens.config_of(name) | {"time_step_limit": limits}

    mixer = mixer_from_hf(
        Config(), tensors_of(name), goldens.PREFIX[:-1], param_dtype=jnp.bfloat16
    )
    assert mixer.dt_limit == (0.1, math.inf)
    assert mixer.in_proj.kernel.dtype == jnp.bfloat16
    assert {p.dtype for p in (mixer.A_log, mixer.D, mixer.dt_bias)} == {
        jnp.dtype("float32")
    }


def test_everything_wrong_with_tensors_is_named():
    tensors = tensors_of("lfm2")
    del tensors[f"{goldens.PREFIX}conv.bias"]
    tensors[f"{goldens.PREFIX}extra"] = np.zeros(3)
    tensors[f"{goldens.PREFIX}out_proj.weight"] = np.zeros((20, 21))
    tensors[f"{goldens.PREFIX}in_proj.bias"] = np.zeros(60, np.int8)
    with pytest.raises(ValueError) as error:
        mixer_from_hf(goldens.config_of("lfm2"), tensors, goldens.PREFIX)
    for part in (
        f"missing: {goldens.PREFIX}conv.bias",
        f"unexpected: {goldens.PREFIX}extra",
        "out_proj.weight has shape (20, 21), expected (20, 20)",
        "in_proj.bias has dtype int8",
    ):
        assert part in str(error.value)
    with pytest.raises(ValueError, match=r"model_type must be one of mamba2, .*'gpt2'"):
        mixer_from_hf({"model_type": "gpt2"}, {}, "")
    with pytest.raises(ValueError, match="heads must divide d_inner, got 7 and 40"):
        config = {"model_type": "bamba", "hidden_size": 20, "mamba_n_heads": 7}
        mixer_from_hf(config, {}, "")


def test_sizes_of_a_mixer():
    rngs = nnx.Rngs(0)
    # expand alone truncates: 704 * (960 / 704) is 959.99….
    mixer = Mamba2Mixer(704, d_inner=960, use_bias=True, use_out_bias=False, rngs=rngs)
    assert (mixer.d_inner, mixer.num_heads) == (960, 15)
    assert mixer.in_proj.bias is not None
    assert mixer.out_proj.bias is None
    assert mixer.column_sizes == (960, 960, 128, 128, 15)
    with pytest.raises(ValueError, match="headdim must divide d_inner, got 64 and 100"):
        Mamba2Mixer(704, d_inner=100, rngs=rngs)


@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_a_norm_gated_by_sigmoid(norm_before_gate):
    norm = GatedRMSNorm(
        6, groups=2, gate_activation="sigmoid", norm_before_gate=norm_before_gate
    )
    rng = np.random.default_rng(0)
    norm.scale[...] = jnp.asarray(rng.standard_normal(6), jnp.float32)
    y, z = rng.standard_normal((2, 4, 6))
    gate = 1 / (1 + np.exp(-z))
    want = (y if norm_before_gate else y * gate).reshape(4, 2, 3)
    want = want / np.sqrt((want**2).mean(-1, keepdims=True) + 1e-5)
    want = want.reshape(4, 6) * np.asarray(norm.scale[...])
    want = want * gate if norm_before_gate else want
    got = norm(jnp.asarray(y, jnp.float32), jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="gate_activation must be"):
        GatedRMSNorm(6, gate_activation="tanh")


def test_a_short_conv_in_pieces():
    mixer = ShortConvMixer(8, d_conv=7, use_bias=True, rngs=nnx.Rngs(0))
    u = jnp.asarray(np.random.default_rng(0).standard_normal((2, 12, 8)), jnp.float32)
    want = mixer(u)
    first, state = mixer(u[:, :3], return_final_state=True)
    second, state = mixer(u[:, 3:], initial_state=state, return_final_state=True)
    assert_close(np.concatenate([first, second], axis=1), np.asarray(want))
    assert state.shape == (2, 6, 8)
