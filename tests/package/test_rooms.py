"""How the package is built: imports go down only, and functions take few parameters."""

import ast
import pathlib

import pytest

import jax_causal_conv

ROOT = pathlib.Path(jax_causal_conv.__file__).parent
# From the ground up. A module may import from those below it and from its own line.
FLOORS = (
    ("compat", "columns", "promotion"),
    ("operands",),
    ("batch", "checks"),
    ("slots", "chunks", "replay"),
    ("arguments",),
    ("xla", "kernels"),
    ("op",),
    (
        "packed",
        "update",
        "dense",
        "states",
        "halo",
        "metadata",
        "packing",
        "mamba2.ssd",
    ),
    ("nnx_conv", "linen", "published"),
    ("mamba2", "short_conv"),
    ("nnx",),
    ("__init__", "doctor", "__main__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(ROOT.rglob("*.py"))
}


# What travels together is one record. Public ops and the constructors of layers and
# engines are exempt: their parameters are what callers say by name.
MOST_PARAMETERS = 12
MOST_OF_A_TRITON_FUNCTION = 16
PUBLIC_OPS = {
    "causal_conv1d_fn",
    "causal_conv1d_update",
    "ssd",
    "ssd_packed",
    "validate_batch",  # which takes what they take
}
PUBLIC_METHODS = {"mamba2.mixer": {"packed"}, "mamba2.model": {"packed"}}


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


def functions_of(module: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    tree = ast.parse(MODULES[module].read_text())
    return [node for node in ast.walk(tree) if isinstance(node, kinds)]


def number_of_parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    arguments = function.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    starred = (arguments.vararg, arguments.kwarg)
    return len(named) + sum(argument is not None for argument in starred)


def is_triton(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any("triton.jit" in ast.unparse(node) for node in function.decorator_list)


@pytest.mark.parametrize("module", MODULES)
def test_functions_take_few_parameters(module):
    too_many = {}
    exempt = PUBLIC_OPS | PUBLIC_METHODS.get(module, set()) | {"__init__"}
    for function in functions_of(module):
        if function.name in exempt:
            continue
        most = MOST_OF_A_TRITON_FUNCTION if is_triton(function) else MOST_PARAMETERS
        if (number := number_of_parameters(function)) > most:
            too_many[f"{function.name} (line {function.lineno})"] = number
    assert not too_many, f"{module} has functions of too many parameters: {too_many}"


def test_triton_functions_are_recognised():
    found = {module for module in MODULES if any(map(is_triton, functions_of(module)))}
    assert {"kernels.packed", "kernels.walks", "kernels.backward"} <= found


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
