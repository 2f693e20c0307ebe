"""Packing on the host: rows of requests into a batch, documents into rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import ArrayLike

from . import checks
from .chunks import ConvMetadata
from .metadata import build_metadata
from .operands import PAD_SLOT_ID

__all__ = [
    "BatchArguments",
    "PackedBatch",
    "PackedDocuments",
    "pack_batch",
    "pack_documents",
]


class BatchArguments(TypedDict):
    """What `causal_conv1d_fn` and the layers' `packed` take by name."""

    query_start_loc: np.ndarray
    cache_indices: np.ndarray
    has_initial_state: np.ndarray
    metadata: ConvMetadata


class PackedBatch(NamedTuple):
    """A packed batch of T tokens and N rows, padding included. A pytree.

    Attributes:
        tokens: `(T, ...)`, the rows back to back, then zeros.
        query_start_loc: `(N+1,)` int32, where each row starts; padding rows are empty.
        cache_indices: `(N,)` int32, each row's slot, `PAD_SLOT_ID` in padding.
        has_initial_state: `(N,)` bool, False in padding.
        metadata: of `query_start_loc`, for all layers.
    """

    tokens: np.ndarray
    query_start_loc: np.ndarray
    cache_indices: np.ndarray
    has_initial_state: np.ndarray
    metadata: ConvMetadata

    def arguments(self) -> BatchArguments:
        """All but the tokens, by the names of `causal_conv1d_fn`'s parameters."""
        return {
            "query_start_loc": self.query_start_loc,
            "cache_indices": self.cache_indices,
            "has_initial_state": self.has_initial_state,
            "metadata": self.metadata,
        }


class PackedDocuments(NamedTuple):
    """Documents in rows of one length. A pytree.

    Attributes:
        tokens: `(R, length, ...)`, padding at the end of the last row.
        segment_ids: `(R, length)` int32, each token's document; -1 in padding.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray


def pack_batch(
    rows: Sequence[ArrayLike],
    cache_indices: ArrayLike,
    has_initial_state: ArrayLike,
    *,
    num_tokens: int,
    num_rows: int,
    block_m: int | None = None,
) -> PackedBatch:
    """Lays the rows of a step back to back, padded to one of a server's few shapes.

    Args:
        rows: each request's next tokens, `(n_i, ...)`: token numbers, or inputs
            `(n_i, D)`. Without rows the tokens are `(T,)` int32.
        cache_indices: one integer per row, its slot.
        has_initial_state: one bool per row: does its slot hold history? False for the
            first tokens of a request.
        num_tokens: T, at least all tokens of the rows.
        num_rows: N, at least as many as there are rows.
        block_m: as for `build_metadata`.

    Returns:
        The `PackedBatch`, of NumPy arrays.

    Raises:
        TypeError: wrong dtypes, or a static argument is not an int.
        ValueError: rows, slots and bools are not equally many, rows do not fit
            together, or there are too many of them or of their tokens.

    Example:
        >>> batch = pack_batch([[7, 8, 9], [4]], [3, 0], [False, True],
        ...                    num_tokens=8, num_rows=4)
        >>> batch.tokens.tolist(), batch.query_start_loc.tolist()
        ([7, 8, 9, 4, 0, 0, 0, 0], [0, 3, 4, 4, 4])
        >>> batch.cache_indices.tolist()
        [3, 0, -1, -1]
    """
    num_tokens = checks.static_int("num_tokens", num_tokens, minimum=0)
    num_rows = checks.static_int("num_rows", num_rows, minimum=0)
    arrays = _arrays("rows", rows)
    count, lengths = len(arrays), [len(array) for array in arrays]
    if count > num_rows:
        raise ValueError(f"num_rows must be at least {count}, the rows, got {num_rows}")
    if (total := sum(lengths)) > num_tokens:
        raise ValueError(
            f"num_tokens must be at least {total}, the rows' tokens, got {num_tokens}"
        )
    shape, dtype = _common("rows", arrays)
    tokens = np.zeros((num_tokens, *shape), dtype)
    offsets = np.full(num_rows + 1, total, np.int32)
    offsets[: count + 1] = np.cumsum([0, *lengths])
    if arrays:
        np.concatenate(arrays, out=tokens[:total])
    slots = np.full(num_rows, PAD_SLOT_ID, np.int32)
    seen = np.zeros(num_rows, bool)
    slots[:count] = _one_per_row("cache_indices", cache_indices, count, "iu")
    seen[:count] = _one_per_row("has_initial_state", has_initial_state, count, "b")
    metadata = build_metadata(offsets, num_tokens, block_m=block_m)
    return PackedBatch(tokens, offsets, slots, seen, metadata)


def pack_documents(
    documents: Sequence[ArrayLike], length: int, *, pad: int = 0
) -> PackedDocuments:
    """Lays documents back to back in rows, with the segment ids that part them.

    A document that does not fit goes on in the next row, where it starts anew: rows do
    not see each other.

    Args:
        documents: the tokens of each, `(n_i,)`, or inputs `(n_i, ...)`.
        length: tokens of a row.
        pad: what the end of the last row is filled with.

    Returns:
        As many rows as it takes, as NumPy arrays; `segment_ids` go into the dense op,
        the layers and the models.

    Raises:
        TypeError: `length` is not an int.
        ValueError: `length` < 1, or the documents do not fit together.

    Example:
        >>> rows = pack_documents([[1, 2, 3], [4, 5]], 4)
        >>> rows.tokens.tolist(), rows.segment_ids.tolist()
        ([[1, 2, 3, 4], [5, 0, 0, 0]], [[0, 0, 0, 1], [1, -1, -1, -1]])
    """
    length = checks.static_int("length", length, minimum=1)
    arrays = _arrays("documents", documents)
    shape, dtype = _common("documents", arrays)
    total = sum(map(len, arrays))
    rows = -(-total // length)
    tokens = np.full((rows * length, *shape), pad, dtype)
    segment_ids = np.full(rows * length, -1, np.int32)
    if arrays:
        np.concatenate(arrays, out=tokens[:total])
        segment_ids[:total] = np.repeat(
            np.arange(len(arrays), dtype=np.int32), list(map(len, arrays))
        )
    return PackedDocuments(
        tokens.reshape(rows, length, *shape), segment_ids.reshape(rows, length)
    )


def _arrays(name: str, values: Sequence[ArrayLike]) -> list[np.ndarray]:
    """The values as arrays; an empty list has the dtype of the others."""
    arrays = [np.asarray(value) for value in values]
    for i, array in enumerate(arrays):
        if array.ndim == 0:
            raise ValueError(f"{name}[{i}] must be a sequence of tokens, got {array}")
    full = [array for array in arrays if array.size]
    first = full[0] if full else np.zeros(0, np.int32)
    return [
        array if array.size else np.zeros((len(array), *first.shape[1:]), first.dtype)
        for array in arrays
    ]


def _common(name: str, arrays: list[np.ndarray]) -> tuple[tuple[int, ...], np.dtype]:
    """The shape of one token, and a dtype that holds all of them."""
    if not arrays:
        return (), np.dtype(np.int32)
    shape = arrays[0].shape[1:]
    for i, array in enumerate(arrays):
        if array.shape[1:] != shape:
            raise ValueError(
                f"{name} must have tokens of one shape, got {name}[0] with {shape} "
                f"and {name}[{i}] with {array.shape[1:]}"
            )
    dtype = np.result_type(*arrays)
    # Python's integers are int64 to NumPy, which jax would narrow anyway.
    narrow = dtype == np.int64 and all(
        array.size == 0 or (array.min() >= -(2**31) and array.max() < 2**31)
        for array in arrays
    )
    return shape, np.dtype(np.int32) if narrow else dtype


def _one_per_row(name: str, values: ArrayLike, count: int, kinds: str) -> np.ndarray:
    array = np.asarray(values)
    if array.shape != (count,):
        raise ValueError(
            f"{name} must have shape ({count},), one per row, got {array.shape}"
        )
    if count and array.dtype.kind not in kinds:
        what = "bool" if kinds == "b" else "integers"
        raise TypeError(f"{name} must be {what}, got dtype {array.dtype}")
    return array
