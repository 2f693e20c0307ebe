"""What the ops are called with: a record of what is static, one of arrays.

Both travel whole from the public op to the implementation. A spec is known while jax
traces. The other records are pytrees: one field per operand, None where the caller
gave none. A record of the same type also holds what there is one of per operand:
shapes, cotangents, the names of dimensions.
"""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

from .columns import ALL, Columns

Activation: TypeAlias = (
    Literal["silu", "swish", "gelu", "relu", "sigmoid", "tanh"] | bool | None
)
"""What callers may say about the activation; True is silu, False is None."""

Implementation: TypeAlias = Literal["xla", "triton", "interpret"] | None
"""Who computes; None chooses at lowering."""

PAD_SLOT_ID = -1
"""The slot number that means "skip this sequence" unless the caller names another."""


@dataclass(frozen=True)
class ConvSpec:
    """What is static about one call of a conv op.

    Attributes:
        activation: the canonical name of the activation, None for none.
        columns: which columns of x are read, and the parts of the output.
        pad_slot_id: the slot number that means "skip this sequence".
        final_state_len: L of the dense op's final state; None if none is wanted.
        dilation: tokens from one tap to the next; 1 if there is a single tap.
        residual: whether the op's columns of x are added to the output.
    """

    activation: str | None = None
    columns: Columns = ALL
    pad_slot_id: int = PAD_SLOT_ID
    final_state_len: int | None = None
    dilation: int = 1
    residual: bool = False

    def reach(self, width: int) -> int:
        """R, how many tokens before its own a filter of `width` taps spans."""
        return (width - 1) * self.dilation


class PackedOperands(NamedTuple):
    """Arrays of `causal_conv1d_fn`, in the letters of its docstring.

    Attributes:
        x: `(T, D)`, or wider: see `Columns`.
        weight: `(D, W)`.
        bias: `(D,)`.
        states: `(S, L, D)`.
        query_start_loc: `(N+1,)` int32, any values.
        slots: `(N,)` int32, the slot of each sequence; None is `arange(N)`.
        has_initial_state: `(N,)` bool; None is all False.
        num_rejected: `(N,)` int32; None is 0.
        metadata: a `ConvMetadata`; None leaves it to the kernels' launch.
        write_slots: `(N,)` int32, where the new states go; None is `slots`.
        snapshot_slots: `(N,)` int32, where earlier states go; None: there are none.
        snapshot_ends: `(N,)` int32, after how many tokens they are.
    """

    x: Any
    weight: Any
    bias: Any
    states: Any
    query_start_loc: Any
    slots: Any = None
    has_initial_state: Any = None
    num_rejected: Any = None
    metadata: Any = None
    write_slots: Any = None
    snapshot_slots: Any = None
    snapshot_ends: Any = None


class UpdateOperands(NamedTuple):
    """Arrays of `causal_conv1d_update`.

    Attributes:
        x: `(B, Q, D)`, or wider.
        weight: `(D, W)`.
        bias: `(D,)`.
        states: `(S, L, D)`.
        slots: `(B,)` int32; None is `arange(B)`.
        cache_seqlens: `(B,)` int32, positions in circular buffers; None: none are.
        num_rejected: `(B,)` int32; None is 0.
        write_slots: `(B,)` int32, where the new states go; None is `slots`.
    """

    x: Any
    weight: Any
    bias: Any
    states: Any
    slots: Any = None
    cache_seqlens: Any = None
    num_rejected: Any = None
    write_slots: Any = None


class DenseOperands(NamedTuple):
    """Arrays of `causal_conv1d`.

    Attributes:
        x: `(B, T, D)`, or wider.
        weight: `(D, W)`.
        bias: `(D,)`.
        states: `(B, L, D)`, the state before each row; None is zeros.
        segment_ids: `(B, T)` int32; None is one document a row.
    """

    x: Any
    weight: Any
    bias: Any
    states: Any = None
    segment_ids: Any = None


class PackedBackwardOperands(NamedTuple):
    """Arrays of the gradient of a packed batch.

    Attributes:
        x: `(T, D)`, or wider.
        weight: `(D, W)`.
        bias: `(D,)`.
        history: `(N, R, D)`, the rows before each sequence's first token.
        dy: a tuple with the cotangent of each part of the output.
        dslots: `(N, L, D)`, the cotangent of what each sequence left in its slot.
        query_start_loc: `(N+1,)` int32.
        live: `(N,)` bool, the sequences that were not skipped.
        metadata: that of the forward.
        dsnapshots: `(N, L, D)`, the cotangent of each sequence's snapshot; None if
            there were none. The kernels do not know them.
        snapshot_ends: `(N,)` int32, in `[0, length]`: the tokens before each.
    """

    x: Any
    weight: Any
    bias: Any
    history: Any
    dy: Any
    dslots: Any
    query_start_loc: Any
    live: Any
    metadata: Any = None
    dsnapshots: Any = None
    snapshot_ends: Any = None


class RowsBackwardOperands(NamedTuple):
    """Arrays of the gradient of B rows of equal length.

    Attributes:
        x: `(B, T, D)`, or wider.
        weight: `(D, W)`.
        bias: `(D,)`.
        history: `(B, R, D)`, the rows before each row's first token.
        dy: a tuple with the cotangent of each part of the output.
        dslots: `(B, L, D)`, the cotangent of the state after each row, which holds
            the last tokens of the row's last run that is not padding; None is zeros.
        live: `(B,)` bool, the rows that were not skipped; None is all.
        segment_ids: `(B, T)` int32; None is one document a row.
    """

    x: Any
    weight: Any
    bias: Any
    history: Any
    dy: Any
    dslots: Any = None
    live: Any = None
    segment_ids: Any = None


@dataclass(frozen=True)
class SSDSpec:
    """What is static about one call of an SSD op.

    Attributes:
        chunk_size: c, the tokens of a chunk in XLA, at most all there are.
        dt_softplus: whether step sizes are softplus of what is given.
        dt_limit: the least and the largest step size.
        exact: whether products have float32 operands, or those of x's dtype may do.
        max_prefills: how many live sequences of more than one token the packed op
            serves, beside those of one token and drafts.
        pad_slot_id: the slot number that means "skip", in the packed op.
        final_state: whether the dense op returns one.
    """

    chunk_size: int
    dt_softplus: bool = False
    dt_limit: tuple[float, float] = (0.0, math.inf)
    exact: bool = True
    max_prefills: int = 0
    pad_slot_id: int = PAD_SLOT_ID
    final_state: bool = False

    # The SSD reads all of x and returns one array; what serves all ops asks for it.
    columns: ClassVar[Columns] = ALL

    @property
    def limits_dt(self) -> bool:
        """Whether `dt_limit` limits anything: by default it is never looked at."""
        return self.dt_limit != (0.0, math.inf)


class SSDOperands(NamedTuple):
    """Arrays of `ssd`.

    Attributes:
        x: `(B, T, H, P)`.
        dt: `(B, T, H)`.
        A: `(H,)`.
        B: `(B, T, G, K)`.
        C: `(B, T, G, K)`.
        D: `(H,)` or `(H, P)`.
        dt_bias: `(H,)`, added to dt.
        states: `(B, H, P, K)`, the state before each row; None is zeros.
        segment_ids: `(B, T)` int32; None is one document a row.
    """

    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any = None
    dt_bias: Any = None
    states: Any = None
    segment_ids: Any = None


class SSDBackwardOperands(NamedTuple):
    """Arrays of the gradient of `ssd`.

    Attributes:
        x, dt, A, B, C, D, dt_bias, states, segment_ids: see `SSDOperands`.
        dy: `(B, T, H, P)`, the cotangent of y.
        dfinal: `(B, H, P, K)`, that of the final state; None is zeros.
    """

    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any = None
    dt_bias: Any = None
    states: Any = None
    segment_ids: Any = None
    dy: Any = None
    dfinal: Any = None


class SSDPackedOperands(NamedTuple):
    """Arrays of `ssd_packed`.

    Attributes:
        x: `(T, H, P)`.
        dt: `(T, H)`.
        A: `(H,)`.
        B: `(T, G, K)`.
        C: `(T, G, K)`.
        D: `(H,)` or `(H, P)`.
        dt_bias: `(H,)`, added to dt.
        states: `(S, H, P, K)`.
        query_start_loc: `(N+1,)` int32, any values.
        slots: `(N,)` int32, the slot of each sequence; None is `arange(N)`.
        has_initial_state: `(N,)` bool; None is all False.
        write_slots: `(N,)` int32, where the new states go; None is `slots`.
        snapshot_slots: `(N,)` int32, where earlier states go; None: there are none.
        snapshot_ends: `(N,)` int32, after how many tokens they are.
        recent_x: `(S, q, H, P)`, x of the last q tokens of each slot's request, oldest
            first, zeros before its first token; states are those before these tokens,
            which can be taken back. None: none can.
        recent_dt: `(S, q, H)`, likewise their dt, as it takes part in the recurrence.
        recent_B: `(S, q, G, K)`, likewise.
        num_rejected: `(N,)` int32, how many of them are taken back; None is 0.
    """

    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any
    dt_bias: Any
    states: Any
    query_start_loc: Any
    slots: Any = None
    has_initial_state: Any = None
    write_slots: Any = None
    snapshot_slots: Any = None
    snapshot_ends: Any = None
    recent_x: Any = None
    recent_dt: Any = None
    recent_B: Any = None
    num_rejected: Any = None

    @property
    def num_drafts(self) -> int:
        """q, how many tokens can be taken back."""
        return 0 if self.recent_x is None else self.recent_x.shape[1]
