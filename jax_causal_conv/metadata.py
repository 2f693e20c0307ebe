"""Metadata of a packed batch, and the check of one before it is served."""

from typing import Any

import numpy as np
from jax.typing import ArrayLike

from . import checks
from .chunks import ConvMetadata, chunk_metadata
from .kernels.tiles import default_block_m
from .operands import PAD_SLOT_ID


def build_metadata(
    query_start_loc: ArrayLike, num_tokens: int, *, block_m: int | None = None
) -> ConvMetadata:
    """Builds the chunk arrays of a packed batch, without a loop over sequences.

    Args:
        query_start_loc: `(N+1,)` integers, as for `causal_conv1d_fn`; any values are
            safe. NumPy (or a list) is computed on the host; a jax array or tracer in
            the graph, without a host sync. Both give the same arrays.
        num_tokens: T, the number of rows of x (static).
        block_m: tokens per chunk; must be at least W-1 for the op. None is the
            kernels' own choice from T and N: as little as 8 in small batches, so say
            it for filters wider than 9.

    Returns:
        The `ConvMetadata` of this batch; of NumPy arrays if the input was.

    Raises:
        TypeError: offsets are not integers, or a static argument is not an int.
        ValueError: wrong rank, empty offsets, negative num_tokens, block_m < 1.

    Example:
        >>> import numpy as np
        >>> m = build_metadata(np.array([0, 5, 6]), 8, block_m=4)
        >>> m.chunk_seq.tolist(), m.chunk_offset.tolist()
        ([0, 0, 1, -1, -1], [0, 1, 0, 0, 1])
    """
    num_tokens = checks.static_int("num_tokens", num_tokens, minimum=0)
    offsets = checks.offsets(query_start_loc, num_tokens)
    num_seqs = offsets.shape[0] - 1
    if block_m is None:
        block_m = default_block_m(num_tokens, num_seqs)
    block_m = checks.static_int("block_m", block_m, minimum=1)
    checks.token_count("num_tokens", num_tokens, block_m)
    return chunk_metadata(offsets, num_tokens, block_m)


def validate_batch(
    query_start_loc: ArrayLike,
    cache_indices: ArrayLike | None = None,
    *,
    num_tokens: int,
    num_slots: int,
    pad_slot_id: int = PAD_SLOT_ID,
    write_indices: ArrayLike | None = None,
    snapshot_indices: ArrayLike | None = None,
) -> None:
    """Checks a packed batch on the host, eagerly, for servers and notebooks.

    The ops accept any integers; this tells a mistake from an intention. Empty
    sequences and pad slots are exempt from the checks of slots.

    Args:
        query_start_loc: `(N+1,)` integers.
        cache_indices: `(N,)` integers, None = `arange(N)`.
        num_tokens: T.
        num_slots: S.
        pad_slot_id: the slot number that means "skip".
        write_indices: `(N,)` integers, where new states go; None = `cache_indices`.
            Then several live sequences may read one slot.
        snapshot_indices: `(N,)` integers, where snapshots go, or None.

    Raises:
        ValueError: names the first offending entry: `query_start_loc[0] != 0`, a
            decreasing or too large offset, a slot out of range, a slot used by two
            live sequences: written by both, or read by one and written by the other.
        TypeError: not integers, or traced values.
    """
    num_tokens = checks.static_int("num_tokens", num_tokens, minimum=0)
    num_slots = checks.static_int("num_slots", num_slots, minimum=0)
    pad_slot_id = checks.static_int("pad_slot_id", pad_slot_id)
    q = checks.host_integers("query_start_loc", query_start_loc)
    checks.at_least_one_offset(q)
    if q[0] != 0:
        raise ValueError(f"query_start_loc[0] must be 0, got {q[0]}")
    decreasing = np.concatenate([[False], q[1:] < q[:-1]])
    if (bad := np.flatnonzero(decreasing | (q > num_tokens))).size:
        i = int(bad[0])
        if decreasing[i]:
            raise ValueError(
                f"query_start_loc must not decrease, got query_start_loc[{i}] = {q[i]} "
                f"after {q[i - 1]}"
            )
        raise ValueError(
            f"query_start_loc[{i}] = {q[i]} is beyond num_tokens = {num_tokens}"
        )
    n = q.size - 1
    if cache_indices is None:
        if num_slots < n:
            raise ValueError(
                f"num_slots must be at least N = {n} when cache_indices is None, "
                f"got {num_slots}"
            )
        slots = np.arange(n)
    else:
        slots = checks.host_integers("cache_indices", cache_indices)
        if slots.size != n:
            raise ValueError(
                f"cache_indices must have shape (N,) = ({n},), got {slots.shape}"
            )
    live = np.flatnonzero((q[1:] > q[:-1]) & (slots != pad_slot_id))
    if write_indices is not None or snapshot_indices is not None:
        moves = {"write_indices": write_indices, "snapshot_indices": snapshot_indices}
        _validate_moves(slots, live, moves, num_slots, pad_slot_id)
        return
    used, first = np.unique(slots[live], return_index=True)
    outside = live[(slots[live] < 0) | (slots[live] >= num_slots)]
    repeated = np.setdiff1d(live, live[first], assume_unique=True)
    owner = dict(zip(used.tolist(), live[first].tolist(), strict=True))
    for i in sorted(map(int, {*outside[:1], *repeated[:1]})):
        slot = int(slots[i])
        if not 0 <= slot < num_slots:
            raise ValueError(
                f"cache_indices[{i}] = {slot} is outside [0, num_slots = {num_slots}) "
                f"and is not pad_slot_id = {pad_slot_id}"
            )
        raise ValueError(
            f"cache_indices[{i}] = {slot} is already used by live sequence "
            f"{owner[slot]}; two live sequences must not share a slot"
        )


def _validate_moves(
    reads: np.ndarray,
    live: np.ndarray,
    moves: dict[str, Any],
    num_slots: int,
    pad_slot_id: int,
) -> None:
    """Raises where live sequences that read and write slots get in each other's way."""
    writes = {}
    for name, value in moves.items():
        if value is not None:
            writes[name] = checks.host_integers(name, value)
            if writes[name].shape != reads.shape:
                raise ValueError(
                    f"{name} must have shape (N,) = {reads.shape}, "
                    f"got {writes[name].shape}"
                )
    for name, slots in {"cache_indices": reads, **writes}.items():
        outside = (slots < 0) | (slots >= num_slots)
        for i in live[outside[live] & (slots[live] != pad_slot_id)].tolist():
            raise ValueError(
                f"{name}[{i}] = {slots[i]} is outside [0, num_slots = {num_slots}) "
                f"and is not pad_slot_id = {pad_slot_id}"
            )
    if "write_indices" not in writes:
        writes = {"cache_indices": reads, **writes}
    written: dict[int, int] = {}
    for name, slots in writes.items():
        for i in live.tolist():
            slot = int(slots[i])
            if slot == pad_slot_id:
                continue
            if (other := written.setdefault(slot, i)) != i:
                raise ValueError(
                    f"{name}[{i}] = {slot} is already written by live sequence "
                    f"{other}; two live sequences must not write one slot"
                )
    for i in live.tolist():
        if (other := written.get(int(reads[i]), i)) != i:
            raise ValueError(
                f"cache_indices[{i}] = {reads[i]} is written by live sequence {other}; "
                "no live sequence may read a slot that another one writes"
            )
