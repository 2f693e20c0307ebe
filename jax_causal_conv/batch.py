"""What the index arguments of a batch mean: its sequences, tokens and runs.

Every implementation, of every op, reads a batch by these definitions: offsets and slot
numbers are clamped here, and who is live is decided here.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Sequences(NamedTuple):
    """What a batch's index arguments mean, after clamping; all `(N,)`.

    Attributes:
        start: first token of the sequence.
        length: its number of tokens.
        slot: its slot, clamped into `[0, S)`; only meaningful where `live`.
        history: how many rows at the front of the slot are valid history, the newest
            last: L minus the rejected ones, 0 without initial state.
        live: False for skipped sequences.
    """

    start: jax.Array
    length: jax.Array
    slot: jax.Array
    history: jax.Array
    live: jax.Array


class Stores(NamedTuple):
    """States that sequences leave in a cache, one each; all `(N,)`.

    Attributes:
        slot: where the state goes, clamped into `[0, S)`.
        end: it is the state after so many of the sequence's tokens.
        live: False where nothing is stored.
    """

    slot: jax.Array
    end: jax.Array
    live: jax.Array


class Tokens(NamedTuple):
    """Where each token stands; all `(T,)`.

    Attributes:
        owner: its sequence, clamped into `[0, N)`.
        position: its index in the sequence.
        live: False where nobody covers it or its sequence is skipped.
    """

    owner: jax.Array
    position: jax.Array
    live: jax.Array


def sanitize_offsets(query_start_loc, num_tokens: int):
    """`cummax(clip(q, 0, T))`: the one meaning of any vector of offsets."""
    return lax.cummax(jnp.clip(query_start_loc, 0, num_tokens))


def sequences(
    offsets, slots, has_initial_state, num_rejected, shape, pad_slot_id: int
) -> Sequences:
    """Resolves sanitised offsets and optional index arrays for slots of `shape`."""
    num_slots, state_len = shape[:2]
    start, length = offsets[:-1], offsets[1:] - offsets[:-1]
    if slots is None:
        slots = jnp.arange(start.shape[0], dtype=jnp.int32)
    slot, named = _named_slots(slots, num_slots, pad_slot_id)
    live = named & (length > 0)
    history = jnp.full_like(start, state_len)
    if num_rejected is not None:
        history = history - jnp.clip(num_rejected, 0, state_len)
    has_initial_state = False if has_initial_state is None else has_initial_state
    history = jnp.where(has_initial_state, history, 0)
    return Sequences(start, length, slot, history, live)


def _named_slots(slots, num_slots: int, pad_slot_id: int):
    """Slot numbers clamped into `[0, S)`, and whether they named a slot."""
    slots = jnp.asarray(slots)
    named = (slots >= 0) & (slots < num_slots) & (slots != pad_slot_id)
    return jnp.clip(slots, 0, max(num_slots - 1, 0)), named


def stores_of(seqs: Sequences, operands, pad_slot_id: int) -> tuple[Stores, ...]:
    """What the sequences store: their snapshots, if any, and their last states.

    The last states come last: a snapshot that is to go to the same slot is not stored.

    Args:
        seqs: the sequences.
        operands: a record with `states`, `write_slots`, and perhaps `snapshot_slots`
            and `snapshot_ends`.
        pad_slot_id: the slot number that means "none".
    """
    num_slots = operands.states.shape[0]
    last = Stores(seqs.slot, seqs.length, seqs.live)
    if operands.write_slots is not None:
        slot, named = _named_slots(operands.write_slots, num_slots, pad_slot_id)
        last = Stores(slot, seqs.length, seqs.live & named)
    snapshot_slots = getattr(operands, "snapshot_slots", None)
    if snapshot_slots is None:
        return (last,)
    slot, named = _named_slots(snapshot_slots, num_slots, pad_slot_id)
    live = seqs.live & named & ~(last.live & (slot == last.slot))
    return Stores(slot, jnp.clip(operands.snapshot_ends, 0, seqs.length), live), last


def surplus_prefills(seqs: Sequences, limit: int, most: int = 1):
    """Which sequences an SSD op skips, `(N,)`: it serves `limit` prefills, in order.

    A prefill is a live sequence of more than `most` tokens.
    """
    prefill = seqs.live & (seqs.length > most)
    return prefill & (jnp.cumsum(prefill) > limit)


def first_after(ends, query):
    """The first index whose entry of sorted `ends` exceeds `query`; N if none does.

    An unrolled binary search: a loop would be a chain of kernels on a GPU, and jax's
    own search fails in a `shard_map` over some of a mesh's axes. The number of steps
    depends on N; where that is symbolic (`jax.export`), every end is counted instead.
    """
    count = ends.shape[0]
    if jax.export.is_symbolic_dim(count):
        return jnp.sum(ends <= query[:, None], axis=1, dtype=jnp.int32)
    found = jnp.zeros_like(query)
    for bit in reversed(range(count.bit_length())):
        further = found + (1 << bit)
        entry = take_rows(ends, further - 1)
        found = jnp.where((further <= count) & (entry <= query), further, found)
    return found


def tokens_of(seqs: Sequences, num_tokens: int) -> Tokens:
    """The tokens of packed sequences."""
    token = jnp.arange(num_tokens, dtype=jnp.int32)
    end = seqs.start + seqs.length
    # The first sequence that ends behind the token; N if the token comes after all.
    owner = first_after(end, token)
    covered = (owner < end.shape[0]) & (token >= seqs.start[0])
    live = covered & take_rows(seqs.live, owner)
    return Tokens(
        jnp.minimum(owner, end.shape[0] - 1), token - take_rows(seqs.start, owner), live
    )


def accumulator(x) -> jnp.dtype:
    """The dtype of products and sums: float64 iff x is."""
    # Said by hand: jax promotes no dtypes where its users want strict promotion.
    return jnp.dtype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)


def take_rows(table, *index):
    """Rows of `table` at indices, which are clamped, by one gather."""
    return table.at[index].get(mode="clip")


def slots_one_by_one(operands, pad_slot_id: int):
    """The slot numbers of an update's rows if `row_by_row` takes them apart, or None.

    Where the caller names no slots and there are as many as rows, slot i belongs to
    row i. Of a batch of row i and slot i alone the slot's number is 0, or -1 if the row
    is to be skipped. Otherwise the rows cannot be taken apart.
    """
    batch, num_slots = operands.x.shape[0], operands.states.shape[0]
    named = operands.slots is not None or operands.write_slots is not None
    if named or batch != num_slots:
        return None
    return jnp.where(jnp.arange(batch, dtype=jnp.int32) == pad_slot_id, -1, 0)


def row_by_row(function):
    """`function` of a batch, as a vmap of itself over batches of one row.

    So XLA sees that no gather leaves its row, and keeps a batch that is sharded over
    devices where it is.
    """

    def of_row(*row):
        out = function(*jax.tree.map(lambda a: a[None], row))
        return jax.tree.map(lambda a: a[0], out)

    return jax.vmap(of_row)


class Runs(NamedTuple):
    """Runs of equal segment ids in the rows of a dense batch; all `(B, T)`.

    Attributes:
        start: position in the row at which the token's run starts.
        real: False for tokens that are padding.
    """

    start: jax.Array
    real: jax.Array


def runs_of(segment_ids, batch: int, length: int) -> Runs:
    """The contiguous runs of equal ids; without ids each row is one run."""
    if segment_ids is None:
        shape = (batch, length)
        return Runs(jnp.zeros(shape, jnp.int32), jnp.ones(shape, bool))
    position = jnp.arange(length, dtype=jnp.int32)
    before = take_rows(segment_ids.T, jnp.maximum(position - 1, 0)).T
    change = jnp.where(segment_ids != before, position, 0)
    return Runs(lax.cummax(change, axis=1), segment_ids >= 0)


def tokens_of_runs(runs: Runs) -> Tokens:
    """The tokens of dense rows; all fields are `(B, T)`.

    A row has two histories: number 0 is what came before the row, and belongs to the
    run at position 0; number 1 is zeros, and belongs to all later runs. The owner of a
    token is the number of its history.
    """
    owner = jnp.where(runs.start == 0, 0, 1)
    position = jnp.arange(runs.start.shape[1], dtype=jnp.int32) - runs.start
    return Tokens(owner, position, runs.real)


def last_runs(runs: Runs, state_len: int) -> Sequences:
    """The last run of real tokens of each row, as a sequence of the row's tokens.

    A row of nothing but padding has an empty one at position 0, which keeps all of the
    row's history.
    """
    batch, length = runs.start.shape
    position = jnp.arange(length, dtype=jnp.int32)
    end = jnp.max(jnp.where(runs.real, position + 1, 0), axis=1)
    last = jnp.maximum(end - 1, 0)[:, None]
    start = jnp.take_along_axis(runs.start, last, axis=1, mode="clip")[:, 0]
    start = jnp.where(end > 0, start, 0)
    history = jnp.where(start == 0, state_len, 0)
    slot, live = jnp.zeros((batch,), jnp.int32), jnp.ones((batch,), bool)
    return Sequences(start, end - start, slot, history, live)
