"""Rollback of SSM states: how the last tokens of a request can be taken back.

A slot holds the state *before* the last q tokens of a request, and of these tokens what
the recurrence takes of them: x, dt and B, oldest first. Where the request had fewer,
zeros stand in front, which change no state. A step puts those that were not rejected
in front of its new tokens, and leaves the state q tokens behind: that is the packed SSD
of a batch in which each sequence is longer by q tokens, with states before the last q.
XLA makes that batch, as here; the kernels read the tokens where they are.

The alternative is a state after each of q drafts: a step then writes q more states. For
a layer of Mamba2-2.7B one has 2.6 MB in float32, and what the recurrence takes of a
token 11 KB: with q = 4 a step moves 5.3 MB a sequence here, and 15.7 MB there.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .batch import (
    Sequences,
    accumulator,
    first_after,
    sanitize_offsets,
    sequences,
    stores_of,
    surplus_prefills,
    take_rows,
    tokens_of,
)
from .operands import PAD_SLOT_ID, SSDPackedOperands, SSDSpec
from .slots import store_rows


def step_sizes(spec: SSDSpec, dt, bias):
    """The step sizes of the recurrence, from what the caller gave."""
    if bias is not None:
        dt = dt + bias.astype(dt.dtype)
    if spec.dt_softplus:
        dt = jax.nn.softplus(dt)
    return jnp.clip(dt, *spec.dt_limit) if spec.limits_dt else dt


def replayed(
    spec: SSDSpec, operands: SSDPackedOperands
) -> tuple[SSDSpec, SSDPackedOperands, Any, Callable]:
    """The longer batch without drafts that a batch with drafts is.

    Returns:
        Its spec and operands; after how many tokens its sequences leave their states;
        and a function that makes the results of the one from those of the other.
    """
    num_tokens, drafts = operands.x.shape[0], operands.num_drafts
    num_slots = operands.states.shape[0]
    offsets = sanitize_offsets(operands.query_start_loc, num_tokens)
    seqs = sequences(
        offsets,
        operands.slots,
        operands.has_initial_state,
        operands.num_rejected,
        (num_slots, drafts),
        spec.pad_slot_id,
    )
    surplus = surplus_prefills(seqs, spec.max_prefills, most=1 + drafts)
    seqs = seqs._replace(live=seqs.live & ~surplus)
    recent = operands.recent_x, operands.recent_dt, operands.recent_B
    recent, kept = lax.optimization_barrier(
        (recent, [_kept(rows, seqs, drafts) for rows in recent])
    )
    wide = accumulator(operands.x)
    dt = step_sizes(spec, operands.dt.astype(wide), operands.dt_bias)
    longer = offsets + drafts * jnp.arange(offsets.shape[0], dtype=jnp.int32)
    source = _sources(longer, num_tokens, drafts)

    def extended(tokens, before):
        before = before.reshape(-1, *tokens.shape[1:]).astype(tokens.dtype)
        return take_rows(jnp.concatenate([tokens, before]), source)

    x, dt, B = map(extended, (operands.x, dt, operands.B), kept)
    # Nobody looks at the outputs of tokens that are replayed.
    C = extended(operands.C, jnp.zeros_like(kept[2]))
    stores = stores_of(seqs, operands, spec.pad_slot_id)
    longer_spec = dataclasses.replace(
        spec,
        dt_softplus=False,
        dt_limit=(0.0, math.inf),
        max_prefills=seqs.live.shape[0],  # surplus ones are not live
    )
    longer_operands = SSDPackedOperands(
        x,
        dt,
        operands.A,
        B,
        C,
        operands.D,
        None,
        operands.states,
        longer,
        slots=jnp.where(seqs.live, seqs.slot, PAD_SLOT_ID),
        has_initial_state=operands.has_initial_state,
        write_slots=operands.write_slots,
        snapshot_slots=operands.snapshot_slots,
        snapshot_ends=None if len(stores) == 1 else stores[0].end,
    )

    def results_of(y, states):
        tokens = tokens_of(seqs, num_tokens)
        place = jnp.arange(num_tokens, dtype=jnp.int32) + drafts * (tokens.owner + 1)
        y = jnp.where(tokens.live[:, None, None], take_rows(y, place), 0)
        row = jnp.arange(drafts, dtype=jnp.int32)
        rows_of = [(longer[:-1] + store.end)[:, None] + row for store in stores]
        new = list(recent)
        for i, tokens in enumerate((x, dt, B)):
            for store, rows in zip(stores, rows_of, strict=True):
                last = take_rows(tokens, rows).astype(new[i].dtype)
                new[i] = store_rows(new[i], store, row, last)
        return y, states, *new

    return longer_spec, longer_operands, stores[-1].end, results_of


def _kept(rows, seqs: Sequences, drafts: int):
    """Of each sequence, `(N, q, ...)`, what was not rejected, with zeros in front."""
    row = seqs.history[:, None] - drafts + jnp.arange(drafts, dtype=jnp.int32)
    old = take_rows(rows, seqs.slot[:, None], jnp.maximum(row, 0))
    mask = (row >= 0) & seqs.live[:, None]
    return jnp.where(mask.reshape(*mask.shape, *[1] * (old.ndim - 2)), old, 0)


def _sources(longer, num_tokens: int, drafts: int):
    """Where the tokens of the longer batch are from, `(T + N·q,)`.

    Numbers from T on count the tokens that are replayed, sequence by sequence.
    """
    num_seqs = longer.shape[0] - 1
    token = jnp.arange(num_tokens + num_seqs * drafts, dtype=jnp.int32)
    owner = first_after(longer[1:], token)
    place = token - take_rows(longer, owner)
    replay = (owner < num_seqs) & (place >= 0) & (place < drafts)
    fresh = jnp.clip(token - drafts * (owner + 1), 0, num_tokens - 1)
    return jnp.where(replay, num_tokens + owner * drafts + place, fresh)
