"""Drawing the next token of every row of a batch, inside the jitted step.

What a row draws depends on its own logits, its seed and its position in the request
alone, never on the other rows: a uniform number, drawn with the key `(seed, position)`,
picks from the row's cumulative distribution.

Top-k and top-p do without a sort, which takes XLA ten times as long for 16 rows of
50,000 logits on a CPU. They find the logit of the last token to keep bit by bit, in 32
passes over the vocabulary. Each pass counts (or weighs) the tokens whose logit is at
least some value.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..promotion import promoting

__all__ = ["GREEDY", "SamplingParams", "sample"]


def integer(name: str, value: Any) -> int:
    """The value as an int. NumPy's integers are integers; booleans are none."""
    if type(value) is int:
        return value
    if not (isinstance(value, bool) or str(getattr(value, "dtype", "")) == "bool"):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(
        f"{name} must be an integer, got {value!r} ({type(value).__name__})"
    )


def _real(name: str, value: Any) -> float:
    """The value as a float: a number, or an array of one number without dimensions."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            return float("inf") if value > 0 else -float("inf")
    kind = getattr(value, "dtype", bool)
    real = jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)
    if not real or np.ndim(value):
        raise TypeError(
            f"{name} must be a number, got {value!r} ({type(value).__name__})"
        )
    return float(value)


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are drawn; by default, greedily.

    Numbers may be those of NumPy; they are kept as Python's.

    Attributes:
        temperature: divides the logits; 0 is greedy decoding.
        top_k: draw from the k most likely tokens; 0 is off.
        top_p: draw from the smallest set of tokens whose probability reaches p, in
            (0, 1]; 1 is off. Comes after top_k, and refers to what that left over.
        seed: in [0, 2**32). The same seed, prompt and model draw the same tokens. None
            takes the request's number, so that equal requests differ.

    Raises:
        TypeError: a value is not a number or, `top_k` and `seed`, not an integer.
        ValueError: a value is out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self):
        for name in "temperature", "top_p":
            object.__setattr__(self, name, _real(name, getattr(self, name)))
        object.__setattr__(self, "top_k", integer("top_k", self.top_k))
        if self.seed is not None:
            object.__setattr__(self, "seed", integer("seed", self.seed))
        if not 0 <= self.temperature <= float(np.finfo(np.float32).max):
            raise ValueError(
                "temperature must be finite (in float32) and >= 0, got "
                f"{self.temperature}"
            )
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be in [0, 2**31), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if self.seed is not None and not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in [0, 2**32), got {self.seed}")


GREEDY = SamplingParams()


@promoting
def sample(
    logits: jax.Array,
    seeds: jax.Array,
    positions: jax.Array,
    temperature: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
) -> jax.Array:
    """Draws one token per row; for use under jit.

    Temperature comes first, then top-k, then top-p of the renormalised rest. Of tokens
    with equal logits the one with the lower number comes first, everywhere: in greedy
    decoding, at the edge of the top k and at the edge of the top p. On a CPU, what no
    row asks for (drawing at all, top-k, top-p) is not computed in that step.

    Args:
        logits: `(N, V)`, finite or -inf; converted to float32.
        seeds: `(N,)` uint32, of each row's request.
        positions: `(N,)` integers >= 0, of the new token in its request.
        temperature: `(N,)`; rows with values <= 0 are greedy.
        top_k: `(N,)` integers; values <= 0 and >= V are off.
        top_p: `(N,)`; values >= 1 are off, values <= 0 keep the first token only.

    Returns:
        `(N,)` int32 tokens in [0, V). Logits that are not as above draw some token.
    """
    logits = logits.astype(jnp.float32)
    likeliest = most_likely(logits)

    def draw():
        kept = filtered(logits, temperature, top_k, top_p)
        drawn = jax.vmap(_from_distribution)(kept, seeds, positions)
        return jnp.where(temperature > 0, drawn, likeliest)

    return _where_any(temperature > 0, draw, likeliest)


def most_likely(logits: jax.Array) -> jax.Array:
    """What `sample` draws for `(N, V)` logits if all rows are greedy."""
    return jnp.argmax(logits.astype(jnp.float32), axis=-1).astype(jnp.int32)


@promoting
def filtered(
    logits: jax.Array, temperature: jax.Array, top_k: jax.Array, top_p: jax.Array
) -> jax.Array:
    """The weights that `sample` draws from: `(N, V)` float32, 0 where not kept.

    Proportional to the probabilities: the most likely token weighs 1. Arguments as in
    `sample`; rows with temperature <= 0 are meaningless.
    """
    draws = temperature > 0
    smallest = jnp.finfo(jnp.float32).tiny
    # Logits are taken relative to the largest, so that no temperature overflows exp.
    logits = logits.astype(jnp.float32)
    logits = logits - jnp.max(logits, axis=-1, keepdims=True)
    weights = jnp.exp(logits / jnp.maximum(temperature, smallest)[:, None])
    by_k = draws & (top_k > 0) & (top_k < logits.shape[-1])
    by_p = draws & (top_p < 1)

    def cut_k(weights):
        ones = jnp.ones_like(top_k, shape=logits.shape)
        kept = jax.vmap(_reaching)(logits, ones, top_k)
        return jnp.where(kept | ~by_k[:, None], weights, 0.0)

    def cut_p(weights):
        p = jnp.maximum(top_p * jnp.sum(weights, axis=-1), smallest)
        kept = jax.vmap(_reaching)(logits, weights, p)
        return jnp.where(kept | ~by_p[:, None], weights, 0.0)

    weights = _where_any(by_k, functools.partial(cut_k, weights), weights)
    return _where_any(by_p, functools.partial(cut_p, weights), weights)


def _where_any(mask: jax.Array, then: Callable[[], jax.Array], otherwise: jax.Array):
    """`then()`, which equals `otherwise` in the rows outside the mask.

    On a CPU `then` is not computed unless some row needs it. Elsewhere it always is: on
    a GPU the host, which launches one branch or the other, would have to wait for the
    mask, and with it for the whole step.
    """
    return jax.lax.platform_dependent(
        cpu=lambda: jax.lax.cond(jnp.any(mask), then, lambda: otherwise), default=then
    )


def _reaching(logits: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Marks the first tokens, by falling logit, whose weights add up to `target`.

    Args:
        logits: `(V,)` float32. Of equal ones the first comes first.
        weights: `(V,)`, >= 0. Those of equal logits are equal, or 0.
        target: scalar > 0 of the weights' dtype. If all weights together do not reach
            it, all tokens are kept.

    Returns:
        `(V,)` bool.
    """
    # The logits as unsigned integers of the same order. -0.0, which equals 0.0 but has
    # other bits, becomes 0.0 first.
    logits = jnp.where(logits == 0, 0.0, logits)
    bits = jax.lax.bitcast_convert_type(logits, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    order = jnp.where(bits >= sign, ~bits, bits | sign)

    def narrow(i, edge):
        higher = edge | (sign >> jnp.asarray(i, jnp.uint32))
        reached = jnp.sum(jnp.where(order >= higher, weights, 0)) >= target
        return jnp.where(reached, higher, edge)

    edge = jax.lax.fori_loop(0, 32, narrow, jnp.uint32(0))
    above = order > edge
    tied = jnp.where(order == edge, weights, 0)
    missing = target - jnp.sum(jnp.where(above, weights, 0))
    return above | ((order == edge) & (jnp.cumsum(tied) - tied < missing))


def _from_distribution(
    weights: jax.Array, seed: jax.Array, position: jax.Array
) -> jax.Array:
    """The first token of `(V,)` weights at which a random share of them is reached."""
    key = jax.random.fold_in(jax.random.key(seed), position)
    total = jnp.cumsum(weights)
    # A cumsum in parallel may fall by a rounding error from one token to the next. So
    # the total is the largest sum rather than the last, and tokens without weight are
    # excluded explicitly.
    share = jax.random.uniform(key) * jnp.max(total)
    return jnp.argmax((total > share) & (weights > 0)).astype(jnp.int32)
