"""The decode kernel of the state-space duality. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .device import Offsets, offset_bound
from .ssd_device import add_up, load_skip, step_size, zero_tokens, zero_uncovered


@triton.jit
def slot_of(inputs, seq, C: tl.constexpr):
    """The slot of a sequence, whether it names one, and whether it holds a state."""
    slot = seq
    if inputs.slots is not None:
        slot = tl.load(inputs.slots + seq)
    valid = (slot >= 0) & (slot < inputs.num_slots) & (slot != C.PAD_SLOT_ID)
    known = valid
    if inputs.known is not None:
        known = valid & tl.load(inputs.known + seq)
    elif not C.ALL_KNOWN:
        known = valid & (slot != slot)
    return slot, valid, known


@triton.jit
def state_tile(slot, head, channels, size, C: tl.constexpr):
    """Where a block of a head's state is in `(S, H, P, K)`, and which of it there is."""
    row = slot.to(tl.int64) * (C.H * C.P * C.K) + head * (C.P * C.K)
    at = row + channels[:, None] * C.K + size[None, :]
    return at, (channels < C.P)[:, None] & (size < C.K)[None, :]


@triton.jit
def load_state(states_ptr, slot, known, head, channels, C: tl.constexpr):
    """A block of the state in a slot, in float32; zeros where it holds none."""
    size = tl.arange(0, C.K_BLOCK)
    at, _ = state_tile(slot, head, channels, size, C)
    mask = (channels < tl.where(known, C.P, 0))[:, None] & (size < C.K)[None, :]
    return tl.load(states_ptr + at, mask=mask, other=0.0).to(tl.float32)


class Token(NamedTuple):
    """What the recurrence takes of a token, for one head, as it was given."""

    x: Any
    dt: Any
    B: Any
    C: Any


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
def step(inputs, y_ptr, state, slot, place, token, head, channels, C: tl.constexpr):
    """One token of a head: its output, and the state after `state`, in its slot.

    Args:
        place: of the token in the batch.
        token: a `Token`.
    """
    x = token.x.to(tl.float32)
    dt = step_size(token.dt, inputs.dt_bias, head, C)
    A = tl.load(inputs.A + head).to(tl.float32)
    decay = tl.exp2(dt * A * 1.4426950408889634)
    state = state * decay + (x * dt)[:, None] * token.B.to(tl.float32)[None, :]
    y = add_up(state * token.C.to(tl.float32)[None, :], 1)
    in_p = channels < C.P
    if inputs.D is not None:
        y += load_skip(inputs.D, head, channels, in_p, C) * x
    at, mask = state_tile(slot, head, channels, tl.arange(0, C.K_BLOCK), C)
    tl.store(inputs.states + at, state.to(inputs.states.dtype.element_ty), mask=mask)
    row = place.to(tl.int64) * (C.H * C.P) + head * C.P
    tl.store(y_ptr + row + channels, y.to(y_ptr.dtype.element_ty), mask=in_p)


# One program advances one sequence of one token by it, for P_BLOCK channels of one
# head; the grid is 1-D, sequences x heads x blocks of channels, blocks fastest.
#
# Reads: the sequence's offsets (and those before it: cummax), slot, token, and its part
# of the slot. Writes: its part of the slot, in place, and of the token's output. A
# sequence of several tokens is surplus here: its tokens are zeroed and its slot is left
# alone, as with one that is skipped. Tokens of nobody are zeroed as well, dealt out to
# the sequences, so that y needs no memset.
#
# Race-free in a donated cache: live sequences own different slots, and of a slot each
# program owns other elements, which it has read before it writes them. Tokens belong
# to one sequence each, since sanitised offsets never overlap.
#
# Values are never trusted: offsets are cummax(clip(q, 0, T)), slots are compared with
# [0, S). The state and the token that it is in most batches, where every sequence has
# one, are asked for before the offsets are known: to wait for all of them at once.
@triton.jit
def decode_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0)
    block = program % C.P_BLOCKS
    head = program // C.P_BLOCKS % C.H
    seq = program // (C.P_BLOCKS * C.H)
    P_BLOCK: tl.constexpr = C.P_BLOCK
    channels = block * P_BLOCK + tl.arange(0, P_BLOCK)
    slot, valid, known = slot_of(inputs, seq, C)
    state = load_state(inputs.states, slot, known, head, channels, C)
    num_tokens = inputs.num_tokens
    likely = tl.minimum(seq, num_tokens - 1)
    token = load_token(inputs, likely, head, channels, C)
    end = tl.load(inputs.offsets + seq + 1)
    offsets = Offsets(inputs.offsets, num_tokens, inputs.num_seqs)
    begin = offset_bound(offsets, seq, C)
    end = tl.maximum(tl.minimum(end, num_tokens), begin)
    if valid & (end - begin == 1):
        if begin != likely:
            token = load_token(inputs, begin, head, channels, C)
        step(inputs, outputs.y, state, slot, begin, token, head, channels, C)
    else:
        in_p = channels < C.P
        zero_tokens(outputs.y, begin, end - begin, head, channels, in_p, C)
    if (seq == 0) | (seq == inputs.num_seqs - 1):
        # What lies before the first and behind the last sequence.
        in_p = channels < C.P
        before = tl.where(seq == 0, begin, 0)
        after = tl.where(seq == inputs.num_seqs - 1, end, num_tokens)
        zero_uncovered(
            outputs.y, before, after, num_tokens, 0, 1, head, channels, in_p, C
        )
