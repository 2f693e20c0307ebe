"""Writes goldens/families.npz: what the mixers of transformers' families compute.

    pip install torch transformers
    python -m tests.support.make_family_goldens

As in make_mamba2_goldens.py, weights and inputs are drawn by name, so that the file
holds outputs alone, and every parameter is random.
"""

import importlib
import json

import numpy as np

from tests.support import REPOSITORY
from tests.support.make_mamba2_goldens import uniform

GOLDENS = REPOSITORY / "tests" / "mamba2" / "goldens" / "families.npz"
ROWS, LENGTH = 2, 23

_SMALL_BAMBA = {
    "hidden_size": 20,
    "mamba_n_heads": 4,
    "mamba_d_state": 6,
    "mamba_chunk_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
# What each config.json holds about the mixer, and the class of the mixer.
MIXERS = {
    "mamba2": (
        {
            "model_type": "mamba2",
            "hidden_size": 18,
            "num_heads": 6,
            "head_dim": 6,
            "state_size": 5,
            "n_groups": 2,
            "chunk_size": 8,
            "time_step_limit": [0.1, 0.7],
        },
        "Mamba2Mixer",
    ),
    "bamba": (
        {"model_type": "bamba", "mamba_n_groups": 2} | _SMALL_BAMBA,
        "BambaMixer",
    ),
    "bamba, biases and limits": (
        {
            "model_type": "bamba",
            "mamba_d_head": 10,
            "mamba_d_conv": 3,
            "mamba_proj_bias": True,
            "mamba_conv_bias": False,
            "time_step_limit": [0.2, 0.9],
            "rms_norm_eps": 1e-2,
        }
        | _SMALL_BAMBA,
        "BambaMixer",
    ),
    "granitemoehybrid": (
        {"model_type": "granitemoehybrid", "time_step_limit": [0.0, 0.5]}
        | _SMALL_BAMBA,
        "GraniteMoeHybridMambaLayer",
    ),
    "zamba2": (
        {
            "model_type": "zamba2",
            "hidden_size": 20,
            "n_mamba_heads": 5,
            "mamba_d_state": 6,
            "mamba_ngroups": 5,
            "chunk_size": 8,
            "add_bias_linear": True,
            "use_conv_bias": False,  # which it does not heed
            "time_step_min": 0.3,
            "layers_block_type": ["linear_attention"],
            "num_attention_heads": 4,
        },
        "Zamba2MambaMixer",
    ),
    "nemotron_h": (
        {
            "model_type": "nemotron_h",
            "hidden_size": 20,
            "expand": 2,  # which it does not heed
            "mamba_num_heads": 6,
            "mamba_head_dim": 4,
            "ssm_state_size": 7,
            "n_groups": 3,
            "conv_kernel": 4,
            "chunk_size": 8,
            "time_step_min": 0.25,
            "layers_block_type": ["linear_attention"],
        },
        "NemotronHMamba2Mixer",
    ),
    "falcon_h1": (
        {
            "model_type": "falcon_h1",
            "mamba_d_ssm": 24,
            "mamba_proj_bias": True,
            "ssm_in_multiplier": 1.7,
            "ssm_multipliers": [0.6, 1.3, 0.8, 1.6, 0.4],
            "time_step_limit": [0.2, 1.0],
        }
        | _SMALL_BAMBA,
        "FalconH1Mixer",
    ),
    "falcon_h1 with a norm": (
        {
            "model_type": "falcon_h1",
            "mamba_d_ssm": None,
            "mamba_rms_norm": True,
            "mamba_n_groups": 2,
            "projectors_bias": True,
            "ssm_multipliers": [0.7, 1.4, 0.9, 1.5, 0.5],
        }
        | _SMALL_BAMBA,
        "FalconH1Mixer",
    ),
    "lfm2": (
        {
            "model_type": "lfm2",
            "hidden_size": 20,
            "conv_bias": True,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["conv"],
        },
        "Lfm2ShortConv",
    ),
    "lfm3": (
        {
            "model_type": "lfm3",
            "hidden_size": 20,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "layer_types": ["conv"],
        },
        "Lfm3ShortConv",
    ),
}


def drawn(case, name, shape):
    """A random parameter: around what it is in trained models."""
    scale, mean = {
        "in_proj.weight": (1.5, 0),
        "norm.weight": (0.5, 1),
        "A_log": (1.2, 0.2),
        "dt_bias": (1.5, -1),
        "D": (1.5, 0),
    }.get(name, (0.6, 0))
    array = uniform(shape, case, name) * np.float32(scale) + np.float32(mean)
    return array.astype(np.float32)


def inputs(case):
    width = MIXERS[case][0]["hidden_size"]
    return uniform((ROWS, LENGTH, width), case, "inputs")


def mixer_of(case):
    """The mixer in torch, with drawn parameters, and their names and shapes."""
    import torch
    import transformers

    config, name = MIXERS[case]
    own = transformers.AutoConfig.for_model(**config, num_hidden_layers=1)
    module = importlib.import_module(
        f"transformers.models.{own.model_type}.modeling_{own.model_type}"
    )
    mixer = getattr(module, name)(own, layer_idx=0)
    if own.model_type == "falcon_h1":
        mixer.register_buffer(
            "mup_vector", module.compute_mup_vector(own), persistent=False
        )
    state = {
        key: torch.tensor(drawn(case, key, tuple(value.shape)))
        for key, value in mixer.state_dict().items()
    }
    mixer.load_state_dict(state, strict=True)
    return own, mixer.eval()


def golden(case):
    """The outputs for whole texts; the shapes of the tensors."""
    import torch

    _, mixer = mixer_of(case)
    with torch.no_grad():
        outputs = mixer(torch.tensor(inputs(case))).numpy()
    shapes = {key: list(value.shape) for key, value in mixer.state_dict().items()}
    return outputs, shapes


def decoding_error(case):
    """How far decoding with a cache there is from reading whole texts."""
    import torch
    import transformers

    config, mixer = mixer_of(case)
    u = torch.tensor(inputs(case))
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad():
        whole = mixer(u)
        first = mixer(u[:, :5], cache=cache)
        rest = [mixer(u[:, t : t + 1], cache=cache) for t in range(5, LENGTH)]
    error = (torch.cat([first, *rest], 1) - whole).abs().max() / whole.abs().max()
    return float(error)


def main():
    import torch
    import transformers

    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    arrays = {"made with": versions}
    for case in MIXERS:
        arrays[f"{case}/outputs"], shapes = golden(case)
        arrays[f"{case}/shapes"] = json.dumps(shapes)
        print(f"{case}: cached decoding differs by {decoding_error(case):.1e}")
    np.savez_compressed(GOLDENS, **arrays)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size:,} bytes; {arrays['made with']}")


if __name__ == "__main__":
    main()
