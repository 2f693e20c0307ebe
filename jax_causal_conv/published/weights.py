"""Published tensors become the parameters of NNX layers, and parameters tensors.

Nothing is loaded in part: names, shapes and dtypes are all checked before the first
tensor is read.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

Where = tuple[Any, ...]
"""A parameter's place in a layer, such as ("layers", 0, "mixer", "D")."""

Layer = TypeVar("Layer", bound=nnx.Module)

DTYPES = [np.dtype(d) for d in ("f2", ml_dtypes.bfloat16, "f4", "f8")]
"""The accepted dtypes."""

# The decay of every token depends on these few numbers: they are never rounded to 16
# bits.
_FLOAT32 = {"A_log", "D", "dt_bias"}


class Tensor(NamedTuple):
    """A published tensor, which `read` reads. `dtype` is None if it is not accepted."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    read: Callable[[], np.ndarray]


def below(tensors: Mapping[str, Any], prefix: str) -> dict[str, Tensor]:
    """The arrays whose names begin with `prefix` and a dot, by what follows."""
    prefix = prefix.rstrip(".") + "."
    found = {}
    for name in tensors.keys():  # noqa: SIM118 (files of safetensors have keys alone)
        if name.startswith(prefix):
            array = tensors[name]
            shape, dtype = np.shape(array), getattr(array, "dtype", None)
            found[name.removeprefix(prefix)] = Tensor(
                shape,
                dtype if dtype in DTYPES else None,
                functools.partial(np.asarray, array),
            )
    return found


def dtypes(
    tensors: Mapping[str, Tensor],
    name: str,
    dtype: DTypeLike | None,
    param_dtype: DTypeLike | None,
) -> tuple[np.dtype, np.dtype]:
    """Dtypes of computation and parameters: None is the tensor's of that name."""
    if dtype is None and name in tensors:
        dtype = tensors[name].dtype
    dtype = jax.dtypes.canonicalize_dtype(jnp.float32 if dtype is None else dtype)
    return dtype, jax.dtypes.canonicalize_dtype(param_dtype or dtype)


def build(
    make: Callable[[], Layer],
    tensors: Mapping[str, Tensor],
    param_dtype: DTypeLike,
    *,
    name_of: Callable[[Where], str] | None = None,
    change: Mapping[str, Callable[[np.ndarray], np.ndarray]] | None = None,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Layer:
    """Makes a layer with these tensors, none of which may be missing or left over.

    Args:
        make: makes it with any parameters; they are not computed.
        tensors: by name.
        param_dtype: of the parameters, but for `A_log`, `D` and `dt_bias`, which are
            float32.
        name_of: the name of a parameter's tensor. None is `name`.
        change: what is done to tensors of these names, in torch's order of axes.
        shapes: of tensors of these names, before the change.

    Raises:
        ValueError: names everything that is wrong with the tensors.
    """
    name_of, change = name_of or name, change or {}
    graph, state = nnx.split(nnx.eval_shape(make), nnx.Param)
    params = {name_of(where): (where, p) for where, p in nnx.to_flat_state(state)}
    expected = {
        key: turned(where, np.broadcast_to(0, param.shape)).shape
        for key, (where, param) in params.items()
    }
    check(expected | dict(shapes or {}), tensors)
    loaded = []
    for key, (where, param) in params.items():
        target = jnp.dtype(jnp.float32 if where[-1] in _FLOAT32 else param_dtype)
        array = tensors[key].read()
        array = change[key](array) if key in change else array
        array = np.asarray(turned(where, array), target, order="C")
        loaded.append((where, param.replace(jnp.asarray(array))))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def check(shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor]) -> None:
    """Raises a ValueError that names everything wrong with the tensors."""
    wrong = [f"missing: {name}" for name in sorted(shapes.keys() - tensors.keys())]
    wrong += [f"unexpected: {name}" for name in sorted(tensors.keys() - shapes.keys())]
    for name in sorted(shapes.keys() & tensors.keys()):
        tensor = tensors[name]
        if tensor.shape != shapes[name]:
            wrong.append(f"{name} has shape {tensor.shape}, expected {shapes[name]}")
        elif tensor.dtype is None:
            wrong.append(f"{name} is not of float16, bfloat16, float32 or float64")
    if wrong:
        raise ValueError("the tensors do not fit the config:\n  " + "\n  ".join(wrong))


def name(where: Where) -> str:
    """The name of a parameter's tensor within its layer."""
    return ".".join(map(str, (*where[:-1], leaf(where))))


def leaf(where: Where) -> str:
    """The last part of that name."""
    return "weight" if where[-1] in ("kernel", "scale", "embedding") else where[-1]


def turned(where: Where, array: Any) -> Any:
    """Turns an array's axes from our order to torch's, or back; it returns a view.

    A Linear's weight is the transpose of a kernel; a Conv1d's `(C, 1, W)` has an axis
    of length 1 that the conv's kernel `(C, W)` has not.
    """
    if where[-1] != "kernel":
        return array
    if where[-2] != "conv":
        return array.T
    return array[:, None, :] if array.ndim == 2 else array[:, 0, :]
