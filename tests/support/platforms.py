"""What this host has, and exports for hosts that have more."""

import importlib.util
import warnings

import jax
import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
ON_CPU = jax.default_backend() == "cpu"
HAS_GPU = jax.default_backend() == "gpu"
KERNEL_CALLS = ("triton_kernel_call", "triton_kernel_call_ffi")  # jax-triton 0.3, 0.4
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None
    or importlib.util.find_spec("jax_triton") is None,
    reason="lowers the Triton kernels: needs triton and jax-triton (Linux only)",
)


def exported(op, *arguments, platforms=("cpu", "cuda")):
    """jax gives no guarantee for other people's custom calls and wants this said."""
    disabled = [
        jax.export.DisabledSafetyCheck.custom_call(call) for call in KERNEL_CALLS
    ]
    export = jax.export.export(
        jax.jit(op), platforms=platforms, disabled_checks=disabled
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "causal conv uses XLA on CUDA")
        return export(*arguments)
