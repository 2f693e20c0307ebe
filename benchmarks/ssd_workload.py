"""What is computed in the suite of the SSD: inputs, the exact answer, and the bytes.

Heads of one group share B and C and nothing else, so that a float64 answer for a few
heads checks a result of any size.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.workload import TOLERANCE, compare, normal

Op = Literal["ssd_packed", "ssd"]

_COMPARED_HEADS = 3
# Peers round decays and states to bfloat16 before they multiply them.
_STATE_TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class SsdWorkload:
    """One call of the SSD, for a layer of Mamba2-2.7B.

    Sequences lie back to back in x `(T, H, P)`; rows of the dense op have one length.
    Sequences of one token decode, from the state in their slot; longer ones are prompts
    and start from zero.

    Attributes:
        op: "ssd_packed" (mixed batches, with states in slots) or "ssd" (dense rows
            without states).
        lengths: tokens of each sequence.
        dtype: of x, dt, B and C. A, D and the bias of dt are float32.
        state_dtype: of the cache.
        heads: H.
        dim: P, channels of a head.
        state_size: K.
        groups: G.
    """

    op: Op
    lengths: tuple[int, ...]
    dtype: str = "bfloat16"
    state_dtype: str = "float32"
    heads: int = 80
    dim: int = 64
    state_size: int = 128
    groups: int = 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def slots(self) -> int:
        """S: more than there are sequences, slot 0 never used, as some peers want."""
        return len(self.lengths) + 8

    @property
    def prompts(self) -> int:
        """How many sequences have more than one token."""
        return sum(length > 1 for length in self.lengths)

    @property
    def ops(self) -> tuple[str, ...]:
        """All ops that compute it.

        "ssd_decode" is one token a sequence, "ssd_rows" are fresh rows of one length.
        """
        also = {(True, 0): "ssd_decode", (True, len(self.lengths)): "ssd_rows"}
        kind = also.get((len(set(self.lengths)) == 1, self.prompts))
        return (self.op, kind) if kind else (self.op,)

    @property
    def nbytes(self) -> int:
        """Bytes that must be read or written once."""
        itemsize = jnp.dtype(self.dtype).itemsize
        of_token = 2 * self.heads * self.dim + self.heads
        of_token += 2 * self.groups * self.state_size
        moved = 0
        if self.op == "ssd_packed":
            # Decodes read a state and write one, prompts write one.
            moved = 2 * len(self.lengths) - self.prompts
        state = self.heads * self.dim * self.state_size
        state *= jnp.dtype(self.state_dtype).itemsize
        return self.tokens * of_token * itemsize + moved * state

    # ---- Inputs --------------------------------------------------------------------

    @functools.cached_property
    def x(self) -> jax.Array:
        return normal(0, (self.tokens, self.heads, self.dim), self.dtype)

    @functools.cached_property
    def B(self) -> jax.Array:
        return normal(1, (self.tokens, self.groups, self.state_size), self.dtype)

    @functools.cached_property
    def C(self) -> jax.Array:
        return normal(2, (self.tokens, self.groups, self.state_size), self.dtype)

    @functools.cached_property
    def dt(self) -> jax.Array:
        """As the projection leaves it, without bias and softplus."""
        return normal(3, (self.tokens, self.heads), self.dtype)

    @functools.cached_property
    def dt_bias(self) -> jax.Array:
        """Steps are spread from 0.001 to 0.1, as Mamba2 starts its training."""
        steps = np.geomspace(1e-3, 1e-1, self.heads)
        np.random.default_rng(0).shuffle(steps)
        return jnp.asarray(np.log(np.expm1(steps)), jnp.float32)

    @functools.cached_property
    def A(self) -> jax.Array:
        """From -1 to -16, likewise."""
        return -jnp.linspace(1, 16, self.heads, dtype=jnp.float32)

    @functools.cached_property
    def D(self) -> jax.Array:
        return normal(4, (self.heads,), "float32")

    @functools.cached_property
    def steps(self) -> jax.Array:
        """`softplus(dt + dt_bias)`, float32: for whoever does not compute it."""
        return jax.nn.softplus(self.dt.astype(jnp.float32) + self.dt_bias)

    def states(self) -> jax.Array:
        """A cache `(S, H, P, K)`, new for everyone, with the same numbers.

        A few slots' numbers over and over: drawing them all would take the most time.
        """
        shape = min(self.slots, 13), self.heads, self.dim, self.state_size
        few = normal(5, shape, self.state_dtype)
        return jnp.take(few, np.arange(self.slots) % 13, axis=0)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    @functools.cached_property
    def cache_indices(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        slots = 1 + rng.permutation(self.slots - 1)[: len(self.lengths)]
        return slots.astype(np.int32)

    @functools.cached_property
    def unused_slots(self) -> np.ndarray:
        """Slots that no sequence names."""
        return np.setdiff1d(np.arange(self.slots), self.cache_indices).astype(np.int32)

    @functools.cached_property
    def has_initial_state(self) -> np.ndarray:
        return np.array(self.lengths) == 1

    # ---- The exact answer ----------------------------------------------------------

    @functools.cached_property
    def compared(self) -> np.ndarray:
        """The heads whose results are compared: spread out, both ends included."""
        picked = np.linspace(0, self.heads - 1, min(self.heads, _COMPARED_HEADS))
        return np.unique(picked.astype(np.int32))

    def pick(self, array) -> np.ndarray:
        """The compared heads of an array of jax `(…, H, P)`, in NumPy."""
        picked = jnp.take(jnp.asarray(array), self.compared, axis=-2)
        return np.asarray(picked.astype(jnp.float32))

    def pick_states(self, states, slots) -> np.ndarray:
        """The compared heads of some of the states `(S, H, P, K)`, in NumPy."""
        picked = jnp.asarray(states)[slots[:, None], self.compared]
        return np.asarray(picked.astype(jnp.float32))

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Results in float64 for the compared heads, one token after another.

        "y" `(T, h, P)`; with a cache "states" `(N, h, P, K)`, what the sequences leave
        behind, and "unused", the states in slots that no sequence names.
        """
        heads = self.compared
        x = self.pick(self.x).astype(np.float64)
        group = heads // (self.heads // self.groups)
        B, C = (
            np.asarray(jnp.take(a, group, axis=1).astype(jnp.float32), np.float64)
            for a in (self.B, self.C)
        )
        raw = np.asarray(self.dt.astype(jnp.float32), np.float64)[:, heads]
        dt = np.logaddexp(0, raw + np.asarray(self.dt_bias, np.float64)[heads])
        decay = np.exp(dt * np.asarray(self.A, np.float64)[heads])
        shape = len(self.lengths), len(heads), self.dim, self.state_size
        state = np.zeros(shape)
        results = {}
        if self.op == "ssd_packed":
            decodes = self.has_initial_state
            cache = self.states()
            slots = self.cache_indices[decodes]
            state[decodes] = self.pick_states(cache, slots)
            results["unused"] = self.pick_states(cache, self.unused_slots)
        y = np.asarray(self.D, np.float64)[heads][:, None] * x
        lengths = np.array(self.lengths)
        for step in range(lengths.max()):
            live = np.flatnonzero(lengths > step)
            token = self.offsets[live] + step
            write = (dt[token, :, None] * x[token])[..., None] * B[token][:, :, None]
            now = decay[token][..., None, None] * state[live] + write
            y[token] += (now @ C[token][..., None])[..., 0]
            state[live] = now
        results["y"] = y
        if self.op == "ssd_packed":
            results["states"] = state
        return results

    def errors(self, got: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of each result that is there the largest difference over the largest value.

        Raises:
            WrongResult: one is too large, or a result has the wrong shape.
        """
        bounds = {"y": TOLERANCE[self.dtype], "states": _STATE_TOLERANCE, "unused": 0.0}
        errors: dict[str, float] = {}
        for name, array in got.items():
            errors |= compare({name: array}, self.expected, bounds[name])
        return errors
