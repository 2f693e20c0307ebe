"""What the README shows runs as it stands."""

import re

from tests.support import REPOSITORY

README = REPOSITORY / "README.md"


def test_python_blocks_run_one_after_the_other():
    blocks = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
    assert len(blocks) >= 4, f"found {len(blocks)} Python blocks"
    scope: dict = {}
    for block in blocks:
        exec(compile(block, str(README), "exec"), scope)
