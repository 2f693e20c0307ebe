"""The packed forward kernel. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .offsets import Offsets, offset_bound, zero_uncovered
from .rows import Rows, channel_block, load_filter, zero_rows
from .stores import Store, roll_slot, snapshot_store, store_window, written_store
from .walks import filter_rows


class PackedInputs(NamedTuple):
    """The arrays of `PackedOperands` and its metadata; numbers T, N and S.

    Attributes:
        block_m: tokens of a chunk.
    """

    x: Any
    weight: Any
    bias: Any
    states: Any
    query_start_loc: Any
    slots: Any
    has_initial_state: Any
    num_rejected: Any
    write_slots: Any
    snapshot_slots: Any
    snapshot_ends: Any
    chunk_seq: Any
    chunk_offset: Any
    num_tokens: Any
    num_seqs: Any
    num_slots: Any
    block_m: Any


class PackedOutputs(NamedTuple):
    """The parts of the output."""

    out: tuple


class Sequence(NamedTuple):
    """What is known of a sequence.

    Attributes:
        start, end: its tokens.
        slot: any integer.
        history: how many rows at the front of the slot are valid.
    """

    start: Any
    end: Any
    slot: Any
    history: Any


@triton.jit
def sequence(seq, inputs, offsets, C: tl.constexpr):
    """The `Sequence` of number `seq`; none of its loads waits for another."""
    end = tl.load(offsets.ptr + seq + 1)
    slot = seq
    if inputs.slots is not None:
        slot = tl.load(inputs.slots + seq)
    history = seq * 0  # a tensor, as it is if a branch below sets it
    if inputs.has_initial_state is not None:
        has_history = tl.load(inputs.has_initial_state + seq)
        history = tl.where(has_history, C.L, 0)
        if inputs.num_rejected is not None:
            rejected = tl.load(inputs.num_rejected + seq)
            rejected = tl.minimum(tl.maximum(rejected, 0), C.L)
            history = tl.maximum(history - rejected, 0)
    start = offset_bound(offsets, seq, C)
    end = tl.maximum(tl.minimum(end, offsets.num_tokens), start)
    return Sequence(start, end, slot, history)


# One program filters one chunk (at most block_m tokens) of one sequence for BLOCK_N
# channels. The grid is 1-D, chunks x blocks of channels, channels fastest: programs
# that run side by side read neighbouring memory, and no grid axis limit applies.
# Program -> (sequence, chunk) by chunk_seq/chunk_offset; programs behind the last
# chunk (chunk_seq == -1) zero the tokens that no sequence covers, and chunks of
# skipped sequences are zeroed as well, so that `out` needs no memset.
#
# Reads: its rows of x and the C.REACH rows before them; chunk 0 the sequence's slot.
# Writes: its rows of out; chunk 0 of a live sequence the slot that its state goes to,
# its own or another, in place, and that of its snapshot.
#
# Race-free in a donated state buffer: live sequences write different slots, and none
# that another one reads (where two do all the same, their own results and these slots
# are unspecified, no others); of a sequence only chunk 0 touches slots (later chunks
# take their history from x, which is why block_m >= C.REACH), in programs that own
# different channels. Several sequences may read one slot, which nobody then writes. Of
# the slots that a program writes either may be the one that it reads, but they are two.
# Within the program every read of a slot is before the first write: with a barrier
# between in roll_slot, and in store_window of several warps; one warp reads and writes
# in order. Rows of out belong to one program each, since sanitised offsets never
# overlap.
#
# Values are never trusted: offsets are cummax(clip(q, 0, T)), slots are compared with
# [0, S), a program number out of range is compared before it is multiplied.
@triton.jit
def packed_kernel(inputs, outputs, C: tl.constexpr):
    program = tl.program_id(0) // C.COL_BLOCKS
    block, out = channel_block(outputs.out, C)
    num_seqs = inputs.num_seqs
    block_m = inputs.block_m
    offsets = Offsets(inputs.query_start_loc, inputs.num_tokens, num_seqs)

    # The filter is needed last, but its loads are issued first, to overlap with others.
    filter = load_filter(inputs.weight, inputs.bias, block, C)
    seq = tl.load(inputs.chunk_seq + program)
    chunk = tl.load(inputs.chunk_offset + program)
    # Where decodes come first in a batch, program i serves sequence i. So it loads what
    # describes that sequence at once, and only if the guess was wrong it waits for
    # memory once more.
    found = Sequence(program, program, program, program)
    if program < num_seqs:
        found = sequence(program, inputs, offsets, C)
    if seq < 0:
        if (seq == -1) & (chunk >= 0):
            zero_uncovered(out, offsets, chunk, block_m, block, C)
    elif (seq < num_seqs) & (chunk >= 0):
        if seq != program:
            found = sequence(seq, inputs, offsets, C)
        length = found.end - found.start
        if (length > 0) & (chunk <= (length - 1) // block_m):
            first = chunk * block_m
            rows = tl.minimum(block_m, length - first)
            row_ptr = inputs.x + C.OFFSET + found.start.to(tl.int64) * C.X
            token = (found.start + first).to(tl.int64)
            out = Rows(out.ptr + token * out.stride, out.stride)
            slot, history = found.slot, found.history
            if (slot >= 0) & (slot < inputs.num_slots) & (slot != C.PAD_SLOT_ID):
                slot_ptr = inputs.states + slot.to(tl.int64) * (C.L * C.D)
                first_ptr = row_ptr + first.to(tl.int64) * C.X
                store = Store(slot, slot_ptr, length, None)
                if inputs.write_slots is not None:
                    store = written_store(inputs, seq, length, C)
                early = None
                if inputs.snapshot_slots is not None:
                    early = snapshot_store(inputs, seq, store, C)
                window = filter_rows(
                    first_ptr,
                    slot_ptr,
                    None,
                    out,
                    0,
                    history,
                    filter,
                    (first, block_m, length),
                    block,
                    C,
                )
                if C.WINDOW_IS_SLOT and (chunk == 0) & (length <= block_m):
                    store_window(store, window, block, C)
                elif chunk == 0:
                    roll_slot(row_ptr, slot_ptr, store, early, history, block, C)
            else:
                zero_rows(out, rows, block)
