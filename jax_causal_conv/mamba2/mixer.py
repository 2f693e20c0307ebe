"""The mixer of a Mamba-2 block as a Flax NNX layer, and the gated norm inside it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
from jax.nn.initializers import Initializer
from jax.typing import ArrayLike, DTypeLike

from .. import batch, checks
from ..metadata import ConvMetadata
from ..nnx_conv import CausalConv1d, default_bias_init, default_kernel_init
from ..operands import PAD_SLOT_ID
from ..published import families, weights
from .ssd import ssd, ssd_packed

_default_linear_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class GatedRMSNorm(nnx.Module):
    """RMSNorm of y gated by silu(z), over groups of neighbouring features.

    `scale * rms_norm(y * silu(z))`, or `scale * rms_norm(y) * silu(z)` with
    `norm_before_gate`, with sigmoid in silu's place if asked for; computed in float32
    (float64 for float64 inputs) and rounded once. `scale` is a Param `(features,)`,
    ones at first.

    Args:
        features: the size of the last axis.
        groups: each of so many equal groups of features has its own mean square.
        norm_before_gate: the gate comes after the norm.
        gate_activation: "silu" or "sigmoid", of z.
        eps: added to the mean square.
        dtype: of the result; None infers it from y, z and scale.
        param_dtype: of `scale`.

    Raises:
        ValueError: `groups` does not divide `features`, or the activation is unknown.
    """

    def __init__(
        self,
        features: int,
        *,
        groups: int = 1,
        norm_before_gate: bool = False,
        gate_activation: str = "silu",
        eps: float = 1e-5,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        _divides("groups", groups, "features", features)
        if gate_activation not in ("silu", "sigmoid"):
            raise ValueError(
                f"gate_activation must be 'silu' or 'sigmoid', got {gate_activation!r}"
            )
        self.groups = groups
        self.norm_before_gate = norm_before_gate
        self.gate_activation = gate_activation
        self.eps = eps
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))

    def __call__(self, y: jax.Array, z: jax.Array) -> jax.Array:
        """Normalises y `(..., features)`, gated by z of the same shape."""
        scale = self.scale[...]
        dtype = canonicalize_dtype(y, z, scale, dtype=self.dtype)
        y, z, scale = (_wide(a) for a in (y, z, scale))
        gate = jax.nn.silu(z) if self.gate_activation == "silu" else jax.nn.sigmoid(z)
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

    H = d_inner // headdim heads (d_inner is expand * d_model); head h uses group
    h // (H // n_groups) of B and C; the conv has C = d_inner + 2 * n_groups * d_state
    channels. Parameters: `in_proj` (an nnx.Linear), `conv` (a `CausalConv1d`),
    `A_log`, `D` and `dt_bias` `(H,)`, `norm` (a `GatedRMSNorm` or None), `out_proj`
    (an nnx.Linear). Step sizes, A, D and the norm are computed in float32 whatever
    `dtype` is.

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
        expand: d_inner / d_model; a fraction of a channel is dropped.
        d_inner: the channels of all heads, instead of `expand`.
        headdim: P, the channels of a head.
        n_groups: G, groups of heads that share B and C.
        chunk_size: tokens that the SSD handles at once. It matters for speed only, so
            it need not be that of a checkpoint.
        use_bias: whether in_proj and out_proj have a bias.
        use_out_bias: whether out_proj has one; None is `use_bias`.
        use_conv_bias: whether the conv has one.
        dt_limit: lower and upper limit of the step sizes.
        dt_min: lower end of the initial step sizes, which are log-uniform.
        dt_max: upper end.
        dt_init_floor: no initial step size is smaller.
        A_init_range: -A is initially uniform in this range.
        norm: whether there is a norm. False: y * silu(z) goes into out_proj.
        norm_before_gate: the norm's gate comes after it.
        norm_groups: groups of the norm; None is `n_groups`, as published. (Versions of
            transformers that normalise over the whole of d_inner want 1; for
            `n_groups=1` there is no difference.)
        norm_eps: the norm's epsilon.
        activation: of the conv, as for `causal_conv1d_fn`.
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
        precision: of the SSD's products, as for `ssd`.
        implementation: of the conv and the SSD, as for `causal_conv1d_fn`.
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
        d_inner: int | None = None,
        headdim: int = 64,
        n_groups: int = 1,
        chunk_size: int = 64,
        use_bias: bool = False,
        use_out_bias: bool | None = None,
        use_conv_bias: bool = True,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        dt_min: float = 1e-3,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        A_init_range: tuple[float, float] = (1.0, 16.0),
        norm: bool = True,
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
        precision: jax.lax.PrecisionLike = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        d_model = checks.static_int("d_model", d_model, minimum=1)
        if d_inner is None:
            d_inner = int(expand * d_model)
        d_inner = checks.static_int("d_inner", d_inner, minimum=1)
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
        self.dt_limit = checks.limits("dt_limit", dt_limit)
        checks.exact_products(precision)
        self.precision = precision
        self.implementation = implementation

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
        self.norm: GatedRMSNorm | None = nnx.data(None)
        if norm:
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
            use_bias=use_bias if use_out_bias is None else use_out_bias,
            kernel_init=out_kernel_init,
            bias_init=out_bias_init,
            rngs=rngs,
            **dtypes,
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
        chunk_size: int | None = None,
        num_shards: int = 1,
        precision: jax.lax.PrecisionLike = None,
        implementation: str | None = None,
    ) -> "Mamba2Mixer":
        """The mixer of one layer of a published model.

        Model types (with the prefix of layer 3): mamba2 and nemotron_h
        (`backbone.layers.3.mixer`), bamba, granitemoehybrid and falcon_h1
        (`model.layers.3.mamba`), zamba2 (`model.layers.3.mamba`, and in its hybrid
        layers `model.layers.3.mamba_decoder.mamba`).

        The mixer computes what transformers' mixer does when it reads a whole text.
        Its decoding with a cache does not apply `time_step_limit` and `time_step_min`;
        here they always hold. Falcon-H1's `ssm_in_multiplier` and `ssm_multipliers`
        become part of in_proj, once, in float32. What a block does around its mixer
        (Falcon-H1's `ssm_out_multiplier`, Granite's `residual_multiplier`) is not
        in it.

        Args:
            config: the model's config.json, as json reads it.
            tensors: arrays under their names in the checkpoint, those of other layers
                too; a file opened by `safetensors.safe_open` will do.
            prefix: of the names of this mixer's tensors.
            dtype: of the computation. None is that of in_proj's weight.
            param_dtype: of the parameters, but for `A_log`, `D` and `dt_bias`, which
                are float32. None is `dtype`.
            chunk_size: None is the config's.
            num_shards: as for the constructor; the columns are put in its order.
            precision: as for the constructor.
            implementation: as for the constructor.

        Returns:
            The mixer, on jax's default device.

        Raises:
            ValueError: another kind of model; a value of the config is of a wrong kind,
                or sizes contradict each other; or tensors are missing, left over,
                misshapen or no floats, all of which are named.
        """
        published = families.mamba2(config)
        arguments = published.arguments | {
            "num_shards": num_shards,
            "precision": precision,
            "implementation": implementation,
        }
        if chunk_size is not None:
            arguments["chunk_size"] = chunk_size
        found = weights.below(tensors, prefix)
        dtype, param_dtype = weights.dtypes(found, "in_proj.weight", dtype, param_dtype)

        def make() -> Mamba2Mixer:
            return cls(
                dtype=dtype, param_dtype=param_dtype, rngs=nnx.Rngs(0), **arguments
            )

        mixer = nnx.eval_shape(make)
        columns, channels = mixer.in_proj_order, mixer.conv_order
        factors = published.columns
        scaled = bool((factors != 1).any() or published.in_factor != 1)

        def in_proj(weight: np.ndarray) -> np.ndarray:
            if scaled:
                weight = _at_least_float32(weight) * factors[:, None]
                weight = weight * np.float32(published.in_factor)
            return weight[columns]

        def in_proj_bias(bias: np.ndarray) -> np.ndarray:
            bias = _at_least_float32(bias) * factors if scaled else bias
            return bias[columns]

        return weights.build(
            make,
            found,
            param_dtype,
            name_of=lambda where: weights.name(where).replace("conv.", "conv1d."),
            change={
                "in_proj.weight": in_proj,
                "in_proj.bias": in_proj_bias,
                "conv1d.weight": lambda weight: weight[channels],
                "conv1d.bias": lambda bias: bias[channels],
            },
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
        z, arguments, _ = self._ssd_arguments(
            u,
            lambda xbc, **columns: (
                self.conv(xbc, segment_ids=segment_ids, **columns),
                None,
            ),
        )
        y = ssd(**arguments, segment_ids=segment_ids)
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
        slots: dict[str, Any] = {
            "cache_indices": cache_indices,
            "has_initial_state": has_initial_state,
            "pad_slot_id": pad_slot_id,
        }
        z, arguments, conv_states = self._ssd_arguments(
            u,
            lambda xbc, **columns: self.conv.packed(
                xbc, cache.conv, query_start_loc, metadata=metadata, **slots, **columns
            ),
        )
        y, ssm_states = ssd_packed(
            ssm_states=cache.ssm,
            query_start_loc=query_start_loc,
            max_prefills=max_prefills,
            **arguments,
            **slots,
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
        """Indices of the parts' columns, in `num_shards` blocks of a share of each."""
        parts = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
        return np.hstack([p.reshape(self.num_shards, -1) for p in parts]).ravel()

    def _split(self, columns: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
        """The parts of the last axis, which is laid out as by `_order`."""
        rows, shards = columns.shape[:-1], self.num_shards
        blocks = columns.reshape(*rows, shards, sum(sizes) // shards)
        parts = jnp.split(blocks, np.cumsum(sizes)[:-1] // shards, axis=-1)
        return [
            part.reshape(*rows, size) for part, size in zip(parts, sizes, strict=True)
        ]

    def _ssd_arguments(
        self, u: ArrayLike, conv: Callable[..., tuple[Any, Any]]
    ) -> tuple[jax.Array, dict[str, Any], Any]:
        """Projects u, runs the conv, and prepares the arguments of the SSD.

        Args:
            u: the mixer's input.
            conv: called with columns x, B, C, returns them convolved, and a second
                value. With one shard it gets the whole output of in_proj, and keywords
                `channel_offset` and `split` that say where x, B, C lie in it and how to
                return them: as three arrays, without a copy to cut them apart.

        Returns:
            The gate z; the arguments that `ssd` and `ssd_packed` share; `conv`'s second
            value.
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
        arguments = {
            "x": x.reshape(*rows, self.num_heads, self.headdim),
            "dt": dt,
            "A": -jnp.exp(_wide(self.A_log[...])),
            "B": b.reshape(*rows, self.n_groups, self.d_state),
            "C": c.reshape(*rows, self.n_groups, self.d_state),
            "D": _wide(self.D[...]),
            "dt_bias": _wide(self.dt_bias[...]),
            "dt_softplus": True,
            "dt_limit": self.dt_limit,
            "chunk_size": self.chunk_size,
            "precision": self.precision,
            "implementation": self.implementation,
        }
        return z, arguments, conv_states

    def _output(self, y: Any, z: jax.Array) -> jax.Array:
        """The mixer's output from that of the SSD and the gate."""
        y = y.reshape(z.shape)
        if self.norm is None:
            dtype = canonicalize_dtype(y, z, dtype=self.out_proj.dtype)
            y = (_wide(y) * jax.nn.silu(_wide(z))).astype(dtype)
        else:
            y = self.norm(y, z)
        return self.out_proj(y)


def _without_surplus(
    u: ArrayLike,
    cache: Mamba2Cache,
    query_start_loc: ArrayLike,
    cache_indices: ArrayLike | None,
    max_prefills: int,
    pad_slot_id: int,
) -> jax.Array:
    """`cache_indices` that skip the prefills which `ssd_packed` is going to skip.

    The conv has no limit of prefills: without this it would advance the conv states of
    requests whose SSM states stay behind.
    """
    num_tokens, num_slots = jnp.shape(u)[0], cache.ssm.shape[0]
    offsets = checks.offsets(query_start_loc, num_tokens)
    num_seqs = offsets.shape[0] - 1
    limit = checks.static_int("max_prefills", max_prefills, minimum=0)
    slots = checks.slots_array(
        "cache_indices", cache_indices, cache.ssm, "cache.ssm", num_seqs, "N"
    )
    if slots is None:
        slots = np.arange(num_seqs, dtype=np.int32)
    offsets = batch.sanitize_offsets(jnp.asarray(offsets), num_tokens)
    pad = checks.pad_slot(pad_slot_id, num_slots)
    seqs = batch.sequences(offsets, slots, None, None, (num_slots, 1), pad)
    return jnp.where(batch.surplus_prefills(seqs, limit), PAD_SLOT_ID, slots)


def _wide(array: jax.Array) -> jax.Array:
    """In float32, or in float64 if that is its dtype."""
    return array.astype(batch.accumulator(array))


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raises unless `value` is a positive int that divides `whole`."""
    if whole % checks.static_int(name, value, minimum=1):
        raise ValueError(f"{name} must divide {whole_name}, got {value} and {whole}")
