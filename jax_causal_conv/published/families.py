"""Which families of models have these mixers, and how their configs call the sizes.

The names and defaults are those of the config classes in transformers 5.24. A family
is a row of a table: its layers differ from those here in names alone.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from . import fields
from .fields import field

_ANY_STEP = (0.0, float("inf"))

_MAMBA2 = {
    "d_model": field("hidden_size", 4096, fields.SIZE),
    "d_state": field("state_size", 128, fields.SIZE),
    "d_conv": field("conv_kernel", 4, fields.SIZE),
    "expand": field("expand", 2, fields.POSITIVE),
    "num_heads": field("num_heads", 128, fields.SIZE),
    "headdim": field("head_dim", 64, fields.SIZE),
    "n_groups": field("n_groups", 8, fields.SIZE),
    "chunk_size": field("chunk_size", 256, fields.SIZE),
    "use_bias": field("use_bias", False, fields.FLAG),
    "use_conv_bias": field("use_conv_bias", True, fields.FLAG),
    "activation": field("hidden_act", "silu", fields.SILU),
    "norm_eps": field("layer_norm_epsilon", 1e-5, fields.NOT_NEGATIVE),
    "dt_limit": field("time_step_limit", _ANY_STEP, fields.LIMITS),
}
_BAMBA = {
    "d_model": field("hidden_size", 4096, fields.SIZE),
    "d_state": field("mamba_d_state", 256, fields.SIZE),
    "d_conv": field("mamba_d_conv", 4, fields.SIZE),
    "expand": field("mamba_expand", 2, fields.POSITIVE),
    "num_heads": field("mamba_n_heads", 128, fields.SIZE),
    "headdim": field("mamba_d_head", "auto", fields.SIZE_OR_AUTO),
    "n_groups": field("mamba_n_groups", 1, fields.SIZE),
    "chunk_size": field("mamba_chunk_size", 256, fields.SIZE),
    "use_bias": field("mamba_proj_bias", False, fields.FLAG),
    "use_conv_bias": field("mamba_conv_bias", True, fields.FLAG),
    "activation": field("hidden_act", "silu", fields.SILU),
    "norm_eps": field("rms_norm_eps", 1e-5, fields.NOT_NEGATIVE),
    "dt_limit": field("time_step_limit", _ANY_STEP, fields.LIMITS),
}
_FAMILIES: dict[str, dict[str, Any]] = {
    "mamba2": _MAMBA2,
    "bamba": _BAMBA,
    "granitemoehybrid": _BAMBA
    | {"norm_eps": field("rms_norm_eps", 1e-6, fields.NOT_NEGATIVE)},
    # Its own names for some sizes; what is no field here, it does not let choose.
    "zamba2": {
        "d_model": field("hidden_size", 2560, fields.SIZE),
        "d_state": field("mamba_d_state", 64, fields.SIZE),
        "d_conv": field("mamba_d_conv", 4, fields.SIZE),
        "expand": field("mamba_expand", 2, fields.POSITIVE),
        "num_heads": field("n_mamba_heads", 8, fields.SIZE),
        "headdim": None,
        "n_groups": field("mamba_ngroups", 1, fields.SIZE),
        "chunk_size": field("chunk_size", 256, fields.SIZE),
        "use_bias": field("add_bias_linear", False, fields.FLAG),
        "dt_limit": field("time_step_min", 1e-3, fields.LEAST),
    },
    # d_inner follows from the heads, whatever `expand` says.
    "nemotron_h": {
        "d_model": field("hidden_size", 4096, fields.SIZE),
        "d_state": field("ssm_state_size", 128, fields.SIZE),
        "d_conv": field("conv_kernel", 4, fields.SIZE, "mamba_d_conv"),
        "num_heads": field("mamba_num_heads", 128, fields.SIZE),
        "headdim": field("mamba_head_dim", 64, fields.SIZE),
        "n_groups": field("n_groups", 8, fields.SIZE, "mamba_n_groups"),
        "chunk_size": field("chunk_size", 128, fields.SIZE, "mamba_chunk_size"),
        "use_bias": field("use_bias", False, fields.FLAG),
        "use_conv_bias": field("use_conv_bias", True, fields.FLAG, "mamba_conv_bias"),
        "activation": field("mamba_hidden_act", "silu", fields.SILU),
        "norm_eps": field("layer_norm_epsilon", 1e-5, fields.NOT_NEGATIVE),
        "dt_limit": field("time_step_min", 1e-3, fields.LEAST, "mamba_dt_min"),
    },
    "falcon_h1": _BAMBA
    | {
        "d_inner": field("mamba_d_ssm", 1024, fields.SIZE_OR_NULL),
        "use_out_bias": field("projectors_bias", False, fields.FLAG),
        "norm": field("mamba_rms_norm", False, fields.FLAG),
        "norm_before_gate": field("mamba_norm_before_gate", True, fields.FLAG),
        "in_factor": field("ssm_in_multiplier", 1.0, fields.FACTOR),
        "factors": field("ssm_multipliers", None, fields.factors(5)),
    },
}
_SHORT_CONV: dict[str, dict[str, Any]] = {
    kind: {
        "d_model": field("hidden_size", d_model, fields.SIZE),
        "d_conv": field("conv_L_cache", d_conv, fields.SIZE),
        "use_bias": field("conv_bias", False, fields.FLAG),
    }
    for kind, d_model, d_conv in [
        ("lfm2", 2560, 3),
        ("lfm2_moe", 2048, 3),
        ("lfm3", 2048, 7),
    ]
}
_LOADERS = {
    "Mamba2Mixer.from_hf": _FAMILIES,
    "ShortConvMixer.from_hf": _SHORT_CONV,
}


class Mixer(NamedTuple):
    """A Mamba-2 mixer of a family.

    Attributes:
        arguments: of a `Mamba2Mixer`.
        in_factor: what in_proj's input is multiplied by.
        factors: what z, x, B, C, dt are multiplied by, biases included.
    """

    arguments: dict[str, Any]
    in_factor: float
    factors: tuple[float, ...]

    @property
    def columns(self) -> np.ndarray:
        """`factors` of each column of in_proj, in float32."""
        sizes = self.arguments
        states = sizes["n_groups"] * sizes["d_state"]
        heads = sizes["d_inner"] // sizes["headdim"]
        repeats = (sizes["d_inner"], sizes["d_inner"], states, states, heads)
        return np.repeat(np.array(self.factors, np.float32), repeats)


def mamba2(config: Mapping[str, Any]) -> Mixer:
    """The Mamba-2 mixer of which a config speaks.

    Raises:
        ValueError: the family has none, or a value is of the wrong kind, or sizes
            contradict each other.
    """
    values = _read(config, _FAMILIES)
    heads, headdim = values.pop("num_heads"), values.pop("headdim")
    expand = values.pop("expand", None)
    d_inner = values.pop("d_inner", None)
    if d_inner is None:
        d_inner = heads * headdim if expand is None else int(expand * values["d_model"])
    headdim = headdim or d_inner // heads
    if heads * headdim != d_inner:
        raise ValueError(
            f"{heads} heads of {headdim} channels contradict the inner size {d_inner}"
        )
    in_factor = values.pop("in_factor", 1.0)
    factors = values.pop("factors", (1.0,) * 5)
    return Mixer(values | {"d_inner": d_inner, "headdim": headdim}, in_factor, factors)


def short_conv(config: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of the `ShortConvMixer` of which a config speaks.

    Raises:
        ValueError: the family has none, or a value is of the wrong kind.
    """
    return _read(config, _SHORT_CONV)


def loader_of(kind: Any) -> str:
    """A hint at what loads the mixers of a model_type, or nothing."""
    found = [
        f"; {loader} loads the mixers of {kind!r}"
        for loader, families in _LOADERS.items()
        if isinstance(kind, str) and kind in families
    ]
    return "".join(found)


def _read(config: Mapping[str, Any], families: dict[str, Any]) -> dict[str, Any]:
    """The values that a config of one of these families has."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in families:
        known = ", ".join(map(repr, families))
        raise ValueError(
            f"model_type must be one of {known}, got {kind!r}{loader_of(kind)}"
        )
    return fields.read(config, families[kind])
