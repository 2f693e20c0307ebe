"""A model whose next token depends on every token before it, and that compiles at once.

Its state is a hash of the tokens that it has seen, so that a state from a wrong slot,
of a wrong length or with a rejected token in it changes all that is drawn from then on.
Integers are exact: chunks of any size give the same. A slot has as many of the states
before its own, the latest first, as drafts may be taken back.
"""

import types

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jax_causal_conv.mamba2 import sample

VOCAB = 61
MULTIPLIER, INCREMENT = 1_664_525, 1_013_904_223
HASHES = np.random.default_rng(0).integers(0, 2**31, VOCAB, np.uint32) * 2 + 1


class Recall(nnx.Module):
    """Follows the rules of `Mamba2LM.packed`, token by token."""

    def __init__(self):
        self.config = types.SimpleNamespace(vocab_size=VOCAB)

    def init_cache(self, num_slots, *, dtype=None, ssm_dtype=None, max_drafts=0):
        return jnp.zeros((num_slots, 1 + max_drafts), jnp.uint32)

    def packed(
        self,
        tokens,
        cache,
        query_start_loc,
        *,
        cache_indices,
        has_initial_state,
        num_rejected_tokens=None,
        write_indices=None,
        snapshot_ends=None,
        snapshot_indices=None,
        logits_at=None,
        **_,
    ):
        starts, ends = query_start_loc[:-1], query_start_loc[1:]
        depth = jnp.arange(cache.shape[1])[None]
        if num_rejected_tokens is not None:
            depth = jnp.minimum(
                depth + num_rejected_tokens[:, None], cache.shape[1] - 1
            )
        states = cache[cache_indices[:, None], depth]
        first = jnp.where(has_initial_state[:, None], states, 0)
        sequence = jnp.searchsorted(ends, jnp.arange(len(tokens)), side="right")

        def see(states, inputs):
            token, i = inputs
            new = states[i, 0] * jnp.uint32(MULTIPLIER) + token.astype(jnp.uint32)
            new += jnp.uint32(INCREMENT)
            new = jnp.concatenate([new[None], states[i, :-1]])
            return states.at[i].set(new, mode="drop"), new

        last, after = jax.lax.scan(see, first, (tokens, sequence))
        live = (ends > starts) & (cache_indices >= 0)
        outside = len(cache)
        target = cache_indices if write_indices is None else write_indices
        target = jnp.where(live & (target >= 0), target, outside)
        new = cache.at[target].set(last, mode="drop")
        if snapshot_indices is not None:
            at = starts + snapshot_ends - 1
            left = jnp.where((snapshot_ends > 0)[:, None], after[at], first)
            target = jnp.where(
                live & (snapshot_indices >= 0), snapshot_indices, outside
            )
            new = new.at[target].set(left, mode="drop")
        if logits_at is None:
            logits_at = jnp.maximum(ends - 1, 0)
        return logits_of(after[logits_at, 0]), new


def logits_of(states):
    """Logits `(N, VOCAB)` of states `(N,)`: another hash for every token."""
    bits = (states[:, None] ^ (states[:, None] >> 15)) * HASHES
    bits = (bits ^ (bits >> 13)) * jnp.uint32(MULTIPLIER)
    return (bits >> 8).astype(jnp.float32) * (12 / 2**24)


@jax.jit
def draw(state, seed, position, temperature, top_k, top_p):
    """A token after one state; scalars in and out."""
    row = (seed, position, temperature, top_k, top_p)
    return sample(logits_of(state[None]), *(value[None] for value in row))[0]


def answer(request, seed=None):
    """What a request draws from a `Recall`, by its definition."""
    sampling = request.sampling
    seed = sampling.seed if seed is None else seed
    state, tokens = 0, []
    for token in request.prompt:
        state = (state * MULTIPLIER + int(token) + INCREMENT) % 2**32
    while len(tokens) < request.max_new_tokens:
        token = draw(
            np.uint32(state),
            np.uint32(seed or 0),
            np.int32(len(request.prompt) + len(tokens)),
            np.float32(sampling.temperature),
            np.int32(sampling.top_k),
            np.float32(sampling.top_p),
        )
        tokens.append(int(token))
        if tokens[-1] in request.stop_token_ids:
            break
        state = (state * MULTIPLIER + tokens[-1] + INCREMENT) % 2**32
    return tokens
