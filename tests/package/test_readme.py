"""What the README shows runs as it stands."""

from tests.package import markdown
from tests.support import REPOSITORY


def test_python_blocks_run_one_after_the_other():
    assert markdown.run(REPOSITORY / "README.md") >= 4
