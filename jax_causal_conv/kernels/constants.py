"""What is static about a launch of a conv's kernel: C, to the kernels. No JAX here."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Constants:
    """What is static about a launch of a conv's kernel, C to the kernels.

    Attributes:
        W: taps of the filter.
        D: channels.
        X: elements of a row of x.
        OFFSET: the first of them that is a channel.
        SPLIT: channels of each part of the output.
        COL_BLOCKS: blocks of channels, none of which spans two parts.
        BLOCK_N: channels of a block.
        GROUP: rows of an unrolled step of the loop over tokens.
        WARPS: warps a program.
        PAIRS: channels are bfloat16, and parts and rows begin and end at even ones, so
            that two of them are one word.
        ACTIVATION: its canonical name, or None.
        L: rows of a slot.
        L_BLOCK, SLOT_N: rows and channels of a slot that are moved at once.
        WINDOW_IS_SLOT: whether the last W-1 rows that a program met are, to the bit,
            what the slot becomes.
        PAD_SLOT_ID: the slot number that means "skip".
        SCAN: offsets that a program looks at together.
        Q: tokens of each row of a decode step.
        DILATION: tokens from one tap to the next.
        RESIDUAL: whether x is added to the output.
        AHEAD: whether a group's rows are loaded while the one before it is filtered.
        FAST: whether to use CUDA spellings, which Triton's interpreter does not know;
            each has a plain twin beside it.
    """

    W: int
    D: int
    X: int
    OFFSET: int
    SPLIT: tuple[int, ...]
    COL_BLOCKS: int
    BLOCK_N: int
    GROUP: int
    WARPS: int
    PAIRS: bool
    ACTIVATION: str | None
    L: int = 0
    L_BLOCK: int = 0
    SLOT_N: int = 0
    WINDOW_IS_SLOT: bool = False
    PAD_SLOT_ID: int = 0
    SCAN: int = 0
    Q: int = 0
    DILATION: int = 1
    RESIDUAL: bool = False
    AHEAD: bool = True
    FAST: bool = True

    @property
    def REACH(self) -> int:  # a constant like the others
        """Tokens before its own that the filter spans."""
        return (self.W - 1) * self.DILATION
