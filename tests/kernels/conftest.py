import pytest

from tests.support import quick


@pytest.fixture(scope="module")
def quick_compilation():
    """Where kernels are launched at once, all around them compiles bit by bit."""
    with quick.compilation():
        yield
