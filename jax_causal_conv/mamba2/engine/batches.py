"""Who takes part in a step, and the arrays that tell the device so."""

from typing import NamedTuple

import numpy as np

from ...metadata import ConvMetadata, build_metadata
from ...operands import PAD_SLOT_ID
from .buckets import Bucket
from .requests import Generation


class Row(NamedTuple):
    """A generation's share of a step.

    Attributes:
        generation: whose tokens these are.
        start: position of the first of them in the request.
        length: how many there are.
        draws: whether the next token is drawn after the last of them.
    """

    generation: Generation
    start: int
    length: int
    draws: bool

    @property
    def decodes(self) -> bool:
        """Whether its token is on the device, rather than part of the text."""
        return self.start >= len(self.generation.text)


class Batch(NamedTuple):
    """A step's input from the host, padded to T tokens and N rows.

    `seeds` and what follows up to `top_p` are zero in rows that draw nothing.

    Attributes:
        tokens: `(T,)` int32, 0 where the token is still on the device.
        query_start_loc: `(N+1,)` int32, as for `causal_conv1d_fn`.
        slots: `(N,)` int32, PAD_SLOT_ID in padding.
        has_initial_state: `(N,)` bool, False in the first chunk of a request.
        decodes: `(N,)` bool, whether the row is its slot's newest token.
        draws: `(N,)` bool, whether the row ends with the last known token of its
            request, so that the next one is drawn.
        seeds: `(N,)` uint32.
        positions: `(N,)` int32, of the token to draw.
        temperature: `(N,)` float32.
        top_k: `(N,)` int32.
        top_p: `(N,)` float32.
        metadata: of `query_start_loc`, for the convs of all layers.
    """

    tokens: np.ndarray
    query_start_loc: np.ndarray
    slots: np.ndarray
    has_initial_state: np.ndarray
    decodes: np.ndarray
    draws: np.ndarray
    seeds: np.ndarray
    positions: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray
    metadata: ConvMetadata


def pack(rows: list[Row], bucket: Bucket) -> Batch:
    """Puts the rows back to back, followed by empty rows and unused tokens."""
    num_tokens, n, _ = bucket
    tokens = np.zeros(num_tokens, np.int32)
    offsets = np.zeros(n + 1, np.int32)
    slots = np.full(n, PAD_SLOT_ID, np.int32)
    has_initial_state, decodes, draws = np.zeros((3, n), bool)
    positions, top_k = np.zeros((2, n), np.int32)
    temperature, top_p = np.zeros((2, n), np.float32)
    seeds = np.zeros(n, np.uint32)
    end = 0
    for i, row in enumerate(rows):
        generation, start, length = row.generation, row.start, row.length
        if row.decodes:
            decodes[i] = True
        else:
            tokens[end : end + length] = generation.text[start : start + length]
        end += length
        offsets[i + 1] = end
        slots[i] = generation.slot
        has_initial_state[i] = start > 0
        if row.draws:
            sampling = generation.terms.sampling
            draws[i] = True
            seeds[i] = generation.seed
            positions[i] = start + length
            temperature[i] = sampling.temperature
            top_k[i] = sampling.top_k
            top_p[i] = sampling.top_p
    offsets[len(rows) + 1 :] = end
    return Batch(
        tokens=tokens,
        query_start_loc=offsets,
        slots=slots,
        has_initial_state=has_initial_state,
        decodes=decodes,
        draws=draws,
        seeds=seeds,
        positions=positions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        metadata=build_metadata(offsets, num_tokens),
    )
