"""The mixer of a Mamba-2 block as a Flax NNX layer, and the gated norm inside it."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import Initializer
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from .. import batch, checks
from ..arguments import Activation, Implementation
from ..halo import halo_state, ssd_halo_state
from ..metadata import ConvMetadata
from ..nnx_conv import CausalConv1d, default_bias_init, default_kernel_init
from ..operands import PAD_SLOT_ID
from ..promotion import promoting
from ..published import families, weights
from .mesh import (
    SharedColumns,
    TiedConv,
    TiedPromotion,
    on_mesh,
    place_like,
    spec_of,
)
from .ssd import DraftStates, ssd, ssd_packed

__all__ = ["GatedRMSNorm", "Mamba2Cache", "Mamba2Mixer"]

_default_linear_init = jax.nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class GatedRMSNorm(nnx.Module):
    """RMSNorm of y gated by silu(z), over groups of neighbouring features.

    `scale * rms_norm(y * silu(z))`, or `scale * rms_norm(y) * silu(z)` with
    `norm_before_gate`, computed in float32 (float64 for float64 inputs) and rounded
    once. With `gate_activation="sigmoid"` the gate is sigmoid(z). `scale` is a Param
    `(features,)`, ones at first.

    Args:
        features: the size of the last axis.
        groups: each of so many equal groups of features has its own mean square.
        norm_before_gate: the gate comes after the norm.
        eps: added to the mean square.
        gate_activation: "silu" or "sigmoid", of the gate.
        dtype: of the result; None infers it from y, z and scale.
        param_dtype: of `scale`.

    Raises:
        ValueError: `groups` does not divide `features`, or `gate_activation` is
            unknown.
    """

    def __init__(
        self,
        features: int,
        *,
        groups: int = 1,
        norm_before_gate: bool = False,
        eps: float = 1e-5,
        gate_activation: str = "silu",
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
    ):
        if gate_activation not in ("silu", "sigmoid"):
            raise ValueError(
                f"gate_activation must be 'silu' or 'sigmoid', got {gate_activation!r}"
            )
        _divides("groups", groups, "features", features)
        self.groups = groups
        self.norm_before_gate = norm_before_gate
        self.eps = eps
        self.gate_activation = gate_activation
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((features,), param_dtype))

    @promoting
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

    In a dense call, slot i is the state before or after row i.

    Attributes:
        conv: `(S, W-1, C)`, the last inputs of the conv; with drafts `(S, W-1+q, C)`.
        ssm: `(S, H, P, K)`, the state of the SSM; with drafts `DraftStates`.
    """

    conv: jax.Array
    ssm: jax.Array | DraftStates


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

    **Long rows.** `initial_state` and `return_final_state` let documents be trained in
    pieces; `axis_name` shards time over the devices of a mesh axis (context
    parallelism): the devices exchange W-1 tokens for the conv and, in ceil(log2(n))
    steps, the states of the SSD.

    **Memory in training.** The conv's output has the name "conv" for the policies of
    `jax.checkpoint`. A block that keeps nothing but its input, and one that keeps the
    conv's output as well, which is then not computed again:

        >>> policies = jax.checkpoint_policies
        >>> keep_nothing = jax.checkpoint(block)
        >>> keep_conv = jax.checkpoint(
        ...     block, policy=policies.save_only_these_names("conv")
        ... )

    **Tensor parallelism** over a mesh axis of n devices needs `num_shards=n`. Then
    in_proj's columns lie as n blocks, one per shard, of that shard's z, x, B, C, dt,
    and the conv's channels as n blocks of x, B, C, so that no shard needs another's
    columns. With fewer groups than shards every shard has its own copy of the columns
    B and C of its heads' group (so the conv has C = d_inner + 2 * num_shards * d_state
    channels). The copies of a group are one parameter: they begin equal, and each gets
    the sum of their gradients, which keeps them equal under any optimiser that treats
    elements alike. Shard the columns of `in_proj.kernel` (and
    its bias), the channels of `conv.kernel` and `conv.bias`, the rows of
    `out_proj.kernel`, the channels of `Mamba2Cache.conv` and the heads of
    `Mamba2Cache.ssm`, by `nnx.with_partitioning` around the initialisers or by
    `NamedSharding`; the `(H,)` vectors and `norm.scale` are small and may stay whole.
    Under plain jit the XLA implementation of the forward pass then communicates once,
    in the sum of out_proj, and, where n does not divide `norm_groups`, in the norm,
    which sums one number per token and group. Published weights are brought into this
    layout by indexing with `in_proj_order` and `conv_order`; `tensor_parallel` does all
    of this for a whole model.

    **Explicit meshes**, as `jax.make_mesh` makes them by default, are welcome: XLA
    divides the mixer as on automatic axes, and the outputs are sharded like u.

    Args:
        d_model: features of input and output.
        d_state: K, the size of the state per head and channel.
        d_conv: W, the width of the conv.
        expand: d_inner / d_model, if d_inner is None.
        d_inner: channels of all heads; None is int(expand * d_model).
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
        norm: False leaves the norm out: out = out_proj(y * silu(z)).
        norm_before_gate: the norm's gate comes after it.
        norm_groups: groups of the norm; None is `n_groups`, as published. (Versions of
            transformers that normalise over the whole of d_inner want 1; for
            `n_groups=1` there is no difference.)
        norm_eps: the norm's epsilon.
        activation: of the conv, as for `causal_conv1d_fn`.
        num_shards: blocks of the columns, for tensor parallelism. It divides `n_groups`
            or is a multiple of it, and divides the number of heads.
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
        activation: Activation = "silu",
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
        implementation: Implementation = None,
        rngs: nnx.Rngs,
    ):
        d_model = checks.static_int("d_model", d_model, minimum=1)
        if d_inner is None:
            d_inner = int(expand * d_model)
            _divides("headdim", headdim, "d_inner = expand * d_model", d_inner)
        else:
            d_inner = checks.static_int("d_inner", d_inner, minimum=1)
            _divides("headdim", headdim, "d_inner", d_inner)
        num_heads = d_inner // headdim
        _divides("n_groups", n_groups, "the number of heads", num_heads)
        _divides("num_shards", num_shards, "the number of heads", num_heads)
        if n_groups % num_shards and num_shards % n_groups:
            raise ValueError(
                "num_shards must divide n_groups or be a multiple of it, got "
                f"{num_shards} and {n_groups}"
            )
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
        promotion: dict[str, Any] = {}
        make_conv: Callable[..., CausalConv1d] = CausalConv1d
        if num_shards > n_groups:
            of_in_proj = self._copies(2 * d_inner)
            promotion["promote_dtype"] = TiedPromotion(of_in_proj)
            make_conv = functools.partial(TiedConv, shared=self._copies(d_inner))
        self.in_proj = nnx.Linear(
            d_model,
            sum(self._in_proj_sizes),
            use_bias=use_bias,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
            **dtypes,
            **promotion,
        )
        if num_shards > n_groups:
            of_in_proj.equalise(self.in_proj.kernel, 1)
            of_in_proj.equalise(self.in_proj.bias, 0)
        self.conv = make_conv(
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

    @property
    def column_sizes(self) -> tuple[int, int, int, int, int]:
        """How many columns of published in_proj weights are z, x, B, C and dt."""
        z, _, dt = self._in_proj_sizes
        x, b, c = self._conv_sizes
        return z, x, b, c, dt

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
        implementation: Implementation = None,
    ) -> Mamba2Mixer:
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
        `(d_model, columns)`; the identity with one shard. With fewer groups than
        shards the columns of B and C occur several times.
        """
        return self._order(("z", "x", "B", "C", "dt"))

    @property
    def conv_order(self) -> np.ndarray:
        """Channels of published conv weights in this mixer's order."""
        return self._order(("x", "B", "C"))

    def __call__(
        self,
        u: ArrayLike,
        *,
        segment_ids: ArrayLike | None = None,
        initial_state: Mamba2Cache | None = None,
        return_final_state: bool = False,
        axis_name: str | None = None,
    ) -> Any:
        """Mixes rows of tokens, for training.

        Args:
            u: `(B, T, d_model)`.
            segment_ids: `(B, T)` integers, as for `causal_conv1d`: documents packed
                into a row do not see each other; a negative id is padding.
            initial_state: the states before the rows, `(B, W-1, C)` and
                `(B, H, P, K)`: what another call returned, or `init_cache(B)`. They
                belong to each row's run at position 0, so give zeros to a row whose
                piece begins with another document. None is zeros.
            return_final_state: also return the states after each row's last token that
                is not padding. With them, long documents can be trained in pieces
                (`jax.lax.stop_gradient` around them truncates the gradients), and
                `packed` can go on from a row that was read here.
            axis_name: the mesh axis over which time is sharded, inside `jax.shard_map`:
                u and `segment_ids` are this device's part, of at least W-1 tokens,
                and `initial_state` is that before the whole rows. Returned states are
                those after the device's own part; a part of nothing but padding does
                not pass the conv's on.

        Returns:
            `(B, T, d_model)`; with `return_final_state` a pair of it and a
            `Mamba2Cache`.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape is wrong.

        Example:
            >>> graphdef, params = nnx.split(mixer)
            >>> def part(params, u, ids):  # what each device computes of its tokens
            ...     mixer = nnx.merge(graphdef, params)
            ...     return mixer(u, segment_ids=ids, axis_name="time")
            >>> rows = P(None, "time")
            >>> apply = jax.shard_map(
            ...     part, mesh=mesh, in_specs=(P(), rows, rows), out_specs=rows
            ... )
            >>> out = apply(params, u, ids)
        """
        self._check_input(u, 3, "(B, T, d_model)", "packed tokens go to `packed`")
        if initial_state is not None and isinstance(initial_state.ssm, DraftStates):
            raise TypeError(
                "initial_state must be a Mamba2Cache without drafts, got one of "
                "init_cache(max_drafts=…), which `packed` alone understands"
            )
        rows = {"segment_ids": segment_ids, "initial_state": initial_state}
        options = {"return_final_state": return_final_state, "axis_name": axis_name}

        def specs():
            batch, *_ = mixed = spec_of(u)
            channels, *_ = spec_of(self.conv.kernel[...])
            after: Any = P(batch, None, channels), P(batch, channels)
            return (P(*mixed), Mamba2Cache(*after)) if return_final_state else P(*mixed)

        return on_mesh(
            lambda mixer, u, rows: mixer._rows(u, **rows, **options),
            self,
            (u, rows),
            specs,
        )

    def _rows(
        self,
        u: ArrayLike,
        *,
        segment_ids: ArrayLike | None,
        initial_state: Mamba2Cache | None,
        return_final_state: bool,
        axis_name: str | None,
    ) -> Any:
        """`__call__`, where no axis of the mesh is explicit."""
        before: Any = initial_state or (None, None)
        conv_before, ssm_before = before
        options: dict[str, Any] = {
            "segment_ids": segment_ids,
            "return_final_state": return_final_state,
        }

        def conv(columns, **where):
            before = conv_before
            if axis_name is not None:
                start = where.get("channel_offset", 0)
                before = halo_state(
                    columns[..., start : start + sum(self._conv_sizes)],
                    axis_name,
                    self.conv.kernel_size - 1,
                    segment_ids=segment_ids,
                    initial_state=conv_before,
                )
            out, after = _pair(
                self.conv(columns, initial_state=before, **options, **where),
                return_final_state,
            )
            return jax.tree.map(_computed_once, out), after

        z, arguments, conv_after = self._ssd_arguments(u, conv)
        if axis_name is not None:
            same = ("x", "dt", "A", "B", "dt_bias", "dt_softplus", "dt_limit")
            ssm_before = ssd_halo_state(
                **{name: arguments[name] for name in same},
                axis_name=axis_name,
                segment_ids=segment_ids,
                initial_state=ssm_before,
            )
        y, ssm_after = _pair(
            ssd(**arguments, initial_state=ssm_before, **options), return_final_state
        )
        out = self._output(y, z)
        return (out, Mamba2Cache(conv_after, ssm_after)) if return_final_state else out

    def packed(
        self,
        u: ArrayLike,
        cache: Mamba2Cache,
        query_start_loc: ArrayLike,
        *,
        cache_indices: ArrayLike | None = None,
        has_initial_state: ArrayLike | None = None,
        num_rejected_tokens: ArrayLike | None = None,
        write_indices: ArrayLike | None = None,
        snapshot_ends: ArrayLike | None = None,
        snapshot_indices: ArrayLike | None = None,
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
            num_rejected_tokens: `(N,)` integers, how many of each request's last tokens
                were rejected drafts and are taken back, as for `ssd_packed`; None is 0.
                The cache must have been made for so many drafts.
            write_indices: `(N,)` integers, the slot that each new state goes to,
            snapshot_ends: `(N,)` integers, after how many tokens a sequence also leaves
                its state, and
            snapshot_indices: `(N,)` integers, the slots for that, all as for
                `causal_conv1d_fn`, or None.
            metadata: from `build_metadata`, to share between layers. None builds it.
            max_prefills: static; how many live sequences may have more than one
                token, or, in a cache for q drafts, more than 1 + q. Of a batch with
                more the surplus ones, in order, are skipped: no slot of theirs changes.
                0 compiles a step without prompts. None is enough for any batch.
            pad_slot_id: static int, the slot number that means "skip".

        Returns:
            `(T, d_model)` and the new cache.

        Raises:
            TypeError: a dtype or the type of a static argument is wrong.
            ValueError: a shape or size is wrong, or `metadata` is for other sizes.
        """
        self._check_input(u, 2, "(T, d_model)", "rows are for calling the mixer")
        if not isinstance(cache, Mamba2Cache):
            raise TypeError(
                "cache must be a Mamba2Cache, as init_cache makes it, got "
                f"{type(cache).__name__}"
            )
        arrays = {
            "cache": cache,
            "query_start_loc": query_start_loc,
            "cache_indices": cache_indices,
            "has_initial_state": has_initial_state,
            "num_rejected_tokens": num_rejected_tokens,
            "write_indices": write_indices,
            "snapshot_ends": snapshot_ends,
            "snapshot_indices": snapshot_indices,
            "metadata": metadata,
        }
        return on_mesh(
            lambda mixer, u, arrays: mixer._packed(
                u, **arrays, max_prefills=max_prefills, pad_slot_id=pad_slot_id
            ),
            self,
            (u, arrays),
            lambda: (P(*spec_of(u)), jax.tree.map(lambda a: P(*spec_of(a)), cache)),
        )

    def _packed(
        self,
        u: ArrayLike,
        cache: Mamba2Cache,
        query_start_loc: ArrayLike,
        *,
        cache_indices: ArrayLike | None,
        metadata: ConvMetadata | None,
        max_prefills: int | None,
        pad_slot_id: int,
        **sequences: ArrayLike | None,
    ) -> tuple[jax.Array, Mamba2Cache]:
        """`packed`, where no axis of the mesh is explicit."""
        if max_prefills is not None:
            cache_indices = _without_surplus(
                u, cache, query_start_loc, cache_indices, max_prefills, pad_slot_id
            )
        slots: dict[str, Any] = {
            "cache_indices": cache_indices,
            "pad_slot_id": pad_slot_id,
            **sequences,
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
        max_drafts: int = 0,
    ) -> Mamba2Cache:
        """The cache of `num_slots` requests without history.

        Args:
            num_slots: S.
            dtype: of the conv states; None is the mixer's `dtype`, else `param_dtype`.
            ssm_dtype: of the SSM states.
            max_drafts: q, how many of a request's last tokens can be taken back by
                `num_rejected_tokens`. The tokens that the cache remembers for it have
                `dtype`: it should be the computation's.

        Returns:
            A `Mamba2Cache` of zeros: `(S, W-1, C)` and `(S, H, P, K)`; with drafts
            `(S, W-1+q, C)` and `DraftStates`. Channels and heads lie on the devices
            that have the conv's.

        Raises:
            TypeError: `max_drafts` is no static int.
            ValueError: it is negative.
        """
        drafts = checks.static_int("max_drafts", max_drafts, minimum=0)
        heads = self.num_heads, self.headdim
        of_group = self._stored_groups, self.d_state
        rows = self.conv.kernel_size - 1 + drafts
        conv = self.conv.init_state(num_slots, state_len=rows, dtype=dtype)
        place = functools.partial(place_like, self.conv.kernel.get_value())
        states = (num_slots, *heads, self.d_state)
        ssm: Any = place(jnp.zeros(states, ssm_dtype), 1)
        if drafts:
            recent = num_slots, drafts
            wide = batch.accumulator(conv)
            ssm = DraftStates(
                ssm,
                place(jnp.zeros((*recent, *heads), conv.dtype), 2),
                place(jnp.zeros((*recent, self.num_heads), wide), 2),
                place(jnp.zeros((*recent, *of_group), conv.dtype), 2),
            )
        return Mamba2Cache(place(conv, 2), ssm)

    def _check_input(self, u: ArrayLike, rank: int, letters: str, other: str) -> None:
        shape = jnp.shape(u)
        features = self.in_proj.in_features
        if len(shape) == rank and shape[-1] == features:
            return
        hint = f": {other}" if shape[-1:] == (features,) else ""
        raise ValueError(
            f"u must have shape {letters} with d_model = {features}, got {shape}{hint}"
        )

    @property
    def _conv_sizes(self) -> tuple[int, int, int]:
        """Channels x, B, C, with all copies of the latter two."""
        states = self._stored_groups * self.d_state
        return self.d_inner, states, states

    @property
    def _in_proj_sizes(self) -> tuple[int, int, int]:
        """Columns z, the conv's, dt."""
        return self.d_inner, sum(self._conv_sizes), self.num_heads

    @property
    def _stored_groups(self) -> int:
        """Groups of B and C, of which each shard has at least one."""
        return max(self.n_groups, self.num_shards)

    def _copies(self, before: int) -> SharedColumns:
        """The columns B and C of each shard, which follow its share of `before`."""
        start = before // self.num_shards
        stop = start + 2 * self.d_state
        return SharedColumns(self.num_shards, self.n_groups, start, stop)

    def _order(self, names: Sequence[str]) -> np.ndarray:
        """Indices of the parts' columns, in `num_shards` blocks of a share of each."""
        states = self.n_groups * self.d_state
        sizes = {"z": self.d_inner, "x": self.d_inner, "dt": self.num_heads}
        parts, start = [], 0
        for name in names:
            size = sizes.get(name, states)
            part = start + np.arange(size)
            if name in ("B", "C"):
                copies = self._stored_groups // self.n_groups
                part = np.repeat(part.reshape(self.n_groups, -1), copies, axis=0)
            parts.append(part.reshape(self.num_shards, -1))
            start += size
        return np.hstack(parts).ravel()

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
            "B": b.reshape(*rows, self._stored_groups, self.d_state),
            "C": c.reshape(*rows, self._stored_groups, self.d_state),
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
        if self.norm is not None:
            return self.out_proj(self.norm(y, z))
        return self.out_proj((_wide(y) * jax.nn.silu(_wide(z))).astype(z.dtype))


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
    states, most = cache.ssm, 1
    if isinstance(states, DraftStates):
        most += states.x.shape[1]
        states = states.states
    num_tokens, num_slots = jnp.shape(u)[0], states.shape[0]
    offsets = checks.offsets(query_start_loc, num_tokens)
    num_seqs = offsets.shape[0] - 1
    limit = checks.static_int("max_prefills", max_prefills, minimum=0)
    slots = checks.slots_array(
        "cache_indices", cache_indices, states, "cache.ssm", num_seqs, "N"
    )
    if slots is None:
        slots = np.arange(num_seqs, dtype=np.int32)
    offsets = batch.sanitize_offsets(jnp.asarray(offsets), num_tokens)
    pad = checks.pad_slot(pad_slot_id, num_slots)
    seqs = batch.sequences(offsets, slots, None, None, (num_slots, 1), pad)
    surplus = batch.surplus_prefills(seqs, limit, most)
    return jnp.where(surplus, PAD_SLOT_ID, slots)


def _pair(result: Any, has_state: bool) -> tuple[Any, Any]:
    """A result and its final state, which is None if it has none."""
    return result if has_state else (result, None)


def _computed_once(array: jax.Array) -> jax.Array:
    """The conv's output, to be kept in memory, and named for checkpoint policies.

    XLA for CPUs would rather compute a conv again inside each of the SSD's products
    that read it. Only float32 was measured to gain.
    """
    array = checkpoint_name(array, "conv")
    if array.dtype != jnp.float32:
        return array
    return jax.lax.platform_dependent(
        array, cpu=jax.lax.optimization_barrier, default=lambda array: array
    )


def _wide(array: jax.Array) -> jax.Array:
    """In float32, or in float64 if that is its dtype."""
    return array.astype(batch.accumulator(array))


def _at_least_float32(array: np.ndarray) -> np.ndarray:
    return array if array.dtype == np.float64 else array.astype(np.float32)


def _divides(name: str, value: int, whole_name: str, whole: int) -> None:
    """Raises unless `value` is a positive int that divides `whole`."""
    if whole % checks.static_int(name, value, minimum=1):
        raise ValueError(f"{name} must divide {whole_name}, got {value} and {whole}")
