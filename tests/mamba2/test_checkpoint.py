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

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
        ({"state_size": 0}, "state_size must be a positive integer, got 0"),
        ({"hidden_size": None}, "hidden_size must be a positive integer, got None"),
        ({"head_dim": float("nan")}, "head_dim must be a positive integer, got nan"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers must be .* integer, got '2'"),
        ({"vocab_size": -4}, "vocab_size must be a positive integer, got -4"),
        ({"conv_kernel": True}, "conv_kernel must be a positive integer, got True"),
        ({"n_groups": 3.5}, "n_groups must be a positive integer, got 3.5"),
        ({"expand": float("inf")}, "expand must be a positive finite number, got inf"),
        ({"use_bias": "no"}, "use_bias must be true or false, got 'no'"),
        (
            {"layer_norm_epsilon": -1.0},
            "layer_norm_epsilon must be .*0 or more, got -1",
        ),
        ({"time_step_limit": None}, "time_step_limit must be two numbers.*, got None"),
        ({"time_step_limit": [1, 0]}, r"time_step_limit must be .* got \[1, 0\]"),
        ({"time_step_limit": [0, float("nan")]}, r"time_step_limit must be .*nan\]"),
        ({"eos_token_id": ["2"]}, r"eos_token_id must be an integer, .*got \['2'\]"),
        ({"model_type": "bamba"}, "Mamba2Mixer.from_hf loads the mixers of 'bamba'"),
        ({"model_type": "lfm3"}, "ShortConvMixer.from_hf loads the mixers of 'lfm3'"),
        ({"model_type": ["mamba2"]}, "model_type must be 'mamba2', got"),
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


def changed(**values):
    """Changes fields of a JSON object, or of the map in it."""

    def change(content):
        found = json.loads(content)
        where = found.get("weight_map", found)
        where |= {{"norm": NORM}.get(name, name): v for name, v in values.items()}
        return json.dumps(found).encode()

    return change


def replaced(content):
    return lambda _: content


SHARD, MAP, CONFIG = "b.safetensors", "model.safetensors.index.json", "config.json"
OUTSIDE = r"weight_map\['.*norm.weight'\] must be the name of a file in the same folder"
CUT_OFF = "is not a whole safetensors file"
FAULTS = {
    "above the folder": (MAP, changed(norm="../b.safetensors"), OUTSIDE),
    "absolute": (MAP, changed(norm="/b.safetensors"), OUTSIDE),
    "the folder above": (MAP, changed(norm=".."), OUTSIDE),
    "windows' way above": (MAP, changed(norm="..\\b.safetensors"), OUTSIDE),
    "zero byte": (MAP, changed(norm="b.safetensors\0"), OUTSIDE),
    "no text": (MAP, changed(norm=7), OUTSIDE),
    "nothing": (MAP, changed(norm=""), OUTSIDE),
    "no map": (MAP, replaced(b'{"metadata": {}}'), "weight_map must be an object, got"),
    "index cut off": (MAP, lambda content: content[:-9], "is not JSON"),
    "no object": (CONFIG, replaced(b"[1]"), "must hold a JSON object, got list"),
    "no UTF-8": (CONFIG, replaced(b"\xff"), "is not JSON"),
    "wrong values": (
        CONFIG,
        changed(state_size=None, num_hidden_layers="2"),
        "num_hidden_layers must be .* got '2'; state_size must be .* got None",
    ),
    "pointer": (
        SHARD,
        replaced(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"),
        "is a git-lfs pointer, expected the weights",
    ),
    "header cut off": (SHARD, lambda content: content[:20], CUT_OFF),
    "data cut off": (SHARD, lambda content: content[:-1], CUT_OFF),
    "empty": (SHARD, replaced(b""), CUT_OFF),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_files_are_named_and_nothing_is_placed(fault, tmp_path, monkeypatch):
    _, tensors = checkpoint_of(tmp_path, UNTIED)
    (tmp_path / "model.safetensors").unlink()
    shards = {"a.safetensors": {}, SHARD: {}}
    for number, (name, value) in enumerate(tensors.items()):
        shards[sorted(shards)[number % 2]][name] = value
    for shard, values in shards.items():
        save_file(values, tmp_path / shard)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    (tmp_path / MAP).write_text(json.dumps({"weight_map": weight_map}))
    placed = []
    asarray = jnp.asarray
    monkeypatch.setattr(jnp, "asarray", lambda *a: placed.append(a) or asarray(*a))
    load(tmp_path)
    assert len(placed) >= len(tensors)
    placed.clear()
    name, change, message = FAULTS[fault]
    (tmp_path / name).write_bytes(change((tmp_path / name).read_bytes()))
    with pytest.raises(ValueError, match=message) as error:
        load(tmp_path)
    assert str(tmp_path / name) in str(error.value)
    assert not placed


def test_shard_that_is_not_there_is_named(tmp_path):
    checkpoint_of(tmp_path, TIED)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {NORM: "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileNotFoundError, match=r"model-00001-of-00001\.safetensors"):
        load(tmp_path)


@pytest.mark.parametrize("original", [False, True], ids=["transformers", "original"])
def test_model_saved_without_its_head_loads(original, tmp_path):
    config, tensors = checkpoint_of(tmp_path, TIED)
    expected = load(tmp_path)
    if original:
        config, tensors = goldens.original(config, tensors)
        del tensors["lm_head.weight"]
    tensors = {name.removeprefix("backbone."): v for name, v in tensors.items()}
    goldens.write_checkpoint(tmp_path, config, tensors)
    assert_same_model(load(tmp_path), expected)


def test_model_without_its_head_that_is_not_tied_is_refused(tmp_path):
    config, tensors = checkpoint_of(tmp_path, UNTIED)
    del tensors["lm_head.weight"]
    tensors = {name.removeprefix("backbone."): v for name, v in tensors.items()}
    goldens.write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(ValueError, match=r"missing: lm_head.weight$"):
        load(tmp_path)


def test_tied_table_may_be_stored_as_the_head_alone(tmp_path):
    config, tensors = checkpoint_of(tmp_path, TIED)
    expected = load(tmp_path)
    tensors["lm_head.weight"] = tensors.pop("backbone.embeddings.weight")
    goldens.write_checkpoint(tmp_path, config, tensors)
    assert_same_model(load(tmp_path), expected)


@pytest.mark.parametrize(
    "outside, inside, message",
    [
        ({"d_model": None}, {}, "d_model must be a positive integer, got None"),
        ({"vocab_size": "9"}, {}, "vocab_size must be a positive integer, got '9'"),
        ({}, {"d_state": float("nan")}, "d_state must be a positive integer, got nan"),
        ({}, {"ngroups": -1}, "ngroups must be a positive integer, got -1"),
        ({"ssm_cfg": 3}, {}, "ssm_cfg must be an object, got 3"),
    ],
)
def test_original_config_of_wrong_values_is_refused(outside, inside, message):
    config, _ = goldens.original(
        goldens.MODELS[TIED], goldens.weights(goldens.MODELS[TIED], 7)
    )
    config["ssm_cfg"] |= inside
    with pytest.raises(ValueError, match=message):
        Mamba2Config.from_original(config | outside)


def test_original_config_without_a_size_is_refused():
    with pytest.raises(ValueError, match="n_layer is missing, expected a positive int"):
        Mamba2Config.from_original(
            {"ssm_cfg": {"layer": "Mamba2"}, "vocab_size": 9, "d_model": 8}
        )


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


def test_shards_of_pickles_load_as_one_file(tmp_path):
    torch = pytest.importorskip("torch")
    _, tensors = checkpoint_of(tmp_path, UNTIED)
    expected = load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    shards = {"pytorch_model-1.bin": {}, "pytorch_model-2.bin": {}}
    for number, (name, value) in enumerate(tensors.items()):
        shards[sorted(shards)[number % 2]][name] = torch.tensor(value)
    for number, (shard, values) in enumerate(shards.items()):
        # The older of torch's formats loads as well.
        torch.save(values, tmp_path / shard, _use_new_zipfile_serialization=number == 0)
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert_same_model(load(tmp_path), expected)
    whole = (tmp_path / "pytorch_model-1.bin").read_bytes()
    for content, message in [
        (whole[:-30], "is not a whole torch checkpoint"),
        (b"", "is not a whole torch checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    ]:
        (tmp_path / "pytorch_model-1.bin").write_bytes(content)
        with pytest.raises(ValueError, match=rf"pytorch_model-1\.bin {message}"):
            load(tmp_path)


@pytest.mark.parametrize("content", [["a list"], {"model": {"a": 1}}, {"code": print}])
def test_pickle_of_anything_but_tensors_is_refused(content, tmp_path):
    torch = pytest.importorskip("torch")
    checkpoint_of(tmp_path, TIED)
    (tmp_path / "model.safetensors").unlink()
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin (must hold|is not)"):
        load(tmp_path)
