"""The conv state's rule in jax.numpy: reading history, and what a slot becomes.

A slot holds the last inputs of a request, oldest first; see the package's `batch` for
whose slot is whose.
"""

import jax
import jax.numpy as jnp
from jax import lax

from .batch import Runs, Sequences, Stores, last_runs, row_by_row, runs_of, take_rows


@jax.custom_jvp
def differentiate_as(value, twin):
    """`value`, with the derivative of its equal `twin`.

    In this module the twin comes from one conversion to the accumulator's dtype, so
    that gradients through several paths are added there and rounded once, while `value`
    keeps its bits. Compiled programs compute the twin only where a derivative is taken.
    """
    del twin
    return value


@differentiate_as.defjvp
def _(primals, tangents):
    # The recursion makes derivatives of higher orders those of the twin as well.
    return differentiate_as(*primals), tangents[1].astype(primals[0].dtype)


def wide_slots(states, seqs: Sequences, dtype):
    """Each sequence's slot `(N, L, D)` in the accumulator's dtype."""
    return take_rows(states, seqs.slot).astype(dtype)


def slot_rows(states, wide, seqs: Sequences, row, dtype):
    """`states[slot, row]` as `dtype`, for `row` `(N, K)`; numbers are clamped.

    `wide` is `wide_slots(states)`.
    """
    each = jnp.arange(row.shape[0])[:, None]
    value = take_rows(states, seqs.slot[:, None], row).astype(dtype)
    return differentiate_as(value, take_rows(wide, each, row).astype(dtype))


def history_before(states, wide, seqs: Sequences, count: int):
    """The `count` rows before each sequence's first token, `(N, count, D)`.

    Zeros where there are fewer, and for skipped sequences; in the dtype of `wide`,
    which is `wide_slots(states)`.
    """
    row = seqs.history[:, None] - count + jnp.arange(count, dtype=jnp.int32)
    old = slot_rows(states, wide, seqs, jnp.maximum(row, 0), wide.dtype)
    return jnp.where(((row >= 0) & seqs.live[:, None])[..., None], old, 0)


def ring_before(states, wide, seqs: Sequences, cursor, count: int):
    """`history_before` for circular buffers whose next row is `cursor` `(N,)`."""
    row = cursor[:, None] - count + jnp.arange(count, dtype=jnp.int32)
    row = jnp.mod(row, states.shape[1])
    old = slot_rows(states, wide, seqs, row, wide.dtype)
    return jnp.where(seqs.live[:, None, None], old, 0)


def token_rows(x, wide, token, dtype):
    """Rows of x as `dtype`; `wide` is x in the accumulator's dtype."""
    value = take_rows(x, token).astype(dtype)
    return differentiate_as(value, take_rows(wide, token).astype(dtype))


def slots_after(rows, slots, seqs: Sequences, state_len: int, dtype, length=None):
    """The last `state_len` rows of `concat(history, x[start:start+length])`.

    Where these are fewer, rows of zeros come in front.

    Args:
        rows: x `(T, D)`, and the same in the accumulator's dtype.
        slots: the states `(S, L, D)`, and `wide_slots` of them; two Nones if there is
            no history.
        seqs: whose tokens and slots they are.
        state_len: rows of the result.
        dtype: that of the result.
        length: `(N,)`, how many tokens of each sequence are taken; None is all.

    Returns:
        `(N, state_len, D)`.
    """
    (x, wide_x), (states, wide) = rows, slots
    length = seqs.length if length is None else length
    if state_len == 0:
        return jnp.zeros((length.shape[0], 0, x.shape[1]), dtype)
    row = jnp.arange(state_len, dtype=jnp.int32)
    token = length[:, None] - state_len + row  # of the sequence; < 0: history
    new = jnp.maximum(seqs.start[:, None] + token, 0)
    new = token_rows(x, wide_x, new, dtype)
    if states is None:
        old = jnp.zeros((), dtype)
    else:
        row = seqs.history[:, None] + token
        old = slot_rows(states, wide, seqs, jnp.maximum(row, 0), dtype)
        old = jnp.where((row >= 0)[..., None], old, 0)
    return jnp.where((token >= 0)[..., None], new, old)


def store_rows(states, store: Stores, row, rows):
    """Writes `rows` `(N, K, D)` to rows `row` of the slots that are stored to."""
    slot = jnp.where(store.live, store.slot, states.shape[0])  # out of bounds: dropped
    return states.at[slot[:, None], row].set(rows, mode="drop", unique_indices=True)


def read_before(states, reads):
    """The same arrays, of which `states` may be updated only after all of `reads`.

    So XLA updates a donated cache in place, rather than keep a copy for later reads.
    """
    return lax.optimization_barrier((states, reads))


def final_states(x, initial_state, segment_ids, state_len: int):
    """What a continuation of each row's last run needs, `(B, state_len, D)`."""
    runs = runs_of(segment_ids, *x.shape[:2])
    return final_states_of((x, x), (initial_state, initial_state), runs, state_len)


def final_states_of(rows, states, runs: Runs, state_len: int):
    """`final_states` of arrays that were converted to the accumulator's dtype before.

    Args:
        rows: x `(B, T, D)`, and the same in the accumulator's dtype.
        states: the initial state `(B, L, D)`, likewise; two Nones if there is none.
        runs: those of the rows.
        state_len: rows of the result.
    """
    dtype = rows[0].dtype if states[0] is None else states[0].dtype

    def of_row(rows, states, last):
        rows = tuple(array[0] for array in rows)
        return slots_after(rows, states, last, state_len, dtype)

    return row_by_row(of_row)(rows, states, last_runs(runs, state_len))
