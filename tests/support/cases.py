"""Random cases for the ops: generation only, no running, no checking.

A *shape* is everything static, thus one compilation; a *case* is a shape filled with
numpy arrays. Drawing many cases of one shape is cheap, so a fuzzer or a GPU run can use
the same generator: `packed_shape(rng)` then `packed_case(shape, rng)`.
"""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np

from tests.support import reference

INT_MIN, INT_MAX = -(2**31), 2**31 - 1
INT32 = np.dtype("int32")
FLOATS = (np.dtype("float32"), np.dtype("float16"), np.dtype(ml_dtypes.bfloat16))
CHANNELS = (1, 3, 64, 100, 257, 2064)
ACTIVATIONS = tuple(reference.ACTIVATIONS)  # names, True and False
DILATIONS = (1, 1, 1, 2, 3, 5)
MAX_WIDTH, MAX_EXTRA = 8, 10  # L goes from W-1 to W+9
GRID = MAX_WIDTH * (MAX_EXTRA + 1)  # every (W, L) once


@dataclasses.dataclass(frozen=True)
class PackedShape:
    num_tokens: int
    num_seqs: int
    num_slots: int
    channels: int
    width: int
    state_len: int
    x_dtype: Any = FLOATS[0]
    weight_dtype: Any = FLOATS[0]
    bias_dtype: Any | None = FLOATS[0]
    state_dtype: Any = FLOATS[0]
    index_dtype: Any = INT32
    cache_indices: bool = True
    has_initial_state: bool = True
    num_rejected_tokens: bool = True
    activation: str | bool | None = "silu"
    dilation: int = 1
    residual: bool = False
    pad_slot_id: int = reference.PAD_SLOT_ID
    block_m: int | None = None
    write_indices: bool = False
    snapshots: bool = False


@dataclasses.dataclass(frozen=True)
class UpdateShape:
    num_rows: int
    num_queries: int | None  # None: x is (B, D)
    num_slots: int
    channels: int
    width: int
    state_len: int
    x_dtype: Any = FLOATS[0]
    weight_dtype: Any = FLOATS[0]
    bias_dtype: Any | None = FLOATS[0]
    state_dtype: Any = FLOATS[0]
    index_dtype: Any = INT32
    conv_state_indices: bool = True
    cache_seqlens: bool = False
    num_rejected_tokens: bool = True
    activation: str | bool | None = "silu"
    dilation: int = 1
    residual: bool = False
    pad_slot_id: int = reference.PAD_SLOT_ID
    write_indices: bool = False


def conv_options(shape):
    names = ("activation", "dilation", "residual")
    return {name: getattr(shape, name) for name in names}


def reach(shape):
    """How many tokens before its own a filter of a shape spans."""
    return (shape.width - 1) * shape.dilation


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of one call, by their public names."""

    shape: "PackedShape | UpdateShape | DenseShape"
    arrays: dict[str, np.ndarray | None]
    options: dict[str, Any]

    def replace(self, **arrays) -> "Case":
        return dataclasses.replace(self, arrays=self.arrays | arrays)

    def __str__(self):
        integers = {
            name: array.tolist()
            for name, array in self.arrays.items()
            if array is not None and array.dtype.kind in "iub"
        }
        return f"{self.shape}\n  {integers}"


def choose(rng, pool):
    return pool[rng.integers(len(pool))]


def maybe(rng, value, probability=0.5):
    return value if rng.random() < probability else None


def floats(rng, shape, dtype, scale=1.0):
    return (scale * rng.standard_normal(shape)).astype(dtype)


def random_patterns(rng, shape, dtype):
    """Any bits: NaN payloads, signalling NaNs, infinities, subnormals, -0."""
    integer = np.dtype(f"u{dtype.itemsize}")
    pattern = rng.integers(0, np.iinfo(integer).max, shape, integer, endpoint=True)
    return pattern.view(dtype)


def representable(values, dtype):
    """The integers of `values` that `dtype` can hold."""
    info = np.iinfo(dtype)
    return [value for value in values if info.min <= value <= info.max]


def integers(values, dtype):
    info = np.iinfo(dtype)
    return np.array([min(max(int(v), info.min), info.max) for v in values], dtype)


def far_values(dtype):
    """Integers that point nowhere; wide dtypes include those that wrap in int32."""
    far = [INT_MIN, INT_MAX, -7, 127, 2**31 + 3, 2**32 + 1, -(2**32) + 1, 2**63 - 1]
    return representable([*far, 2**64 - 1], dtype)


def dtypes(rng):
    """dtypes of x, weight, bias (None: no bias) and state: half of the time all one."""
    if rng.random() < 0.5:
        one = choose(rng, FLOATS)
        four = [one] * 4
    else:
        four = [choose(rng, FLOATS) for _ in range(4)]
    if rng.random() < 0.3:
        four[2] = None
    names = ("x_dtype", "weight_dtype", "bias_dtype", "state_dtype")
    return dict(zip(names, four, strict=True))


def width_and_length(index):
    """(W, L) number `index`: 88 consecutive numbers visit W=1..8 with L=W-1..W+9."""
    width = 1 + index % MAX_WIDTH
    return width, width - 1 + index % (MAX_EXTRA + 1)


def dilated(rng, width):
    """Static options, and how many tokens before its own a filter then spans."""
    options = {
        "dilation": int(choose(rng, DILATIONS)),
        "residual": bool(rng.random() < 0.3),
    }
    return options, (width - 1) * options["dilation"]


def packed_shape(rng, index=None, *, small=False, index_dtypes=("int32",)):
    """A random shape; `small` suits an interpreter that takes its time."""
    width, state_len = width_and_length(rng.integers(GRID) if index is None else index)
    dilation, reach = dilated(rng, width)
    state_len += reach - (width - 1)
    cache_indices = rng.random() < 0.8
    num_seqs = int(choose(rng, (1, 2, 3, 5) if small else (1, 2, 3, 5, 9)))
    num_slots = int(choose(rng, (1, 4, 7, 12)))
    if not cache_indices:
        num_slots = max(num_slots, num_seqs)
    block_m = int(choose(rng, (8, 16, 11)))
    return PackedShape(
        num_tokens=int(choose(rng, (1, 7, 24, 40) if small else (1, 7, 24, 61, 160))),
        num_seqs=num_seqs,
        num_slots=num_slots,
        channels=int(choose(rng, CHANNELS[:4] if small else CHANNELS)),
        width=width,
        state_len=state_len,
        **dtypes(rng),
        index_dtype=np.dtype(choose(rng, index_dtypes)),
        cache_indices=cache_indices,
        has_initial_state=rng.random() < 0.8,
        num_rejected_tokens=rng.random() < 0.5,
        activation=choose(rng, ACTIVATIONS),
        **dilation,
        pad_slot_id=int(choose(rng, (-1, -1, -1, 0, 2, 300))),
        block_m=maybe(rng, max(block_m, reach)),
        write_indices=rng.random() < 0.3,
        snapshots=rng.random() < 0.3,
    )


def interesting_lengths(reach, block_m):
    block = block_m or 16
    long = 3 * block + 1
    lengths = {0, 1, reach - 1, reach, reach + 1, block - 1, block, block + 1, long}
    return sorted(length for length in lengths if length >= 0)


def random_offsets(rng, shape):
    """Valid offsets: interesting lengths, often an uncovered head and tail."""
    lengths = interesting_lengths(reach(shape), shape.block_m)
    head = min(int(choose(rng, (0, 0, 0, 1, 5))), shape.num_tokens)
    offsets = [head]
    for _ in range(shape.num_seqs):
        offsets.append(min(offsets[-1] + int(choose(rng, lengths)), shape.num_tokens))
    if rng.random() < 0.5:
        offsets[-1] = shape.num_tokens
    return offsets


def malformed_offsets(rng, shape):
    offsets = random_offsets(rng, shape)
    if rng.random() < 0.5:
        rng.shuffle(offsets)
    for i in range(len(offsets)):
        if rng.random() < 0.3:
            offsets[i] = choose(rng, far_values(shape.index_dtype))
    return offsets


def random_slots(rng, live, num_slots, pad_slot_id, dtype, malformed):
    """Slots in random order, no two live rows on one; some pads, some far away."""
    free = [s for s in rng.permutation(num_slots) if s != pad_slot_id]
    nowhere = [pad_slot_id, -1, num_slots, num_slots + 5]
    if malformed:
        nowhere += far_values(dtype)
    nowhere = [
        slot
        for slot in representable(nowhere, dtype)
        if not reference.is_slot(slot, num_slots, pad_slot_id)
    ]
    slots, used = [], []
    for is_live in live:
        if not is_live and used and rng.random() < 0.5:
            slots.append(choose(rng, used))  # an empty row may name a busy slot
        elif free and rng.random() < 0.75:
            slots.append(free.pop())
            used.append(slots[-1])
        else:
            slots.append(choose(rng, nowhere))
    return integers(slots, dtype)


def random_moves(rng, lengths, shape, slots, dtype, malformed) -> dict[str, Any]:
    """What makes states of live sequences move, with nothing left unspecified.

    Args:
        rng: the generator.
        lengths: of the sequences, 0 of those that are not live anyway.
        shape: with num_slots, pad_slot_id and the flags of what there is to be.
        slots: `cache_indices` or the like, None for none.
        dtype: of all integers.
        malformed: whether some point far away.

    Returns:
        `cache_indices`, perhaps with several readers of one slot, `write_indices`,
        `snapshot_ends` and `snapshot_indices`; None for what there is not to be.
    """
    num_slots, pad, count = shape.num_slots, shape.pad_slot_id, len(lengths)
    reads = list(range(count)) if slots is None else [int(s) for s in slots]
    live = [
        i
        for i in range(count)
        if lengths[i] and reference.is_slot(reads[i], num_slots, pad)
    ]
    far = far_values(dtype) if malformed else []
    nowhere = [
        slot
        for slot in representable([pad, -1, num_slots, num_slots + 5, *far], dtype)
        if not reference.is_slot(slot, num_slots, pad)
    ]
    if shape.write_indices and slots is not None and len(live) > 1:
        for i in live[1:]:
            if rng.random() < 0.3:
                reads[i] = reads[live[0]]
    readers = [reads[i] for i in live]
    free = [s for s in range(num_slots) if s != pad and s not in readers]
    rng.shuffle(free)

    def place(i, mine, chance):
        """The slot that was read, if no other reads it; or a free one; or none."""
        if i not in live:  # it stores nothing, wherever it points
            return int(choose(rng, [*nowhere, *range(num_slots)]))
        if mine and readers.count(reads[i]) == 1 and rng.random() < chance:
            return reads[i]
        return free.pop() if free and rng.random() < 0.8 else int(choose(rng, nowhere))

    writes, earlier, ends = reads, None, None
    if shape.write_indices:
        writes = [place(i, True, 0.4) for i in range(count)]
    if getattr(shape, "snapshots", False):
        # Where the state goes elsewhere, the snapshot may replace what was read.
        earlier = [place(i, writes[i] != reads[i], 0.3) for i in range(count)]
        for i in live:
            if rng.random() < 0.1:  # where the state goes, which comes first
                earlier[i] = writes[i]
        pool = [0, 1, 2, *lengths, *(int(n) // 2 for n in lengths), *far]
        ends = [choose(rng, representable(pool, dtype)) for _ in range(count)]
    return {
        "cache_indices": None if slots is None else integers(reads, dtype),
        "write_indices": integers(writes, dtype) if shape.write_indices else None,
        "snapshot_ends": None if ends is None else integers(ends, dtype),
        "snapshot_indices": None if earlier is None else integers(earlier, dtype),
    }


def random_rejected(rng, count, state_len, dtype, malformed):
    pool = [0, 0, 1, 2, state_len - 1, state_len, state_len + 3]
    if malformed:
        pool += [-1, *far_values(dtype)]
    pool = representable(pool, dtype)
    return integers([choose(rng, pool) for _ in range(count)], dtype)


def packed_case(shape: PackedShape, rng, *, malformed=False) -> Case:
    """Fill a shape. `malformed`: integers that no careful caller would pass."""
    draw = malformed_offsets if malformed else random_offsets
    offsets = integers(draw(rng, shape), shape.index_dtype)
    clean = reference.clean_offsets(offsets, shape.num_tokens)
    lengths = np.diff(clean)
    scale = float(choose(rng, (1.0, 1.0, 8.0)))
    arrays = {
        "x": floats(rng, (shape.num_tokens, shape.channels), shape.x_dtype, scale),
        "weight": floats(rng, (shape.channels, shape.width), shape.weight_dtype, 0.5),
        "bias": None,
        "conv_states": floats(
            rng,
            (shape.num_slots, shape.state_len, shape.channels),
            shape.state_dtype,
        ),
        "query_start_loc": offsets,
        "cache_indices": None,
        "has_initial_state": None,
        "num_rejected_tokens": None,
    }
    if shape.bias_dtype is not None:
        arrays["bias"] = floats(rng, shape.channels, shape.bias_dtype)
    if shape.cache_indices:
        arrays["cache_indices"] = random_slots(
            rng,
            lengths > 0,
            shape.num_slots,
            shape.pad_slot_id,
            shape.index_dtype,
            malformed,
        )
    if shape.has_initial_state:
        arrays["has_initial_state"] = rng.random(shape.num_seqs) < 0.6
    if shape.num_rejected_tokens:
        arrays["num_rejected_tokens"] = random_rejected(
            rng, shape.num_seqs, shape.state_len, shape.index_dtype, malformed
        )
    if shape.write_indices or shape.snapshots:
        slots, dtype = arrays["cache_indices"], shape.index_dtype
        arrays |= random_moves(rng, lengths, shape, slots, dtype, malformed)
    options = conv_options(shape) | {"pad_slot_id": shape.pad_slot_id}
    return Case(shape, arrays, options)


def update_shape(rng, index=None, *, small=False, index_dtypes=("int32",)):
    width, state_len = width_and_length(rng.integers(GRID) if index is None else index)
    dilation, reach = dilated(rng, width)
    state_len += reach - (width - 1)
    conv_state_indices = rng.random() < 0.8
    num_rows = int(choose(rng, (1, 3, 6) if small else (1, 3, 6, 17)))
    num_slots = int(choose(rng, (1, 4, 7, 20)))
    if not conv_state_indices:
        num_slots = max(num_slots, num_rows)
    circular = rng.random() < 0.4
    return UpdateShape(
        num_rows=num_rows,
        num_queries=choose(rng, (None, 1, 2, 3, 4, 5)),
        num_slots=num_slots,
        channels=int(choose(rng, CHANNELS[:4] if small else CHANNELS)),
        width=width,
        state_len=state_len,
        **dtypes(rng),
        index_dtype=np.dtype(choose(rng, index_dtypes)),
        conv_state_indices=conv_state_indices,
        cache_seqlens=circular,
        num_rejected_tokens=not circular and rng.random() < 0.6,
        activation=choose(rng, ACTIVATIONS),
        **dilation,
        pad_slot_id=int(choose(rng, (-1, -1, -1, 0, 2, 300))),
        write_indices=rng.random() < 0.3,
    )


def random_positions(rng, shape, malformed):
    length = max(shape.state_len, 1)
    pool = [0, 1, length - 1, length, 2 * length + 1, 1000]
    if malformed:
        pool += [-1, -length, *far_values(shape.index_dtype)]
    pool = representable(pool, shape.index_dtype)
    return integers(
        [choose(rng, pool) for _ in range(shape.num_rows)], shape.index_dtype
    )


def update_case(shape: UpdateShape, rng, *, malformed=False) -> Case:
    queries = () if shape.num_queries is None else (shape.num_queries,)
    scale = float(choose(rng, (1.0, 1.0, 8.0)))
    arrays = {
        "x": floats(
            rng, (shape.num_rows, *queries, shape.channels), shape.x_dtype, scale
        ),
        "conv_state": floats(
            rng,
            (shape.num_slots, shape.state_len, shape.channels),
            shape.state_dtype,
        ),
        "weight": floats(rng, (shape.channels, shape.width), shape.weight_dtype, 0.5),
        "bias": None,
        "cache_seqlens": None,
        "conv_state_indices": None,
        "num_rejected_tokens": None,
    }
    if shape.bias_dtype is not None:
        arrays["bias"] = floats(rng, shape.channels, shape.bias_dtype)
    if shape.conv_state_indices:
        arrays["conv_state_indices"] = random_slots(
            rng,
            [True] * shape.num_rows,
            shape.num_slots,
            shape.pad_slot_id,
            shape.index_dtype,
            malformed,
        )
    if shape.cache_seqlens:
        arrays["cache_seqlens"] = random_positions(rng, shape, malformed)
    if shape.num_rejected_tokens:
        arrays["num_rejected_tokens"] = random_rejected(
            rng, shape.num_rows, shape.state_len, shape.index_dtype, malformed
        )
    if shape.write_indices:
        slots, dtype = arrays["conv_state_indices"], shape.index_dtype
        lengths = [int(shape.num_queries != 0)] * shape.num_rows
        moves = random_moves(rng, lengths, shape, slots, dtype, malformed)
        arrays["conv_state_indices"] = moves["cache_indices"]
        arrays["conv_state_write_indices"] = moves["write_indices"]
    options = conv_options(shape) | {"pad_slot_id": shape.pad_slot_id}
    return Case(shape, arrays, options)


@dataclasses.dataclass(frozen=True)
class DenseShape:
    num_rows: int
    num_tokens: int  # per row
    channels: int
    width: int
    state_len: int | None = None  # None: without initial state
    x_dtype: Any = FLOATS[0]
    weight_dtype: Any = FLOATS[0]
    bias_dtype: Any | None = FLOATS[0]
    state_dtype: Any = FLOATS[0]
    segment_ids: bool = True
    activation: str | bool | None = "silu"
    dilation: int = 1
    residual: bool = False


def random_segments(rng, shape):
    """Runs of length 1, < W and longer; few ids, so that they return; padding."""
    ids = np.zeros((shape.num_rows, shape.num_tokens), np.int32)
    for row in ids:
        first, previous = 0, None
        while first < shape.num_tokens:
            span = reach(shape)
            length = int(choose(rng, (1, 1, 2, span, span + 1, 9, 20)))
            segment = int(choose(rng, (-3, -1, 0, 1, 5)))
            if segment == previous:
                continue
            row[first : first + max(length, 1)] = previous = segment
            first += max(length, 1)
    return ids


def dense_case(shape: DenseShape, rng) -> Case:
    rows = (shape.num_rows, shape.num_tokens)
    arrays = {
        "x": floats(rng, (*rows, shape.channels), shape.x_dtype),
        "weight": floats(rng, (shape.channels, shape.width), shape.weight_dtype, 0.5),
        "bias": None,
        "initial_state": None,
        "segment_ids": None,
    }
    if shape.bias_dtype is not None:
        arrays["bias"] = floats(rng, shape.channels, shape.bias_dtype)
    if shape.state_len is not None:
        size = (shape.num_rows, shape.state_len, shape.channels)
        arrays["initial_state"] = floats(rng, size, shape.state_dtype)
    if shape.segment_ids:
        arrays["segment_ids"] = random_segments(rng, shape)
    return Case(shape, arrays, conv_options(shape))
