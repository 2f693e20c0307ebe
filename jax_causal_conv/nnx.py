"""Flax NNX layers over the ops; needs the extra `flax`.

`CausalConv1d` is the conv alone, `Mamba2Mixer` the whole mixer of a Mamba-2 block.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from . import batch as xla
from . import checks
from .columns import Output
from .dense import causal_conv1d
from .metadata import ConvMetadata
from .operands import PAD_SLOT_ID
from .packed import causal_conv1d_fn
from .ssd import ssd, ssd_packed
from .update import causal_conv1d_update

try:
    from flax import nnx
    from flax.nnx.nn.dtypes import canonicalize_dtype
except ModuleNotFoundError as error:
    raise ImportError(
        'jax_causal_conv.nnx needs Flax: pip install "jax-causal-conv[flax]"'
    ) from error

default_kernel_init = jax.nn.initializers.variance_scaling(
    1 / 3, "fan_in", "uniform", in_axis=-1, out_axis=-2
)
default_bias_init = nnx.initializers.zeros_init()
_default_linear_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
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
        activation: None, "silu" or "swish".
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
        activation: str | bool | None = None,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        kernel_metadata: Mapping[str, Any] = _NO_METADATA,
        bias_metadata: Mapping[str, Any] = _NO_METADATA,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.features = checks.static_int("features", features, minimum=0)
        self.kernel_size = checks.static_int("kernel_size", kernel_size, minimum=1)
        checks.activation_name(activation)
        self.use_bias = use_bias
        self.activation = activation
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
        **batch: Any,
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
            implementation=self.implementation,
            **batch,
        )

    def decode(
        self, x: ArrayLike, conv_state: ArrayLike, **batch: Any
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
            state_len: L >= W-1, more for speculative decoding. None is W-1.
            dtype: None is the layer's `dtype`, else its `param_dtype`.

        Returns:
            `(S, L, D)` zeros.
        """
        rows = self.kernel_size - 1 if state_len is None else state_len
        dtype = dtype or self.dtype or self.param_dtype
        return jnp.zeros((num_slots, rows, self.features), dtype)

    def _operands(self, x: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Input in the computation's dtype, parameters in their own."""
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        dtype = canonicalize_dtype(x, kernel, bias, dtype=self.dtype)
        return jnp.asarray(x, dtype), kernel, bias


class GatedRMSNorm(nnx.Module):
    """RMSNorm of y gated by silu(z), over groups of neighbouring features.

    `scale * rms_norm(y * silu(z))`, or `scale * rms_norm(y) * silu(z)` with
    `norm_before_gate`, computed in float32 (float64 for float64 inputs) and rounded
    once. `scale` is a Param `(features,)`, ones at first.

    Args:
        features: the size of the last axis.
        groups: each of so many equal groups of features has its own mean square.
        norm_before_gate: the gate comes after the norm.
        eps: added to the mean square.
        dtype: of the result; None infers it from y, z and scale.
        param_dtype: of `scale`.

    Raises:
        ValueError: `groups` does not divide `features`.
    """

    def __init__(
        self,
        features: int,
        *,
        groups: int = 1,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        _divides("groups", groups, "features", features)
        self.groups = groups
        self.norm_before_gate = norm_before_gate
        self.eps = eps
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """Normalises y `(..., features)`, gated by z of the same shape."""
        scale = self.scale[...]
        dtype = canonicalize_dtype(y, z, scale, dtype=self.dtype)
        y, z, scale = (_wide(a) for a in (y, z, scale))
        gate = jax.nn.silu(z)
        y = y if self.norm_before_gate else y * gate
        size = y.shape[-1] // self.groups
        grouped = y.reshape(*y.shape[:-1], self.groups, size)
        square = jnp.square(grouped).mean(-1, keepdims=True)
        y = (grouped * jax.lax.rsqrt(square + self.eps)).reshape(y.shape) * scale
        return (y * gate if self.norm_before_gate else y).astype(dtype)


class Mamba2Cache(NamedTuple):
    """What requests leave behind in one `Mamba2Mixer`: S slots, one per request.

    Attributes:
        conv: `(S, W-1, C)`, the last inputs of the conv.
        ssm: `(S, H, P, K)`, the state of the SSM.
    """

    conv: jax.Array
    ssm: jax.Array


class Mamba2Mixer(nnx.Module):
    """The mixer of a Mamba-2 block: in_proj, conv, SSD, gated RMSNorm, out_proj.

    The mathematics of `Mamba2` in state-spaces/mamba and of `Mamba2Mixer` in
    transformers: of in_proj's columns z, x, B, C, dt, the conv takes x, B, C; then

        dt = clip(softplus(dt + dt_bias), *dt_limit);  A = -exp(A_log)
        y = ssd(x, dt, A, B, C, D);  out = out_proj(norm(y, z))

    H = d_inner // headdim heads with d_inner = expand * d_model; head h uses group
    h // (H // n_groups) of B and C; the conv has C = d_inner + 2 * n_groups * d_state
    channels. Parameters: `in_proj` (an nnx.Linear), `conv` (a `CausalConv1d`),
    `A_log`, `D` and `dt_bias` `(H,)`, `norm` (a `GatedRMSNorm`), `out_proj` (an
    nnx.Linear). Step sizes, A, D and the norm are computed in float32 whatever `dtype`
    is.

    **Padding.** Tokens that are padding (a negative segment id, a skipped sequence)
    are seen by nobody. Their own rows of the output mean nothing: for finite u they
    are out_proj's bias, zeros without one. Nothing masks u itself, so a NaN there
    stays in its row of the output but reaches the gradients of in_proj, as in any
    linear layer.

    **Tensor parallelism** over a mesh axis of n devices needs `num_shards=n`, which
    must divide `n_groups`. Then in_proj's columns lie as n blocks, one per shard, of
    that shard's z, x, B, C, dt, and the conv's channels as n blocks of x, B, C, so
    that no shard needs another's columns. Shard the columns of `in_proj.kernel` (and
    its bias), the channels of `conv.kernel` and `conv.bias`, the rows of
    `out_proj.kernel`, the channels of `Mamba2Cache.conv` and the heads of
    `Mamba2Cache.ssm`, by `nnx.with_partitioning` around the initialisers or by
    `NamedSharding`; the `(H,)` vectors and `norm.scale` are small and may stay whole.
    Under plain jit the XLA implementation of the forward pass then communicates once,
    in the sum of out_proj (and in the norm, where n does not divide `norm_groups`).
    Published weights are brought into this layout by indexing with `in_proj_order` and
    `conv_order`.

    Args:
        d_model: features of input and output.
        d_state: K, the size of the state per head and channel.
        d_conv: W, the width of the conv.
        expand: d_inner / d_model.
        headdim: P, the channels of a head.
        n_groups: G, groups of heads that share B and C.
        chunk_size: tokens that the SSD handles at once. It matters for speed only, so
            it need not be that of a checkpoint.
        use_bias: whether in_proj and out_proj have a bias.
        use_conv_bias: whether the conv has one.
        dt_limit: lower and upper limit of the step sizes.
        dt_min: lower end of the initial step sizes, which are log-uniform.
        dt_max: upper end.
        dt_init_floor: no initial step size is smaller.
        A_init_range: -A is initially uniform in this range.
        norm_before_gate: the norm's gate comes after it.
        norm_groups: groups of the norm; None is `n_groups`, as published. (Versions of
            transformers that normalise over the whole of d_inner want 1; for
            `n_groups=1` there is no difference.)
        norm_eps: the norm's epsilon.
        activation: of the conv: None, "silu" or "swish".
        num_shards: blocks of the columns, for tensor parallelism.
        dtype: of the computation; None infers it from u and parameters.
        param_dtype: of all parameters.
        kernel_init: of in_proj's kernel `(d_model, columns)`. The default for both
            projections is uniform in ±1/sqrt(fan-in), PyTorch's and thus the published.
        out_kernel_init: of out_proj's kernel `(d_inner, d_model)`.
        conv_kernel_init: of the conv's kernel `(C, W)`.
        bias_init: of in_proj's bias; zeros, like all biases.
        out_bias_init: of out_proj's bias.
        conv_bias_init: of the conv's bias.
        implementation: of the conv, as for `causal_conv1d_fn`.
        rngs: the stream `params` is used.

    Raises:
        TypeError: a size is not an int.
        ValueError: sizes do not divide as they must, or the activation is unknown.

    Example:
        >>> mixer = Mamba2Mixer(256, rngs=nnx.Rngs(0))
        >>> y = mixer(u, segment_ids=ids)
        >>> cache = mixer.init_cache(num_slots=8)
        >>> out, cache = mixer.packed(tokens, cache, query_start_loc,
        ...                           cache_indices=slots, has_initial_state=seen)
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2,
        headdim: int = 64,
        n_groups: int = 1,
        chunk_size: int = 64,
        use_bias: bool = False,
        use_conv_bias: bool = True,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        norm_before_gate: bool = False,
        norm_groups: int | None = None,
        norm_eps: float = 1e-5,
        activation: str | bool | None = "silu",
        num_shards: int = 1,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = _default_linear_init,
        out_kernel_init: Initializer = _default_linear_init,
        conv_kernel_init: Initializer = default_kernel_init,
        bias_init: Initializer = default_bias_init,
        out_bias_init: Initializer = default_bias_init,
        conv_bias_init: Initializer = default_bias_init,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        d_model = checks.static_int("d_model", d_model, minimum=1)
        d_inner = int(expand * d_model)
        _divides("headdim", headdim, "d_inner = expand * d_model", d_inner)
        num_heads = d_inner // headdim
        _divides("n_groups", n_groups, "the number of heads", num_heads)
        _divides("num_shards", num_shards, "n_groups", n_groups)
        self.d_model = d_model
        self.d_inner = d_inner
        self.d_state = checks.static_int("d_state", d_state, minimum=1)
        self.headdim = headdim
        self.num_heads = num_heads
        self.n_groups = n_groups
        self.num_shards = num_shards
        self.chunk_size = chunk_size
        self.dt_limit = (float(dt_limit[0]), float(dt_limit[1]))

        dtypes: dict[str, Any] = {"dtype": dtype, "param_dtype": param_dtype}
        self.in_proj = nnx.Linear(
            d_model,
            sum(self._in_proj_sizes),
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
            **dtypes,
        )
        self.conv = CausalConv1d(
            sum(self._conv_sizes),
            d_conv,
            use_bias=use_conv_bias,
            activation=activation,
            kernel_init=conv_kernel_init,
            bias_init=conv_bias_init,
            implementation=implementation,
            rngs=rngs,
            **dtypes,
        )
        shape = (num_heads,)
        a = jax.random.uniform(rngs.params(), shape, jnp.float32, *A_init_range)
        self.A_log = nnx.Param(jnp.log(a).astype(param_dtype))
        self.D = nnx.Param(jnp.ones(shape, param_dtype))
        log_dt = jax.random.uniform(
            rngs.params(), shape, jnp.float32, math.log(dt_min), math.log(dt_max)
        )
        dt = jnp.maximum(jnp.exp(log_dt), dt_init_floor)
        inverse_softplus = dt + jnp.log(-jnp.expm1(-dt))
        self.dt_bias = nnx.Param(inverse_softplus.astype(param_dtype))
        self.norm = GatedRMSNorm(
            d_inner,
            groups=n_groups if norm_groups is None else norm_groups,
            norm_before_gate=norm_before_gate,
            eps=norm_eps,
            **dtypes,
        )
        self.out_proj = nnx.Linear(
            d_inner,
            d_model,
            use_bias=use_bias,
            kernel_init=out_kernel_init,
            bias_init=out_bias_init,
            rngs=rngs,
            **dtypes,
        )

    @property
    def in_proj_order(self) -> np.ndarray:
        """Columns of published in_proj weights in this mixer's order.

        `mixer.in_proj.kernel[...] = published[:, mixer.in_proj_order]` for a kernel
        `(d_model, columns)`; the identity with one shard.
        """
        z, _, dt = self._in_proj_sizes
        return self._order((z, *self._conv_sizes, dt))

    @property
    def conv_order(self) -> np.ndarray:
        """Channels of published conv weights in this mixer's order."""
        return self._order(self._conv_sizes)

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
        z, operands, _ = self._ssd_operands(
            u,
            lambda xbc, **columns: (
                self.conv(xbc, segment_ids=segment_ids, **columns),
                None,
            ),
        )
        y = ssd(*operands, segment_ids=segment_ids, chunk_size=self.chunk_size)
        return self._output(y, z)

    def packed(
        self,
        u: ArrayLike,
        cache: Mamba2Cache,
        query_start_loc: ArrayLike,
        *,
        cache_indices: ArrayLike | None = None,
        has_initial_state: ArrayLike | None = None,
        metadata: ConvMetadata | None = None,
        max_prefills: int | None = None,
        pad_slot_id: int = PAD_SLOT_ID,
    ) -> tuple[jax.Array, Mamba2Cache]:
        """Mixes packed tokens of many requests and advances their states, for serving.

        Prefills, chunks of prefills and single decode steps may be mixed at will. The
        cache is functional: donate it to jit for an update in place.

        Args:
            u: `(T, d_model)`.
            cache: from `init_cache`.
            query_start_loc: `(N+1,)` integers, as for `causal_conv1d_fn`.
            cache_indices: `(N,)` integers, the slot of each sequence, or None.
            has_initial_state: `(N,)` bool, or None for all False.
            metadata: from `build_metadata`, to share between layers. None builds it.
            max_prefills: static; how many live sequences may have more than one
                token. Of a batch with more the surplus ones, in order, are skipped: no
                slot of theirs changes. 0 compiles a pure decode step. None is enough
                for any batch.
            pad_slot_id: static int, the slot number that means "skip".

        Returns:
            `(T, d_model)` and the new cache.

        Raises:
            TypeError: a dtype or the type of a static argument is wrong.
            ValueError: a shape or size is wrong, or `metadata` is for other sizes.
        """
        if max_prefills is not None:
            cache_indices = _without_surplus(
                u, cache, query_start_loc, cache_indices, max_prefills, pad_slot_id
            )
        batch: dict[str, Any] = {
            "cache_indices": cache_indices,
            "has_initial_state": has_initial_state,
            "pad_slot_id": pad_slot_id,
        }
        z, operands, conv_states = self._ssd_operands(
            u,
            lambda xbc, **columns: self.conv.packed(
                xbc, cache.conv, query_start_loc, metadata=metadata, **batch, **columns
            ),
        )
        y, ssm_states = ssd_packed(
            *operands,
            cache.ssm,
            query_start_loc,
            max_prefills=max_prefills,
            chunk_size=self.chunk_size,
            **batch,
        )
        return self._output(y, z), Mamba2Cache(conv_states, ssm_states)

    def init_cache(
        self,
        num_slots: int,
        *,
        dtype: DTypeLike | None = None,
        ssm_dtype: DTypeLike = jnp.float32,
    ) -> Mamba2Cache:
        """The cache of `num_slots` requests without history.

        Args:
            num_slots: S.
            dtype: of the conv states; None is the mixer's `dtype`, else `param_dtype`.
            ssm_dtype: of the SSM states.

        Returns:
            A `Mamba2Cache` of zeros: `(S, W-1, C)` and `(S, H, P, K)`.
        """
        shape = (num_slots, self.num_heads, self.headdim, self.d_state)
        conv = self.conv.init_state(num_slots, dtype=dtype)
        return Mamba2Cache(conv, jnp.zeros(shape, ssm_dtype))

    @property
    def _conv_sizes(self) -> tuple[int, int, int]:
        """Channels x, B, C."""
        states = self.n_groups * self.d_state
        return self.d_inner, states, states

    @property
    def _in_proj_sizes(self) -> tuple[int, int, int]:
        """Columns z, the conv's, dt."""
        return self.d_inner, sum(self._conv_sizes), self.num_heads

    def _order(self, sizes: Sequence[int]) -> np.ndarray:
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        return np.hstack([p.reshape(self.num_shards, -1) for p in parts]).ravel()

    def _split(self, columns: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
        """Splits the last axis, `num_shards` blocks of all parts, into the parts."""
        rows, shards = columns.shape[:-1], self.num_shards
        blocks = columns.reshape(*rows, shards, sum(sizes) // shards)
        parts = jnp.split(blocks, np.cumsum(sizes)[:-1] // shards, axis=-1)
        return [
            part.reshape(*rows, size) for part, size in zip(parts, sizes, strict=True)
        ]

    def _ssd_operands(
        self, u: ArrayLike, conv: Callable[..., tuple[Any, Any]]
    ) -> tuple[jax.Array, tuple[Any, Any, Any, Any, Any, Any], Any]:
        """The gate z, the operands of the SSD, and what `conv` returns beside its out.

        `conv` takes and returns the columns x, B, C. It finds them in in_proj's output
        and writes them apart itself, unless they lie in blocks of several shards.
        """
        projected = self.in_proj(jnp.asarray(u))
        z, xbc, dt = self._split(projected, self._in_proj_sizes)
        if self.num_shards == 1:
            (x, b, c), conv_states = conv(
                projected, channel_offset=self.d_inner, split=self._conv_sizes
            )
        else:
            xbc, conv_states = conv(xbc)
            x, b, c = self._split(xbc, self._conv_sizes)
        rows = x.shape[:-1]
        dt = jax.nn.softplus(_wide(dt) + _wide(self.dt_bias[...]))
        operands = (
            x.reshape(*rows, self.num_heads, self.headdim),
            jnp.clip(dt, *self.dt_limit),
            -jnp.exp(_wide(self.A_log[...])),
            b.reshape(*rows, self.n_groups, self.d_state),
            c.reshape(*rows, self.n_groups, self.d_state),
            _wide(self.D[...]),
        )
        return z, operands, conv_states

    def _output(self, y: Any, z: jax.Array) -> jax.Array:
        return self.out_proj(self.norm(y.reshape(z.shape), z))


def _without_surplus(
    u: ArrayLike,
    cache: Mamba2Cache,
    query_start_loc: ArrayLike,
    cache_indices: ArrayLike | None,
    max_prefills: int,
    pad_slot_id: int,
) -> jax.Array:
    """`cache_indices` without the sequences that `ssd_packed` will skip.

    The conv has no such limit, and its states must not run ahead of the SSM's.
    """
    num_tokens, num_slots = jnp.shape(u)[0], cache.ssm.shape[0]
    offsets = checks.index_array(
        "query_start_loc", query_start_loc, (None,), "(N+1,)", 0, num_tokens
    )
    checks.at_least_one_offset(offsets)
    num_seqs = offsets.shape[0] - 1
    limit = checks.static_int("max_prefills", max_prefills, minimum=0)
    slots = checks.slots_array(
        "cache_indices", cache_indices, cache.ssm, "cache.ssm", num_seqs, "N"
    )
    if slots is None:
        slots = np.arange(num_seqs, dtype=np.int32)
    offsets = xla.sanitize_offsets(jnp.asarray(offsets), num_tokens)
    pad = checks.pad_slot(pad_slot_id, num_slots)
    seqs = xla.sequences(offsets, slots, None, None, (num_slots, 1), pad)
    prefill = seqs.live & (seqs.length > 1)
    surplus = prefill & (jnp.cumsum(prefill) > limit)
    return jnp.where(surplus, PAD_SLOT_ID, slots)


def _wide(array: jax.Array) -> jax.Array:
    """In float32, or float64 if it is that already."""
    return array.astype(jnp.promote_types(array.dtype, jnp.float32))


def _divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raises unless `value` is a positive int that divides `whole`."""
    if whole % checks.static_int(name, value, minimum=1):
        raise ValueError(f"{name} must divide {whole_name}, got {value} and {whole}")
