"""Imports inside the package go down only, so that no room knows who uses it."""

import ast
import pathlib

import pytest

import jax_causal_conv

ROOT = pathlib.Path(jax_causal_conv.__file__).parent
# From the ground up. A module may import from those below it and from its own line.
FLOORS = (
    ("compat", "columns"),
    ("operands",),
    ("batch", "checks"),
    ("slots", "chunks"),
    ("xla", "kernels"),
    ("op",),
    ("packed", "update", "dense", "states", "halo", "metadata", "mamba2.ssd"),
    ("nnx_conv", "linen"),
    ("mamba2",),
    ("nnx",),
    ("__init__", "doctor", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}


def room_of(module: str) -> str:
    return module if module in FLOOR else module.partition(".")[0]


def imports_of(module: str) -> set[str]:
    """The package's modules that a module imports anywhere, also within functions."""
    found = set()
    package = ["jax_causal_conv", *module.split(".")[:-1]]
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [".".join([*base, alias.name]) for alias in node.names]
            names.append(".".join(base))
        else:
            continue
        for name in names:
            inside = name.removeprefix("jax_causal_conv").removeprefix(".")
            if not name.startswith("jax_causal_conv"):
                continue
            for candidate in (inside, f"{inside}.__init__"):
                if candidate in MODULES and candidate != "__init__":
                    found.add(candidate)
    return found - {module}


@pytest.mark.parametrize("module", MODULES)
def test_nothing_imports_upward(module):
    floor = FLOOR[room_of(module)]
    above = {m for m in imports_of(module) if FLOOR[room_of(m)] > floor}
    assert not above, f"{module} is below what it imports: {sorted(above)}"


def test_no_module_imports_itself_by_way_of_others():
    below = {module: imports_of(module) for module in MODULES}
    while leaves := {m for m, imported in below.items() if not imported & set(below)}:
        for leaf in leaves:
            del below[leaf]
    assert not below, f"these import each other: {sorted(below)}"
