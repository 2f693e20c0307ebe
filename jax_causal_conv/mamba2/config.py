"""What a Mamba2 language model is, apart from any code that computes it.

`Mamba2Config` holds the sizes and options, and reads and writes the config.json of both
published layouts.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from .. import checks
from ..published import families, fields
from ..published.fields import field

__all__ = ["Mamba2Config"]

_ANY_STEP = (0.0, float("inf"))

# Our fields under the names of transformers' Mamba2Config, with its default values.
_HF_FIELDS = {
    "vocab_size": field("vocab_size", 32768, fields.SIZE),
    "d_model": field("hidden_size", 4096, fields.SIZE),
    "n_layers": field("num_hidden_layers", 64, fields.SIZE),
    "d_state": field("state_size", 128, fields.SIZE),
    "d_conv": field("conv_kernel", 4, fields.SIZE),
    "expand": field("expand", 2, fields.POSITIVE),
    "headdim": field("head_dim", 64, fields.SIZE),
    "n_groups": field("n_groups", 8, fields.SIZE),
    "chunk_size": field("chunk_size", 256, fields.SIZE),
    "use_bias": field("use_bias", False, fields.FLAG),
    "use_conv_bias": field("use_conv_bias", True, fields.FLAG),
    "tie_embeddings": field("tie_word_embeddings", False, fields.FLAG),
    "norm_eps": field("layer_norm_epsilon", 1e-5, fields.NOT_NEGATIVE),
    "dt_limit": field("time_step_limit", _ANY_STEP, fields.LIMITS),
    "dt_min": field("time_step_min", 1e-3, fields.POSITIVE),
    "dt_max": field("time_step_max", 0.1, fields.POSITIVE),
    "dt_init_floor": field("time_step_floor", 1e-4, fields.POSITIVE),
    "residual_in_fp32": field("residual_in_fp32", True, fields.FLAG),
    "bos_token_id": field("bos_token_id", 0, fields.TOKEN),
    "eos_token_id": field("eos_token_id", 2, fields.TOKENS),
    "pad_token_id": field("pad_token_id", 1, fields.TOKEN),
}
# What must hold of a config, but is no field here.
_HF_CHECKED = {
    "hidden_act": field("hidden_act", "silu", fields.SILU),
    "num_heads": field("num_heads", None, fields.SIZE_OR_NULL),
}

# The same for `ssm_cfg` of the original code, with that code's default values.
_ORIGINAL_FIELDS = {
    "d_state": field("d_state", 128, fields.SIZE),
    "d_conv": field("d_conv", 4, fields.SIZE),
    "expand": field("expand", 2, fields.POSITIVE),
    "headdim": field("headdim", 64, fields.SIZE),
    "n_groups": field("ngroups", 1, fields.SIZE),
    "chunk_size": field("chunk_size", 256, fields.SIZE),
    "use_bias": field("bias", False, fields.FLAG),
    "use_conv_bias": field("conv_bias", True, fields.FLAG),
    "dt_limit": field("dt_limit", _ANY_STEP, fields.LIMITS),
    "dt_min": field("dt_min", 1e-3, fields.POSITIVE),
    "dt_max": field("dt_max", 0.1, fields.POSITIVE),
    "dt_init_floor": field("dt_init_floor", 1e-4, fields.POSITIVE),
    "norm_before_gate": field("norm_before_gate", False, fields.FLAG),
}
# And for the config around it.
_ORIGINAL_OUTSIDE = {
    "vocab_size": field("vocab_size", fields.Required, fields.SIZE),
    "multiple": field("pad_vocab_size_multiple", 8, fields.SIZE),
    "d_model": field("d_model", fields.Required, fields.SIZE),
    "n_layers": field("n_layer", fields.Required, fields.SIZE),
    "tie_embeddings": field("tie_embeddings", True, fields.FLAG),
    "residual_in_fp32": field("residual_in_fp32", True, fields.FLAG),
}
# What else `ssm_cfg` may hold without an effect on the outputs of a trained model.
_ORIGINAL_IGNORED = {"layer", "conv_init", "A_init_range", "use_mem_eff_path"}
# Options of `ssm_cfg`, and of the config around it, that would change the outputs: each
# must be absent or have this value.
_ORIGINAL_REQUIRED: dict[str, Any] = {
    "rmsnorm": True,
    "D_has_hdim": False,
    "d_ssm": None,
}
_ORIGINAL_REQUIRED_OUTSIDE: dict[str, Any] = {
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "rms_norm": True,
}


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Sizes and options of a Mamba2 language model.

    Attributes:
        vocab_size: rows of the embedding table, padding of the vocabulary included.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        d_state: K, the size of the state per channel.
        d_conv: W, the width of the causal conv.
        expand: d_inner / d_model.
        headdim: P, channels per head; divides d_inner.
        n_groups: G, groups of heads that share B and C; divides the number of heads.
        chunk_size: tokens per chunk of the scan: speed alone depends on it.
        use_bias: whether in- and out-projections have biases.
        use_conv_bias: whether the conv has one.
        tie_embeddings: whether the embedding table is the head as well.
        norm_eps: epsilon of every RMSNorm.
        dt_limit: smallest and largest step size.
        dt_min: smallest step size at initialisation.
        dt_max: largest step size at initialisation.
        dt_init_floor: smaller initial step sizes are raised to it.
        norm_before_gate: apply the gate after the norm rather than before it.
        residual_in_fp32: keep the residual stream in float32 in a 16-bit model.
        bos_token_id: the token that starts a text, or None.
        eos_token_id: the token (or tokens) that ends one, or None.
        pad_token_id: the padding token, or None.

    Raises:
        TypeError: a size is not an int.
        ValueError: sizes do not divide, or a size is below 1.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    n_groups: int = 1
    chunk_size: int = 64
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    norm_before_gate: bool = False
    residual_in_fp32: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "n_layers", "d_state", "d_conv")
        for name in (*sizes, "headdim", "n_groups", "chunk_size"):
            checks.static_int(name, getattr(self, name), minimum=1)
        if not 1 <= self.expand < float("inf"):  # nor is NaN
            raise ValueError(f"expand must be at least 1, got {self.expand}")
        if self.d_inner % self.headdim:
            raise ValueError(
                f"headdim = {self.headdim} must divide expand * d_model = "
                f"{self.d_inner}"
            )
        if self.num_heads % self.n_groups:
            raise ValueError(
                f"n_groups = {self.n_groups} must divide the number of heads, "
                f"{self.num_heads}"
            )

    @property
    def d_inner(self) -> int:
        """Channels of a mixer: expand * d_model."""
        return int(self.expand * self.d_model)

    @property
    def num_heads(self) -> int:
        """H."""
        return self.d_inner // self.headdim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Mamba2Config":
        """Reads the config.json of a transformers `Mamba2ForCausalLM`.

        What is absent has the default of transformers. `norm_before_gate`, which old
        configurations carry, is ignored as transformers ignores it: the gate is always
        applied first.

        Raises:
            ValueError: another kind of model, a value of a wrong kind, an activation
                other than silu, or sizes that contradict each other.
        """
        if (kind := config.get("model_type", "mamba2")) != "mamba2":
            hint = families.loader_of(kind)
            raise ValueError(f"model_type must be 'mamba2', got {kind!r}{hint}")
        values = fields.read(config, _HF_FIELDS | _HF_CHECKED)
        del values["hidden_act"]
        heads = values.pop("num_heads")
        result = cls(**values)
        if heads not in (None, result.num_heads):
            raise ValueError(
                f"num_heads = {heads} contradicts expand * hidden_size / head_dim = "
                f"{result.num_heads}"
            )
        return result

    @classmethod
    def from_original(cls, config: Mapping[str, Any]) -> "Mamba2Config":
        """Reads the config.json of a `state-spaces/mamba2-*` model.

        What is absent has the default of the original code. The vocabulary is padded
        as it pads it.

        Raises:
            ValueError: an option that is not known here (attention or MLP layers,
                LayerNorm, another mixer), naming all of them; or a value that is
                missing or of a wrong kind.
        """
        mixer = config.get("ssm_cfg") or {}
        if not isinstance(mixer, Mapping):
            raise ValueError(f"ssm_cfg must be an object, got {mixer!r}")
        wrong = []
        if (layer := mixer.get("layer", "Mamba1")) != "Mamba2":
            wrong.append(f"ssm_cfg.layer = {layer!r}")
        for options, required, prefix in [
            (mixer, _ORIGINAL_REQUIRED, "ssm_cfg."),
            (config, _ORIGINAL_REQUIRED_OUTSIDE, ""),
        ]:
            for name, value in required.items():
                if options.get(name, value) != value:
                    wrong.append(f"{prefix}{name} = {options[name]!r}")
        known = {name for entry in _ORIGINAL_FIELDS.values() for name in entry.names}
        known |= _ORIGINAL_IGNORED | _ORIGINAL_REQUIRED.keys()
        wrong += [f"ssm_cfg.{name} is unknown" for name in sorted(mixer.keys() - known)]
        if wrong:
            raise ValueError("not a Mamba2 model known here: " + "; ".join(wrong))
        inside = fields.read(mixer, _ORIGINAL_FIELDS)
        outside = fields.read(config, _ORIGINAL_OUTSIDE)
        multiple = outside.pop("multiple")
        outside["vocab_size"] = -(-outside["vocab_size"] // multiple) * multiple
        return cls(**outside, **inside)

    def to_hf(self) -> dict[str, Any]:
        """The config.json of the same model for transformers.

        Raises:
            ValueError: transformers cannot say `norm_before_gate`.
        """
        if self.norm_before_gate:
            raise ValueError("transformers' Mamba2 has no norm_before_gate")
        values = {
            entry.names[-1]: getattr(self, ours) for ours, entry in _HF_FIELDS.items()
        }
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "hidden_act": "silu",
            "num_heads": self.num_heads,
            **json.loads(json.dumps(values)),  # tuples become lists
        }
