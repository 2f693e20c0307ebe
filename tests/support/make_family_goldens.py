"""Writes goldens/families.npz: what transformers' mixers of many families compute.

    pip install torch transformers
    python -m tests.support.make_family_goldens

Weights and inputs are drawn as in `make_mamba2_goldens`; the file holds what each layer
returns for whole texts alone.
"""

import importlib

import numpy as np

from tests.support import REPOSITORY
from tests.support.make_mamba2_goldens import uniform

GOLDENS = REPOSITORY / "tests" / "mamba2" / "goldens" / "families.npz"
BATCH, LENGTH = 2, 19
PREFIX = "model.layers.3.mixer."
OUT_MULTIPLIER = 0.7  # of Falcon-H1, whose decoder layer applies it

# Of each family: its layer in transformers, its config.json, and sizes of its weights:
# d_model, d_inner, heads, groups, d_state, width; and which biases there are, and if
# there is a norm.
_JAMBA_LIKE = {
    "hidden_size": 24,
    "mamba_n_heads": 6,
    "mamba_d_head": 8,
    "mamba_n_groups": 2,
    "mamba_d_state": 5,
    "mamba_d_conv": 3,
    "mamba_expand": 2,
    "mamba_chunk_size": 7,
}
_SIZES = (24, 48, 6, 2, 5, 3)
FAMILIES = {
    "mamba2": (
        "Mamba2Mixer",
        {
            "hidden_size": 24,
            "num_heads": 6,
            "head_dim": 8,
            "state_size": 12,
            "n_groups": 3,
            "chunk_size": 7,
            "use_bias": True,
            "time_step_limit": [0.05, 0.3],
        },
        (24, 48, 6, 3, 12, 4),
        "in out conv norm",
    ),
    "bamba": (
        "BambaMixer",
        _JAMBA_LIKE | {"time_step_limit": [0.1, 0.5], "mamba_d_head": "auto"},
        _SIZES,
        "conv norm",
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridMambaLayer",
        _JAMBA_LIKE | {"mamba_proj_bias": True, "mamba_conv_bias": False},
        _SIZES,
        "in out norm",
    ),
    "zamba2": (
        "Zamba2MambaMixer",
        {
            "hidden_size": 20,
            "n_mamba_heads": 6,
            "mamba_ngroups": 2,
            "mamba_d_state": 5,
            "mamba_d_conv": 4,
            "mamba_expand": 3,
            "chunk_size": 7,
            "time_step_min": 0.2,
            "add_bias_linear": True,
        },
        (20, 60, 6, 2, 5, 4),
        "in out conv norm",
    ),
    "nemotron_h": (
        "NemotronHMamba2Mixer",
        {
            "hidden_size": 20,
            "mamba_num_heads": 4,
            "mamba_head_dim": 9,
            "n_groups": 2,
            "ssm_state_size": 5,
            "conv_kernel": 4,
            "chunk_size": 7,
            "time_step_min": 0.15,
            "layer_norm_epsilon": 0.01,
        },
        (20, 36, 4, 2, 5, 4),
        "conv norm",
    ),
    "falcon_h1": (
        "FalconH1Mixer",
        _JAMBA_LIKE
        | {
            "mamba_d_ssm": 36,
            "mamba_d_head": 6,
            "projectors_bias": True,
            "ssm_in_multiplier": 1.3,
            "ssm_multipliers": [0.4, 1.2, 0.9, 1.1, 0.6],
            "ssm_out_multiplier": OUT_MULTIPLIER,
        },
        (24, 36, 6, 2, 5, 3),
        "out conv",
    ),
    "falcon_h1, norm first": (
        "FalconH1Mixer",
        _JAMBA_LIKE
        | {
            "mamba_d_ssm": 36,
            "mamba_d_head": 6,
            "mamba_proj_bias": True,
            "mamba_rms_norm": True,
            "ssm_multipliers": [0.4, 1.2, 0.9, 1.1, 0.6],
            "ssm_out_multiplier": OUT_MULTIPLIER,
        },
        (24, 36, 6, 2, 5, 3),
        "in conv norm",
    ),
    "lfm2": (
        "Lfm2ShortConv",
        {"hidden_size": 20, "conv_L_cache": 3, "conv_bias": True},
        (20, 20, 0, 0, 0, 3),
        "in out conv",
    ),
    "lfm3": ("Lfm3ShortConv", {"hidden_size": 20}, (20, 20, 0, 0, 0, 7), ""),
}


def kind_of(name):
    return name.partition(",")[0]


def config_of(name):
    """Its config.json."""
    return {"model_type": kind_of(name)} | FAMILIES[name][1]


def tensors_of(name):
    """Its tensors, named as in a layer."""
    _, _, (model, inner, heads, groups, state, width), parts = FAMILIES[name]
    parts = parts.split()
    tensors = {}

    def draw(leaf, shape, scale, mean=0.0):
        random = uniform(shape, name, leaf)
        tensors[leaf] = (random * np.float32(scale) + np.float32(mean)).astype("f4")

    channels, conv, columns = inner, "conv", 3 * inner
    if heads:
        channels, conv = inner + 2 * groups * state, "conv1d"
        columns = inner + channels + heads
        draw("A_log", (heads,), 1.2, 0.2)
        draw("D", (heads,), 1.5)
        draw("dt_bias", (heads,), 2, -2)
    draw("in_proj.weight", (columns, model), 1.5 / model**0.5)
    draw(f"{conv}.weight", (channels, 1, width), 0.9)
    draw("out_proj.weight", (model, inner), 3 / inner**0.5)
    sizes = {"in": ("in_proj", columns), "conv": (conv, channels)}
    sizes["out"] = ("out_proj", model)
    for part, (layer, size) in sizes.items():
        if part in parts:
            draw(f"{layer}.bias", (size,), 0.4)
    if "norm" in parts:
        draw("norm.weight", (inner,), 0.5, 1)
    return tensors


def inputs_of(name):
    return uniform((BATCH, LENGTH, FAMILIES[name][2][0]), name, "inputs") * 2


def golden(name):
    """What transformers computes."""
    import torch
    from transformers import AutoConfig

    kind, (layer, options, _, _) = kind_of(name), FAMILIES[name]
    config = AutoConfig.for_model(kind, **options)
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    layer = getattr(module, layer)(config, layer_idx=0).eval()
    if kind == "falcon_h1":
        layer.register_buffer(
            "mup_vector", module.compute_mup_vector(config), persistent=False
        )
    state = {key: torch.tensor(value) for key, value in tensors_of(name).items()}
    layer.load_state_dict(state, strict=True)
    with torch.no_grad():
        out = layer(torch.tensor(inputs_of(name))).numpy()
    return out * np.float32(OUT_MULTIPLIER) if kind == "falcon_h1" else out


def main():
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    arrays = {name: golden(name) for name in FAMILIES}
    np.savez_compressed(GOLDENS, **arrays | {"made with": versions})
    print(f"{GOLDENS}: {GOLDENS.stat().st_size:,} bytes; {versions}")


if __name__ == "__main__":
    main()
