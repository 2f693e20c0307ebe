"""Which columns of x an op reads, and into which parts it cuts its output.

For models whose projections make several things side by side (Mamba2's z, x, B, C, dt;
q, k, v), so that nothing is cut out before the conv or apart behind it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

Output: TypeAlias = Any
"""One array, or with `split` a tuple of its parts. A union would be no help to callers,
who know which of the two they asked for."""


@dataclass(frozen=True)
class Columns:
    """The columns of an op's input and the parts of its output.

    Inside the package an output is always a tuple of its parts, even of a single one.
    `output` makes of it what the caller asked for.

    Attributes:
        offset: the first column of x; None if x has the conv's D channels alone.
        split: the channels of each part; None if there is one array.
    """

    offset: int | None = None
    split: tuple[int, ...] | None = None

    @property
    def all_together(self) -> bool:
        """Are x, the channels and the output the same columns?"""
        return self.offset is None and self.num_parts == 1

    @property
    def num_parts(self) -> int:
        """How many arrays the output is."""
        return 1 if self.split is None else len(self.split)

    def sizes(self, dim: int) -> tuple[int, ...]:
        """The channels of each part of D channels."""
        return (dim,) if self.split is None else self.split

    def of(self, x: jax.Array, dim: int) -> jax.Array:
        """The D columns of x."""
        if self.offset is None:
            return x
        return lax.slice_in_dim(x, self.offset, self.offset + dim, axis=-1)

    def widen(self, dx: jax.Array, width: int) -> jax.Array:
        """The transpose of `of`: zeros around the columns of an x of `width`."""
        if self.offset is None:
            return dx
        behind = width - dx.shape[-1] - self.offset
        rows = [(0, 0)] * (dx.ndim - 1)
        return jnp.pad(dx, [*rows, (self.offset, behind)])

    def parts(self, out: jax.Array) -> tuple[jax.Array, ...]:
        """The parts of `out`."""
        if self.num_parts == 1:
            return (out,)
        return tuple(lax.split(out, self.sizes(out.shape[-1]), axis=-1))

    def joined(self, parts: Sequence[jax.Array]) -> jax.Array:
        """The array of all channels, from its parts."""
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)

    def output(self, parts: Sequence[jax.Array]) -> Output:
        """What a caller sees of the parts."""
        return parts[0] if self.split is None else tuple(parts)


ALL = Columns()
"""x has D channels and the output is one array."""
