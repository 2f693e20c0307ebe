"""The few shapes that a step may have, each of which is compiled once."""

from collections.abc import Iterable
from typing import NamedTuple


class Bucket(NamedTuple):
    """The static shape of a step.

    Attributes:
        tokens: T, how many tokens it has room for.
        sequences: N, how many rows it has room for.
        prefills: how many of the rows may have more tokens than one and its drafts.
    """

    tokens: int
    sequences: int
    prefills: int


def sizes_of(
    name: str, sizes: Iterable[int] | None, largest: int, smallest: int
) -> list[int]:
    """The given sizes, sorted; by default `largest` and its halves (rounded up)."""
    if sizes is None:
        sizes = [largest]
        while sizes[-1] > smallest:
            sizes.append(max(-(-sizes[-1] // 2), smallest))
    sizes = sorted(set(sizes))
    if not sizes or sizes[0] < 1 or sizes[-1] != largest:
        raise ValueError(f"{name} must be in [1, {largest}] and end there, got {sizes}")
    return sizes


class Buckets:
    """The shapes of an engine: decodes alone, decodes with drafts, and mixed ones.

    Attributes:
        all: of these, in the order in which they are tried.
        short: tokens of a row up to which it is no prefill: one and its drafts.
    """

    def __init__(
        self,
        num_slots: int,
        max_tokens_per_step: int,
        max_prefills_per_step: int,
        token_buckets: Iterable[int] | None,
        decode_buckets: Iterable[int] | None,
        max_drafts: int,
    ):
        decode_sizes = sizes_of("decode_buckets", decode_buckets, num_slots, 1)
        mixed_sizes = sizes_of("token_buckets", token_buckets, max_tokens_per_step, 16)
        decodes = [Bucket(n, n, 0) for n in decode_sizes]
        self.short = 1 + max_drafts
        with_drafts = [Bucket(n * self.short, n, 0) for n in decode_sizes]
        mixed = {
            Bucket(t, min(t, num_slots), min(t // 2, num_slots, max_prefills_per_step))
            for t in mixed_sizes
            if t > 1
        }
        self.all = tuple(dict.fromkeys([*decodes, *with_drafts, *sorted(mixed)]))

    def fit(self, lengths: list[list[int]]) -> Bucket:
        """The first bucket that holds rows of these lengths, on each of the devices."""
        needs = [
            Bucket(sum(own), len(own), sum(length > self.short for length in own))
            for own in lengths
        ]
        need = Bucket(*map(max, zip(*needs, strict=True)))
        return next(
            bucket
            for bucket in self.all
            if all(has >= needs for has, needs in zip(bucket, need, strict=True))
        )
