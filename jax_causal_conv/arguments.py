"""What callers say by name, as types for editors and type checkers."""

from typing import TypedDict

import jax
from jax.typing import ArrayLike

from .chunks import ConvMetadata
from .operands import Activation, Implementation

__all__ = [
    "Activation",
    "DenseArguments",
    "Implementation",
    "PackedArguments",
    "PackedOptions",
    "SSDArguments",
    "UpdateArguments",
    "UpdateOptions",
]


class _Choices(TypedDict, total=False):
    activation: Activation
    dilation: int
    residual: bool
    implementation: Implementation


class _Packed(TypedDict, total=False):
    cache_indices: ArrayLike | None
    has_initial_state: ArrayLike | None
    num_rejected_tokens: ArrayLike | None
    write_indices: ArrayLike | None
    snapshot_ends: ArrayLike | None
    snapshot_indices: ArrayLike | None
    metadata: ConvMetadata | None
    pad_slot_id: int
    channel_offset: int | None


class _Update(TypedDict, total=False):
    cache_seqlens: ArrayLike | None
    conv_state_indices: ArrayLike | None
    conv_state_write_indices: ArrayLike | None
    num_rejected_tokens: ArrayLike | None
    pad_slot_id: int
    channel_offset: int | None


class DenseArguments(_Choices, total=False):
    """Those of `causal_conv1d` that do not decide what it returns."""

    initial_state: ArrayLike | None
    segment_ids: ArrayLike | None
    channel_offset: int | None


class PackedArguments(_Choices, _Packed, total=False):
    """Those of `causal_conv1d_fn` that do not decide what it returns."""


class UpdateArguments(_Update, total=False):
    """Those of `causal_conv1d_update` that do not decide what it returns."""

    dilation: int
    residual: bool
    implementation: Implementation


class SSDArguments(TypedDict, total=False):
    """Those of `ssd` that do not decide what it returns."""

    initial_state: ArrayLike | None
    segment_ids: ArrayLike | None
    chunk_size: int
    dt_bias: ArrayLike | None
    dt_softplus: bool
    dt_limit: tuple[float, float]
    precision: jax.lax.PrecisionLike
    implementation: Implementation


class PackedOptions(_Packed, total=False):
    """What a layer's `packed` passes on to `causal_conv1d_fn`."""

    split: tuple[int, ...] | None


class UpdateOptions(_Update, total=False):
    """What a layer's `decode` passes on to `causal_conv1d_update`."""

    split: tuple[int, ...] | None
