"""The Mamba2 language model, for training and for packed serving."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from jax_causal_conv import PAD_SLOT_ID, ConvMetadata, build_metadata
from jax_causal_conv.nnx import Mamba2Cache, Mamba2Mixer

# Our fields under the names of transformers' Mamba2Config, with its default values.
_HF_FIELDS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 32768),
    "d_model": ("hidden_size", 4096),
    "n_layers": ("num_hidden_layers", 64),
    "d_state": ("state_size", 128),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
    "headdim": ("head_dim", 64),
    "n_groups": ("n_groups", 8),
    "chunk_size": ("chunk_size", 256),
    "use_bias": ("use_bias", False),
    "use_conv_bias": ("use_conv_bias", True),
    "tie_embeddings": ("tie_word_embeddings", False),
    "norm_eps": ("layer_norm_epsilon", 1e-5),
    "dt_limit": ("time_step_limit", (0.0, float("inf"))),
    "dt_min": ("time_step_min", 1e-3),
    "dt_max": ("time_step_max", 0.1),
    "dt_init_floor": ("time_step_floor", 1e-4),
    "residual_in_fp32": ("residual_in_fp32", True),
    "bos_token_id": ("bos_token_id", 0),
    "eos_token_id": ("eos_token_id", 2),
    "pad_token_id": ("pad_token_id", 1),
}

# `ssm_cfg` of the original code: its names of our fields, with its default values ...
_ORIGINAL_FIELDS: dict[str, tuple[str, Any]] = {
    "d_state": ("d_state", 128),
    "d_conv": ("d_conv", 4),
    "expand": ("expand", 2),
    "headdim": ("headdim", 64),
    "n_groups": ("ngroups", 1),
    "chunk_size": ("chunk_size", 256),
    "use_bias": ("bias", False),
    "use_conv_bias": ("conv_bias", True),
    "dt_limit": ("dt_limit", (0.0, float("inf"))),
    "dt_min": ("dt_min", 1e-3),
    "dt_max": ("dt_max", 0.1),
    "dt_init_floor": ("dt_init_floor", 1e-4),
    "norm_before_gate": ("norm_before_gate", False),
}
# ... what else it may hold and changes no output of a trained model ...
_ORIGINAL_IGNORED = {"layer", "conv_init", "A_init_range", "use_mem_eff_path"}
# ... and what would change it, with the only value that is known here.
_ORIGINAL_REQUIRED: dict[str, Any] = {
    "rmsnorm": True,
    "D_has_hdim": False,
    "d_ssm": None,
}
_ORIGINAL_REQUIRED_OUTSIDE: dict[str, Any] = {
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "rms_norm": True,
}


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Sizes and options of a Mamba2 language model.

    Attributes:
        vocab_size: rows of the embedding table, padding of the vocabulary included.
        d_model: width of the residual stream.
        n_layers: number of blocks.
        d_state: K, the size of the state per channel.
        d_conv: W, the width of the causal conv.
        expand: d_inner / d_model.
        headdim: P, channels per head; divides d_inner.
        n_groups: G, groups of heads that share B and C; divides the number of heads.
        chunk_size: tokens per chunk of the scan: speed alone depends on it.
        use_bias: whether in- and out-projections have biases.
        use_conv_bias: whether the conv has one.
        tie_embeddings: whether the embedding table is the head as well.
        norm_eps: epsilon of every RMSNorm.
        dt_limit: smallest and largest step size.
        dt_min: smallest step size at initialisation.
        dt_max: largest step size at initialisation.
        dt_init_floor: initial step sizes below are raised to it.
        norm_before_gate: normalise first and multiply with the gate then.
        residual_in_fp32: keep the residual stream in float32 in a 16-bit model.
        bos_token_id: the token that starts a text, or None.
        eos_token_id: the token (or tokens) that ends one, or None.
        pad_token_id: the padding token, or None.

    Raises:
        ValueError: sizes do not divide, or a size is below 1.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    d_state: int = 128
    d_conv: int = 4
    expand: int = 2
    headdim: int = 64
    n_groups: int = 1
    chunk_size: int = 64
    use_bias: bool = False
    use_conv_bias: bool = True
    tie_embeddings: bool = True
    norm_eps: float = 1e-5
    dt_limit: tuple[float, float] = (0.0, float("inf"))
    dt_min: float = 1e-3
    dt_max: float = 0.1
    dt_init_floor: float = 1e-4
    norm_before_gate: bool = False
    residual_in_fp32: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    def __post_init__(self):
        sizes = ("vocab_size", "d_model", "n_layers", "d_state", "d_conv", "expand")
        for name in (*sizes, "headdim", "n_groups", "chunk_size"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"{name} must be at least 1, got {getattr(self, name)}"
                )
        if self.d_inner % self.headdim:
            raise ValueError(
                f"headdim = {self.headdim} must divide expand * d_model = "
                f"{self.d_inner}"
            )
        if self.num_heads % self.n_groups:
            raise ValueError(
                f"n_groups = {self.n_groups} must divide the number of heads, "
                f"{self.num_heads}"
            )

    @property
    def d_inner(self) -> int:
        """Channels of a mixer: expand * d_model."""
        return int(self.expand * self.d_model)

    @property
    def num_heads(self) -> int:
        """H."""
        return self.d_inner // self.headdim

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "Mamba2Config":
        """Reads the config.json of a transformers `Mamba2ForCausalLM`.

        What is absent has the default of transformers. `norm_before_gate`, which old
        configurations carry, is ignored as transformers ignores it: the gate is always
        applied first.

        Raises:
            ValueError: another kind of model, an activation other than silu, or sizes
                that contradict each other.
        """
        if (kind := config.get("model_type", "mamba2")) != "mamba2":
            raise ValueError(f"model_type must be 'mamba2', got {kind!r}")
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ValueError(f"hidden_act must be 'silu' or 'swish', got {act!r}")
        values = {
            field: config.get(key, default)
            for field, (key, default) in _HF_FIELDS.items()
        }
        values["dt_limit"] = _limits(values["dt_limit"])
        if isinstance(eos := values["eos_token_id"], list):
            values["eos_token_id"] = tuple(eos)
        result = cls(**values)
        if (heads := config.get("num_heads", result.num_heads)) != result.num_heads:
            raise ValueError(
                f"num_heads = {heads} contradicts expand * hidden_size / head_dim = "
                f"{result.num_heads}"
            )
        return result

    @classmethod
    def from_original(cls, config: Mapping[str, Any]) -> "Mamba2Config":
        """Reads the config.json of a `state-spaces/mamba2-*` model.

        What is absent has the default of the original code. The vocabulary is padded
        as it pads it.

        Raises:
            ValueError: an option that is not known here (attention or MLP layers,
                LayerNorm, another mixer), naming all of them.
        """
        mixer = dict(config.get("ssm_cfg") or {})
        wrong = []
        if (layer := mixer.get("layer", "Mamba1")) != "Mamba2":
            wrong.append(f"ssm_cfg.layer = {layer!r}")
        for options, required, prefix in [
            (mixer, _ORIGINAL_REQUIRED, "ssm_cfg."),
            (config, _ORIGINAL_REQUIRED_OUTSIDE, ""),
        ]:
            for name, value in required.items():
                if options.get(name, value) != value:
                    wrong.append(f"{prefix}{name} = {options[name]!r}")
        known = {key for key, _ in _ORIGINAL_FIELDS.values()}
        known |= _ORIGINAL_IGNORED | _ORIGINAL_REQUIRED.keys()
        wrong += [f"ssm_cfg.{name} is unknown" for name in sorted(mixer.keys() - known)]
        if wrong:
            raise ValueError("not a Mamba2 model known here: " + "; ".join(wrong))
        values = {
            field: mixer.get(key, default)
            for field, (key, default) in _ORIGINAL_FIELDS.items()
        }
        values["dt_limit"] = _limits(values["dt_limit"])
        multiple = config.get("pad_vocab_size_multiple", 8)
        return cls(
            vocab_size=-(-config["vocab_size"] // multiple) * multiple,
            d_model=config["d_model"],
            n_layers=config["n_layer"],
            tie_embeddings=config.get("tie_embeddings", True),
            residual_in_fp32=config.get("residual_in_fp32", True),
            **values,
        )

    def to_hf(self) -> dict[str, Any]:
        """The config.json of the same model for transformers.

        Raises:
            ValueError: transformers cannot say `norm_before_gate`.
        """
        if self.norm_before_gate:
            raise ValueError("transformers' Mamba2 has no norm_before_gate")
        values = {key: getattr(self, field) for field, (key, _) in _HF_FIELDS.items()}
        return {
            "architectures": ["Mamba2ForCausalLM"],
            "model_type": "mamba2",
            "hidden_act": "silu",
            "num_heads": self.num_heads,
            **json.loads(json.dumps(values)),  # tuples become lists
        }


def _limits(limits: Any) -> tuple[float, float]:
    """Two floats; transformers may write infinity as {"__float__": "Infinity"}."""
    low, high = (
        float(limit["__float__"] if isinstance(limit, Mapping) else limit)
        for limit in limits
    )
    return low, high


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32, rounded once to `dtype`."""

    def __init__(
        self, features: int, *, epsilon: float, dtype: DTypeLike, param_dtype: DTypeLike
    ):
        self.epsilon = epsilon
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones(features, param_dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalises `(..., features)`, whatever its dtype."""
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = jnp.mean(x * x, axis=-1, keepdims=True)
        return (x * jax.lax.rsqrt(mean + self.epsilon) * self.scale[...]).astype(
            self.dtype
        )


class Block(nnx.Module):
    """One layer: the residual stream plus the mixer of its norm."""

    def __init__(
        self,
        config: Mamba2Config,
        *,
        dtype: DTypeLike,
        param_dtype: DTypeLike,
        implementation: str | None,
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
            dtype=dtype,
            param_dtype=param_dtype,
            implementation=implementation,
            rngs=rngs,
        )

    def __call__(
        self, hidden: jax.Array, segment_ids: ArrayLike | None = None
    ) -> jax.Array:
        """Rows `(B, T, d_model)`, for training."""
        return hidden + self.mixer(self.norm(hidden), segment_ids=segment_ids)

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
        return hidden + mixed, cache


class Mamba2LM(nnx.Module):
    """Embedding, Mamba2 blocks, final norm, head.

    The layout of the published Mamba2 models (Dao and Gu, "Transformers are SSMs",
    2024) and of transformers' `Mamba2ForCausalLM`; `checkpoint` loads either. The
    model holds parameters only: caches are arguments and results, so that a server
    may donate them.

    Parameters: `embed.embedding` (vocab_size, d_model); per layer `layers[i].norm` and
    `layers[i].mixer`; `norm`; `lm_head.kernel` (d_model, vocab_size), unless the
    embedding table is the head as well.

    Args:
        config: sizes and options.
        dtype: of the computation; None is `param_dtype`. Norms, step sizes and the
            scan compute in float32 in any case, logits come out in float32.
        param_dtype: of the parameters.
        implementation: of the conv, as for `causal_conv1d_fn`.
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
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ):
        self.config = config
        self.dtype = jnp.dtype(dtype or param_dtype)
        self.param_dtype = jnp.dtype(param_dtype)
        dtypes: Any = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed = nnx.Embed(
            config.vocab_size,
            config.d_model,
            embedding_init=nnx.initializers.normal(0.02),
            rngs=rngs,
            **dtypes,
        )
        self.layers = nnx.List(
            Block(config, implementation=implementation, rngs=rngs, **dtypes)
            for _ in range(config.n_layers)
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
        self, tokens: ArrayLike, *, segment_ids: ArrayLike | None = None
    ) -> jax.Array:
        """Logits of whole rows, for training and evaluation.

        Args:
            tokens: `(B, T)` integers; ids outside the vocabulary are clipped into it.
            segment_ids: `(B, T)` integers or None, as for `causal_conv1d`: documents
                packed into one row do not see each other; a negative id is padding.

        Returns:
            `(B, T, vocab_size)` float32 logits of each next token. Those at padding
            are finite and without meaning.
        """
        hidden = self._embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden, segment_ids)
        return self._logits(hidden)

    def packed(
        self,
        tokens: ArrayLike,
        cache: tuple[Mamba2Cache, ...],
        query_start_loc: ArrayLike,
        *,
        cache_indices: ArrayLike | None = None,
        has_initial_state: ArrayLike | None = None,
        metadata: ConvMetadata | None = None,
        max_prefills: int | None = None,
        pad_slot_id: int = PAD_SLOT_ID,
    ) -> tuple[jax.Array, tuple[Mamba2Cache, ...]]:
        """One step of serving: prefills, chunks of them and decodes, packed.

        Args:
            tokens: `(T,)` integers, T >= 1; ids outside the vocabulary are clipped
                into it.
            cache: of `init_cache`, one entry per layer; donate it to `jax.jit`.
            query_start_loc: `(N+1,)`, as for `causal_conv1d_fn`.
            cache_indices: `(N,)` or None, as there.
            has_initial_state: `(N,)` bool or None, as there.
            metadata: of `build_metadata`, shared by all layers; None builds it here,
                once.
            max_prefills: static, as for `ssd_packed`: how many live sequences may
                have more than one token. None is min(N, T // 2).
            pad_slot_id: static, the slot number that means "skip".

        Returns:
            `(N, vocab_size)` float32 logits after each sequence's last token, finite
            and without meaning for empty and skipped sequences; and the new cache.
        """
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
                cache_indices=cache_indices,
                has_initial_state=has_initial_state,
                metadata=metadata,
                max_prefills=max_prefills,
                pad_slot_id=pad_slot_id,
            )
            new_cache.append(new)
        # Offsets mean cummax(clip(q, 0, T)), and T >= 1 keeps every row inside.
        ends = jax.lax.cummax(jnp.clip(jnp.asarray(query_start_loc), 0, num_tokens))
        last = jnp.maximum(ends[1:] - 1, 0)
        return self._logits(hidden[last]), tuple(new_cache)

    def init_cache(
        self, num_slots: int, *, dtype: DTypeLike | None = None
    ) -> tuple[Mamba2Cache, ...]:
        """The caches of all layers, zero.

        Args:
            num_slots: S, how many requests fit.
            dtype: of the conv states; None is the computation's. SSM states are
                float32.

        Returns:
            One `Mamba2Cache` per layer.
        """
        return tuple(
            layer.mixer.init_cache(num_slots, dtype=dtype) for layer in self.layers
        )

    def _embed(self, tokens: ArrayLike) -> jax.Array:
        """The residual stream's first value. Clipped: NaN must not mark bad ids."""
        table = self.embed.embedding[...]
        hidden = jnp.take(table, jnp.asarray(tokens), axis=0, mode="clip")
        hidden = hidden.astype(self.dtype)
        if self.config.residual_in_fp32:
            hidden = hidden.astype(jnp.promote_types(self.dtype, jnp.float32))
        return hidden

    def _logits(self, hidden: jax.Array) -> jax.Array:
        """Final norm and head; products of `dtype`, float32 sums."""
        if self.lm_head is None:
            head = self.embed.embedding[...].T
        else:
            head = self.lm_head.kernel[...]
        return jnp.matmul(
            self.norm(hidden),
            head.astype(self.dtype),
            preferred_element_type=jnp.float32,
        )
