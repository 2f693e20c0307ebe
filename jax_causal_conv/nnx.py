"""Flax NNX layers over the ops; needs the extra `flax`.

`CausalConv1d` is the conv alone, `Mamba2Mixer` the whole mixer of a Mamba-2 block,
`ShortConvMixer` that of LFM2 and LFM3.
"""

try:
    import flax  # noqa: F401 (asked for first, to name the cure if it is missing)
except ModuleNotFoundError as error:
    raise ImportError(
        'jax_causal_conv.nnx needs Flax: pip install "jax-causal-conv[flax]"'
    ) from error

from .mamba2.mixer import GatedRMSNorm, Mamba2Cache, Mamba2Mixer
from .nnx_conv import CausalConv1d, default_bias_init, default_kernel_init
from .short_conv import ShortConvMixer

__all__ = [
    "CausalConv1d",
    "GatedRMSNorm",
    "Mamba2Cache",
    "Mamba2Mixer",
    "ShortConvMixer",
    "default_bias_init",
    "default_kernel_init",
]
