"""The Mamba2 language model, for training and for packed serving."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike, DTypeLike

from ..arguments import Implementation
from ..batch import accumulator, sanitize_offsets
from ..metadata import ConvMetadata, build_metadata
from ..operands import PAD_SLOT_ID
from ..promotion import promoting
from .config import Mamba2Config
from .mesh import on_mesh, spec_of
from .mixer import Mamba2Cache, Mamba2Mixer

__all__ = ["Mamba2LM"]


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32, rounded once to `dtype`."""

    def __init__(
        self, features: int, *, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(features, param_dtype))

    @promoting
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `(..., features)`, whatever its dtype."""
        x = x.astype(accumulator(x))
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        scale = self.scale[...].astype(x.dtype)
        return (x * jax.lax.rsqrt(mean + self.epsilon) * scale).astype(self.dtype)


class Block(nnx.Module):
    """One layer: the residual stream plus the mixer of its norm."""

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        precision: jax.lax.PrecisionLike,
        implementation: Implementation,
        num_shards: int,
        rngs: nnx.Rngs,
    ):
        self.norm = RMSNorm(
            config.d_model,
            epsilon=config.norm_eps,
            dtype=dtype,
            param_dtype=param_dtype,
        )
        self.mixer = Mamba2Mixer(
            config.d_model,
            d_state=config.d_state,
            d_conv=config.d_conv,
            expand=config.expand,
            headdim=config.headdim,
            n_groups=config.n_groups,
            chunk_size=config.chunk_size,
            use_bias=config.use_bias,
            use_conv_bias=config.use_conv_bias,
            dt_limit=config.dt_limit,
            dt_min=config.dt_min,
            dt_max=config.dt_max,
            dt_init_floor=config.dt_init_floor,
            norm_before_gate=config.norm_before_gate,
            norm_eps=config.norm_eps,
            num_shards=num_shards,
            dtype=dtype,
            param_dtype=param_dtype,
            precision=precision,
            implementation=implementation,
            rngs=rngs,
        )

    def __call__(
        self, hidden: jax.Array, *, return_final_state: bool = False, **rows: Any
    ) -> Any:
        """Rows `(B, T, d_model)`, for training; `rows` as for `Mamba2Mixer`."""
        mixed = self.mixer(
            self.norm(hidden), return_final_state=return_final_state, **rows
        )
        if not return_final_state:
            return hidden + mixed.astype(hidden.dtype)
        mixed, after = mixed
        return hidden + mixed.astype(hidden.dtype), after

    def packed(
        self,
        hidden: jax.Array,
        cache: Mamba2Cache,
        query_start_loc: ArrayLike,
        **batch: Any,
    ) -> tuple[jax.Array, Mamba2Cache]:
        """Packed tokens `(T, d_model)`, for serving."""
        mixed, cache = self.mixer.packed(
            self.norm(hidden), cache, query_start_loc, **batch
        )
        return hidden + mixed.astype(hidden.dtype), cache


class Mamba2LM(nnx.Module):
    """Embedding, Mamba2 blocks, final norm, head.

    The layout of the published Mamba2 models (Dao and Gu, "Transformers are SSMs",
    2024) and of transformers' `Mamba2ForCausalLM`; `checkpoint` loads either. The
    model holds parameters only: caches are arguments and results, so that a server
    may donate them. On a mesh with explicit axes logits are sharded like the tokens,
    and the cache as it was.

    Parameters: `embed.embedding` (vocab_size, d_model); per layer `layers[i].norm` and
    `layers[i].mixer`; `norm`; `lm_head.kernel` (d_model, vocab_size), unless the
    embedding table is the head as well.

    Args:
        config: sizes and options.
        dtype: of the computation; None is `param_dtype`. Norms, step sizes and the
            scan compute in float32 in any case, logits come out in float32.
        param_dtype: of the parameters.
        precision: of the SSD's products, as for `ssd`.
        implementation: of conv and SSD, as for `causal_conv1d_fn`.
        num_shards: of the mixers, for tensor parallelism; see `tensor_parallel`.
        rngs: the stream `params` is used.

    Example:
        >>> config = Mamba2Config(vocab_size=256, d_model=64, n_layers=2, headdim=16)
        >>> model = Mamba2LM(config, rngs=nnx.Rngs(0))
        >>> logits = model(jnp.zeros((2, 32), jnp.int32))  # (2, 32, 256)
        >>> cache = model.init_cache(num_slots=4)
        >>> last_logits, cache = model.packed(  # (2, 256)
        ...     jnp.zeros(8, jnp.int32), cache, jnp.array([0, 5, 6]))
    """

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        precision: jax.lax.PrecisionLike = None,
        implementation: Implementation = None,
        num_shards: int = 1,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.precision = precision
        self.implementation = implementation
        self.num_shards = num_shards
        self.dtype = jnp.dtype(dtype or param_dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        ops: Any = {"precision": precision, "implementation": implementation}
        ops["num_shards"] = num_shards
        self.embed = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
            **dtypes,
        )
        self.layers = nnx.List(
            Block(config, rngs=rngs, **dtypes, **ops) for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.d_model, epsilon=config.norm_eps, **dtypes)
        self.lm_head: nnx.Linear | None
        if config.tie_embeddings:
            self.lm_head = nnx.data(None)
        else:
            self.lm_head = nnx.Linear(
                config.d_model,
                config.vocab_size,
                use_bias=False,
                kernel_init=nnx.initializers.normal(0.02),
                rngs=rngs,
                **dtypes,
            )

    def __call__(
        self,
        tokens: ArrayLike,
        *,
        segment_ids: ArrayLike | None = None,
        initial_state: tuple[Mamba2Cache, ...] | None = None,
        return_final_state: bool = False,
        axis_name: str | None = None,
    ) -> Any:
        """Logits of whole rows, for training and evaluation.

        Args:
            tokens: `(B, T)` integers; ids outside the vocabulary are clipped into it.
            segment_ids: `(B, T)` integers or None, as for `causal_conv1d`: documents
                packed into one row do not see each other; a negative id is padding.
            initial_state: the states before the rows, one `Mamba2Cache` per layer, as
                for `Mamba2Mixer`: of another call, or `init_cache(B)`. None is zeros.
            return_final_state: also return the states after the rows.
            axis_name: the mesh axis over which time is sharded, as for `Mamba2Mixer`.

        Returns:
            `(B, T, vocab_size)` float32 logits of each next token. Those at padding
            are finite and without meaning. With `return_final_state` a pair of them
            and the states, one `Mamba2Cache` per layer.
        """
        _check_tokens(tokens, 2, "(B, T)", "packed tokens go to `packed`")
        rows = {"segment_ids": segment_ids, "initial_state": initial_state}
        options = {"return_final_state": return_final_state, "axis_name": axis_name}

        def specs():
            batch, *_ = ids = spec_of(jnp.asarray(tokens))
            logits = P(*ids, None)
            if not return_final_state:
                return logits
            channels, *_ = spec_of(self.layers[0].mixer.conv.kernel[...])
            after: Any = P(batch, None, channels), P(batch, channels)
            return logits, (Mamba2Cache(*after),) * len(self.layers)

        return on_mesh(
            lambda model, tokens, rows: model._rows(tokens, **rows, **options),
            self,
            (tokens, rows),
            specs,
        )

    def _rows(
        self,
        tokens: ArrayLike,
        *,
        segment_ids: ArrayLike | None,
        initial_state: tuple[Mamba2Cache, ...] | None,
        return_final_state: bool,
        axis_name: str | None,
    ) -> Any:
        """`__call__`, where no axis of the mesh is explicit."""
        hidden = self._embed(tokens)
        states = []
        before = initial_state or (None,) * len(self.layers)
        for layer, state in zip(self.layers, before, strict=True):
            hidden = layer(
                hidden,
                segment_ids=segment_ids,
                initial_state=state,
                return_final_state=return_final_state,
                axis_name=axis_name,
            )
            if return_final_state:
                hidden, after = hidden
                states.append(after)
        logits = self._logits(hidden)
        return (logits, tuple(states)) if return_final_state else logits

    def packed(
        self,
        tokens: ArrayLike,
        cache: tuple[Mamba2Cache, ...],
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
        logits_at: ArrayLike | None = None,
    ) -> tuple[jax.Array, tuple[Mamba2Cache, ...]]:
        """One step of serving: prefills, chunks of them and decodes, packed.

        Args:
            tokens: `(T,)` integers, T >= 1; ids outside the vocabulary are clipped
                into it.
            cache: of `init_cache`, one entry per layer; donate it to `jax.jit`.
            query_start_loc: `(N+1,)`, as for `causal_conv1d_fn`.
            cache_indices: `(N,)` or None, as there.
            has_initial_state: `(N,)` bool or None, as there.
            num_rejected_tokens: `(N,)` or None: how many of each request's last tokens
                were rejected drafts and are taken back; at most the `max_drafts` that
                the cache was made for.
            write_indices: `(N,)` or None, as there, and
            snapshot_ends: `(N,)` or None, as there, and
            snapshot_indices: `(N,)` or None, as there: the slots that new and earlier
                states of all layers go to.
            metadata: of `build_metadata`, shared by all layers; None builds it here,
                once.
            max_prefills: static, as for `ssd_packed`: how many live sequences may
                have more than one token, or, in a cache for q drafts, more than 1 + q.
                None is min(N, T // 2).
            pad_slot_id: static, the slot number that means "skip".
            logits_at: `(M,)` integers, the tokens whose logits are wanted, clipped into
                [0, T); None is the last one of each sequence.

        Returns:
            `(N, vocab_size)` or `(M, vocab_size)` float32 logits after these tokens,
            finite and without meaning for empty and skipped sequences; and the new
            cache.

        Raises:
            TypeError: a dtype is wrong.
            ValueError: a shape or size is wrong.
        """
        _check_tokens(tokens, 1, "(T,)", "rows (B, T) are for calling the model")
        if isinstance(cache, Mamba2Cache) or len(cache) != len(self.layers):
            got = "one" if isinstance(cache, Mamba2Cache) else len(cache)
            raise ValueError(
                f"cache must have one Mamba2Cache for each of {len(self.layers)} "
                f"layers, as init_cache makes it, got {got}"
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
            "logits_at": logits_at,
        }
        return on_mesh(
            lambda model, tokens, arrays: model._packed(
                tokens, **arrays, max_prefills=max_prefills, pad_slot_id=pad_slot_id
            ),
            self,
            (tokens, arrays),
            lambda: (P(None, None), jax.tree.map(lambda a: P(*spec_of(a)), cache)),
        )

    def _packed(
        self,
        tokens: ArrayLike,
        cache: tuple[Mamba2Cache, ...],
        query_start_loc: ArrayLike,
        *,
        metadata: ConvMetadata | None,
        logits_at: ArrayLike | None,
        **sequences: Any,
    ) -> tuple[jax.Array, tuple[Mamba2Cache, ...]]:
        """`packed`, where no axis of the mesh is explicit."""
        hidden = self._embed(tokens)
        num_tokens = hidden.shape[0]
        if metadata is None:
            metadata = build_metadata(query_start_loc, num_tokens)
        new_cache = []
        for layer, old in zip(self.layers, cache, strict=True):
            hidden, new = layer.packed(
                hidden,
                old,
                query_start_loc,
                metadata=metadata,
                **sequences,
            )
            new_cache.append(new)
        if logits_at is None:
            # T >= 1, so that this is a token even where a sequence is empty.
            offsets = sanitize_offsets(jnp.asarray(query_start_loc), num_tokens)
            logits_at = jnp.maximum(offsets[1:] - 1, 0)
        wanted = jnp.take(hidden, jnp.asarray(logits_at), axis=0, mode="clip")
        return self._logits(wanted), tuple(new_cache)

    def init_cache(
        self,
        num_slots: int,
        *,
        dtype: DTypeLike | None = None,
        ssm_dtype: DTypeLike = jnp.float32,
        max_drafts: int = 0,
    ) -> tuple[Mamba2Cache, ...]:
        """The caches of all layers, zero.

        Args:
            num_slots: S, how many requests fit.
            dtype: of the conv states; None is the computation's.
            ssm_dtype: of the SSM states.
            max_drafts: how many of a request's last tokens can be taken back by
                `num_rejected_tokens`; 0 costs nothing.

        Returns:
            One `Mamba2Cache` per layer.
        """
        return tuple(
            layer.mixer.init_cache(
                num_slots, dtype=dtype, ssm_dtype=ssm_dtype, max_drafts=max_drafts
            )
            for layer in self.layers
        )

    def _embed(self, tokens: ArrayLike) -> jax.Array:
        """The first value of the residual stream.

        Token ids are clipped: by default an id outside the table would give NaN.
        """
        table = self.embed.embedding[...]
        hidden = jnp.take(table, jnp.asarray(tokens), axis=0, mode="clip")
        hidden = hidden.astype(self.dtype)
        if self.config.residual_in_fp32:
            hidden = hidden.astype(accumulator(hidden))
        return hidden

    def _logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and head, which multiplies in `dtype` and sums in float32."""
        if self.lm_head is None:
            head = self.embed.embedding[...].T
        else:
            head = self.lm_head.kernel[...]
        return jnp.matmul(
            self.norm(hidden),
            head.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )


def _check_tokens(tokens: ArrayLike, rank: int, letters: str, other: str) -> None:
    """Raises unless the tokens are integers of that rank."""
    shape = jnp.shape(tokens)
    if len(shape) != rank:
        raise ValueError(f"tokens must have shape {letters}, got {shape}: {other}")
    dtype = jnp.result_type(tokens)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise TypeError(f"tokens must be integers, got dtype {dtype}")
