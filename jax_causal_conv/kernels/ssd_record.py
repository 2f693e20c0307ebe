"""What the kernels of the state-space duality are given. No JAX and no Triton here.

Letters: T tokens, N sequences, S slots, H heads of P channels, G groups of heads, K
state size; J the most prefills, M chunks of c tokens, Q stretches of chunks.
"""

import dataclasses
from typing import Any, NamedTuple


class SsdInputs(NamedTuple):
    """What a kernel of the op reads; None is what it does not need or nobody gave.

    Attributes:
        x: `(T, H, P)`.
        dt: `(T, H)`.
        A: `(H,)`.
        B, C: `(T, G, K)`.
        D: `(H,)`, or `(H, P)` as `SsdConstants.D_BY_CHANNEL` says.
        dt_bias: `(H,)`.
        states: `(S, H, P, K)`, where sequences start from; None is zeros. Those of a
            packed batch are updated in place.
        slots: `(N,)` int32, the slot of each sequence; None is its number.
        known: `(N,)` bool, does the slot hold a state? None is all False.
        write_slots: `(N,)` int32, where states go; None is `slots`.
        snapshot_slots: `(N,)` int32, where earlier states go; None: there are none.
        snapshot_ends: `(N,)` int32, after how many tokens they are.
        recent_x: `(S, DRAFTS, H, P)`, x of the tokens behind the states, oldest first;
            None without drafts.
        recent_dt: `(S, DRAFTS, H)`, their steps; recent_B: `(S, DRAFTS, G, K)`.
        rejected: `(N,)` int32, how many of these, the last ones, are taken back; None
            is 0.
        offsets: `(N+1,)` int32. With `role` sanitised: sequence i owns the tokens
            `[offsets[i], offsets[i + 1])`. Without it, as for `decode_kernel`, they are
            `query_start_loc` as the caller gave it.
        role: `(N,)` int32, what becomes of a sequence: `DECODE`, `SKIP`, or it is the
            prefill of this number. None where all sequences are prefills (dense rows);
            `slots`, `known` and `offsets` are then not needed either.
        prefills: `(J, 6)` int32, of each prefill its first token, length, slot, whether
            the slot holds a state, the number of its first chunk, and, if `STORES`, of
            its sequence, else `(J, 5)`; length 0 behind the last.
        chunks: `(M, 2)` int32, of each chunk its first token, and how many it has; 0
            behind the last. A prefill's chunks follow each other.
        stretches: `(Q, 2)` int32, of each stretch its prefill and which one it is of
            the prefill; -1 behind the last. A prefill's stretches follow each other.
            None without stretches.
        run_start: `(T,)` int32, the place in its row where a token's run begins, -1
            for padding; None without segments.
        y: what `prepare_kernel` has begun, and `chunks_kernel` completes in place.
        sums, carried, forget: what `prepare_kernel` left, see `SsdOutputs`.
        num_tokens, num_seqs, num_slots: T, N, S.
        num_prefills, num_chunks, num_stretches: J, M, Q.
    """

    x: Any = None
    dt: Any = None
    A: Any = None
    B: Any = None
    C: Any = None
    D: Any = None
    dt_bias: Any = None
    states: Any = None
    slots: Any = None
    known: Any = None
    write_slots: Any = None
    snapshot_slots: Any = None
    snapshot_ends: Any = None
    recent_x: Any = None
    recent_dt: Any = None
    recent_B: Any = None
    rejected: Any = None
    offsets: Any = None
    role: Any = None
    prefills: Any = None
    chunks: Any = None
    stretches: Any = None
    run_start: Any = None
    y: Any = None
    sums: Any = None
    carried: Any = None
    forget: Any = None
    num_tokens: Any = None
    num_seqs: Any = None
    num_slots: Any = None
    num_prefills: Any = None
    num_chunks: Any = None
    num_stretches: Any = None


class SsdOutputs(NamedTuple):
    """What a kernel of the op writes.

    Attributes:
        y: `(T, H, P)`.
        states: `(B, H, P, K)`, the last states of dense rows, unless nobody wants them.
        sums: `(M, H, SUMS, c)` float32, of `prepare_kernel`. Of each token the sum of
            dt·A in units of log 2 from its chunk's first token on; dt; the power of two
            of the sum; dt times that of the sum from there to the chunk's end; and, of
            five rows, the power of what the first lost by rounding, dt being divided
            by that.
        carried: `(Q, H, P, K)` float32: what each stretch adds to the state; of the
            first one of a sequence, its state; in the place of the last one, the state
            that the sequence starts from.
        forget: `(Q, H)` float32: the sum of dt·A over a stretch, as above; -inf where
            another run has begun.
        weights: `(Q, H * P_BLOCKS, STRETCH * c)` float32, of no use to others: of each
            token of a stretch dt times the power of the sum from there to its end.
    """

    y: Any = None
    states: Any = None
    sums: Any = None
    carried: Any = None
    forget: Any = None
    weights: Any = None


DECODE = -1
SKIP = -2
"""In `SsdInputs.role`."""


@dataclasses.dataclass(frozen=True)
class SsdConstants:
    """What is static about a launch of an SSD kernel, C to the kernels.

    Attributes:
        H, P, G, K: sizes.
        SOFTPLUS: is softplus applied to dt?
        LOW, HIGH: limits of dt, or None.
        D_BY_CHANNEL: is D `(H, P)`?
        IN_PLACE: does `chunks_kernel` update y and the states that it is given?
        PAD_SLOT_ID: the slot number that means "skip".
        STORES: 0 where a sequence stores its last state in its slot, and nothing else;
            1, where that may be an earlier state or another slot; 2, where there are
            snapshots too.
        DRAFTS: the tokens behind the states, that can be taken back; sequences of one
            token more are still served token by token. 0 without drafts.
        COLUMNS: columns of `recent_kernel`'s programs, a power of two; RECENT_BLOCK,
            DRAFTS rounded up to one.
        P_BLOCK: channels of a head a program, a power of two; from 16 on for products.
        P_BLOCKS: programs a head.
        K_BLOCK: K rounded up to a power of two; from 16 on for products.
        SCAN: offsets that are looked at together, in `decode_kernel`.
        CHUNK: tokens of a chunk, c; a power of two from 16 on.
        STRETCH: chunks of a stretch; 0 without stretches.
        SUM_BLOCK: tokens of a stretch that are added up together, a power of two.
        H_BLOCK: heads whose sums a program makes.
        SUMS: rows of `SsdOutputs.sums`; 5, but 4 where y has the 8 bits of bfloat16.
        EXACT: are float32 operands of products kept whole?
        Y_PARTS, STATE_PARTS: terms of 8 bits that stand for a float32 in products for y
            and for the state, see `ssd_device.dot_left`.
        STAGES: stages of the loop over chunks; STATE_STAGES, of a stretch's.
        FAST: on a GPU; False in Triton's interpreter.
    """

    H: int
    P: int
    G: int
    K: int
    SOFTPLUS: bool = False
    LOW: float | None = None
    HIGH: float | None = None
    D_BY_CHANNEL: bool = False
    IN_PLACE: bool = False
    PAD_SLOT_ID: int = -1
    STORES: int = 0
    DRAFTS: int = 0
    COLUMNS: int = 0
    RECENT_BLOCK: int = 0
    P_BLOCK: int = 0
    P_BLOCKS: int = 0
    K_BLOCK: int = 0
    SCAN: int = 0
    CHUNK: int = 0
    STRETCH: int = 0
    SUM_BLOCK: int = 0
    H_BLOCK: int = 0
    SUMS: int = 5
    EXACT: bool = True
    Y_PARTS: int = 3
    STATE_PARTS: int = 3
    STAGES: int = 1
    STATE_STAGES: int = 1
    FAST: bool = True
