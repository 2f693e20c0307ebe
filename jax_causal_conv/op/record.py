"""`Op`: all that jax has to be told about an op of ours, in one record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, eq=False)
class Op:
    """An op on checked operands.

    Its implementations have one signature, `(spec, operands) -> tuple of arrays`, where
    spec is hashable and static, and operands a NamedTuple with None for what is absent.

    Attributes:
        name: for people, and part of the keys of caches.
        public: the functions that call it, as messages name them.
        xla: the implementation in XLA.
        launches: gives the function that makes the kernels' launches; Triton is
            imported when it is called.
        dims: a record like the operands, with the names of each array's dimensions.
            Dimensions with a capital letter may be sharded: each device then runs the
            op on its share. X names the columns of x, and Y those of the output. These
            are the channels D as well, unless x is wider or the output is split: then
            none of the three can be sharded.
        result_dims: the names of each result's dimensions. What has a Y stands for as
            many results as the output has parts.
        result_shapes: `(spec, operands) -> list` of `jax.ShapeDtypeStruct`, from
            anything with a shape and a dtype.
        rename: `(spec, operands) -> dict`, other names for dimensions in this call.
            Dimensions of one name are sharded alike; if they differ in size, each must
            be a multiple of the smallest. None renames nothing.
        fold: `(spec, operands, axes, size) -> operands or None`, what makes one call
            of the op under vmap. `axes` is a record like the operands, True where an
            array has the mapped axis, of `size`, in front. The result is the operands
            with that axis folded into rows, or None if that is impossible.
    """

    name: str
    public: str
    xla: Callable[..., tuple]
    launches: Callable[[], Callable]
    dims: Any
    result_dims: tuple[str, ...]
    result_shapes: Callable[..., list]
    rename: Callable[..., dict[str, str]] | None = None
    fold: Callable[..., Any] | None = None

    def __repr__(self) -> str:
        return self.name
