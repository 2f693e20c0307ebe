"""What the public SSD ops hand to an implementation: static facts, and arrays."""

from dataclasses import dataclass
from typing import NamedTuple

import jax

from ..checks import PAD_SLOT_ID


@dataclass(frozen=True)
class SSDSpec:
    """The static facts of a call.

    Attributes:
        chunk_size: c, the tokens of a chunk, at most all of them.
        max_prefills: how many live sequences of more than one token are served. Only
            the packed op has such a limit.
        pad_slot_id: the slot number that means "skip", in the packed op.
    """

    chunk_size: int
    max_prefills: int = 0
    pad_slot_id: int = PAD_SLOT_ID


class SSDOperands(NamedTuple):
    """The arrays of `ssd`, whose docstring describes them, after the checks."""

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    initial_state: jax.Array
    segment_ids: jax.Array | None


class SSDPackedOperands(NamedTuple):
    """The arrays of `ssd_packed`, whose docstring describes them, after the checks."""

    x: jax.Array
    dt: jax.Array
    A: jax.Array
    B: jax.Array
    C: jax.Array
    D: jax.Array | None
    ssm_states: jax.Array
    query_start_loc: jax.Array
    cache_indices: jax.Array | None
    has_initial_state: jax.Array | None
