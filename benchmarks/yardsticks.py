"""What times are compared with: copies, silu alone, and a kernel that is empty."""

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Candidate
from benchmarks.timing import Prepared
from benchmarks.workload import Workload
from jax_causal_conv.op.primitive import (
    DEFAULT_COMPUTE_CAPABILITY,
    visible_compute_capability,
)


def copy(work: Workload, path: Path | None = None) -> Prepared:
    """A copy that reads and writes as many bytes as the op must, into a new array."""
    source = jnp.ones(work.nbytes // 2, jnp.uint8)
    return Prepared(functools.partial(jax.jit(jnp.copy), source))


def memcpy(work: Workload, path: Path | None = None) -> Prepared:
    """The same on a CPU into memory that is there already, perhaps in its caches."""
    source = np.ones(work.nbytes // 2, np.uint8)
    target = np.zeros_like(source)
    return Prepared(functools.partial(np.copyto, target, source), lambda _: None)


def silu(work: Workload, path: Path | None = None) -> Prepared:
    """`jax.nn.silu` of the same x: a yardstick for what computes as many outputs."""
    return Prepared(functools.partial(jax.jit(jax.nn.silu), work.x))


def launch(work: Workload, path: Path | None = None) -> Prepared:
    """A Triton kernel that does nothing, called as ours are: no call takes less."""
    import triton  # noqa: PLC0415 (only where there is a GPU)

    from jax_causal_conv.kernels import bridge, record  # noqa: PLC0415 (jax-triton)

    kernel = triton.jit(_nothing)
    capability = visible_compute_capability() or DEFAULT_COMPUTE_CAPABILITY

    def step(x):
        out = jax.ShapeDtypeStruct((1,), work.dtype)
        nothing = record.Launch(kernel, _One(x), _One(out), 1, 1, constants=None)
        return bridge.call(nothing, compute_capability=capability)

    return Prepared(functools.partial(jax.jit(step), work.x), nbytes=0)


class _One(NamedTuple):
    array: Any


def _nothing(inputs, outputs, C: "tl.constexpr"):  # noqa: F821 (for Triton)
    pass


YARDSTICKS = {
    "copy": Candidate("copy", copy, ()),
    "memcpy": Candidate("memcpy", memcpy, ()),
    "silu(x)": Candidate("silu(x)", silu, ()),
    "empty kernel": Candidate("empty kernel", launch, ()),
}
