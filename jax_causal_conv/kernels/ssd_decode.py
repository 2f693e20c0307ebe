"""The decode kernel of the state-space duality. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .ssd_device import (
    Store,
    add_up,
    load_bias,
    load_skip,
    load_state,
    next_state,
    own_tokens,
    slot_of,
    state_tile,
    step_size,
    store_state,
    stores_of,
    zero_tokens,
)
from .ssd_recent import kept_of, replay, without


class Token(NamedTuple):
    """What the recurrence takes of a token, for one head, as it was given."""

    x: Any
    dt: Any
    B: Any
    C: Any


class Head(NamedTuple):
    """What all tokens of a head have in common."""

    A: Any
    bias: Any
    skip: Any


@triton.jit
def load_token(inputs, token, head, channels, C: tl.constexpr):
    size = tl.arange(0, C.K_BLOCK)
    token = token.to(tl.int64)
    row = token * (C.H * C.P) + head * C.P
    group = token * (C.G * C.K) + head // (C.H // C.G) * C.K
    return Token(
        tl.load(inputs.x + row + channels, mask=channels < C.P, other=0.0),
        tl.load(inputs.dt + token * C.H + head),
        tl.load(inputs.B + group + size, mask=size < C.K, other=0.0),
        tl.load(inputs.C + group + size, mask=size < C.K, other=0.0),
    )


@triton.jit
def load_head(inputs, head, channels, C: tl.constexpr):
    A = tl.load(inputs.A + head).to(tl.float32)
    bias = load_bias(inputs, head, C)
    return Head(A, bias, load_skip(inputs, head, channels, C))


@triton.jit
def advance(inputs, state, token, head, C: tl.constexpr):
    """The state after a token, and its output, from the state before it.

    Args:
        token: a `Token`.
        head: a `Head`.
    """
    x = token.x.to(tl.float32)
    dt = step_size(token.dt, head.bias, C)
    state = next_state(state, x, dt, token.B, head.A)
    y = add_up(state * token.C.to(tl.float32)[None, :], 1)
    if inputs.D is not None:
        y += head.skip * x
    return state, y


@triton.jit
def store_step(
    inputs, outputs, old, state, y, its, token, head, channels, C: tl.constexpr
):
    """Writes what `advance` returns: to a slot, in place, and a place in the batch.

    Args:
        old: the state before it.
        its: number, slot and length of the sequence.
    """
    seq, slot, length = its
    if C.STORES == 0:
        at, mask = state_tile(slot, head, channels, C)
        new = state.to(inputs.states.dtype.element_ty)
        tl.store(inputs.states + at, new, mask=mask)
    else:
        last, early = stores_of(inputs, seq, slot, length, C)
        if C.STORES > 1:
            then = tl.where(early.end > 0, state, old)
            store_state(inputs.states, early, length > 0, then, head, channels, C)
        then = tl.where(last.end > 0, state, old)
        store_state(inputs.states, last, length > 0, then, head, channels, C)
    _store_output(outputs, y, token, head, channels, C)


@triton.jit
def _store_output(outputs, y, token, head, channels, C: tl.constexpr):
    row = token.to(tl.int64) * (C.H * C.P) + head * C.P
    y = y.to(outputs.y.dtype.element_ty)
    tl.store(outputs.y + row + channels, y, mask=channels < C.P)


@triton.jit
def serve_drafts(
    inputs, outputs, state, known, its, begin, head, channels, C: tl.constexpr
):
    """Advances a sequence by recent tokens, then by a few of its own; writes all of it.

    Args:
        state: that in its slot, if that is `known` to hold one.
        its: number, slot and length of the sequence.
        begin: its first token.
    """
    seq, slot, length = its
    ahead = load_token(inputs, begin, head, channels, C)
    common = load_head(inputs, head, channels, C)
    kept = kept_of(inputs, seq, known, C)
    stores = stores_of(inputs, seq, slot, length, C)
    last, early = without(stores, C.DRAFTS - kept)
    # Up to the snapshot, if there may be one, then to the last state, then to the end.
    done = kept * 0
    for part in range(C.STORES + 1):
        is_early = part < C.STORES - 1
        upto = tl.where(is_early, early.end, last.end)
        upto = tl.where(part == C.STORES, kept + length, upto)
        recent = tl.minimum(upto, kept)
        state = replay(inputs, state, slot, done, recent, common.A, head, channels, C)
        for i in range(tl.maximum(done, kept), upto):
            token = ahead
            following = begin + tl.minimum(i - kept + 1, length - 1)
            ahead = load_token(inputs, following, head, channels, C)
            state, y = advance(inputs, state, token, common, C)
            _store_output(outputs, y, begin + (i - kept), head, channels, C)
        store = Store(
            tl.where(is_early, early.slot, last.slot),
            upto,
            tl.where(is_early, early.live, last.live),
        )
        when = part < C.STORES
        store_state(inputs.states, store, when, state, head, channels, C)
        done = upto


# One program advances one sequence of one token, or of a token and up to DRAFTS drafts,
# for P_BLOCK channels of one head; the grid is 1-D, sequences x heads x blocks of
# channels, blocks fastest.
#
# Reads: the sequence's offsets (and those before it: cummax), slot, tokens, and its
# part of the slot; with drafts also recent tokens, which nobody writes here. Writes:
# its part of the slot's state, in place, or of others', and of the tokens' outputs. A
# sequence of more tokens is surplus here: they are zeroed and its slot is left alone,
# as with one that is skipped. The first sequence zeroes the tokens before it, the last
# one those behind it, so that y needs no memset.
#
# Race-free in a donated cache: live sequences write different slots, none of which
# another one reads, and of a slot each program owns other elements. What it writes is
# computed from what it has read at the same place of the slot that it reads, which
# therefore may be any of those that it writes. Tokens belong to one sequence each,
# since sanitised offsets never overlap.
#
# Values are never trusted: offsets are cummax(clip(q, 0, T)), slots are compared with
# [0, S). The state and the token that it is in most batches, where every sequence has
# one, are asked for before the offsets are known: to wait for all of them at once.
@triton.jit
def decode_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    P_BLOCK: tl.constexpr = C.P_BLOCK
    channels = program % C.P_BLOCKS * P_BLOCK + tl.arange(0, P_BLOCK)
    head = program // C.P_BLOCKS % C.H
    seq = program // (C.P_BLOCKS * C.H)
    slot, valid, known = slot_of(inputs, seq, C)
    state = load_state(inputs.states, slot, known, head, channels, C)
    likely = tl.minimum(seq, inputs.num_tokens - 1)
    token = load_token(inputs, likely, head, channels, C)
    its = load_head(inputs, head, channels, C)
    begin, end = own_tokens(inputs, seq, C)
    own = seq, slot, end - begin
    served = end - begin == 1
    if C.DRAFTS > 0:
        served = (end - begin > 0) & (end - begin <= 1 + C.DRAFTS)
    if valid & served:
        if C.DRAFTS > 0:
            serve_drafts(inputs, outputs, state, known, own, begin, head, channels, C)
        else:
            if begin != likely:
                token = load_token(inputs, begin, head, channels, C)
            new, y = advance(inputs, state, token, its, C)
            store_step(inputs, outputs, state, new, y, own, begin, head, channels, C)
    else:
        zero_tokens(outputs.y, begin, end - begin, head, channels, C)
    if seq == 0:
        zero_tokens(outputs.y, 0, begin, head, channels, C)
    if seq == inputs.num_seqs - 1:
        zero_tokens(outputs.y, end, inputs.num_tokens - end, head, channels, C)
