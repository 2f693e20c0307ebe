"""Causal depthwise conv1d with conv states, for Mamba-style models in JAX."""

from .checks import PAD_SLOT_ID
from .dense import causal_conv1d
from .dispatch import target_compute_capability
from .halo import halo_state
from .mamba2.ssd import ssd, ssd_packed
from .metadata import ConvMetadata, build_metadata, validate_batch
from .packed import causal_conv1d_fn
from .states import layer_slots, varlen_conv_states
from .update import causal_conv1d_update

__version__ = "0.1.0"

__all__ = [
    "PAD_SLOT_ID",
    "ConvMetadata",
    "build_metadata",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "halo_state",
    "layer_slots",
    "ssd",
    "ssd_packed",
    "target_compute_capability",
    "validate_batch",
    "varlen_conv_states",
]
