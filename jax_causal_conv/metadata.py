"""Metadata of a packed batch, and the check of one before it is served."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from jax.typing import ArrayLike

from . import checks
from .chunks import ConvMetadata, chunk_metadata
from .kernels.tiles import default_block_m
from .operands import PAD_SLOT_ID
from .promotion import promoting

__all__ = ["build_metadata", "validate_batch"]


@promoting
def build_metadata(
    query_start_loc: ArrayLike, num_tokens: int, *, block_m: int | None = None
) -> ConvMetadata:
    """Builds the chunk arrays of a packed batch, without a loop over sequences.

    Args:
        query_start_loc: `(N+1,)` integers, as for `causal_conv1d_fn`; any values are
            safe. NumPy (or a list) is computed on the host; a jax array or tracer in
            the graph, without a host sync. Both give the same arrays.
        num_tokens: T, the number of rows of x (static).
        block_m: tokens per chunk; must be at least (W-1) * dilation for the op. None is
            the kernels' own choice from T and N: as little as 8 in small batches, so
            say it for filters that span more.

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
    has_initial_state: ArrayLike | None = None,
    num_rejected_tokens: ArrayLike | None = None,
    metadata: ConvMetadata | None = None,
    state_len: int | None = None,
    width: int | None = None,
    dilation: int = 1,
    pad_slot_id: int = PAD_SLOT_ID,
    write_indices: ArrayLike | None = None,
    snapshot_indices: ArrayLike | None = None,
) -> None:
    """Checks a packed batch on the host, eagerly, for servers and notebooks.

    The ops accept any integers; this tells a mistake from an intention. Empty
    sequences and pad slots are exempt from the checks of slots. Pass what the op gets:
    what is left out is not checked.

    Args:
        query_start_loc: `(N+1,)` integers.
        cache_indices: `(N,)` integers, None = `arange(N)`.
        num_tokens: T.
        num_slots: S.
        has_initial_state: `(N,)` bool or None, all False, as the op has it.
        num_rejected_tokens: `(N,)` integers.
        metadata: what the op would get with this batch.
        state_len: L, the length of a slot, and
        width: W, of the filter, and
        dilation: of its taps: rejected tokens need L >= (W-1) * dilation + r.
        pad_slot_id: the slot number that means "skip".
        write_indices: `(N,)` integers, where new states go; None = `cache_indices`.
            Then several live sequences may read one slot.
        snapshot_indices: `(N,)` integers, where snapshots go, or None.

    Raises:
        ValueError: names the first offending entry: `query_start_loc[0] != 0` (lengths
            in the place of offsets are recognised), a decreasing or too large offset, a
            slot out of range, a slot used by two live sequences (written by both, or
            read by one and written by the other), metadata of another batch, more
            rejected tokens than a slot of `state_len` has room for.
        TypeError: not integers, or traced values.

    Warns:
        UserWarning: all live sequences have one token, and none has an initial state:
            decodes that forget what came before.
    """
    num_tokens = checks.static_int("num_tokens", num_tokens, minimum=0)
    num_slots = checks.static_int("num_slots", num_slots, minimum=0)
    pad_slot_id = checks.static_int("pad_slot_id", pad_slot_id)
    q = checks.host_integers("query_start_loc", query_start_loc)
    checks.at_least_one_offset(q)
    if q[0] != 0:
        hint = ""
        if (q > 0).all() and q.sum() <= num_tokens:
            hint = "; these look like lengths: offsets are np.cumsum([0, *lengths])"
        raise ValueError(f"query_start_loc[0] must be 0, got {q[0]}{hint}")
    _validate_offsets(q, num_tokens)
    n = q.size - 1
    slots = _slots(cache_indices, n, num_slots)
    live = np.flatnonzero((q[1:] > q[:-1]) & (slots != pad_slot_id))
    if write_indices is not None or snapshot_indices is not None:
        moves = {"write_indices": write_indices, "snapshot_indices": snapshot_indices}
        _validate_moves(slots, live, moves, num_slots, pad_slot_id)
    else:
        _validate_slots(slots, live, num_slots, pad_slot_id)
    live = live[(slots[live] >= 0) & (slots[live] < num_slots)]
    seen = _seen(has_initial_state, n)
    _warn_of_lost_history(q, live, seen)
    if num_rejected_tokens is not None:
        least = 0
        if width is not None:
            dilation = checks.static_int("dilation", dilation, minimum=1)
            least = (checks.static_int("width", width, minimum=1) - 1) * dilation
        rows = live[seen[live]]
        _check_rejected(num_rejected_tokens, rows, n, state_len, least)
    if metadata is not None:
        _check_metadata(metadata, q, num_tokens)


def _slots(cache_indices: ArrayLike | None, n: int, num_slots: int) -> np.ndarray:
    if cache_indices is None:
        if num_slots < n:
            raise ValueError(
                f"num_slots must be at least N = {n} when cache_indices is None, "
                f"got {num_slots}"
            )
        return np.arange(n)
    slots = checks.host_integers("cache_indices", cache_indices)
    if slots.size != n:
        raise ValueError(
            f"cache_indices must have shape (N,) = ({n},), got {slots.shape}"
        )
    return slots


def _seen(has_initial_state: ArrayLike | None, n: int) -> np.ndarray:
    if has_initial_state is None:
        return np.zeros(n, bool)
    return np.asarray(checks.has_initial_state(has_initial_state, n))


def _warn_of_lost_history(q: np.ndarray, live: np.ndarray, seen: np.ndarray) -> None:
    """Warns of decode steps that start from nothing."""
    if live.size > 1 and (np.diff(q)[live] == 1).all() and not seen[live].any():
        warnings.warn(
            f"all {live.size} live sequences have one token and no initial state: "
            "decode steps need has_initial_state=True, or they forget their history",
            stacklevel=3,
        )


def _check_rejected(
    value: ArrayLike,
    rows: np.ndarray,
    n: int,
    state_len: int | None,
    least: int,
) -> None:
    rejected = checks.host_integers("num_rejected_tokens", value)
    if rejected.size != n:
        raise ValueError(
            f"num_rejected_tokens must have shape (N,) = ({n},), got {rejected.shape}"
        )
    for i in rows[rejected[rows] < 0][:1]:
        raise ValueError(
            f"num_rejected_tokens[{i}] must not be negative, got {rejected[i]}"
        )
    if state_len is None:
        return
    state_len = checks.static_int("state_len", state_len, minimum=0)
    for i in rows[rejected[rows] > state_len - least][:1]:
        raise ValueError(
            f"num_rejected_tokens[{i}] = {rejected[i]} needs slots of "
            f"L >= (W-1) * dilation + r = {least + int(rejected[i])} rows, "
            f"got state_len = {state_len}"
        )


def _check_metadata(metadata: ConvMetadata, q: np.ndarray, num_tokens: int) -> None:
    if not isinstance(metadata, ConvMetadata):
        raise TypeError(
            f"metadata must be a ConvMetadata or None, got {type(metadata).__name__}"
        )
    expected = build_metadata(q, num_tokens, block_m=metadata.block_m)
    for name in ("chunk_seq", "chunk_offset"):
        got, want = np.asarray(getattr(metadata, name)), getattr(expected, name)
        if got.shape != want.shape:
            raise ValueError(
                f"metadata.{name} must have shape {want.shape} for this batch, got "
                f"{got.shape}"
            )
        for p in np.flatnonzero(got != want)[:1]:
            raise ValueError(
                f"metadata is of another batch: {name}[{p}] is {got[p]}, and with this "
                f"query_start_loc {want[p]}; build it anew for every step"
            )


def _validate_offsets(q: np.ndarray, num_tokens: int) -> None:
    """Raises where offsets decrease or leave the batch."""
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


def _validate_slots(
    slots: np.ndarray, live: np.ndarray, num_slots: int, pad_slot_id: int
) -> None:
    """Raises where a live sequence has no slot, or that of another one."""
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
