"""Mamba2 checkpoints: both published layouts load, strictly; what is saved loads."""

import json
import sys

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("safetensors")

from flax import nnx
from safetensors import safe_open
from safetensors.numpy import save_file

from jax_causal_conv.mamba2 import Mamba2Config, Mamba2LM, load, save
from tests.support import make_mamba2_goldens as goldens

TIED, UNTIED, BIASED, _ = goldens.MODELS
NORM = "backbone.layers.1.mixer.norm.weight"


def checkpoint_of(directory, name, *, seed=7):
    """Writes a model's checkpoint in transformers' layout; returns what is in it."""
    config = goldens.MODELS[name]
    tensors = goldens.weights(config, seed)
    goldens.write_checkpoint(directory, config, tensors)
    return config, tensors


def parameters(model):
    """Values by place."""
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {where: np.asarray(param[...]) for where, param in flat}


def assert_same_model(one, other):
    assert one.config == other.config
    ours, theirs = parameters(one), parameters(other)
    assert ours.keys() == theirs.keys()
    for where, value in ours.items():
        assert value.dtype == theirs[where].dtype, where
        np.testing.assert_array_equal(value, theirs[where], err_msg=str(where))


@pytest.mark.parametrize("name", [TIED, UNTIED, BIASED])
def test_original_layout_loads_as_the_same_model(name, tmp_path):
    config, tensors = checkpoint_of(tmp_path, name)
    expected = load(tmp_path)
    goldens.write_checkpoint(tmp_path, *goldens.original(config, tensors))
    assert_same_model(load(tmp_path), expected)


@pytest.mark.parametrize("name", goldens.MODELS)
def test_saved_model_loads_as_it_was(name, tmp_path):
    _, tensors = checkpoint_of(tmp_path, name)
    model = load(tmp_path)
    save(tmp_path / "saved", model)
    assert_same_model(load(tmp_path / "saved"), model)
    with safe_open(tmp_path / "saved" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}  # transformers wants to know
        assert set(file.keys()) == set(tensors)
        for key, value in tensors.items():
            np.testing.assert_array_equal(file.get_tensor(key), value, err_msg=key)


def test_new_model_survives_a_round_trip(tmp_path):
    config = Mamba2Config(
        vocab_size=11,
        d_model=8,
        n_layers=1,
        d_state=3,
        headdim=4,
        tie_embeddings=False,
        eos_token_id=(4, 5),
        dt_limit=(0.01, float("inf")),
    )
    model = nnx.jit(lambda: Mamba2LM(config, rngs=nnx.Rngs(3)))()
    save(tmp_path, model)
    assert_same_model(load(tmp_path), model)


def test_shards_load_as_one_file(tmp_path):
    _, tensors = checkpoint_of(tmp_path, UNTIED)
    expected = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = {"model-00001-of-00002.safetensors": {}}
    shards["model-00002-of-00002.safetensors"] = {}
    weight_map = {}
    for number, (name, value) in enumerate(tensors.items()):
        shard = sorted(shards)[number % 2]
        shards[shard][name], weight_map[name] = value, shard
    for shard, values in shards.items():
        save_file(values, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same_model(load(tmp_path), expected)


def test_stored_dtype_is_kept_unless_another_is_wanted(tmp_path):
    config, tensors = checkpoint_of(tmp_path, BIASED)
    stored = {name: v.astype(ml_dtypes.bfloat16) for name, v in tensors.items()}
    goldens.write_checkpoint(tmp_path, config, stored)
    expected = parameters(load(tmp_path, dtype=jnp.float32))
    for dtype, param_dtype, of_params in [
        (None, None, jnp.bfloat16),
        (jnp.float16, None, jnp.float16),
        (None, jnp.float32, jnp.float32),
    ]:
        model = load(tmp_path, dtype=dtype, param_dtype=param_dtype)
        assert model.dtype == (dtype or jnp.bfloat16)
        for where, value in parameters(model).items():
            per_head = where[-1] in ("A_log", "D", "dt_bias")
            assert value.dtype == (jnp.float32 if per_head else of_params), where
            np.testing.assert_array_equal(value, expected[where].astype(value.dtype))


def test_chunk_size_may_be_another(tmp_path):
    checkpoint_of(tmp_path, TIED)
    model = load(tmp_path, chunk_size=3)
    assert model.config.chunk_size == model.layers[1].mixer.chunk_size == 3


def test_bfloat16_model_is_saved_bit_for_bit(tmp_path):
    checkpoint_of(tmp_path, TIED)
    model = load(tmp_path, dtype=jnp.bfloat16)
    save(tmp_path / "saved", model)
    assert_same_model(load(tmp_path / "saved"), model)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(NORM), f"missing: {NORM}"),
        (lambda t: t.pop("lm_head.weight"), "missing: lm_head.weight"),
        (lambda t: t.update(extra=np.ones(2)), "unexpected: extra"),
        (lambda t: t.update({NORM: np.ones(3)}), rf"{NORM} has shape \(3,\), exp.*48"),
        (lambda t: t.update({NORM: np.ones(48, np.int32)}), f"{NORM} is not of float"),
    ],
    ids=["missing", "no head", "extra", "misshapen", "integers"],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    config, tensors = checkpoint_of(tmp_path, UNTIED)
    change(tensors)
    # A second fault: all are named at once.
    tensors["another"] = np.ones(1)
    goldens.write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=f"(?s){message}") as error:
        load(tmp_path)
    assert "unexpected: another" in str(error.value)


def test_bias_that_the_config_denies_is_unexpected(tmp_path):
    config, tensors = checkpoint_of(tmp_path, BIASED)
    goldens.write_checkpoint(tmp_path, config | {"use_conv_bias": False}, tensors)
    with pytest.raises(ValueError, match=r"unexpected: backbone.layers.0.*conv1d.bias"):
        load(tmp_path)


def test_tied_head_may_be_stored_but_not_differ(tmp_path):
    config, tensors = checkpoint_of(tmp_path, TIED)
    expected = load(tmp_path)
    head = tensors["backbone.embeddings.weight"].copy()
    goldens.write_checkpoint(tmp_path, config, tensors | {"lm_head.weight": head})
    assert_same_model(load(tmp_path), expected)
    head[3, 4] += 1
    goldens.write_checkpoint(tmp_path, config, tensors | {"lm_head.weight": head})
    with pytest.raises(ValueError, match="differs from the embedding table"):
        load(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model_type": "mamba"}, "model_type must be 'mamba2', got 'mamba'"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu' or 'swish', got 'gelu'"),
        ({"num_heads": 7}, "num_heads = 7 contradicts .* 6"),
        ({"n_groups": 4}, "n_groups = 4 must divide the number of heads, 6"),
        ({"head_dim": 7}, "headdim = 7 must divide .* 48"),
        ({"state_size": 0}, "d_state must be at least 1, got 0"),
    ],
    ids=str,
)
def test_config_of_another_model_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Mamba2Config.from_hf(goldens.MODELS[UNTIED] | change)


def test_original_config_of_another_model_is_refused_with_all_reasons():
    mixer = {"layer": "Mamba1", "rmsnorm": False, "d_ssm": 8, "new": 1}
    config = {
        "d_model": 8,
        "n_layer": 1,
        "vocab_size": 9,
        "ssm_cfg": mixer,
        "attn_layer_idx": [3],
        "d_intermediate": 16,
        "rms_norm": False,
    }
    with pytest.raises(ValueError) as error:
        Mamba2Config.from_original(config)
    for reason in [*(f"ssm_cfg.{name}" for name in mixer), "attn_layer_idx = [3]"]:
        assert reason in str(error.value)
    for reason in ["d_intermediate = 16", "rms_norm = False"]:
        assert reason in str(error.value)


def test_published_configs_are_understood():
    original = Mamba2Config.from_original(
        {  # what state-spaces/mamba2-130m publishes
            "d_model": 768,
            "d_intermediate": 0,
            "n_layer": 24,
            "vocab_size": 50277,
            "ssm_cfg": {"layer": "Mamba2"},
            "attn_layer_idx": [],
            "attn_cfg": {},
            "rms_norm": True,
            "residual_in_fp32": True,
            "fused_add_norm": True,
            "pad_vocab_size_multiple": 16,
            "tie_embeddings": True,
        }
    )
    assert (original.vocab_size, original.num_heads) == (50288, 24)
    assert (original.n_groups, original.d_state, original.headdim) == (1, 128, 64)
    # transformers 5 writes infinity in its own way; absent keys have its defaults.
    hf = Mamba2Config.from_hf({"time_step_limit": [0.0, {"__float__": "Infinity"}]})
    assert hf.dt_limit == (0.0, float("inf"))
    assert (hf.d_model, hf.n_layers, hf.num_heads, hf.n_groups) == (4096, 64, 128, 8)


def test_model_that_transformers_cannot_express_is_not_saved(tmp_path):
    config = Mamba2Config(
        vocab_size=3, d_model=4, n_layers=1, headdim=4, norm_before_gate=True
    )
    model = nnx.eval_shape(lambda: Mamba2LM(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="norm_before_gate"):
        save(tmp_path / "new", model)
    assert not (tmp_path / "new").exists()


def test_directory_without_weights_is_not_found(tmp_path):
    checkpoint_of(tmp_path, TIED)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds none of model\.safetensors"):
        load(tmp_path)


def test_pickle_without_torch_is_refused_with_the_cure(tmp_path, monkeypatch):
    checkpoint_of(tmp_path, TIED)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="can only be read with torch: install it"):
        load(tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_pickle_of_the_original_layout_loads(dtype, tmp_path):
    torch = pytest.importorskip("torch")
    config, tensors = goldens.original(*checkpoint_of(tmp_path, TIED))
    goldens.write_checkpoint(
        tmp_path,
        config,
        {name: v.astype(jnp.dtype(dtype)) for name, v in tensors.items()},
    )
    expected = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        {
            name: torch.tensor(v).to(getattr(torch, dtype))
            for name, v in tensors.items()
        },
        tmp_path / "pytorch_model.bin",
    )
    assert_same_model(load(tmp_path), expected)


@pytest.mark.parametrize("name", goldens.MODELS)
def test_transformers_loads_what_is_saved_and_saves_what_loads(name, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, tensors = checkpoint_of(tmp_path, name)
    model = load(tmp_path)
    save(tmp_path / "ours", model)
    theirs, report = transformers.Mamba2ForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(report.values()), report
    state = theirs.state_dict()
    assert state.keys() - {"lm_head.weight"} == tensors.keys() - {"lm_head.weight"}
    for key, value in tensors.items():
        np.testing.assert_array_equal(state[key].numpy(), value, err_msg=key)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    assert_same_model(load(tmp_path / "theirs"), model)
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "bfloat16")
    assert load(tmp_path / "bfloat16").dtype == jnp.bfloat16
