"""Block sizes and warps: one dataclass, one heuristic per kernel. No JAX here."""

import dataclasses

_WARP = 32
_ACCESS = 16  # bytes: the widest access of a thread
# Channels x taps of a thread that still leave registers for rows in flight.
_TAPS_PER_THREAD = 32
# Elements of a slot that a program holds at once (per channel block, all L rows).
_SLOT_TILE = 2048


@dataclasses.dataclass(frozen=True)
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


def choose(
    dim: int,
    width: int,
    state_len: int,
    rows: int,
    itemsize: int,
    alignment: int | None = None,
    num_warps: int = 1,
) -> Tiles:
    """Tiles for D channels of `itemsize` bytes, W taps and L rows of state.

    `rows` is the tokens per program; `alignment` a number of elements that divides the
    position of every row and part, None for that of D; `num_warps` the warps that
    share a program's channels, if these are enough.
    """
    # As many channels a thread as one access moves; fewer where rows are not aligned
    # and every channel is an access of its own, with registers for its address.
    per_thread = _ACCESS // itemsize
    if (dim if alignment is None else alignment) % per_thread:
        per_thread = 4
    tile = _tiles(dim, width, state_len, rows, per_thread)
    if tile.block_n >= 4 * num_warps * _WARP:
        tile = dataclasses.replace(tile, num_warps=num_warps)
    return tile


def choose_backward(
    dim: int, width: int, rows: int, spare_registers: bool = False
) -> Tiles:
    """Tiles of the backward kernels.

    They keep two windows and the sums for dweight in registers beside the taps. With
    `spare_registers`, long rows go by larger groups, for more loads in flight.
    """
    tile = _tiles(dim, width, 1, rows, 4)
    if spare_registers and width == 4 and rows >= 128:  # as was measured
        tile = dataclasses.replace(tile, group=2 * width)
    return tile


def _tiles(dim: int, width: int, state_len: int, rows: int, per_thread: int) -> Tiles:
    while per_thread > 1 and per_thread * width > _TAPS_PER_THREAD:
        per_thread //= 2
    # The channels of one warp: the last block leaves few threads idle, and one warp
    # waits at no barrier.
    block_n = min(per_thread * _WARP, _power_of_two(dim))
    # A multiple of W lets the window rotate through the registers without moves; a
    # very wide filter would unroll into too much code and takes one row at a time.
    group = width * max(1, 4 // width) if width <= 8 else 1
    if rows < group:
        group = 1
    l_block = _power_of_two(state_len)
    slot_n = max(1, min(block_n, _SLOT_TILE // l_block))
    return Tiles(block_n, 1, group, l_block, slot_n)


def default_block_m(num_tokens: int, num_seqs: int) -> int:
    """Tokens per chunk for `num_tokens` tokens in `num_seqs` sequences.

    Long chunks spare the W-1 rows of history that each chunk reads again, and the
    program's start; short ones keep every multiprocessor busy in small batches, where
    a program's own time is the whole time, and let the few prompts among many decodes,
    which come last, not end long after these.
    """
    mean = num_tokens // max(num_seqs, 1)
    if num_tokens >= 16384 and mean >= 64:
        return 64
    if num_tokens <= 512 or few_rows(num_tokens, num_seqs):
        return 8
    return 16 if num_tokens <= 1024 else 32


def backward_block_m(num_rows: int, dim: int, block_n: int) -> int:
    """Tokens per chunk of the dense backward for `num_rows` tokens of all rows.

    Each chunk ends with W+1 rows of sums that are read again: as long as enough
    programs are left to fill a GPU (about 20 for each of 132 multiprocessors), the
    longer the better.
    """
    blocks = -(-dim // block_n)
    block_m = num_rows * blocks // 2640
    return min(max(1 << max(block_m.bit_length() - 1, 0), 32), 256)


def few_rows(num_tokens: int, num_seqs: int) -> bool:
    """Have most programs of a packed batch so few rows that groups of them do not pay?

    These are busy with waiting for their sequence's slot, not with a loop: they want
    few registers, so that many run at a time.
    """
    return num_tokens <= 3 * num_seqs


def scan(num_seqs: int) -> int:
    """Offsets that a program looks at together, a power of two.

    All of them, but at most 256: more would cost too many registers.
    """
    return min(max(_power_of_two(num_seqs + 1), 8), 256)
