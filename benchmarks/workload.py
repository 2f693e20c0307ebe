"""What is computed in a benchmark: inputs, the exact answer, and the bytes it takes.

All ops filter each channel by itself, so that a float64 answer for a few channels
checks a result of any size.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Op = Literal["packed", "update", "dense", "gradient"]

# Largest difference over the largest value. Peers may round products to bfloat16.
TOLERANCE = {"float32": 1e-3, "bfloat16": 3e-2, "float16": 5e-3}


class WrongResult(ArithmeticError):
    """A candidate does not compute what was asked for."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One call of an op, with bias and silu.

    Sequences lie back to back in x `(T, D)`; rows of the dense op have one length.

    Attributes:
        op: "packed" (mixed batches), "update" (one token a row), "dense" (no states),
            "gradient" (forward and backward of the dense op).
        lengths: tokens of each sequence.
        dim: D.
        width: W; the state length is W-1.
        dtype: of everything.
        slots: S, of the cache. Slot 0 is never used: some peers reserve it.
        seen: have the sequences a history? One without needs no cache to be computed.
    """

    op: Op
    lengths: tuple[int, ...]
    dim: int
    width: int = 4
    dtype: str = "bfloat16"
    slots: int = 0
    seen: bool = True

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def rows(self) -> tuple[int, int, int]:
        """Shape of x as a batch of equal rows."""
        return len(self.lengths), self.lengths[0], self.dim

    @property
    def ops(self) -> tuple[str, ...]:
        """All ops that compute it: one fresh prompt is a row, but for its state."""
        fresh = self.op == "packed" and len(self.lengths) == 1 and not self.seen
        return (self.op, "dense") if fresh else (self.op,)

    @property
    def has_states(self) -> bool:
        return self.op in ("packed", "update")

    @property
    def nbytes(self) -> int:
        """Bytes that must be read or written once."""
        activations = {"gradient": 4}.get(self.op, 2) * self.tokens
        filters = self.width + 1
        if self.op == "gradient":
            filters *= 2
        states = 0
        if self.has_states:
            states = (1 + self.seen) * len(self.lengths) * (self.width - 1)
        itemsize = jnp.dtype(self.dtype).itemsize
        return (activations + filters + states) * self.dim * itemsize

    # ---- Inputs --------------------------------------------------------------------

    def _normal(self, seed: int, *shape: int) -> jax.Array:
        return normal(seed, shape, self.dtype)

    @functools.cached_property
    def x(self) -> jax.Array:
        return self._normal(0, self.tokens, self.dim)

    @functools.cached_property
    def weight(self) -> jax.Array:
        return self._normal(1, self.dim, self.width)

    @functools.cached_property
    def bias(self) -> jax.Array:
        return self._normal(2, self.dim)

    @functools.cached_property
    def dy(self) -> jax.Array:
        return self._normal(3, self.tokens, self.dim)

    def states(self) -> jax.Array:
        """A cache `(S, W-1, D)`, new for everyone, with the same numbers.

        A few slots' numbers over and over: drawing them all would take the most time.
        """
        few = self._normal(4, min(self.slots, 61), self.width - 1, self.dim)
        return jnp.take(few, np.arange(self.slots) % 61, axis=0)

    @functools.cached_property
    def offsets(self) -> np.ndarray:
        return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int32)

    @functools.cached_property
    def cache_indices(self) -> np.ndarray:
        rng = np.random.default_rng(0)
        slots = 1 + rng.permutation(self.slots - 1)[: len(self.lengths)]
        return slots.astype(np.int32)

    @functools.cached_property
    def has_initial_state(self) -> np.ndarray:
        return np.full(len(self.lengths), self.seen)

    # ---- The exact answer ----------------------------------------------------------

    @functools.cached_property
    def channels(self) -> np.ndarray:
        """The channels whose results are compared: spread out, both ends included."""
        count = min(self.dim, 32)
        return np.unique(np.linspace(0, self.dim - 1, count).astype(np.int32))

    def pick(self, array, axis: int = -1) -> np.ndarray:
        """The compared channels of an array of jax, in NumPy."""
        picked = jnp.take(jnp.asarray(array), self.channels, axis=axis)
        return np.asarray(picked.astype(jnp.float32))

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Results in float64 for the compared channels.

        "out" `(T, C)`; "states" `(N, W-1, C)`, what the sequences leave behind, where
        there is a cache; "dx", "dweight" `(C, W)` and "dbias" for gradients.
        """
        x, weight, bias = (
            a.astype(np.float64)
            for a in (
                self.pick(self.x),
                self.pick(self.weight, 0),
                self.pick(self.bias),
            )
        )
        history = np.zeros((len(self.lengths), self.width - 1, len(self.channels)))
        if self.has_states and self.seen:
            history[:] = self.pick(self.states()[self.cache_indices])
        sequences = [
            np.concatenate([past, own])
            for past, own in zip(history, np.split(x, self.offsets[1:-1]), strict=True)
        ]
        pre = np.concatenate(
            [
                bias
                + sum(
                    weight[:, k] * u[k : len(u) - self.width + 1 + k]
                    for k in range(self.width)
                )
                for u in sequences
            ]
        )
        gate = 1 / (1 + np.exp(-pre))
        result = {"out": pre * gate}
        if self.has_states:
            result["states"] = np.stack([u[1 - self.width :] for u in sequences])
        if self.op == "gradient":
            dpre = self.pick(self.dy) * gate * (1 + pre * (1 - gate))
            result |= self._gradients(dpre, sequences, weight)
        return result

    def _gradients(self, dpre, sequences, weight) -> dict[str, np.ndarray]:
        dx, dweight = [], np.zeros_like(weight)
        for d, u in zip(np.split(dpre, self.offsets[1:-1]), sequences, strict=True):
            padded = np.concatenate([d, np.zeros((self.width - 1, d.shape[1]))])
            dx.append(
                sum(
                    weight[:, k] * padded[self.width - 1 - k :][: len(d)]
                    for k in range(self.width)
                )
            )
            for k in range(self.width):
                dweight[:, k] += (d * u[k : k + len(d)]).sum(0)
        return {"dx": np.concatenate(dx), "dweight": dweight, "dbias": dpre.sum(0)}

    def errors(self, got: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of each result that is there the largest difference over the largest value.

        Raises:
            WrongResult: one is too large, or a result has the wrong shape.
        """
        return compare(got, self.expected, TOLERANCE[self.dtype])


def compare(
    got: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], tolerance: float
) -> dict[str, float]:
    """Of each result the largest difference over the largest value.

    Raises:
        WrongResult: one is above the tolerance, or a result has the wrong shape.
    """
    errors = {}
    for name, array in got.items():
        exact = expected[name]
        if array.shape != exact.shape:
            raise WrongResult(f"{name} is {array.shape}, not {exact.shape}")
        error = float(np.abs(array - exact).max() / np.abs(exact).max())
        if not error <= tolerance:  # NaN is wrong, too
            raise WrongResult(f"{name} is off by {error:.1e} of its largest value")
        errors[name] = error
    return errors


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def normal(seed: int, shape: tuple[int, ...], dtype: str) -> jax.Array:
    """Normally distributed numbers."""
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)
