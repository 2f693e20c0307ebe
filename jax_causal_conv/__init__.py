"""Causal depthwise conv1d with conv states, for Mamba-style models in JAX."""

from .chunks import ConvMetadata
from .compat import __version__
from .dense import causal_conv1d
from .halo import halo_state, ssd_halo_state
from .mamba2.ssd import ssd, ssd_packed
from .metadata import build_metadata, validate_batch
from .op.primitive import target_compute_capability
from .operands import PAD_SLOT_ID
from .packed import causal_conv1d_fn
from .packing import PackedBatch, PackedDocuments, pack_batch, pack_documents
from .states import layer_slots, varlen_conv_states
from .update import causal_conv1d_update

__all__ = [
    "PAD_SLOT_ID",
    "ConvMetadata",
    "PackedBatch",
    "PackedDocuments",
    "__version__",
    "build_metadata",
    "causal_conv1d",
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "halo_state",
    "layer_slots",
    "pack_batch",
    "pack_documents",
    "ssd",
    "ssd_halo_state",
    "ssd_packed",
    "target_compute_capability",
    "validate_batch",
    "varlen_conv_states",
]
