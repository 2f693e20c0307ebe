"""Block sizes and warps: one function per kernel, and all that it takes into account.

No JAX here, and no Triton.
"""

import dataclasses

_WARP = 32
_MULTIPROCESSORS = 132  # of an H100
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
        block_m: tokens per program, if it does not take all there are.
        num_warps: warps per program.
        group: rows per unrolled step of the token loop.
        l_block: L rounded up to a power of two.
        slot_n: channels whose L rows are moved at once, a power of two.
        ahead: whether a group's rows are loaded while the one before it is filtered.
    """

    block_n: int
    block_m: int
    num_warps: int
    group: int
    l_block: int
    slot_n: int
    ahead: bool = True


@dataclasses.dataclass(frozen=True)
class Filters:
    """What the choice of tiles knows of a conv's filters.

    Attributes:
        dim: channels of the widest part of the output.
        width: W, the taps.
        itemsize: bytes of an element of x.
        alignment: a number of elements that divides the position of every row and
            part.
        dilation: tokens from one tap to the next.
    """

    dim: int
    width: int
    itemsize: int
    alignment: int
    dilation: int = 1

    @property
    def reach(self) -> int:
        """How many tokens before its own a filter spans."""
        return (self.width - 1) * self.dilation


def packed(filters: Filters, state_len: int, num_tokens: int, num_seqs: int) -> Tiles:
    """Tiles of the packed forward kernel, where the caller does not say block_m."""
    block_m = packed_block_m(filters, num_tokens, num_seqs)
    return packed_chunks(filters, state_len, num_tokens, num_seqs, block_m)


def packed_chunks(
    filters: Filters, state_len: int, num_tokens: int, num_seqs: int, block_m: int
) -> Tiles:
    """Tiles of the packed forward kernel for chunks of block_m tokens."""
    if few_rows(num_tokens, num_seqs):
        return _forward(filters, state_len, block_m, rows=1, num_warps=2)
    tile = _forward(filters, state_len, block_m, rows=block_m)
    return _ahead(tile, num_tokens // max(num_seqs, 1))


def update(filters: Filters, state_len: int, num_tokens: int, batch: int) -> Tiles:
    """Tiles of the decode kernel for `batch` rows of num_tokens tokens."""
    tile = _forward(filters, state_len, num_tokens, rows=num_tokens)
    # As long as multiprocessors are idle, a launch takes as long as one program, which
    # has half as much to do with 4 channels a thread instead of 8.
    programs = batch * -(-filters.dim // tile.block_n)
    if programs < _MULTIPROCESSORS and tile.block_n > 4 * _WARP:
        slot_n = min(tile.slot_n, 4 * _WARP)
        tile = dataclasses.replace(tile, block_n=4 * _WARP, slot_n=slot_n)
    return tile


def dense(filters: Filters, batch: int, length: int) -> Tiles:
    """Tiles of the dense forward kernel for B rows of T tokens."""
    block_m = packed_block_m(filters, batch * length, batch)
    return _ahead(_forward(filters, filters.reach, block_m, rows=block_m), length)


def packed_backward(filters: Filters, block_m: int) -> Tiles:
    """Tiles of the packed backward kernel for chunks of block_m tokens."""
    return _backward(filters, block_m, rows=block_m)


def rows_backward(
    filters: Filters, dim: int, batch: int, length: int, plain: bool
) -> Tiles:
    """Tiles of the backward kernel of rows.

    Args:
        dim: D, the channels of all parts.
        batch, length: B rows of T tokens.
        plain: there are no segments, no slots, and channels in pairs: so there are
            registers to spare, and long rows go by larger groups, for more loads in
            flight.
    """
    tile = _backward(filters, 0, rows=length)
    if (
        plain and filters.width == 4 and length >= 128 * filters.dilation
    ):  # see benchmarks/NOTES.md
        tile = dataclasses.replace(tile, group=2 * filters.width)
    block_m = max(_rows_block_m(batch * length, dim, tile.block_n), filters.reach)
    return dataclasses.replace(tile, block_m=block_m)


def packed_block_m(filters: Filters, num_tokens: int, num_seqs: int) -> int:
    """Tokens per chunk: the default, but as many as the history has rows.

    So a chunk finds all of its history in the slot, or all of it in x.
    """
    return max(default_block_m(num_tokens, num_seqs), filters.reach)


def _forward(
    filters: Filters, state_len: int, block_m: int, rows: int, num_warps: int = 1
) -> Tiles:
    """Tiles of a forward kernel, for loops over `rows` tokens.

    `num_warps` share a program's channels, if these are enough.
    """
    # As many channels a thread as one access moves; fewer where rows are not aligned
    # and every channel is an access of its own, with registers for its address. Fewer
    # for loops, too: larger groups of rows and more warps at a time are worth more than
    # wide accesses (benchmarks/NOTES.md).
    per_thread = _ACCESS // filters.itemsize
    group = 2 * filters.width
    pairs = filters.width == 4 and filters.itemsize == 2
    in_large_groups = pairs and rows >= group * filters.dilation
    if in_large_groups or filters.alignment % per_thread:
        per_thread = 4
    tile = _tiles(filters, state_len, block_m, rows, per_thread)
    if in_large_groups:
        tile = dataclasses.replace(tile, group=group, ahead=False)
    if tile.block_n >= 4 * num_warps * _WARP:
        tile = dataclasses.replace(tile, num_warps=num_warps)
    return tile


def _ahead(tile: Tiles, mean: int) -> Tiles:
    """Loads ahead in sequences of many groups; with few, more warps are worth more."""
    return dataclasses.replace(tile, ahead=tile.ahead or mean >= 128)


def _backward(filters: Filters, block_m: int, rows: int) -> Tiles:
    """Tiles of a backward kernel.

    It keeps two windows and the sums for dweight in registers beside the taps.
    """
    return _tiles(filters, 1, block_m, rows, per_thread=4)


def _tiles(
    filters: Filters, state_len: int, block_m: int, rows: int, per_thread: int
) -> Tiles:
    width = filters.width
    while per_thread > 1 and per_thread * width > _TAPS_PER_THREAD:
        per_thread //= 2
    # The channels of one warp: the last block leaves few threads idle, and one warp
    # waits at no barrier.
    block_n = min(per_thread * _WARP, power_of_two(filters.dim))
    # A multiple of W lets the window rotate through the registers without moves; a
    # very wide filter would unroll into too much code and takes one row at a time.
    group = width * max(1, 4 // width) if width <= 8 else 1
    if -(-rows // filters.dilation) < group:
        group = 1
    l_block = power_of_two(state_len)
    slot_n = max(1, min(block_n, _SLOT_TILE // l_block))
    return Tiles(block_n, block_m, 1, group, l_block, slot_n)


def power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


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


def _rows_block_m(num_tokens: int, dim: int, block_n: int) -> int:
    """Tokens per chunk of the backward of rows that have `num_tokens` tokens in all.

    Each chunk ends with W+1 rows of sums that are read again: as long as enough
    programs are left to fill a GPU (about 20 for each of 132 multiprocessors), the
    longer the better.
    """
    blocks = -(-dim // block_n)
    block_m = num_tokens * blocks // 2640
    return min(max(1 << max(block_m.bit_length() - 1, 0), 32), 256)


def few_rows(num_tokens: int, num_seqs: int) -> bool:
    """Have most programs of a packed batch so few rows that groups of them do not pay?

    Such a program mostly waits for its sequence's slot. It should take few registers,
    so that many of them wait at the same time.
    """
    return num_tokens <= 3 * num_seqs


def scan(num_seqs: int) -> int:
    """Offsets that a program looks at together, a power of two.

    All of them, but at most 256: more would cost too many registers.
    """
    return min(max(power_of_two(num_seqs + 1), 8), 256)


@dataclasses.dataclass(frozen=True)
class SsdTiles:
    """Tile sizes of the launches of one SSD.

    Attributes:
        p_block: channels of a head a program, a power of two.
        k_block: K rounded up to a power of two.
        num_warps: warps a program.
        older_num_warps: warps of a program of chunks on GPUs before Hopper.
        chunk: tokens of a chunk.
        stretch: chunks of a stretch; 0: sequences are not cut into stretches.
        sum_block: tokens of a stretch that are added up together, a power of two.
        h_block: heads whose sums a program makes, a power of two.
        num_stages: of the loop over chunks.
        state_stages: of the loop over a stretch's chunks.
        scan: offsets that a program looks at together.
    """

    p_block: int
    k_block: int
    num_warps: int
    chunk: int = 64
    stretch: int = 0
    sum_block: int = 1024
    h_block: int = 16
    num_stages: int = 2
    state_stages: int = 3
    scan: int = 256
    older_num_warps: int | None = None


# Elements of a state that a program of 4 warps holds in registers: 64 a thread.
_STATE_TILE = 8192
# Bytes of a chunk's B and C, with all that are on their way: a GPU has 100 to 228 KB
# of shared memory, and two programs should fit there, with x and what is rearranged.
_CHUNK_BYTES = 65536
# Programs of the chunks' kernel that a GPU runs at a time: two for each multiprocessor.
_RESIDENT = 2 * _MULTIPROCESSORS


def ssd_decode(
    head_shape: tuple[int, int], state_size: int, itemsize: int, num_seqs: int
) -> SsdTiles:
    """Tiles of the decode kernel, for H heads of P channels and K elements of state.

    A program moves 8 KB of states, of `itemsize` bytes an element: smaller ones start
    and end soonest, which counts where sequences are few; with many, all are alike.
    """
    _, dim = head_shape
    k_block = power_of_two(state_size)
    p_block = max(1, min(64 // itemsize, power_of_two(dim), _STATE_TILE // k_block))
    return SsdTiles(p_block, k_block, 8 // itemsize, scan=scan(num_seqs))


def ssd_few_tokens(
    head_shape: tuple[int, int], state_size: int, num_seqs: int
) -> SsdTiles:
    """Tiles of the decode kernel for sequences of a few tokens.

    What a token takes beside the state is the same for any program: one warp, which
    waits at no barrier, holds 64 elements of a state a thread.
    """
    _, dim = head_shape
    k_block = power_of_two(state_size)
    p_block = max(1, min(power_of_two(dim), 2048 // k_block))
    return SsdTiles(p_block, k_block, 1, scan=scan(num_seqs))


def ssd_recent(drafts: int) -> int:
    """Columns of so many rows that a program renews: 4,096 elements, or one column."""
    return max(1, 4096 // power_of_two(drafts))


def ssd_chunks(
    head_shape: tuple[int, int],
    state_size: int,
    itemsize: int,
    num_tokens: int,
    num_prefills: int,
) -> SsdTiles:
    """Tiles of a batch of T tokens with at most so many prefills.

    Products of matrices want 16 rows or more; 4 warps share a state of 64 x 128.
    `itemsize` is that of x, B and C.
    """
    heads, dim = head_shape
    k_block = max(16, power_of_two(state_size))
    p_block = max(16, min(64, power_of_two(dim), _STATE_TILE // k_block))
    row = 2 * k_block * itemsize
    chunk = 64
    while chunk > 16 and (chunk * row > _CHUNK_BYTES or chunk >= 2 * num_tokens):
        chunk //= 2
    stages = 2 if 2 * chunk * row <= _CHUNK_BYTES else 1
    rows = max(num_prefills, 1)
    programs = heads * -(-dim // p_block) * rows
    stretch = _stretch(-(-num_tokens // (chunk * rows)), programs)
    return SsdTiles(
        p_block,
        k_block,
        4,
        chunk=chunk,
        stretch=stretch,
        sum_block=min(1024, power_of_two(max(stretch, 1) * chunk)),
        h_block=min(16, power_of_two(heads)),
        num_stages=stages,
        state_stages=3 if stages == 2 else 1,
        older_num_warps=8,
    )


def _stretch(chunks: int, programs: int) -> int:
    """Chunks of a stretch for sequences of so many, each once through `programs`.

    As many stretches as the GPU runs at a time, all of a size; more of them would wait,
    and those that are there wait for the last. Fewer than 4 chunks are not worth it.
    """
    stretches = min(_RESIDENT // programs, chunks // 4)
    return -(-chunks // stretches) if stretches > 1 else 0


@dataclasses.dataclass(frozen=True)
class SsdBackwardTiles:
    """Tile sizes of the launches of an SSD's gradient.

    Attributes:
        p_block: channels of an item, a power of two.
        k_block: K rounded up to a power of two.
        chunk: tokens of a tile, a power of two.
        tiles: tiles of a group, at most 4.
        h_block: heads whose sums a program makes, a power of two.
        item_block: items that a program of sums over heads goes through.
        head_tiles: tiles whose dB or dC a program makes, a power of two.
        state_k: elements of K a program that goes through a row, a power of two; they
            divide K, or are `k_block`.
        state_warps: warps of a program that goes through a row for an item.
        token_warps: of one of a tile and an item.
        pair_warps: of one that goes through the items for a pair of tiles.
        head_warps: of one that goes through them for dB or dC; older_head_warps, on
            GPUs before Hopper.
        state_stages, token_stages, pair_stages, head_stages: of their loops.
    """

    p_block: int
    k_block: int
    chunk: int
    tiles: int
    h_block: int
    item_block: int
    head_tiles: int
    state_k: int
    state_warps: int = 4
    token_warps: int = 4
    pair_warps: int = 4
    head_warps: int = 4
    older_head_warps: int = 8
    state_stages: int = 2
    token_stages: int = 1
    pair_stages: int = 3
    head_stages: int = 2


def ssd_backward(
    head_shape: tuple[int, int],
    group_shape: tuple[int, int],
    itemsize: int,
    rows: int,
    length: int,
    bfloat16: bool,
) -> SsdBackwardTiles:
    """Tiles of the gradient of B rows of T tokens.

    Args:
        head_shape: H and P.
        group_shape: G and K.
        itemsize: of x, B and C.
        rows, length: B and T.
        bfloat16: are x, B and C all of it?
    """
    (heads, dim), (groups, size) = head_shape, group_shape
    k_block = max(16, power_of_two(size))
    p_block = max(16, min(64, power_of_two(dim), _STATE_TILE // k_block))
    row = 2 * k_block * itemsize
    chunk = 64
    while chunk > 16 and (chunk * row > _CHUNK_BYTES or chunk >= 2 * length):
        chunk //= 2
    count = min(4, -(-length // chunk))
    stages = 1 if 2 * chunk * row > _CHUNK_BYTES else 2
    # Enough programs for a GPU; fewer, and so fewer sums to be added up again, suffice.
    items = heads // groups * -(-dim // p_block)
    programs = rows * -(-length // (chunk * count)) * groups * 2 * count
    blocks = max(1, min(items // 8, 4 * _RESIDENT // programs))
    # Two tiles read a state once; of other dtypes they take too many registers.
    head_tiles = 2 if bfloat16 and stages == 2 and count > 1 else 1
    # With half a state there are twice as many programs, of half the registers.
    state_k = max(16, _STATE_TILE // 2 // p_block)
    if size % state_k:
        state_k = k_block
    return SsdBackwardTiles(
        p_block,
        k_block,
        chunk,
        count,
        h_block=min(16, power_of_two(heads)),
        item_block=-(-items // blocks),
        head_tiles=head_tiles,
        state_k=state_k,
        head_warps=4 * head_tiles,
        state_stages=stages,
        pair_stages=stages + 1,
        head_stages=3 if head_tiles == 2 else stages,
    )
