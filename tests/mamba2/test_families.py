"""Mixers of published families give what transformers' mixers give, however served.

goldens/families.npz holds what transformers computed for whole texts, and
make_family_goldens.py the configs and weights.
"""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("flax")

from flax import nnx

from jax_causal_conv.nnx import GatedRMSNorm, Mamba2Mixer, ShortConvMixer
from tests.support import make_family_goldens as goldens
from tests.support import quick

pytestmark = pytest.mark.usefixtures("quick_compilation")

TOLERANCE = 5e-6  # of the largest output; up to 1.3e-6 was seen
TOKENS, SEQUENCES, SLOTS = 9, 3, 4  # of a serving step
SLOT_OF = (3, 1)  # of each row
PREFIX = "model.layers.7.mixer"


@pytest.fixture(autouse=True)
def exact_products():
    """float32 products in float32: a GPU may otherwise take TF32."""
    with jax.default_matmul_precision("highest"):
        yield


def published(case):
    """A config, tensors under a prefix beside those of another layer, the outputs."""
    config, _ = goldens.MIXERS[case]
    with np.load(goldens.GOLDENS) as file:
        outputs = file[f"{case}/outputs"]
        shapes = json.loads(str(file[f"{case}/shapes"]))
    tensors = {
        f"{PREFIX}.{name}": goldens.drawn(case, name, tuple(shape))
        for name, shape in shapes.items()
    }
    return config, tensors | {"model.layers.70.mixer.D": np.ones(3)}, outputs


def kind_of(config):
    return ShortConvMixer if config["model_type"].startswith("lfm") else Mamba2Mixer


def loaded(case, **options):
    config, tensors, outputs = published(case)
    mixer = kind_of(config).from_hf(config, tensors, PREFIX, **options)
    return mixer, goldens.inputs(case), outputs


def assert_close(got, expected):
    error = np.abs(got - expected).max() / np.abs(expected).max()
    assert error < TOLERANCE, f"{error:.1e} of the largest output"


def served(mixer, u):
    """Outputs of all rows, served in mixed steps.

    The first row begins in chunks of 5 and goes on token by token, while the second,
    which came later, is still in chunks.
    """
    rows, length, width = u.shape
    outputs = np.full(u.shape, np.nan, np.float32)
    is_short = isinstance(mixer, ShortConvMixer)
    cache = mixer.init_state(SLOTS) if is_short else mixer.init_cache(SLOTS)
    graph, state = nnx.split(mixer)

    @quick.jit
    def step(state, tokens, cache, offsets, slots, seen):
        return nnx.merge(graph, state).packed(
            tokens, cache, offsets, cache_indices=slots, has_initial_state=seen
        )

    done = [0] * rows
    for number in range(10 * length):
        if min(done) == length:
            return outputs
        tokens = np.full((TOKENS, width), np.nan, np.float32)
        offsets, slots, seen, where = [0], [], [], []
        for row in range(rows):
            if done[row] == length or number < 2 * row:
                continue
            chunk = 5 if done[row] < 10 else 1
            end = min(length, done[row] + chunk, done[row] + TOKENS - offsets[-1])
            span = slice(done[row], end)
            tokens[offsets[-1] : offsets[-1] + end - done[row]] = u[row, span]
            where.append((row, span, offsets[-1]))
            offsets.append(offsets[-1] + end - done[row])
            slots.append(SLOT_OF[row])
            seen.append(done[row] > 0)
            done[row] = end
        spare = SEQUENCES - len(slots)
        out, cache = step(
            state,
            tokens,
            cache,
            np.array(offsets + offsets[-1:] * spare, np.int32),
            np.array(slots + [-1] * spare, np.int32),
            np.array(seen + [False] * spare),
        )
        for row, span, start in where:
            outputs[row, span] = out[start : start + span.stop - span.start]
    raise AssertionError("the texts were not served")


@pytest.mark.parametrize("case", goldens.MIXERS)
def test_whole_texts_and_mixed_batches_give_what_transformers_gives(case):
    mixer, u, expected = loaded(case)
    whole = quick.jit(mixer)(u)
    assert whole.dtype == np.float32
    assert_close(whole, expected)
    assert_close(served(mixer, u), expected)


@pytest.mark.parametrize("case", ["falcon_h1 with a norm", "zamba2"])
def test_columns_of_shards_are_in_the_mixers_order(case):
    config, _ = goldens.MIXERS[case]
    shards = config.get("mamba_n_groups") or config.get("mamba_ngroups", 1)
    mixer, u, expected = loaded(case, num_shards=shards, chunk_size=3)
    assert mixer.num_shards == shards
    assert_close(quick.jit(mixer)(u), expected)


def test_mixer_is_what_the_config_says():
    """What a config says is what the mixer has: sizes, biases, norm."""
    mixer, _, _ = loaded("falcon_h1")
    assert (mixer.d_inner, mixer.num_heads, mixer.headdim) == (24, 4, 6)
    assert mixer.norm is None
    assert mixer.in_proj.bias is not None
    assert mixer.out_proj.bias is None
    mixer, _, _ = loaded("nemotron_h")
    assert mixer.dt_limit == (0.25, np.inf)
    mixer, _, _ = loaded("zamba2")
    assert mixer.conv.bias is not None


@pytest.mark.parametrize("case", ["falcon_h1", "lfm3"])
def test_stored_dtype_is_kept_unless_another_is_wanted(case):
    config, tensors, _ = published(case)
    stored = {name: v.astype(ml_dtypes.bfloat16) for name, v in tensors.items()}
    load = kind_of(config).from_hf
    for options, of_params, of_outputs in [
        ({}, jnp.bfloat16, jnp.bfloat16),
        ({"param_dtype": jnp.float32}, jnp.float32, jnp.bfloat16),
        ({"dtype": jnp.float32}, jnp.float32, jnp.float32),
    ]:
        mixer = load(config, stored, PREFIX, **options)
        for where, param in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
            per_head = where[-1] in ("A_log", "D", "dt_bias")
            assert param.dtype == (jnp.float32 if per_head else of_params), where
        u = jnp.zeros((1, 2, 20), of_outputs)
        assert jax.eval_shape(mixer, u).dtype == of_outputs


def test_inner_size_that_a_product_would_truncate():
    # 704 * (960 / 704) is 959.99…: published as a size of its own.
    mixer = nnx.eval_shape(
        lambda: Mamba2Mixer(704, d_inner=960, headdim=64, rngs=nnx.Rngs(0))
    )
    assert (mixer.d_inner, mixer.num_heads) == (960, 15)
    with pytest.raises(ValueError, match="headdim must divide d_inner"):
        Mamba2Mixer(704, expand=960 / 704, rngs=nnx.Rngs(0))


@pytest.mark.parametrize("gate_activation", ["silu", "sigmoid"])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_gates_of_the_norm(gate_activation, norm_before_gate):
    norm = GatedRMSNorm(
        6,
        groups=2,
        norm_before_gate=norm_before_gate,
        gate_activation=gate_activation,
        eps=1e-2,
    )
    rng = np.random.default_rng(5)
    y, z = rng.normal(size=(2, 4, 6))
    scale = rng.normal(size=6)
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    gate = (z if gate_activation == "silu" else 1) / (1 + np.exp(-z))
    inner = y if norm_before_gate else y * gate
    square = np.square(inner.reshape(4, 2, 3)).mean(-1).repeat(3, axis=-1)
    expected = inner / np.sqrt(square + 1e-2) * scale
    expected = expected * gate if norm_before_gate else expected
    got = norm(jnp.asarray(y, jnp.float32), jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


def test_unknown_gate_is_refused():
    with pytest.raises(ValueError, match="gate_activation must be 'silu' or 'sigmoid'"):
        GatedRMSNorm(6, gate_activation="gelu")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(f"{PREFIX}.D"), "missing: D"),
        (
            lambda t: t.update({f"{PREFIX}.norm.weight": np.ones(24)}),
            "unexpected: norm",
        ),
        (lambda t: t.update({f"{PREFIX}.D": np.ones(5)}), r"D has shape \(5,\), .*4"),
        (lambda t: t.update({f"{PREFIX}.D": np.ones(4, int)}), "D is not of float16"),
    ],
    ids=["missing", "left over", "misshapen", "integers"],
)
def test_tensors_that_do_not_fit_are_named(change, message):
    config, tensors, _ = published("falcon_h1")
    change(tensors)
    with pytest.raises(ValueError, match=f"(?s){message}"):
        Mamba2Mixer.from_hf(config, tensors, PREFIX)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"mamba_n_heads": None}, "mamba_n_heads must be a positive integer, got None"),
        ({"mamba_d_head": "7"}, "mamba_d_head must be a positive integer or 'auto', g"),
        ({"mamba_d_ssm": 23}, "4 heads of 5 channels contradict the inner size 23"),
        ({"ssm_multipliers": [1, 2]}, r"ssm_multipliers must be 5 finite .* \[1, 2\]"),
        ({"ssm_in_multiplier": float("nan")}, "ssm_in_multiplier must be a finite num"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', got 'gelu'"),
        ({"model_type": "llama"}, "model_type must be one of 'mamba2', 'bamba'.*llama"),
        ({"model_type": "lfm2"}, "ShortConvMixer.from_hf loads the mixers of 'lfm2'"),
        ({"model_type": None}, "model_type must be one of .*, got None"),
    ],
    ids=str,
)
def test_config_that_says_something_else_is_refused(change, message):
    config, tensors, _ = published("falcon_h1")
    with pytest.raises(ValueError, match=message):
        Mamba2Mixer.from_hf(config | change, tensors, PREFIX)


def test_short_conv_follows_its_formula_in_training_and_padding():
    rng = np.random.default_rng(3)
    mixer = ShortConvMixer(6, d_conv=7, use_bias=True, rngs=nnx.Rngs(1))
    for _, param in nnx.to_flat_state(nnx.state(mixer, nnx.Param)):
        param[...] = rng.normal(size=param.shape)
    u = rng.normal(size=(2, 11, 6)).astype(np.float32)
    ids = np.array([[0] * 4 + [1] * 7, [2] * 9 + [-1] * 2])
    got = np.asarray(quick.jit(lambda u: mixer(u, segment_ids=ids))(u))

    def wide(param):
        return np.asarray(param[...], np.float64)

    columns = u @ wide(mixer.in_proj.kernel) + wide(mixer.in_proj.bias)
    b, c, x = np.split(columns, 3, axis=-1)
    kernel = wide(mixer.conv.kernel)
    y = np.zeros(u.shape)
    for row, t, back in np.ndindex(2, 11, 7):
        if back <= t and ids[row, t] == ids[row, t - back]:
            y[row, t] += kernel[:, -1 - back] * (b * x)[row, t - back]
    y += wide(mixer.conv.bias)
    expected = (c * y) @ wide(mixer.out_proj.kernel) + wide(mixer.out_proj.bias)
    np.testing.assert_allclose(got[ids >= 0], expected[ids >= 0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", goldens.MIXERS)
def test_goldens_are_what_transformers_gives(case):
    pytest.importorskip("torch")
    # 5.17 normalises over all groups of a mixer at once, 5.24 by groups, as we do.
    pytest.importorskip("transformers", minversion="5.24")
    outputs, shapes = goldens.golden(case)
    _, tensors, expected = published(case)
    assert_close(outputs, expected)
    for name, shape in shapes.items():
        assert list(tensors[f"{PREFIX}.{name}"].shape) == shape
