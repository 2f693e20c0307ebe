"""Mixers of published models, from their configurations and tensors.

Many hybrid models have Mamba2's mixer, or a short conv, in some of their layers. They
differ in what they call its sizes, and in little else: `_MAMBA2` and `_SHORT_CONV` are
all there is to know about them.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .mixer import Mamba2Mixer
from .short_conv import ShortConvMixer

_ANY = (0.0, math.inf)


class _Is(NamedTuple):
    """What is so in all models of a family, whatever their config says."""

    value: Any


# Arguments of `Mamba2Mixer`, and a few more that `_mamba2_options` makes some from:
# what they are called in a config, and what they are if it does not say.
_JAMBA_LIKE: dict[str, Any] = {
    "d_model": ("hidden_size", 4096),
    "num_heads": ("mamba_n_heads", 128),
    "headdim": ("mamba_d_head", "auto"),
    "expand": ("mamba_expand", 2),
    "n_groups": ("mamba_n_groups", 1),
    "d_state": ("mamba_d_state", 256),
    "d_conv": ("mamba_d_conv", 4),
    "use_bias": ("mamba_proj_bias", False),
    "use_conv_bias": ("mamba_conv_bias", True),
    "norm_eps": ("rms_norm_eps", 1e-5),
    "activation": ("hidden_act", "silu"),
    "dt_limit": ("time_step_limit", _ANY),
}
_MAMBA2: dict[str, dict[str, Any]] = {
    "mamba2": {
        "d_model": ("hidden_size", 4096),
        "num_heads": ("num_heads", 128),
        "headdim": ("head_dim", 64),
        "expand": ("expand", 2),
        "n_groups": ("n_groups", 8),
        "d_state": ("state_size", 128),
        "d_conv": ("conv_kernel", 4),
        "use_bias": ("use_bias", False),
        "use_conv_bias": ("use_conv_bias", True),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "activation": ("hidden_act", "silu"),
        "dt_limit": ("time_step_limit", _ANY),
    },
    "bamba": _JAMBA_LIKE,
    "granitemoehybrid": _JAMBA_LIKE | {"norm_eps": ("rms_norm_eps", 1e-6)},
    "zamba2": {
        "d_model": ("hidden_size", 2560),
        "num_heads": ("n_mamba_heads", 8),
        "headdim": ("mamba_headdim", "auto"),
        "expand": ("mamba_expand", 2),
        "n_groups": ("mamba_ngroups", 1),
        "d_state": ("mamba_d_state", 64),
        "d_conv": ("mamba_d_conv", 4),
        "use_bias": ("add_bias_linear", False),
        "use_conv_bias": _Is(True),
        "norm_eps": _Is(1e-5),
        "activation": _Is("silu"),
        "least_dt": ("time_step_min", 1e-3),
    },
    "nemotron_h": {
        "d_model": ("hidden_size", 4096),
        "num_heads": ("mamba_num_heads", 128),
        "headdim": ("mamba_head_dim", 64),
        "n_groups": ("n_groups", 8),
        "d_state": ("ssm_state_size", 128),
        "d_conv": ("conv_kernel", 4),
        "use_bias": ("use_bias", False),
        "use_conv_bias": ("use_conv_bias", True),
        "norm_eps": ("layer_norm_epsilon", 1e-5),
        "activation": ("mamba_hidden_act", "silu"),
        "least_dt": ("time_step_min", 1e-3),
    },
    "falcon_h1": _JAMBA_LIKE
    | {
        "d_inner": ("mamba_d_ssm", 1024),
        "use_out_bias": ("projectors_bias", False),
        "norm": ("mamba_rms_norm", False),
        "norm_before_gate": ("mamba_norm_before_gate", True),
        "column_multipliers": ("ssm_multipliers", None),
        "in_multiplier": ("ssm_in_multiplier", 1.0),
        "out_multiplier": ("ssm_out_multiplier", 1.0),
    },
}
_SHORT_CONV: dict[str, dict[str, Any]] = {
    kind: {
        "d_model": ("hidden_size", 2560),
        "d_conv": ("conv_L_cache", width),
        "use_bias": ("conv_bias", False),
    }
    for kind, width in (("lfm2", 3), ("lfm2_moe", 3), ("lfm3", 7))
}

# The decay of every token depends on these few numbers: they are never rounded to 16
# bits.
_FLOAT32 = {"A_log", "D", "dt_bias"}


def mixer_from_hf(
    config: Any, tensors: Mapping[str, Any], prefix: str, **options: Any
) -> Any:
    """The mixer of one layer of a published model, with its weights.

    For models whose config.json has the "model_type" `mamba2`, `bamba`,
    `granitemoehybrid`, `zamba2`, `nemotron_h` or `falcon_h1` (a `Mamba2Mixer`), `lfm2`,
    `lfm2_moe` or `lfm3` (a `ShortConvMixer`). In float32 it computes what transformers'
    layer computes from a whole text, to rounding, and the same when it is served in
    pieces (`packed`). transformers does not: where it decodes with a cache it does not
    limit step sizes (`time_step_limit`, and `time_step_min` in zamba2 and nemotron_h),
    so its continuations differ from its own reading of the same text.

    Falcon-H1's multipliers are folded into the weights: `ssm_in_multiplier`,
    `ssm_multipliers`, and `ssm_out_multiplier`, by which its decoder layer multiplies
    what the mixer returns, and which must not be applied again.

    Args:
        config: a parsed config.json, or the config object of transformers.
        tensors: arrays by name, such as `safetensors.numpy.load_file` gives.
        prefix: of the layer's names, such as "model.layers.0.mamba.".
        **options: arguments of the mixer that do not come from the checkpoint: `dtype`,
            `param_dtype`, `num_shards`, `chunk_size`, `precision`, `implementation`.

    Returns:
        A `Mamba2Mixer` or a `ShortConvMixer`. `A_log`, `D` and `dt_bias` are float32
        whatever `param_dtype` is.

    Raises:
        ValueError: another `model_type`; or tensors are missing, left over under the
            prefix, or misshapen, all of which are named.

    Example:
        >>> config = json.loads(Path("config.json").read_text())
        >>> tensors = safetensors.numpy.load_file("model.safetensors")
        >>> mixer = mixer_from_hf(config, tensors, "model.layers.0.mamba.")
    """
    if not isinstance(config, Mapping):
        config = config.to_dict()
    kind = config.get("model_type")
    make: type[Any]
    prefix = prefix if not prefix or prefix.endswith(".") else f"{prefix}."
    if kind in _MAMBA2:
        known = _read(_MAMBA2[kind], config)
        multipliers = _multipliers(known)
        make, known, conv = Mamba2Mixer, _mamba2_options(known), "conv1d"
    elif kind in _SHORT_CONV:
        make, known, conv = ShortConvMixer, _read(_SHORT_CONV[kind], config), "conv"
        multipliers = None
    else:
        kinds = ", ".join([*_MAMBA2, *_SHORT_CONV])
        raise ValueError(f"model_type must be one of {kinds}, got {kind!r}")
    mixer: Any = nnx.eval_shape(lambda: make(**known | options, rngs=nnx.Rngs(0)))
    weights = _weights(mixer, tensors, prefix, conv)
    if multipliers is not None:
        _fold(mixer, weights, *multipliers)
    if isinstance(mixer, Mamba2Mixer):
        _put_in_order(mixer, weights)
    graphdef, state = nnx.split(mixer)
    loaded = [
        (where, param.replace(_array(where, weights[where], param.dtype)))
        for where, param in nnx.to_flat_state(state)
    ]
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _read(table: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by our names."""
    return {
        ours: theirs.value
        if isinstance(theirs, _Is)
        else config.get(theirs[0], theirs[1])
        for ours, theirs in table.items()
    }


def _mamba2_options(known: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `Mamba2Mixer` from what a config says."""
    options = dict(known)
    heads, headdim = options.pop("num_heads"), options["headdim"]
    if headdim in ("auto", None):
        inner = options.get("d_inner") or int(options["expand"] * options["d_model"])
        if heads < 1 or inner % heads:
            raise ValueError(
                f"the number of heads must divide d_inner, got {heads} and {inner}"
            )
        headdim = inner // heads
    options |= {"headdim": headdim, "d_inner": heads * headdim}
    if "least_dt" in options:
        options["dt_limit"] = (options.pop("least_dt"), math.inf)
    else:
        options["dt_limit"] = tuple(
            # Infinity, as transformers may write it.
            float(limit["__float__"] if isinstance(limit, Mapping) else limit)
            for limit in options["dt_limit"]
        )
    for name in ("expand", "column_multipliers", "in_multiplier", "out_multiplier"):
        options.pop(name, None)
    return options


def _multipliers(known: Mapping[str, Any]) -> tuple | None:
    """Of in_proj's input, of its columns z, x, B, C, dt, and of out_proj."""
    if "in_multiplier" not in known:
        return None
    columns = known["column_multipliers"] or (1.0,) * 5
    return known["in_multiplier"], columns, known["out_multiplier"]


def _weights(
    mixer: Any, tensors: Mapping[str, Any], prefix: str, conv: str
) -> dict[tuple, np.ndarray]:
    """Float32 arrays (or as they are) by their place in the mixer, in its layout."""
    names, weights, wrong = {}, {}, []
    for where, param in nnx.to_flat_state(nnx.state(mixer)):
        leaf = "weight" if where[-1] in ("kernel", "scale") else str(where[-1])
        path = [conv if part == "conv" else str(part) for part in where[:-1]]
        name = prefix + ".".join([*path, leaf])
        names[name] = where
        shape = tuple(param.shape)
        if where[-1] == "kernel":
            is_conv = where[-2] == "conv"
            shape = (shape[0], 1, shape[1]) if is_conv else shape[::-1]
        if name not in tensors:
            wrong.append(f"missing: {name}")
            continue
        array = np.asarray(tensors[name])
        if array.shape != shape:
            wrong.append(f"{name} has shape {array.shape}, expected {shape}")
        elif not jnp.issubdtype(array.dtype, jnp.floating):
            wrong.append(f"{name} has dtype {array.dtype}, expected floats")
        elif where[-1] == "kernel":
            weights[where] = array[:, 0] if array.ndim == 3 else array.T
        else:
            weights[where] = array
    left_over = {n for n in tensors if n.startswith(prefix)} - names.keys()
    wrong += [f"unexpected: {name}" for name in sorted(left_over)]
    if wrong:
        raise ValueError("the tensors do not fit the config:\n  " + "\n  ".join(wrong))
    return weights


def _fold(mixer: Mamba2Mixer, weights, inputs: float, columns, outputs: float) -> None:
    """Multiplies weights in the published order by a model's multipliers."""
    scale = np.repeat(np.asarray(columns, np.float64), mixer.column_sizes)
    scales = {
        ("in_proj", "kernel"): scale * inputs,
        ("in_proj", "bias"): scale,
        ("out_proj", "kernel"): outputs,
        ("out_proj", "bias"): outputs,
    }
    for where, factor in scales.items():
        if where in weights:
            weights[where] = weights[where].astype(np.float64) * factor


def _put_in_order(mixer: Mamba2Mixer, weights) -> None:
    """Brings columns and channels into the order of the mixer's shards."""
    for layer, order in (("in_proj", mixer.in_proj_order), ("conv", mixer.conv_order)):
        axis = 1 if layer == "in_proj" else 0
        weights[layer, "kernel"] = weights[layer, "kernel"].take(order, axis)
        if (layer, "bias") in weights:
            weights[layer, "bias"] = weights[layer, "bias"][order]


def _array(where: tuple, array: np.ndarray, dtype: Any) -> jax.Array:
    return jnp.asarray(array, jnp.float32 if where[-1] in _FLOAT32 else dtype)
