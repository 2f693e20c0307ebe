"""What the kernels of the SSD's gradient are given. No JAX and no Triton here.

Letters as in `ssd_record`, and: a row of T tokens is cut into L tiles of c tokens, and
these into V groups of at most n tiles; the last of each may be shorter. A pair of tiles
(i, j) of one group, j <= i, has the number i·(i+1)/2 + j; there are n·(n+1)/2. An item
is a block of channels of a head: there are I of them, those of a head in turn. Numbers
of a tile or group of all rows are those of its row, row by row.
"""

import dataclasses
from typing import Any, NamedTuple

from .ssd_record import SsdConstants


class SsdBackwardInputs(NamedTuple):
    """What a kernel reads; None is what it does not need or nobody gave.

    Attributes:
        x: `(B·T, H, P)`.
        dt: `(B·T, H)`.
        A: `(H,)`.
        B, C: `(B·T, G, K)`, of one dtype.
        D: `(H,)` or `(H, P)`.
        dt_bias: `(H,)`.
        states: `(B, H, P, K)`, where rows start from; None is zeros.
        run_start: `(B·T,)` int32, the place in its row where a token's run begins, -1
            for padding; None without segments.
        dy: `(B·T, H, P)`, the cotangent of y, in x's dtype.
        dfinal: `(B, H, P, K)`, that of the states at the rows' ends; None is zeros.
        sums, scores, entering, leaving, direct, onward, dropped, flows, flow_totals,
            dscores, dC, dB, arriving, arriving_totals, through: what other kernels have
            left, see `SsdBackwardOutputs`.
        row_len: T.
        tiles: L, of a row.
        groups: V, of a row.
        rows: B.
    """

    x: Any = None
    dt: Any = None
    A: Any = None
    B: Any = None
    C: Any = None
    D: Any = None
    dt_bias: Any = None
    states: Any = None
    run_start: Any = None
    dy: Any = None
    dfinal: Any = None
    sums: Any = None
    scores: Any = None
    entering: Any = None
    leaving: Any = None
    direct: Any = None
    onward: Any = None
    dropped: Any = None
    flows: Any = None
    flow_totals: Any = None
    dscores: Any = None
    dC: Any = None
    dB: Any = None
    arriving: Any = None
    arriving_totals: Any = None
    through: Any = None
    row_len: Any = None
    tiles: Any = None
    groups: Any = None
    rows: Any = None


class SsdBackwardOutputs(NamedTuple):
    """What a kernel writes; float32 unless said otherwise.

    The *flow* from token r to token t > r is
    `dt[r]·decay(t, r)·(dy[t]·x[r])·(C[t]·B[r])`, what r adds to the loss through y[t];
    so there are flows from the state before a group and to the state behind it. The
    derivative in the log of a token's decay is the sum of all flows that pass it.

    Attributes:
        sums: `(B·L, H, 6, c)`: of each token the sum of dt·A in units of log 2 from its
            tile's first token on; dt; the power of two of the sum; that of the sum from
            there to the tile's end; the power of what the first lost by rounding; and
            dt times the fourth.
        scores: `(B·V, G, pairs, c, c)`: B of tile j times C of tile i, as `[r, t]`.
        entering: `(B·V·planes, H, P, K)`: the state before each group, in bfloat16
            terms or in one plane of float32.
        leaving: likewise the cotangent of the state behind each group.
        dstates: `(B, H, P, K)`, the cotangent of `SsdBackwardInputs.states`.
        dx: `(B·T, H, P)`, in x's dtype.
        direct: `(B·L, I, c)`, the derivative in dt where it multiplies x.
        onward: `(B·L, I, c)`, the flow from each token to all behind its tile.
        dropped: `(B·L, I)`, that from all tokens of a tile to the state behind its
            group.
        dD: `(B·L, H, P)`, a tile's sum of dy·x; of one D a head `(B·L, I)`.
        flows: `(B·V, pairs, I, c)`: of two tiles the flow from all of j to each token
            of i; of one tile the flow that passes each token from the tile's tokens to
            the tile's tokens.
        flow_totals: `(B·V, pairs, I)`, of two tiles the sum of these, else 0.
        dscores: `(blocks, B·V, G, pairs, c, c)`: the cotangent of `scores`, as
            `[t, r]`, summed over a block of a group's items.
        dC, dB: `(blocks, B·T, G, K)`, the cotangents through the states before and
            behind a group; of `finish_kernel` `(B·T, G, K)`, all of them.
        arriving: `(B·L, I, c)`, the flow from the state before the group to each token.
        arriving_totals: `(B·L, I)`, its sums.
        through: `(B·V, I)`, from there to the state behind the group.
        ddt: `(B·T, H)`, in dt's dtype.
        dA, ddt_bias: `(B·L, H)`, the sums of tiles.
    """

    sums: Any = None
    scores: Any = None
    entering: Any = None
    leaving: Any = None
    dstates: Any = None
    dx: Any = None
    direct: Any = None
    onward: Any = None
    dropped: Any = None
    dD: Any = None
    flows: Any = None
    flow_totals: Any = None
    dscores: Any = None
    dC: Any = None
    dB: Any = None
    arriving: Any = None
    arriving_totals: Any = None
    through: Any = None
    ddt: Any = None
    dA: Any = None
    ddt_bias: Any = None


@dataclasses.dataclass(frozen=True)
class SsdBackwardConstants(SsdConstants):
    """What is static about a launch; for the rest see `SsdConstants`.

    Attributes:
        TILES: n, tiles of a group.
        PLANES: of `entering` and `leaving`.
        TERMS: bfloat16 terms that stand for a float32 there; 0: they are float32.
        PART: does a row end within a tile?
        ITEM_BLOCK: items of a group that one program of sums over heads goes through.
        ITEM_BLOCKS: such programs for all of a group's items.
        HEAD_TILES: tiles that a program of `backward_heads_kernel` works at, a power of
            two.
        FINISH_HEADS: heads a program of `finish_kernel`, a power of two.
    """

    TILES: int = 1
    PLANES: int = 1
    TERMS: int = 0
    PART: bool = True
    ITEM_BLOCK: int = 1
    ITEM_BLOCKS: int = 1
    HEAD_TILES: int = 1
    FINISH_HEADS: int = 8
