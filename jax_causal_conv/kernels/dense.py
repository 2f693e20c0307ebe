"""The dense forward kernel. No JAX here."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import channel_block, load_filter
from .walks import filter_rows


class DenseInputs(NamedTuple):
    """The arrays of `DenseOperands`.

    Attributes:
        segment_ids: with a dilation, such as differ from run to run.
        row_len, chunks, block_m: tokens and chunks of a row, tokens of a chunk.
    """

    x: Any
    weight: Any
    bias: Any
    states: Any
    segment_ids: Any
    row_len: Any
    chunks: Any
    block_m: Any


class DenseOutputs(NamedTuple):
    """The parts of the output."""

    out: tuple


# One program filters block_m tokens of one row for BLOCK_N channels; the grid is 1-D,
# rows x chunks x blocks of channels, channels fastest. It writes its rows of out and
# nothing else, so programs are independent. Which of the tokens before a token are
# of its segment is known from their ids, which are read while the window rolls.
@triton.jit
def dense_kernel(inputs, outputs, C: tl.constexpr):
    block, out = channel_block(outputs.out, C)
    program = tl.program_id(0) // C.COL_BLOCKS
    row = program // inputs.chunks
    first = program % inputs.chunks * inputs.block_m
    token = row.to(tl.int64) * inputs.row_len + first
    row_ptr = inputs.x + C.OFFSET + token * C.X

    filter = load_filter(inputs.weight, inputs.bias, block, C)
    slot_ptr = None
    if inputs.states is not None:
        slot_ptr = inputs.states + row.to(tl.int64) * (C.L * C.D)
    filter_rows(
        row_ptr,
        slot_ptr,
        inputs.segment_ids,
        out,
        token,
        C.L,
        filter,
        (first, inputs.block_m, inputs.row_len),
        block,
        C,
    )
