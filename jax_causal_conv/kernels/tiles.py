"""Block sizes and warps: one dataclass, one heuristic per kernel. No JAX here."""

from dataclasses import dataclass

# 16 bytes of bf16 a thread: with 8 channels in registers each, the window, the taps
# and four rows in flight fit in 128 registers, and x and out move in 16-byte accesses.
_CHANNELS_PER_THREAD = 8
_WARP = 32
# Elements of a slot that a program holds at once (per channel block, all L rows).
_SLOT_TILE = 8192


@dataclass(frozen=True)
class Tiles:
    """Tile sizes of one launch.

    Attributes:
        block_n: channels per program, a power of two.
        num_warps: warps per program.
        group: rows per unrolled step of the token loop.
        l_block: L rounded up to a power of two.
        slot_n: channels whose L rows are moved at once, a power of two.
    """

    block_n: int
    num_warps: int
    group: int
    l_block: int
    slot_n: int


def _power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def choose(dim: int, width: int, state_len: int, rows: int) -> Tiles:
    """Tiles for D channels, W taps and L rows of state, `rows` tokens per program."""
    # A wide filter keeps W-1 rows and W taps in registers: fewer channels a thread.
    per_thread = _CHANNELS_PER_THREAD
    while per_thread > 1 and per_thread * width > 8 * _CHANNELS_PER_THREAD:
        per_thread //= 2
    # One warp a program: no barrier costs anything, and the last block of channels
    # leaves few threads idle. 19 such programs fit on a multiprocessor.
    block_n = min(per_thread * _WARP, _power_of_two(dim))
    # A multiple of W lets the window rotate through the registers without moves; a
    # very wide filter would unroll into too much code and takes one row at a time.
    group = width * max(1, 4 // width) if width <= 8 else 1
    if rows < group:
        group = 1
    l_block = _power_of_two(state_len)
    slot_n = max(1, min(block_n, _SLOT_TILE // l_block))
    return Tiles(block_n, 1, group, l_block, slot_n)


def choose_backward(dim: int, width: int, rows: int) -> Tiles:
    """Tiles of the backward kernels: as forward, with half the channels a thread.

    They keep two windows and the sums for dweight in registers beside the taps.
    """
    tile = choose(dim, width, 1, rows)
    block_n = max(tile.block_n // 2, 1)
    return Tiles(block_n, 1, tile.group, 1, block_n)


def default_block_m(num_tokens: int, num_seqs: int) -> int:
    """Tokens per chunk for `num_tokens` tokens in `num_seqs` sequences.

    Long chunks spare the W-1 rows of history that each chunk reads again, and the
    program's start; short ones keep every multiprocessor busy in small batches.
    """
    mean = num_tokens // max(num_seqs, 1)
    if num_tokens >= 16384 and mean >= 64:
        return 64
    return 32 if mean >= 16 or num_tokens >= 1024 else 16
