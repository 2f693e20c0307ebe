"""What a Mamba2 language model is, apart from any code that computes it.

`Mamba2Config` holds the sizes and options, and reads and writes the config.json of both
published layouts.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

__all__ = ["Mamba2Config"]

# Our fields under the names of transformers' Mamba2Config, with its default values.
_HF_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32768),
    "d_model": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 64),
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "n_groups": ("n_groups", 8),
    "chunk_size": ("chunk_size", 256),
    "use_bias": ("use_bias", False),
    "use_conv_bias": ("use_conv_bias", True),
    "tie_embeddings": ("tie_word_embeddings", False),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "dt_limit": ("time_step_limit", (0.0, float("inf"))),
    "dt_min": ("time_step_min", 1e-3),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "residual_in_fp32": ("residual_in_fp32", True),
    "bos_token_id": ("bos_token_id", 0),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", 1),
}

# The same for `ssm_cfg` of the original code, with that code's default values.
_ORIGINAL_FIELDS: dict[str, tuple[str, Any]] = {
    "d_state": ("d_state", 128),
    "d_conv": ("d_conv", 4),
    "expand": ("expand", 2),
    "headdim": ("headdim", 64),
    "n_groups": ("ngroups", 1),
    "chunk_size": ("chunk_size", 256),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
    "dt_limit": ("dt_limit", (0.0, float("inf"))),
    "dt_min": ("dt_min", 1e-3),
    "dt_max": ("dt_max", 0.1),
    "dt_init_floor": ("dt_init_floor", 1e-4),
    "norm_before_gate": ("norm_before_gate", False),
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
        sizes = ("vocab_size", "d_model", "n_layers", "d_state", "d_conv", "expand")
        for name in (*sizes, "headdim", "n_groups", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
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
            ValueError: another kind of model, an activation other than silu, or sizes
                that contradict each other.
        """
        if (kind := config.get("model_type", "mamba2")) != "mamba2":
            raise ValueError(f"model_type must be 'mamba2', got {kind!r}")
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ValueError(f"hidden_act must be 'silu' or 'swish', got {act!r}")
        values = {
            field: config.get(key, default)
            for field, (key, default) in _HF_FIELDS.items()
        }
        values["dt_limit"] = _limits(values["dt_limit"])
        if isinstance(eos := values["eos_token_id"], list):
            values["eos_token_id"] = tuple(eos)
        result = cls(**values)
        if (heads := config.get("num_heads", result.num_heads)) != result.num_heads:
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
                LayerNorm, another mixer), naming all of them.
        """
        mixer = dict(config.get("ssm_cfg") or {})
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
        known = {key for key, _ in _ORIGINAL_FIELDS.values()}
        known |= _ORIGINAL_IGNORED | _ORIGINAL_REQUIRED.keys()
        wrong += [f"ssm_cfg.{name} is unknown" for name in sorted(mixer.keys() - known)]
        if wrong:
            raise ValueError("not a Mamba2 model known here: " + "; ".join(wrong))
        values = {
            field: mixer.get(key, default)
            for field, (key, default) in _ORIGINAL_FIELDS.items()
        }
        values["dt_limit"] = _limits(values["dt_limit"])
        multiple = config.get("pad_vocab_size_multiple", 8)
        return cls(
            vocab_size=-(-config["vocab_size"] // multiple) * multiple,
            d_model=config["d_model"],
            n_layers=config["n_layer"],
            tie_embeddings=config.get("tie_embeddings", True),
            residual_in_fp32=config.get("residual_in_fp32", True),
            **values,
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of the same model for transformers.

        Raises:
            ValueError: transformers cannot say `norm_before_gate`.
        """
        if self.norm_before_gate:
            raise ValueError("transformers' Mamba2 has no norm_before_gate")
        values = {key: getattr(self, field) for field, (key, _) in _HF_FIELDS.items()}
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "hidden_act": "silu",
            "num_heads": self.num_heads,
            **json.loads(json.dumps(values)),  # tuples become lists
        }


def _limits(limits: Any) -> tuple[float, float]:
    """Two floats; transformers may write infinity as {"__float__": "Infinity"}."""
    low, high = (
        float(limit["__float__"] if isinstance(limit, Mapping) else limit)
        for limit in limits
    )
    return low, high
