"""Mamba2 checkpoints in local directories: load both published layouts, save one.

- transformers' `Mamba2ForCausalLM` or `Mamba2Model`: config.json with
  "model_type": "mamba2".
- The original `state-spaces/mamba2-*`: config.json with "ssm_cfg".

The weights are model.safetensors or pytorch_model.bin, which needs torch to be read, or
shards of either with an index. Nothing is downloaded. Both layouts have the same names
of tensors, except for the embedding table. Mixers of other families of models are
loaded by `Mamba2Mixer.from_hf`.

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
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..arguments import Implementation
from ..published import fields, weights
from .config import Mamba2Config
from .model import Mamba2LM

__all__ = ["load", "save"]

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"

_BACKBONE = "backbone."
_EMBEDDING = "backbone.embeddings.weight"
_ORIGINAL_EMBEDDING = "backbone.embedding.weight"
_HEAD = "lm_head.weight"

# What torch raises for files that it cannot read, or that hold code.
_UNREADABLE = (
    OSError,
    EOFError,
    LookupError,
    RuntimeError,
    ValueError,
    pickle.UnpicklingError,
)

# How a file begins that stands for another in a git repository.
_LFS = b"version https://git-lfs"

# How safetensors and torch call the dtypes that are accepted.
_DTYPES = dict(zip(("F16", "BF16", "F32", "F64"), weights.DTYPES, strict=True))
_TORCH_DTYPES = {dtype.name: dtype for dtype in weights.DTYPES}


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
        ValueError: the model is not a Mamba2 known here; a value in the config is of a
            wrong kind; a file is cut off or a git-lfs pointer, or lies outside the
            directory; or tensors are missing, left over, misshapen or no floats, all of
            which are named; or the head of a model with tied embeddings is not its
            embedding table. Nothing is loaded in part.
    """
    directory = Path(path)
    config = _read_config(directory / CONFIG)
    if chunk_size is not None:
        config = dataclasses.replace(config, chunk_size=chunk_size)
    with contextlib.ExitStack() as files:
        tensors = _open(directory, files)
        try:
            tensors = _with_one_naming(tensors, config.tie_embeddings)
            of_compute, of_params = weights.dtypes(
                tensors, _EMBEDDING, dtype, param_dtype
            )
            return weights.build(
                lambda: Mamba2LM(
                    config,
                    dtype=of_compute,
                    param_dtype=of_params,
                    precision=precision,
                    implementation=implementation,
                    rngs=nnx.Rngs(0),
                ),
                tensors,
                of_params,
                name_of=_name,
            )
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
        _name(where): np.ascontiguousarray(
            weights.turned(where, np.asarray(param[...]))
        )
        for where, param in nnx.to_flat_state(nnx.state(model, nnx.Param))
    }
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / CONFIG).write_text(text, encoding="utf-8")


def _read_config(path: Path) -> Mamba2Config:
    """The config in a file, in either layout; errors name the file."""
    raw = fields.read_json(path)
    original = "ssm_cfg" in raw
    try:
        return (Mamba2Config.from_original if original else Mamba2Config.from_hf)(raw)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _with_one_naming(
    tensors: Mapping[str, weights.Tensor], tied: bool
) -> dict[str, weights.Tensor]:
    """The tensors as the language model of transformers names them.

    The model below its head may have been saved alone, without `backbone.`; the
    embedding table has another name in the original layout; and tied embeddings may
    have been saved as the table, the head, or both.
    """
    if not any(name.startswith(_BACKBONE) for name in tensors):
        tensors = {
            name if name == _HEAD else _BACKBONE + name: tensor
            for name, tensor in tensors.items()
        }
    tensors = dict(tensors)
    if _ORIGINAL_EMBEDDING in tensors and _EMBEDDING not in tensors:
        tensors[_EMBEDDING] = tensors.pop(_ORIGINAL_EMBEDDING)
    if not tied or _HEAD not in tensors:
        return tensors
    head = tensors.pop(_HEAD)
    table = tensors.setdefault(_EMBEDDING, head)
    if head.shape != table.shape or not np.array_equal(head.read(), table.read()):
        raise ValueError(
            f"embeddings are tied, but {_HEAD} differs from the embedding table"
        )
    return tensors


def _name(where: weights.Where) -> str:
    """The name of a parameter in a checkpoint."""
    top, *path, _ = where
    top = {
        "embed": "backbone.embeddings",
        "layers": "backbone.layers",
        "norm": "backbone.norm_f",
        "lm_head": "lm_head",
    }[top]
    path = ["conv1d" if part == "conv" else str(part) for part in path]
    return ".".join([top, *path, weights.leaf(where)])


def _open(directory: Path, files: contextlib.ExitStack) -> dict[str, weights.Tensor]:
    """All tensors of a checkpoint by name; `files` closes what this opens."""
    open_one = functools.partial(_open_safetensors, files=files)
    if (directory / WEIGHTS).exists():
        return open_one(directory / WEIGHTS)
    if (directory / INDEX).exists():
        return _open_shards(directory / INDEX, open_one)
    if (directory / PICKLE).exists():
        return _unpickle(directory / PICKLE)
    if (directory / PICKLE_INDEX).exists():
        return _open_shards(directory / PICKLE_INDEX, _unpickle)
    raise FileNotFoundError(
        f"{directory} holds none of {WEIGHTS}, {INDEX}, {PICKLE} and {PICKLE_INDEX}"
    )


def _open_shards(
    index: Path, open_one: Callable[[Path], dict[str, weights.Tensor]]
) -> dict[str, weights.Tensor]:
    """The tensors of all files that an index names, which lie beside it."""
    files = fields.read_json(index).get("weight_map")
    if not isinstance(files, dict):
        raise ValueError(f"{index}: weight_map must be an object, got {files!r}")
    for name, file in files.items():
        is_plain = isinstance(file, str) and file not in ("", ".", "..")
        if not is_plain or set(file) & set("/\\\0"):
            raise ValueError(
                f"{index}: weight_map[{name!r}] must be the name of a file in the same "
                f"folder, got {file!r}"
            )
    tensors: dict[str, weights.Tensor] = {}
    for file in sorted(set(files.values())):
        for name, tensor in open_one(index.parent / file).items():
            if name in tensors:
                raise ValueError(f"{index.parent}: {name} is in more than one shard")
            tensors[name] = tensor
    return tensors


def _open_safetensors(
    path: Path, files: contextlib.ExitStack
) -> dict[str, weights.Tensor]:
    """The tensors of one file, which `files` closes."""
    _refuse_pointer(path)
    try:
        file = files.enter_context(safe_open(path, framework="numpy"))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None
    tensors = {}
    for name in file.keys():  # noqa: SIM118 (it is not a dict)
        tensor = file.get_slice(name)
        tensors[name] = weights.Tensor(
            tuple(tensor.get_shape()),
            _DTYPES.get(tensor.get_dtype()),
            functools.partial(file.get_tensor, name),
        )
    return tensors


def _refuse_pointer(path: Path) -> None:
    """Raises if git-lfs has left a pointer in a file's place, or there is no file."""
    with path.open("rb") as file:
        if file.read(len(_LFS)) == _LFS:
            raise ValueError(
                f"{path} is a git-lfs pointer, expected the weights: fetch them with "
                "`git lfs pull`"
            )


def _unpickle(path: Path) -> dict[str, weights.Tensor]:
    """The tensors of a torch checkpoint, mapped into memory."""
    try:
        import torch  # noqa: PLC0415 (needed for these files alone)
    except ModuleNotFoundError as error:
        raise ImportError(
            f"{path} can only be read with torch: install it, or convert the file to "
            f"{WEIGHTS} (safetensors.torch.save_file)"
        ) from error
    _refuse_pointer(path)

    def tensor_of(value):
        def read():
            if value.dtype == torch.bfloat16:  # which numpy does not know
                bits = value.contiguous().view(torch.int16)
                return bits.numpy().view(ml_dtypes.bfloat16)
            return value.numpy()

        dtype = _TORCH_DTYPES.get(str(value.dtype).removeprefix("torch."))
        return weights.Tensor(tuple(value.shape), dtype, read)

    # Files of torch before 1.6 are no archives, and cannot be mapped.
    how = {"map_location": "cpu", "weights_only": True}
    try:
        state = torch.load(path, mmap=zipfile.is_zipfile(path), **how)
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path} is not a whole torch checkpoint: {reason}") from None
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise ValueError(f"{path} must hold tensors by name alone")
    return {name: tensor_of(value) for name, value in state.items()}
