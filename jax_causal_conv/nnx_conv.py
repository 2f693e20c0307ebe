"""The conv as a Flax NNX layer. Its public home is `jax_causal_conv.nnx`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from . import checks
from .arguments import Activation, Implementation, PackedOptions, UpdateOptions
from .columns import Output
from .dense import causal_conv1d
from .packed import causal_conv1d_fn
from .update import causal_conv1d_update

default_kernel_init = jax.nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2
)
default_bias_init = nnx.initializers.zeros_init()
_NO_METADATA: Mapping[str, Any] = MappingProxyType({})


class CausalConv1d(nnx.Module):
    """Causal depthwise conv1d for training, packed serving and decoding.

    The layer holds parameters only. Conv states are arguments and results of the
    methods, so that a server may keep one cache for all layers and donate it.

    `kernel` is a Param `(features, kernel_size)`, whose last column meets the current
    token; `bias` a Param `(features,)` or None. A depthwise
    `nnx.Conv(D, D, W, feature_group_count=D, padding="CAUSAL")` becomes this layer by
    `kernel = conv.kernel[:, 0, :].T`, its bias as it is; so does PyTorch's
    `Conv1d(D, D, W, groups=D)` by `weight[:, 0, :]`.

    Inputs are cast to `dtype`, as in other Flax layers. Parameters are not: the ops
    sum in float32 from operands of any mixed dtypes and round once, so float32
    parameters lose nothing beside bfloat16 inputs.

    Args:
        features: D, the number of channels.
        kernel_size: W, the width of the filter, an int >= 1.
        use_bias: whether there is a bias.
        activation: as for `causal_conv1d_fn`, but none by default.
        dilation: as for `causal_conv1d_fn`.
        residual: as for `causal_conv1d_fn`.
        dtype: of the computation and of outputs; None infers it from x and parameters.
        param_dtype: of the parameters.
        kernel_init: called with shape `(D, W)`, so that fan-in is the *last* axis. The
            default is uniform in ±1/sqrt(W), as PyTorch and the published Mamba models
            have it. `nnx.with_partitioning(init, ("model", None))` shards channels
            (within a mesh, as Flax wants it).
        bias_init: called with shape `(D,)`; zeros by default.
        kernel_metadata: metadata of the Param `kernel`.
        bias_metadata: metadata of the Param `bias`.
        implementation: as for `causal_conv1d_fn`.
        rngs: the stream `params` is used.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is too small, or the activation unknown.

    Example:
        >>> conv = CausalConv1d(64, 4, activation="silu", rngs=nnx.Rngs(0))
        >>> y = conv(x, segment_ids=ids)
        >>> states = conv.init_state(num_slots=8)
        >>> out, states = conv.packed(tokens, states, query_start_loc,
        ...                           cache_indices=slots, has_initial_state=seen)
    """

    def __init__(
        self,
        features: int,
        kernel_size: int,
        *,
        use_bias: bool = True,
        activation: Activation = None,
        dilation: int = 1,
        residual: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        self.features = checks.static_int("features", features, minimum=0)
        self.kernel_size = checks.static_int("kernel_size", kernel_size, minimum=1)
        checks.activation_name(activation)
        self.use_bias = use_bias
        self.activation = activation
        self.dilation = checks.static_int("dilation", dilation, minimum=1)
        self.residual = checks.static_bool("residual", residual)
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.implementation = implementation

        shape = (self.features, self.kernel_size)
        self.kernel = nnx.Param(
            kernel_init(rngs.params(), shape, param_dtype), **kernel_metadata
        )
        self.bias: nnx.Param[jax.Array] | None
        if use_bias:
            self.bias = nnx.Param(
                bias_init(rngs.params(), shape[:1], param_dtype), **bias_metadata
            )
        else:
            self.bias = nnx.data(None)

    def __call__(
        self,
        x: ArrayLike,
        *,
        initial_state: ArrayLike | None = None,
        segment_ids: ArrayLike | None = None,
        return_final_state: bool = False,
        channel_offset: int | None = None,
        split: tuple[int, ...] | None = None,
    ) -> Output | tuple[Output, jax.Array]:
        """Applies `causal_conv1d` to rows `(B, T, D)`, for training.

        Arguments, results and errors are those of `causal_conv1d`.
        """
        x, kernel, bias = self._operands(x)
        return causal_conv1d(
            x,
            kernel,
            bias,
            initial_state=initial_state,
            segment_ids=segment_ids,
            activation=self.activation,
            dilation=self.dilation,
            residual=self.residual,
            return_final_state=return_final_state,
            channel_offset=channel_offset,
            split=split,
            implementation=self.implementation,
        )

    def packed(
        self,
        x: ArrayLike,
        conv_states: ArrayLike,
        query_start_loc: ArrayLike,
        **batch: Unpack[PackedOptions],
    ) -> tuple[Output, jax.Array]:
        """Applies `causal_conv1d_fn` to packed tokens `(T, D)`, for serving.

        `batch` holds its keyword arguments: `cache_indices`, `has_initial_state`,
        `metadata` and so on. Returns the outputs and the new states.
        """
        x, kernel, bias = self._operands(x)
        return causal_conv1d_fn(
            x,
            kernel,
            bias,
            conv_states,
            query_start_loc,
            activation=self.activation,
            dilation=self.dilation,
            residual=self.residual,
            implementation=self.implementation,
            **batch,
        )

    def decode(
        self, x: ArrayLike, conv_state: ArrayLike, **batch: Unpack[UpdateOptions]
    ) -> tuple[Output, jax.Array]:
        """Applies `causal_conv1d_update` to `(B, D)` or `(B, Q, D)`, for decoding.

        `batch` holds its keyword arguments: `conv_state_indices`, `cache_seqlens` and
        so on. Returns the outputs and the new state.
        """
        x, kernel, bias = self._operands(x)
        return causal_conv1d_update(
            x,
            conv_state,
            kernel,
            bias,
            self.activation,
            dilation=self.dilation,
            residual=self.residual,
            implementation=self.implementation,
            **batch,
        )

    def init_state(
        self,
        num_slots: int,
        *,
        state_len: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """Conv states of requests without history.

        Args:
            num_slots: S.
            state_len: L >= (W-1) * dilation, the default; more for speculative
                decoding.
            dtype: None is the layer's `dtype`, else its `param_dtype`.

        Returns:
            `(S, L, D)` zeros.
        """
        reach = (self.kernel_size - 1) * self.dilation
        rows = reach if state_len is None else state_len
        dtype = dtype or self.dtype or self.param_dtype
        return jnp.zeros((num_slots, rows, self.features), dtype)

    def _operands(self, x: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Input in the computation's dtype, parameters in their own."""
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        dtype = canonicalize_dtype(x, kernel, bias, dtype=self.dtype)
        return jnp.asarray(x, dtype), kernel, bias
