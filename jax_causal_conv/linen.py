"""A Flax Linen layer over the ops; needs the extra `flax`.

The mixers are NNX layers. Flax's bridge makes Linen modules of them, whose variables
`{"params": ...}` have the names of the NNX layer's parameters:

    mixer = nnx.bridge.ToLinen(Mamba2Mixer, args=(256,), kwargs={"headdim": 32})
    variables = mixer.init(jax.random.key(0), u)
    y = mixer.apply(variables, u, segment_ids=ids)
    out, cache = mixer.apply(variables, tokens, cache, query_start_loc,
                             cache_indices=slots, nnx_method="packed")

The parameters of an NNX mixer, as `Mamba2Mixer.from_hf` returns it, become variables by
`{"params": nnx.to_pure_dict(nnx.state(mixer, nnx.Param))}`; its `init_cache` needs no
parameters: `nnx.eval_shape` of the mixer has it. Within another Linen module's
`@nn.compact` method, `nnx.bridge.to_linen(Mamba2Mixer, 256, headdim=32)` is called like
any submodule.
"""

from typing import Unpack

import jax
import jax.numpy as jnp
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from . import checks
from .arguments import Activation, Implementation, PackedOptions, UpdateOptions
from .columns import Output
from .dense import causal_conv1d
from .packed import causal_conv1d_fn
from .update import causal_conv1d_update

__all__ = ["CausalConv1d", "default_bias_init", "default_kernel_init"]

try:
    from flax import linen as nn
    from flax.linen.dtypes import canonicalize_dtype
except ModuleNotFoundError as error:
    raise ImportError(
        'jax_causal_conv.linen needs Flax: pip install "jax-causal-conv[flax]"'
    ) from error

default_kernel_init = jax.nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2
)
default_bias_init = nn.initializers.zeros_init()


class CausalConv1d(nn.Module):
    """Causal depthwise conv1d for training, packed serving and decoding.

    The Linen twin of `jax_causal_conv.nnx.CausalConv1d`: what is said there holds
    here. States are arguments and results, not variables of a collection, so that a
    server may donate them.

    Params: `kernel` `(features, kernel_size)`, whose last column meets the current
    token, and `bias` `(features,)`. The params of a depthwise
    `nn.Conv(features, (W,), feature_group_count=features, padding="CAUSAL")` become
    `{"kernel": kernel[:, 0, :].T, "bias": bias}`.

    The attributes are those of the twin: `features`, `kernel_size`, `use_bias`,
    `activation`, `dtype`, `param_dtype`, `kernel_init`, `bias_init`, `implementation`,
    `dilation` and `residual`. So are the methods.

    Example:
        >>> conv = CausalConv1d(64, 4, activation="silu")
        >>> params = conv.init(jax.random.key(0), jnp.ones((2, 16, 64)))
        >>> y = conv.apply(params, x, segment_ids=ids)
        >>> out, states = conv.apply(params, tokens, states, query_start_loc,
        ...                          cache_indices=slots, method="packed")
    """

    features: int
    kernel_size: int
    use_bias: bool = True
    activation: Activation = None
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = default_kernel_init
    bias_init: Initializer = default_bias_init
    implementation: Implementation = None
    dilation: int = 1
    residual: bool = False

    def setup(self):
        """Creates the params."""
        features = checks.static_int("features", self.features, minimum=0)
        width = checks.static_int("kernel_size", self.kernel_size, minimum=1)
        self.kernel = self.param(
            "kernel", self.kernel_init, (features, width), self.param_dtype
        )
        self.bias = (
            self.param("bias", self.bias_init, (features,), self.param_dtype)
            if self.use_bias
            else None
        )

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
        """Applies `causal_conv1d`: see the twin."""
        return causal_conv1d(
            self._cast(x),
            self.kernel,
            self.bias,
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
        """Applies `causal_conv1d_fn`: see the twin."""
        return causal_conv1d_fn(
            self._cast(x),
            self.kernel,
            self.bias,
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
        """Applies `causal_conv1d_update`: see the twin."""
        return causal_conv1d_update(
            self._cast(x),
            conv_state,
            self.kernel,
            self.bias,
            self.activation,
            dilation=self.dilation,
            residual=self.residual,
            implementation=self.implementation,
            **batch,
        )

    @nn.nowrap
    def init_state(
        self,
        num_slots: int,
        *,
        state_len: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """Conv states of requests without history, from no params: see the twin."""
        reach = (self.kernel_size - 1) * self.dilation
        rows = reach if state_len is None else state_len
        dtype = dtype or self.dtype or self.param_dtype
        return jnp.zeros((num_slots, rows, self.features), dtype)

    def _cast(self, x: ArrayLike) -> jax.Array:
        dtype = canonicalize_dtype(x, self.kernel, self.bias, dtype=self.dtype)
        return jnp.asarray(x, dtype)
