"""The convs of published models: one table for tests and benchmarks.

Sizes are derived from the fields of each model's `config.json` in its Hugging Face
repository, named in the comments. For the Mamba2 family the conv runs over x, B and C
together: `d_inner + 2 * n_groups * d_state` channels.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelShape:
    """The conv of one model.

    Attributes:
        name: the model.
        dim: D, channels of the conv.
        width: W, taps of the filter.
        layers: how many layers of the model hold such a conv.
        dtype: of activations and weights, as published.
        bias: does the conv have a bias?
        activation: what follows the conv.
    """

    name: str
    dim: int
    layers: int
    width: int = 4
    dtype: str = "bfloat16"
    bias: bool = True
    activation: str | None = "silu"


def _mamba2(d_inner: int, n_groups: int, d_state: int) -> int:
    return d_inner + 2 * n_groups * d_state


MODELS = (
    # state-spaces/mamba2-130m: d_model 768, n_layer 24; the rest are defaults of
    # mamba_ssm's Mamba2: expand 2, ngroups 1, d_state 128, d_conv 4. The config names
    # no dtype; this one stands for float32, in which such small models are trained.
    ModelShape("Mamba2-130M", _mamba2(2 * 768, 1, 128), 24, dtype="float32"),
    # state-spaces/mamba2-2.7b: d_model 2560, n_layer 64, else as above. Served in
    # bfloat16; the config names no dtype.
    ModelShape("Mamba2-2.7B", _mamba2(2 * 2560, 1, 128), 64),
    # mistralai/Mamba-Codestral-7B-v0.1: hidden_size 4096, expand 2, n_groups 8,
    # state_size 128, conv_kernel 4, num_hidden_layers 64.
    ModelShape("Codestral-Mamba-7B", _mamba2(2 * 4096, 8, 128), 64),
    # ibm-ai-platform/Bamba-9B-v1: hidden_size 4096, mamba_expand 2, mamba_n_groups 1,
    # mamba_d_state 128, mamba_d_conv 4, 32 layers of which 3 are attention.
    ModelShape("Bamba-9B", _mamba2(2 * 4096, 1, 128), 29),
    # Zyphra/Zamba2-2.7B: hidden_size 2560, mamba_expand 2, mamba_ngroups 1,
    # mamba_d_state 64, mamba_d_conv 4, 54 layers, all with a Mamba2 mixer.
    ModelShape("Zamba2-2.7B", _mamba2(2 * 2560, 1, 64), 54),
    # Zyphra/Zamba2-7B: hidden_size 3584, mamba_expand 2, mamba_ngroups 2,
    # mamba_d_state 64, 81 layers.
    ModelShape("Zamba2-7B", _mamba2(2 * 3584, 2, 64), 81),
    # nvidia/Nemotron-H-8B-Base-8K: mamba_num_heads 128 x mamba_head_dim 64, n_groups 8,
    # ssm_state_size 128, conv_kernel 4; 24 "M" in hybrid_override_pattern.
    ModelShape("Nemotron-H-8B", _mamba2(128 * 64, 8, 128), 24),
    # tiiuae/Falcon-H1-7B-Base: mamba_d_ssm 3072 (24 heads of 128), mamba_d_state 256,
    # mamba_n_groups 1, mamba_d_conv 4, 44 layers, all with attention and Mamba2 side by
    # side. (n_groups is known for the 0.5B model and taken to be the same here.)
    ModelShape("Falcon-H1-7B", _mamba2(3072, 1, 256), 44),
    # ibm-granite/granite-4.0-h-small: mamba_n_heads 128 x mamba_d_head 64,
    # mamba_n_groups 1, mamba_d_state 128, mamba_d_conv 4; 36 of 40 layers.
    ModelShape("Granite-4-H-Small", _mamba2(128 * 64, 1, 128), 36),
    # ibm-granite/granite-4.0-h-tiny: mamba_n_heads 48 x mamba_d_head 64, else the same.
    ModelShape("Granite-4-H-Tiny", _mamba2(48 * 64, 1, 128), 36),
    # Qwen/Qwen3-Next-80B-A3B: gated delta net over q, k and v together:
    # 2 * linear_num_key_heads 16 * linear_key_head_dim 128
    # + linear_num_value_heads 32 * linear_value_head_dim 128; linear_conv_kernel_dim 4,
    # no bias; 36 of 48 layers.
    ModelShape("Qwen3-Next-80B", 2 * 16 * 128 + 32 * 128, 36, bias=False),
    # LiquidAI/LFM2-1.2B: hidden_size 2048, conv_L_cache 3, conv_bias false, 10 of 16
    # layers. Gates surround the conv, no activation follows it.
    ModelShape("LFM2-1.2B", 2048, 10, width=3, bias=False, activation=None),
)


def by_kernel(models: tuple[ModelShape, ...] = MODELS) -> dict[ModelShape, str]:
    """One model for each distinct conv, with the names of all that share it."""
    names: dict[tuple, list[ModelShape]] = {}
    for model in models:
        key = (model.dim, model.width, model.dtype, model.bias, model.activation)
        names.setdefault(key, []).append(model)
    return {same[0]: ", ".join(m.name for m in same) for same in names.values()}
