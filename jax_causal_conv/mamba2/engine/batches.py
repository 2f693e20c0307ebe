"""Who takes part in a step, and the arrays that tell the device so."""

from typing import NamedTuple

import numpy as np

from ...metadata import ConvMetadata, build_metadata
from ...operands import PAD_SLOT_ID
from .buckets import Bucket
from .prefixes import Snapshot
from .requests import Generation


class Row(NamedTuple):
    """A generation's share of a step.

    Attributes:
        generation: whose tokens these are.
        start: position of the first of them in the request.
        length: how many there are.
        draws: whether the next token is drawn after the last of them.
        tokens: what they are; None for a single one that is on the device.
        num_drafts: how many of the last tokens are guesses, after each of which (and
            after the token before) a token is drawn.
        source: the snapshot that it starts from instead of its own slot.
        leaves: the snapshot that it leaves, of its tokens up to there.
    """

    generation: Generation
    start: int
    length: int
    draws: bool
    tokens: np.ndarray | None = None
    num_drafts: int = 0
    source: Snapshot | None = None
    leaves: Snapshot | None = None

    @property
    def decodes(self) -> bool:
        """Whether its first token was drawn, and has not been part of the text."""
        return self.start >= len(self.generation.text)

    def right_guesses(self, drawn: list[int]) -> int:
        """How many of its drafts, from the first, are what was drawn in their place."""
        if self.tokens is None or self.num_drafts == 0:
            return 0
        right = self.tokens[-self.num_drafts :] == drawn[:-1]
        return self.num_drafts if right.all() else int(right.argmin())


class Features(NamedTuple):
    """What the batches of an engine have beyond the usual: static, like a bucket.

    Attributes:
        moves: rows may read one slot and write another, and leave snapshots.
        max_drafts: rows may draw so many tokens and one.
    """

    moves: bool
    max_drafts: int

    def draws(self, bucket: Bucket) -> int:
        """How many tokens a step draws, those that nobody asked for included."""
        return min(bucket.tokens, bucket.sequences * (1 + self.max_drafts))


class Draws(NamedTuple):
    """M tokens to draw. `seeds` and what follows are zero where nobody wants one.

    Attributes:
        after: `(M,)` int32, the token of the batch that each comes after, or None:
            the last one of each sequence, M = N.
        slots: `(M,)` int32, whose newest token it is; PAD_SLOT_ID if nobody's.
        seeds: `(M,)` uint32.
        positions: `(M,)` int32, of the token to draw.
        temperature: `(M,)` float32.
        top_k: `(M,)` int32.
        top_p: `(M,)` float32.
    """

    after: np.ndarray | None
    slots: np.ndarray
    seeds: np.ndarray
    positions: np.ndarray
    temperature: np.ndarray
    top_k: np.ndarray
    top_p: np.ndarray


class Batch(NamedTuple):
    """A step's input from the host, padded to T tokens and N rows.

    Attributes:
        tokens: `(T,)` int32, 0 where the token is still on the device.
        query_start_loc: `(N+1,)` int32, as for `causal_conv1d_fn`.
        decodes: `(N,)` bool, whether the row is its slot's newest token.
        states: arguments of the model's `packed` by name, each `(N,)`: where states
            come from and go to.
        draws: the tokens to draw.
        metadata: of `query_start_loc`, for the convs of all layers.
    """

    tokens: np.ndarray
    query_start_loc: np.ndarray
    decodes: np.ndarray
    states: dict[str, np.ndarray]
    draws: Draws
    metadata: ConvMetadata


def pack(rows: list[Row], bucket: Bucket, features: Features) -> Batch:
    """Puts the rows back to back, followed by empty rows and unused tokens."""
    num_tokens, n, _ = bucket
    tokens = np.zeros(num_tokens, np.int32)
    offsets = np.zeros(n + 1, np.int32)
    decodes = np.zeros(n, bool)
    states = {
        "cache_indices": np.full(n, PAD_SLOT_ID, np.int32),
        "has_initial_state": np.zeros(n, bool),
    }
    if features.moves:
        states |= {
            "write_indices": np.full(n, PAD_SLOT_ID, np.int32),
            "snapshot_indices": np.full(n, PAD_SLOT_ID, np.int32),
            "snapshot_ends": np.zeros(n, np.int32),
        }
    if features.max_drafts:
        states["num_rejected_tokens"] = np.zeros(n, np.int32)
    end = 0
    for i, row in enumerate(rows):
        generation, start = row.generation, row.start
        if row.tokens is None:
            decodes[i] = True
        else:
            tokens[end : end + row.length] = row.tokens
        end += row.length
        offsets[i + 1] = end
        source = generation.slot if row.source is None else row.source.slot
        states["cache_indices"][i] = source
        states["has_initial_state"][i] = start > 0
        if features.max_drafts:
            states["num_rejected_tokens"][i] = generation.rejected
        if features.moves:
            states["write_indices"][i] = generation.slot
            if row.leaves is not None:
                states["snapshot_indices"][i] = row.leaves.slot
                states["snapshot_ends"][i] = len(row.leaves.tokens) - start
    offsets[len(rows) + 1 :] = end
    return Batch(
        tokens=tokens,
        query_start_loc=offsets,
        decodes=decodes,
        states=states,
        draws=_draws(rows, offsets, features.draws(bucket), features.max_drafts > 0),
        metadata=build_metadata(offsets, num_tokens),
    )


def _draws(rows: list[Row], offsets: np.ndarray, m: int, several: bool) -> Draws:
    """A token for every row, whether it draws or not, and one more for each draft."""
    after, positions, top_k = np.zeros((3, m), np.int32)
    slots = np.full(m, PAD_SLOT_ID, np.int32)
    temperature, top_p = np.zeros((2, m), np.float32)
    seeds = np.zeros(m, np.uint32)
    first = 0
    for row, end in zip(rows, offsets[1:], strict=False):
        of_row = slice(first, first + 1 + row.num_drafts)
        first = of_row.stop
        after[of_row] = np.arange(end - 1 - row.num_drafts, end)
        if row.draws:
            generation, sampling = row.generation, row.generation.terms.sampling
            last = row.start + row.length
            slots[first - 1] = generation.slot
            positions[of_row] = np.arange(last - row.num_drafts, last + 1)
            seeds[of_row] = generation.seed
            temperature[of_row] = sampling.temperature
            top_k[of_row] = sampling.top_k
            top_p[of_row] = sampling.top_p
    return Draws(
        after=after if several else None,
        slots=slots,
        seeds=seeds,
        positions=positions,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
