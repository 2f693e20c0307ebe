"""Every implementation runs the same tests: take the fixture `implementation`."""

import importlib.util
import os

# The CUDA plugin is here for its compiler; without its libraries it would complain.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
HAS_GPU = jax.default_backend() == "gpu"
IMPLEMENTATIONS = ["xla", None, "interpret"] + (["triton"] if HAS_GPU else [])


@pytest.fixture(scope="session", params=IMPLEMENTATIONS, ids=str)
def implementation(request):
    if request.param == "interpret" and not HAS_TRITON:
        pytest.skip("the interpreter is part of Triton, which is not installed")
    return request.param
