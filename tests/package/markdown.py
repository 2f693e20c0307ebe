"""Runs the Python blocks of Markdown pages, those of a page one after the other.

`python tests/package/markdown.py README.md` needs nothing but what the blocks import.
"""

import pathlib
import re
import sys

_BLOCK = re.compile(r"^( *)```python\n(.*?)^\1```$", re.M | re.S)


def blocks(page: pathlib.Path) -> list[tuple[int, str]]:
    """The line number and the code of each ```python block."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        indent, code = match.groups()
        code = "".join(
            line.removeprefix(indent) for line in code.splitlines(keepends=True)
        )
        found.append((text.count("\n", 0, match.start(2)), code))
    return found


def run(page: pathlib.Path) -> int:
    """Runs a page's blocks in one namespace; returns how many there are."""
    scope: dict = {"__name__": "__main__"}
    found = blocks(page)
    for line, code in found:
        # Behind empty lines, so that an error names the line of the page.
        exec(compile("\n" * line + code, str(page), "exec"), scope)
    return len(found)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"{name}: {run(pathlib.Path(name))} blocks ran")
