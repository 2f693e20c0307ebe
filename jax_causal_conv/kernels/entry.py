"""Flat entry functions of kernels: from single pointers to named records. No JAX here.

A kernel is written as `kernel(inputs, outputs, C)`: two named tuples of pointers and
scalars, and one record of constants. jax-triton hands over single pointers, scalars
and constants. In between stands a function that is generated here for each kernel and
each set of arguments that are present: it takes what there is, one parameter each, and
calls the kernel with the records, None in the place of what is absent.
"""

import functools
import linecache
import types
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import triton
import triton.language as tl

# What a field of a record is: None if absent, _ONE if a single value, or the number of
# values in a tuple.
Form = None | int
_ONE = -1


def leaves(record: Iterable[Any]) -> Iterator[Any]:
    """What is present in a record, in order: a field that is a tuple in its parts."""
    for field in record:
        if isinstance(field, tuple):
            yield from field
        elif field is not None:
            yield field


def arrays(record: Any) -> list[Any]:
    """The leaves that are no numbers."""
    return [leaf for leaf in leaves(record) if not isinstance(leaf, int)]


def replaced(record: Any, others: Iterable[Any]) -> Any:
    """The record with `others` in the place of its `arrays`."""
    rest = iter(others)

    def of(field: Any) -> Any:
        if isinstance(field, tuple):
            return tuple(map(of, field))
        return field if field is None or isinstance(field, int) else next(rest)

    return type(record)(*map(of, record))


def position(record: NamedTuple, name: str) -> int:
    """Where a field stands among the `leaves` of its record."""
    before = record._fields.index(name)
    return len(list(leaves(record[:before])))


def entry(kernel: Any, inputs: NamedTuple, outputs: NamedTuple, spare: int) -> Any:
    """A Triton function `(*leaves(inputs), *leaves(outputs), [*spares], C)`.

    It is made once for each kernel and form of the records, and has the kernel's name.

    Args:
        kernel: a Triton function `(inputs, outputs, C)`.
        inputs, outputs: records with anything in the place of the pointers.
        spare: how many more pointers follow, which nobody reads.
    """
    return _entry(
        kernel, type(inputs), _form(inputs), type(outputs), _form(outputs), spare
    )


def _form(record: NamedTuple) -> tuple[Form, ...]:
    return tuple(
        None if field is None else len(field) if isinstance(field, tuple) else _ONE
        for field in record
    )


@functools.cache
def _entry(
    kernel: Any,
    inputs: type,
    input_form: tuple[Form, ...],
    outputs: type,
    output_form: tuple[Form, ...],
    spare: int,
) -> Any:
    name = kernel.fn.__name__
    parameters: list[str] = []
    records = [
        _construction("Inputs", inputs, input_form, parameters),
        _construction("Outputs", outputs, output_form, parameters),
    ]
    parameters += [f"spare_{i}" for i in range(spare)]
    source = (
        f"def {name}({', '.join(parameters)}, C: tl.constexpr):\n"
        f"    kernel({', '.join(records)}, C)\n"
    )
    scope = {"kernel": kernel, "Inputs": inputs, "Outputs": outputs, "tl": tl}
    return triton.jit(_compiled(source, name, kernel.fn.__module__, scope))


def _construction(
    name: str, record: Any, form: tuple[Form, ...], parameters: list[str]
) -> str:
    """The call that makes a record of parameters, which it adds to the list."""
    fields = []
    for field, parts in zip(record._fields, form, strict=True):
        if parts is None:
            fields.append("None")
            continue
        stem = f"{name.lower()}_{field}"  # a field of both records, or called C
        names = [stem] if parts == _ONE else [f"{stem}_{i}" for i in range(parts)]
        parameters += names
        several = ", ".join(names) + "," * bool(names)
        fields.append(stem if parts == _ONE else f"({several})")
    return f"{name}({', '.join(fields)})"


def _compiled(
    source: str, name: str, module: str, scope: dict[str, Any]
) -> types.FunctionType:
    """The function, whose source Triton finds by `inspect.getsource`."""
    # Triton's debug information names the file. It is the same in every process: else
    # compiled programs would not be found in a cache again.
    filename = f"<{module}.{source.splitlines()[0].removeprefix('def ')}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
    scope["__name__"] = module
    exec(compile(source, filename, "exec"), scope)
    return scope[name]
