"""Inputs as tensors of PyTorch, for the peers that run under it."""

import contextlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import imports
from benchmarks.imports import Absent
from benchmarks.timing import Prepared


class Torch:
    """PyTorch on the device that jax uses, and the ways between the two."""

    def __init__(self) -> None:
        self.torch = imports.load("torch", None)
        self.device = "cuda" if jax.default_backend() == "gpu" else "cpu"
        if self.device == "cuda" and not self.torch.cuda.is_available():
            raise Absent("torch sees no GPU")

    def tensor(self, array) -> Any:
        """A tensor of its own with an array's numbers."""
        if self.device == "cuda" and isinstance(array, jax.Array):
            with contextlib.suppress(Exception):  # then by way of the host
                shared = self.torch.from_dlpack(jax.block_until_ready(array))
                return shared.clone()
        array = np.asarray(array)
        if array.dtype == jnp.bfloat16:
            bits = self.torch.from_numpy(array.view(np.int16).copy())
            return bits.view(self.torch.bfloat16).to(self.device)
        return self.torch.from_numpy(array.copy()).to(self.device)

    def wait(self, result: Any) -> None:
        if self.device == "cuda":
            self.torch.cuda.synchronize()

    def prepared(
        self, call: Callable, view: Callable, *, gradient: bool = False
    ) -> Prepared:
        """What is timed; without `gradient` nothing is kept for a backward pass."""

        def no_grad():
            with self.torch.no_grad():
                return call()

        return Prepared(call if gradient else no_grad, self.wait, view, by_torch=True)
