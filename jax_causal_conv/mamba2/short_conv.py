"""The gated short-conv mixer of LFM2 and LFM3 as a Flax NNX layer."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from .. import checks
from ..arguments import Implementation
from ..nnx_conv import CausalConv1d, default_bias_init, default_kernel_init

_default_linear_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class ShortConvMixer(nnx.Module):
    """The mixer of LFM2 and LFM3: `out_proj(C * conv(B * x))`.

    B, C and x, in this order, are in_proj's columns, d_model each; the conv has no
    activation. It looks W tokens far (3 in LFM2, 7 in LFM3), so its only state is that
    of the conv. Parameters: `in_proj` (an nnx.Linear), `conv` (a `CausalConv1d`),
    `out_proj` (an nnx.Linear). Padding is as in `Mamba2Mixer`.

    Args:
        d_model: features of input and output, and channels of the conv.
        d_conv: W, the width of the conv.
        use_bias: whether both projections and the conv have a bias.
        dtype: of the computation; None infers it from u and parameters.
        param_dtype: of all parameters.
        kernel_init: of in_proj's kernel `(d_model, 3 * d_model)`.
        out_kernel_init: of out_proj's kernel `(d_model, d_model)`.
        conv_kernel_init: of the conv's kernel `(d_model, W)`.
        bias_init: of all biases.
        implementation: of the conv, as for `causal_conv1d_fn`.
        rngs: the stream `params` is used.

    Raises:
        TypeError: a size is not an int.
        ValueError: a size is below 1.

    Example:
        >>> mixer = ShortConvMixer(256, d_conv=3, rngs=nnx.Rngs(0))
        >>> y = mixer(u, segment_ids=ids)
        >>> states = mixer.init_cache(num_slots=8)
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
        self.d_model = checks.static_int("d_model", d_model, minimum=1)
        shared: dict[str, Any] = {
            "use_bias": use_bias,
            "dtype": dtype,
            "param_dtype": param_dtype,
            "bias_init": bias_init,
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

    def __call__(
        self,
        u: ArrayLike,
        *,
        segment_ids: ArrayLike | None = None,
        initial_state: ArrayLike | None = None,
        return_final_state: bool = False,
    ) -> Any:
        """Mixes rows of tokens, for training.

        Args:
            u: `(B, T, d_model)`.
            segment_ids: `(B, T)` integers, as for `causal_conv1d`.
            initial_state: `(B, W-1, d_model)`, as there.
            return_final_state: as there.

        Returns:
            `(B, T, d_model)`; with `return_final_state` a pair of it and the state.
        """
        gate, inputs = self._gated(u)
        result: Any = self.conv(
            inputs,
            segment_ids=segment_ids,
            initial_state=initial_state,
            return_final_state=return_final_state,
        )
        if not return_final_state:
            return self.out_proj(gate * result)
        out, state = result
        return self.out_proj(gate * out), state

    def packed(
        self,
        u: ArrayLike,
        conv_states: ArrayLike,
        query_start_loc: ArrayLike,
        **batch: Any,
    ) -> tuple[jax.Array, jax.Array]:
        """Mixes packed tokens `(T, d_model)` of many requests, for serving.

        `conv_states` is of `init_cache`; `batch` holds keyword arguments of
        `causal_conv1d_fn`: `cache_indices`, `has_initial_state`, `metadata` and so on.
        Returns the outputs and the new states.
        """
        gate, inputs = self._gated(u)
        out: Any
        out, states = self.conv.packed(inputs, conv_states, query_start_loc, **batch)
        return self.out_proj(gate * out), states

    def init_cache(
        self,
        num_slots: int,
        *,
        state_len: int | None = None,
        dtype: DTypeLike | None = None,
    ) -> jax.Array:
        """Conv states of requests without history, as `CausalConv1d.init_state`."""
        return self.conv.init_state(num_slots, state_len=state_len, dtype=dtype)

    def _gated(self, u: ArrayLike) -> tuple[jax.Array, jax.Array]:
        """C, and the conv's input B * x."""
        b, c, x = jnp.split(self.in_proj(jnp.asarray(u)), 3, axis=-1)
        return c, b * x
