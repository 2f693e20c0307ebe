"""The table of a batch: which program of a launch owns which chunk of a sequence."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .batch import first_after, sanitize_offsets
from .operands import PAD_SLOT_ID


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ConvMetadata:
    """Maps the programs of `causal_conv1d_fn` to chunks of sequences.

    Build it once per step with `build_metadata` and pass it to every layer; it is a
    pytree and may be an argument of a jitted (or exported) function. With T tokens and
    N sequences there are `P = T // block_m + N + 1` programs, enough for any offsets,
    so that one compilation serves every batch of a bucket.

    Attributes:
        chunk_seq: `(P,)` int32, the sequence that program p serves; PAD_SLOT_ID for
            the programs behind the last chunk, which zero uncovered tokens.
            vLLM's `batch_ptr`.
        chunk_offset: `(P,)` int32, which block of `block_m` tokens of it.
            vLLM's `token_chunk_offset_ptr`.
        block_m: tokens per chunk (static).
    """

    chunk_seq: Any
    chunk_offset: Any
    block_m: int = dataclasses.field(metadata={"static": True})


jax.export.register_pytree_node_serialization(
    ConvMetadata,
    serialized_name="jax_causal_conv.ConvMetadata",
    serialize_auxdata=lambda aux: str(aux[0]).encode(),
    deserialize_auxdata=lambda data: (int(data.decode()),),
)


def num_programs(num_tokens: int, num_seqs: int, block_m: int) -> int:
    """P: chunks of all sequences and of the uncovered tokens, whatever the offsets."""
    return num_tokens // block_m + num_seqs + 1


def chunk_metadata(query_start_loc: Any, num_tokens: int, block_m: int) -> ConvMetadata:
    """The table of a batch, from int32 offsets `(N+1,)` of any values.

    Offsets in NumPy give arrays in NumPy; those of jax are computed in the graph.
    """
    num_seqs = query_start_loc.shape[0] - 1
    on_host = isinstance(query_start_loc, np.ndarray)
    xp: Any = np if on_host else jnp
    if on_host:
        offsets = np.maximum.accumulate(np.clip(query_start_loc, 0, num_tokens))
    else:
        offsets = sanitize_offsets(query_start_loc, num_tokens)
    chunks = -((offsets[:-1] - offsets[1:]) // block_m)  # ceil, per sequence
    last = xp.cumsum(chunks, dtype=np.int32)
    program = xp.arange(num_programs(num_tokens, num_seqs, block_m), dtype=np.int32)
    if on_host:
        seq = np.searchsorted(last, program, side="right").astype(np.int32)
    else:
        seq = first_after(last, program)
    # Program number of the first chunk of each sequence, then of the zeroing programs.
    first = xp.concatenate([xp.zeros(1, np.int32), last])
    return ConvMetadata(
        chunk_seq=xp.where(seq < num_seqs, seq, np.int32(PAD_SLOT_ID)),
        chunk_offset=program - first[seq],
        block_m=block_m,
    )
