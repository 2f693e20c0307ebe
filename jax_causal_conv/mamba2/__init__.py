"""Mamba2 language models: the SSD, the mixer, the model, its checkpoints, an engine.

`ssd` and `ssd_packed`, the configuration and sampling need nothing but jax. What needs
Flax or safetensors (the extra `mamba2`) is imported when it is first asked for, since
`import jax_causal_conv`, which has `ssd` too, must do without them.
"""

import importlib
from typing import TYPE_CHECKING

from .config import Mamba2Config
from .sampling import GREEDY, SamplingParams, sample
from .ssd import DraftStates, ssd, ssd_packed

if TYPE_CHECKING:
    from .checkpoint import load, save
    from .engine import (
        Bucket,
        DraftRequest,
        Engine,
        Event,
        Generation,
        NgramDraft,
        QueueFull,
        Request,
        Stats,
        StepStats,
    )
    from .mixer import GatedRMSNorm, Mamba2Cache, Mamba2Mixer
    from .model import Mamba2LM
    from .parallel import tensor_parallel
else:
    _MODULES = {
        "checkpoint": ("load", "save"),
        "engine": (
            "Bucket",
            "DraftRequest",
            "Engine",
            "Event",
            "Generation",
            "NgramDraft",
            "QueueFull",
            "Request",
            "Stats",
            "StepStats",
        ),
        "mixer": ("GatedRMSNorm", "Mamba2Cache", "Mamba2Mixer"),
        "model": ("Mamba2LM",),
        "parallel": ("tensor_parallel",),
    }
    _MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

    def __getattr__(name):
        """Finds what needs the extra, on the first use of the name."""
        if (module := _MODULE_OF.get(name)) is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            value = getattr(importlib.import_module(f".{module}", __name__), name)
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{__name__}.{name} needs {error.name}: "
                'pip install "jax-causal-conv[mamba2]"'
            ) from error
        globals()[name] = value
        return value


__all__ = [
    "GREEDY",
    "Bucket",
    "DraftRequest",
    "DraftStates",
    "Engine",
    "Event",
    "GatedRMSNorm",
    "Generation",
    "Mamba2Cache",
    "Mamba2Config",
    "Mamba2LM",
    "Mamba2Mixer",
    "NgramDraft",
    "QueueFull",
    "Request",
    "SamplingParams",
    "Stats",
    "StepStats",
    "load",
    "sample",
    "save",
    "ssd",
    "ssd_packed",
    "tensor_parallel",
]
