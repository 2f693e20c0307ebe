"""Mamba2 checkpoints in local directories: load both published layouts, save one.

- transformers' `Mamba2ForCausalLM`: config.json with "model_type": "mamba2" and
  model.safetensors, or its shards with model.safetensors.index.json.
- The original `state-spaces/mamba2-*`: config.json with "ssm_cfg" and
  pytorch_model.bin, which needs torch to be read, or its tensors as safetensors.

Nothing is downloaded. Both layouts have the same names of tensors, except for the
embedding table.

In float32 a loaded model computes what transformers computes when it reads a whole
text, to rounding. Known differences elsewhere: with `time_step_limit`, transformers (as
the original code) limits step sizes when it reads a text but not when it decodes with a
cache, which then leads to other texts; here they are always limited. With 16-bit
parameters, transformers rounds the residual stream before each norm; here the norms
read it in float32. `norm_before_gate` in a transformers config is without effect, there
and here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import safe_open
from safetensors.numpy import save_file

from ..arguments import Implementation
from .config import Mamba2Config
from .model import Mamba2LM

__all__ = ["load", "save"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"

_EMBEDDING = "backbone.embeddings.weight"
_ORIGINAL_EMBEDDING = "backbone.embedding.weight"
_HEAD = "lm_head.weight"

# The decay of every token depends on these few numbers: they are never rounded to 16
# bits.
_FLOAT32 = {"A_log", "D", "dt_bias"}

# How safetensors and torch call the dtypes that are accepted.
_DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_TORCH_DTYPES = {dtype.name: dtype for dtype in _DTYPES.values()}

_Where = tuple[Any, ...]
"""A parameter's place in the model, such as ("layers", 0, "mixer", "D")."""


class _Tensor(NamedTuple):
    """A tensor in a file, which `read` reads. `dtype` is None if it is not accepted."""

    shape: tuple[int, ...]
    dtype: np.dtype | None
    read: Callable[[], np.ndarray]


def load(
    path: str | os.PathLike[str],
    *,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike | None = None,
    chunk_size: int | None = None,
    precision: jax.lax.PrecisionLike = None,
    implementation: Implementation = None,
) -> Mamba2LM:
    """Loads a model from a directory in either published layout.

    Tensors are read, cast and placed one by one: beside the parameters, only the
    tensor at hand is in memory.

    Args:
        path: the directory.
        dtype: of the computation. None is that of the checkpoint's embedding table.
        param_dtype: of the parameters, but for `A_log`, `D` and `dt_bias`, which are
            float32. None is `dtype`.
        chunk_size: tokens per chunk of the scan, on which speed and memory alone
            depend. None is that of the checkpoint.
        precision: of the SSD's products, as for `ssd`.
        implementation: of conv and SSD, as for `causal_conv1d_fn`.

    Returns:
        The model, on jax's default device.

    Raises:
        FileNotFoundError: a file is missing.
        ImportError: only pytorch_model.bin is there, and torch is not installed.
        ValueError: the model is not a Mamba2 known here; or tensors are missing, left
            over, misshapen or no floats, all of which are named; or the head of a
            model with tied embeddings is not its embedding table.
    """
    directory = Path(path)
    raw = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
    original = "ssm_cfg" in raw
    config = (Mamba2Config.from_original if original else Mamba2Config.from_hf)(raw)
    if chunk_size is not None:
        config = dataclasses.replace(config, chunk_size=chunk_size)
    with contextlib.ExitStack() as files:
        tensors = _open(directory, files)
        # Like transformers, this accepts the original name of the embedding table.
        if _ORIGINAL_EMBEDDING in tensors and _EMBEDDING not in tensors:
            tensors[_EMBEDDING] = tensors.pop(_ORIGINAL_EMBEDDING)
        try:
            if config.tie_embeddings and _HEAD in tensors:
                _drop_tied_head(tensors)
            if dtype is None and _EMBEDDING in tensors:
                dtype = tensors[_EMBEDDING].dtype
            ops = {"precision": precision, "implementation": implementation}
            return _build(config, tensors, dtype, param_dtype, ops)
        except ValueError as error:
            raise ValueError(f"{directory}: {error}") from None


def save(path: str | os.PathLike[str], model: Mamba2LM) -> None:
    """Saves a model as config.json and model.safetensors, as transformers loads it.

    Args:
        path: the directory; made if it is not there.
        model: its parameters are written in their own dtypes.

    Raises:
        ValueError: the model has `norm_before_gate`, which transformers has not.
    """
    directory = Path(path)
    config = {**model.config.to_hf(), "dtype": str(model.param_dtype)}
    tensors = {
        _name(where): np.ascontiguousarray(_turned(where, np.asarray(param[...])))
        for where, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def _build(
    config: Mamba2Config,
    tensors: Mapping[str, _Tensor],
    dtype: DTypeLike | None,
    param_dtype: DTypeLike | None,
    ops: Mapping[str, Any],
) -> Mamba2LM:
    """Makes the model with these tensors, none of which may be missing or left over."""
    dtype = jax.dtypes.canonicalize_dtype(jnp.float32 if dtype is None else dtype)
    param_dtype = jax.dtypes.canonicalize_dtype(param_dtype or dtype)
    empty = nnx.eval_shape(  # shapes alone: nothing is initialised
        lambda: Mamba2LM(
            config,
            dtype=dtype,
            param_dtype=param_dtype,
            rngs=nnx.Rngs(0),
            **ops,
        )
    )
    graph, state = nnx.split(empty, nnx.Param)
    params = {_name(where): (where, p) for where, p in nnx.to_flat_state(state)}
    shapes = {
        name: _turned(where, np.broadcast_to(0, param.shape)).shape
        for name, (where, param) in params.items()
    }
    _check(shapes, tensors)
    loaded = []
    for name, (where, param) in params.items():
        target = jnp.dtype(jnp.float32 if where[-1] in _FLOAT32 else param_dtype)
        array = np.asarray(_turned(where, tensors[name].read()), target, order="C")
        loaded.append((where, param.replace(jnp.asarray(array))))
    return nnx.merge(graph, nnx.from_flat_state(loaded))


def _check(
    shapes: Mapping[str, tuple[int, ...]], tensors: Mapping[str, _Tensor]
) -> None:
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


def _drop_tied_head(tensors: dict[str, _Tensor]) -> None:
    """Removes a head that repeats the embedding table."""
    head = tensors.pop(_HEAD)
    table = tensors.get(_EMBEDDING)
    if table is None:
        return  # reported as missing
    if head.shape != table.shape or not np.array_equal(head.read(), table.read()):
        raise ValueError(
            f"embeddings are tied, but {_HEAD} differs from the embedding table"
        )


def _name(where: _Where) -> str:
    """The name of a parameter in a checkpoint."""
    top, *path, leaf = where
    top = {
        "embed": "backbone.embeddings",
        "layers": "backbone.layers",
        "norm": "backbone.norm_f",
        "lm_head": "lm_head",
    }[top]
    path = ["conv1d" if part == "conv" else str(part) for part in path]
    leaf = "weight" if leaf in ("kernel", "scale", "embedding") else leaf
    return ".".join([top, *path, leaf])


def _turned(where: _Where, array: Any) -> Any:
    """Turns an array's axes from our order to torch's, or back; it returns a view.

    A Linear's weight is the transpose of a kernel; a Conv1d's `(C, 1, W)` has an axis
    of length 1 that the conv's kernel `(C, W)` has not.
    """
    if where[-1] != "kernel":
        return array
    if where[-2] != "conv":
        return array.T
    return array[:, None, :] if array.ndim == 2 else array[:, 0, :]


def _open(directory: Path, files: contextlib.ExitStack) -> dict[str, _Tensor]:
    """All tensors of a checkpoint by name; `files` closes what this opens."""
    if (directory / WEIGHTS).exists():
        shards = [WEIGHTS]
    elif (directory / INDEX).exists():
        index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
    elif (directory / PICKLE).exists():
        return _unpickle(directory / PICKLE)
    else:
        raise FileNotFoundError(
            f"{directory} holds none of {WEIGHTS}, {INDEX} and {PICKLE}"
        )
    tensors: dict[str, _Tensor] = {}
    for shard in shards:
        file = files.enter_context(safe_open(directory / shard, framework="numpy"))
        for name in file.keys():  # noqa: SIM118 (it is not a dict)
            if name in tensors:
                raise ValueError(f"{directory}: {name} is in more than one shard")
            tensor = file.get_slice(name)
            tensors[name] = _Tensor(
                tuple(tensor.get_shape()),
                _DTYPES.get(tensor.get_dtype()),
                functools.partial(file.get_tensor, name),
            )
    return tensors


def _unpickle(path: Path) -> dict[str, _Tensor]:
    """The tensors of a torch checkpoint, mapped into memory."""
    try:
        import torch  # noqa: PLC0415 (needed for these files alone)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{path} can only be read with torch: install it, or convert the file to "
            f"{WEIGHTS} (safetensors.torch.save_file)"
        ) from error

    def tensor_of(value):
        def read():
            if value.dtype == torch.bfloat16:  # which numpy does not know
                bits = value.contiguous().view(torch.int16)
                return bits.numpy().view(ml_dtypes.bfloat16)
            return value.numpy()

        dtype = _TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."))
        return _Tensor(tuple(value.shape), dtype, read)

    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {name: tensor_of(value) for name, value in state.items()}
