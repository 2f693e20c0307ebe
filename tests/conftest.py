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


# Modules whose tests share something slow to prepare (a child process on eight devices,
# compiled programs, a trained model): one worker of pytest-xdist runs all of a module.
PREPARED = (
    "columns",
    "compilation_cache",
    "export",
    "halo",
    "layers_scan",
    "mamba2_engine",
    "mamba2_parity",
    "mamba2_train",
    "sharding",
    "xla_gpu_gate",
)


# Forward passes alone: on a CPU None lowers to the very function that "xla" is.
FORWARD = ("isolation", "packed", "serving", "update")


def pytest_collection_modifyitems(config, items):
    kept, repeated = [], []
    for item in items:
        module = item.module.__name__.rpartition("test_")[2]
        if module in PREPARED:
            item.add_marker(pytest.mark.xdist_group(module))
        params = item.callspec.params if hasattr(item, "callspec") else {}
        again = module in FORWARD and params.get("implementation") == "xla"
        (repeated if again and not HAS_GPU else kept).append(item)
    config.hook.pytest_deselected(items=repeated)
    items[:] = kept
