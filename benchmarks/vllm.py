"""Modules of vLLM, imported without the rest of it, and what its scheduler prepares."""

import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import imports
from benchmarks.tensors import Torch


def vllm_ops(name: str, path: Path | None) -> types.ModuleType:
    """A module of vLLM's Mamba ops; from a path without the rest of vLLM."""
    full = f"vllm.model_executor.layers.mamba.ops.{name}"
    if path is None:
        return imports.load(full, None)
    root = path if path.is_dir() else None
    with imports.stand_in("vllm", _vllm_names(), root):
        return imports.load(full if root else f"vllm_{name}", path)


def _vllm_names() -> dict[str, Any]:
    """What its files import from the rest of vLLM."""
    torch = imports.load("torch", None)
    on_gpu = torch.cuda.is_available()
    capability = torch.cuda.get_device_capability() if on_gpu else (0, 0)
    device_name = torch.cuda.get_device_name().replace(" ", "_") if on_gpu else ""
    silent = types.SimpleNamespace(
        info_once=lambda *_, **__: None, warning_once=lambda *_, **__: None
    )
    platform = types.SimpleNamespace(
        is_cpu=lambda: False,
        is_cuda=lambda: True,
        is_xpu=lambda: False,
        is_arch_support_pdl=lambda: False,
        is_device_capability=lambda number: divmod(number, 10) == capability,
    )
    return {
        "triton": imports.load("triton", None),
        "tl": imports.load("triton.language", None),
        "HAS_TRITON": True,
        "current_platform": platform,
        "PAD_SLOT_ID": -1,
        "NULL_BLOCK_ID": 0,
        "VLLM_TUNED_CONFIG_FOLDER": None,
        "_custom_ops": None,
        "init_logger": lambda _: silent,
        "get_device_name_as_file_name": lambda: device_name,
    }


def vllm_metadata(torch: Torch, lengths: Sequence[int], block_m: int = 8) -> Any:
    """Which program owns which chunk, in the form that its launcher takes."""
    chunks = [-(-length // block_m) for length in lengths]
    owners = np.repeat(np.arange(len(chunks), dtype=np.int32), chunks)
    offsets = np.concatenate([np.arange(n, dtype=np.int32) for n in chunks])
    arrays = {
        "batch_ptr": torch.tensor(owners),
        "token_chunk_offset_ptr": torch.tensor(offsets),
    }
    numbers = {"tot": len(owners), "mlist": owners, "mlist_len": len(owners)}
    table = {block_m: numbers | {"offsetlist": offsets} | arrays}
    return types.SimpleNamespace(nums_dict=table, **arrays)
