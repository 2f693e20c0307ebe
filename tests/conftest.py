"""Every implementation runs the same tests: take the fixture `implementation`."""

import gc
import os

# The CUDA plugin is here for its compiler; without its libraries it would complain.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import pytest

from tests.support import quick
from tests.support.eight_devices import on_eight_devices  # noqa: F401 (a fixture)
from tests.support.platforms import HAS_GPU, HAS_TRITON

IMPLEMENTATIONS = ["xla", None, "interpret"] + (["triton"] if HAS_GPU else [])


@pytest.fixture(scope="session", params=IMPLEMENTATIONS, ids=str)
def implementation(request):
    if request.param == "interpret" and not HAS_TRITON:
        pytest.skip("the interpreter is part of Triton, which is not installed")
    return request.param


@pytest.fixture(scope="module")
def quick_compilation():
    """For a module that is about values: what runs eagerly is compiled bit by bit."""
    with quick.compilation():
        yield


def pytest_collection_modifyitems(config, items):
    """Without a GPU, None lowers to the very function that "xla" is.

    So a test that is marked `forward_only` need not run a second time with "xla".
    """
    kept, repeated = [], []
    for item in items:
        params = item.callspec.params if hasattr(item, "callspec") else {}
        forward = item.get_closest_marker("forward_only") is not None
        again = forward and params.get("implementation") == "xla"
        (repeated if again and not HAS_GPU else kept).append(item)
    config.hook.pytest_deselected(items=repeated)
    items[:] = kept


def pytest_collection_finish():
    """Tests and modules stay: no search for garbage need visit their many objects."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
