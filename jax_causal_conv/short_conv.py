"""The short-conv mixer of LFM2 and LFM3 as a Flax NNX layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from . import checks
from .arguments import Implementation
from .nnx_conv import CausalConv1d, default_bias_init, default_kernel_init
from .published import families, weights

_default_linear_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ShortConvMixer(nnx.Module):
    """The short-conv mixer of LFM2 (W = 3) and LFM3 (W = 7).

    Of in_proj's columns B, C, x, each `d_model` wide,

        out = out_proj(C * conv(B * x))

    with a causal depthwise conv without activation. Parameters: `in_proj` and
    `out_proj` (each an nnx.Linear) and `conv` (a `CausalConv1d`).

    Padding (a negative segment id, a skipped sequence) is seen by nobody; its own rows
    of the output mean nothing.

    Args:
        d_model: features of input and output, and channels of the conv.
        d_conv: W, the width of the conv.
        use_bias: whether projections and conv have biases.
        dtype: of the computation; None infers it from u and parameters.
        param_dtype: of all parameters.
        kernel_init: of in_proj's kernel `(d_model, 3 * d_model)`. The default for both
            projections is uniform in ±1/sqrt(fan-in).
        out_kernel_init: of out_proj's kernel `(d_model, d_model)`.
        conv_kernel_init: of the conv's kernel `(d_model, W)`.
        bias_init: of all biases.
        implementation: of the conv, as for `causal_conv1d_fn`.
        rngs: the stream `params` is used.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is too small.

    Example:
        >>> mixer = ShortConvMixer(256, rngs=nnx.Rngs(0))
        >>> y = mixer(u, segment_ids=ids)
        >>> states = mixer.init_state(num_slots=8)
        >>> out, states = mixer.packed(tokens, states, query_start_loc,
        ...                            cache_indices=slots, has_initial_state=seen)
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_conv: int = 3,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = _default_linear_init,
        out_kernel_init: Initializer = _default_linear_init,
        conv_kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        d_model = checks.static_int("d_model", d_model, minimum=1)
        shared: dict[str, Any] = {
            "use_bias": use_bias,
            "bias_init": bias_init,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "rngs": rngs,
        }
        self.in_proj = nnx.Linear(
            d_model, 3 * d_model, kernel_init=kernel_init, **shared
        )
        self.conv = CausalConv1d(
            d_model,
            d_conv,
            kernel_init=conv_kernel_init,
            implementation=implementation,
            **shared,
        )
        self.out_proj = nnx.Linear(
            d_model, d_model, kernel_init=out_kernel_init, **shared
        )

    @classmethod
    def from_hf(
        cls,
        config: Mapping[str, Any],
        tensors: Mapping[str, Any],
        prefix: str,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike | None = None,
        implementation: Implementation = None,
    ) -> ShortConvMixer:
        """The mixer of one layer of a published model: lfm2, lfm2_moe or lfm3.

        Args:
            config: the model's config.json, as json reads it.
            tensors: arrays under their names in the checkpoint, those of other layers
                too; a file opened by `safetensors.safe_open` will do.
            prefix: of the names of this mixer's tensors, as `model.layers.3.conv`.
            dtype: of the computation. None is that of in_proj's weight.
            param_dtype: of the parameters. None is `dtype`.
            implementation: as for the constructor.

        Returns:
            The mixer, on jax's default device.

        Raises:
            ValueError: another kind of model; a value of the config is of a wrong kind;
                or tensors are missing, left over, misshapen or no floats, all of which
                are named.
        """
        arguments = families.short_conv(config)
        found = weights.below(tensors, prefix)
        dtype, param_dtype = weights.dtypes(found, "in_proj.weight", dtype, param_dtype)

        def make() -> ShortConvMixer:
            return cls(
                dtype=dtype,
                param_dtype=param_dtype,
                implementation=implementation,
                rngs=nnx.Rngs(0),
                **arguments,
            )

        return weights.build(make, found, param_dtype)

    def __call__(
        self, u: ArrayLike, *, segment_ids: ArrayLike | None = None
    ) -> jax.Array:
        """Mixes rows of tokens, for training.

        Args:
            u: `(B, T, d_model)`.
            segment_ids: `(B, T)` integers, as for `causal_conv1d`: documents packed
                into a row do not see each other; a negative id is padding.

        Returns:
            `(B, T, d_model)`.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape is wrong.
        """
        gated, c = self._gated(u)
        y: Any = self.conv(gated, segment_ids=segment_ids)
        return self.out_proj(c * y)

    def packed(
        self,
        u: ArrayLike,
        conv_states: ArrayLike,
        query_start_loc: ArrayLike,
        **batch: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Mixes packed tokens of many requests and advances their states, for serving.

        Args:
            u: `(T, d_model)`.
            conv_states: `(S, W-1, d_model)`, from `init_state`; donate them to jit for
                an update in place.
            query_start_loc: `(N+1,)` integers, as for `causal_conv1d_fn`.
            **batch: its keyword arguments: `cache_indices`, `has_initial_state`,
                `metadata` and so on.

        Returns:
            `(T, d_model)` and the new states.

        Raises:
            TypeError: a dtype or the type of a static argument is wrong.
            ValueError: a shape or size is wrong.
        """
        gated, c = self._gated(u)
        y, conv_states = self.conv.packed(gated, conv_states, query_start_loc, **batch)
        return self.out_proj(c * y), conv_states

    def init_state(
        self, num_slots: int, *, dtype: DTypeLike | None = None
    ) -> jax.Array:
        """Conv states of `num_slots` requests without history: `(S, W-1, d_model)`."""
        return self.conv.init_state(num_slots, dtype=dtype)

    def _gated(self, u: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """The conv's input B * x, and C."""
        b, c, x = jnp.split(self.in_proj(jnp.asarray(u)), 3, axis=-1)
        return b * x, c
