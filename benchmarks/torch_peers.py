"""Peers that run under PyTorch. Each function prepares a `Workload`."""

import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import imports
from benchmarks.tensors import Torch
from benchmarks.timing import Prepared
from benchmarks.vllm import vllm_metadata, vllm_ops
from benchmarks.workload import Workload


class _Tensors(Torch):
    """A workload's inputs as tensors, and the way back."""

    def __init__(self, work: Workload):
        super().__init__()
        self.work = work
        self.x, self.weight, self.bias = map(
            self.tensor, (work.x, work.weight, work.bias)
        )

    def states(self) -> Any:
        return self.tensor(self.work.states())

    def gathered(self, width: int | None = None) -> Any:
        """States of the sequences `(N, D, width)`, oldest first, zeros in front."""
        states = self.tensor(self.work.states()[self.work.cache_indices])
        states = states.transpose(1, 2)
        missing = (width or states.shape[2]) - states.shape[2]
        return self.torch.nn.functional.pad(states, (missing, 0)).contiguous()

    def pick(self, tensor, axis: int = -1) -> np.ndarray:
        channels = self.torch.as_tensor(self.work.channels, device=tensor.device)
        picked = tensor.detach().index_select(axis % tensor.dim(), channels)
        return picked.float().cpu().numpy()

    def rows(self, forward: Callable, channel_last: bool) -> Prepared:
        """`forward(x, weight, bias)` of `(B, T, D)`, or `(B, D, T)`, with gradients."""
        shape = self.work.rows

        def layout(tensor):
            tensor = tensor.reshape(shape)
            return tensor if channel_last else tensor.transpose(1, 2).contiguous()

        def flat(tensor):
            tensor = tensor if channel_last else tensor.transpose(1, 2)
            return self.pick(tensor.reshape(-1, shape[2]))

        inputs = [layout(self.x), self.weight, self.bias]
        if self.work.op != "gradient":
            return self.prepared(lambda: forward(*inputs), lambda y: {"out": flat(y)})
        inputs = [tensor.requires_grad_() for tensor in inputs]
        dy = layout(self.tensor(self.work.dy))

        def call():
            out = forward(*inputs)
            return out, *self.torch.autograd.grad(out, inputs, dy)

        def view(result):
            out, dx, dweight, dbias = result
            return {
                "out": flat(out),
                "dx": flat(dx),
                "dweight": self.pick(dweight, 0),
                "dbias": self.pick(dbias),
            }

        return self.prepared(call, view, gradient=True)

    def updated(self, update: Callable, states) -> Prepared:
        """`update` as Dao-AILab's is called, of a cache `(S, D, W-1)` in place."""
        slots = self.tensor(self.work.cache_indices)

        def call():
            return update(
                self.x,
                states,
                self.weight,
                self.bias,
                "silu",
                conv_state_indices=slots,
            )

        def view(out):
            left = states[slots.long()].transpose(1, 2)
            return {"out": self.pick(out), "states": self.pick(left)}

        return self.prepared(call, view)


def torch_conv(work: Workload, path: Path | None) -> Prepared:
    """A depthwise `F.conv1d` of `(B, D, T)` and silu."""
    torch = _Tensors(work)
    functional = torch.torch.nn.functional

    def forward(x, weight, bias):
        padded = functional.pad(x, (work.width - 1, 0))
        out = functional.conv1d(padded, weight[:, None], bias, groups=work.dim)
        return functional.silu(out)

    return torch.rows(forward, channel_last=False)


def torch_roll(work: Workload, path: Path | None) -> Prepared:
    """What transformers does without kernels: a padded conv, or roll and sum."""
    torch = _Tensors(work)
    functional = torch.torch.nn.functional
    if work.op == "update":
        states = torch.gathered(work.width)

        def step():
            rolled = states.roll(-1, dims=-1)
            rolled[:, :, -1] = torch.x
            states.copy_(rolled)
            return functional.silu((states * torch.weight).sum(-1) + torch.bias)

        def view(out):
            left = states[:, :, 1:].transpose(1, 2)
            return {"out": torch.pick(out), "states": torch.pick(left)}

        return torch.prepared(step, view)

    def forward(x, weight, bias):
        out = functional.conv1d(
            x.transpose(1, 2),
            weight[:, None],
            bias,
            padding=work.width - 1,
            groups=work.dim,
        )
        return functional.silu(out[..., : x.shape[1]].transpose(1, 2))

    return torch.rows(forward, channel_last=True)


def vllm(work: Workload, path: Path | None) -> Prepared:
    """The Triton kernels of vLLM, with metadata built before, as its scheduler does.

    From a path: its `causal_conv1d.py` alone, or a folder with `vllm/` in it, without
    dependent launches, in which a kernel's duration would contain its wait for the one
    before it.
    """
    torch = _Tensors(work)
    module = vllm_ops("causal_conv1d", path)
    states = torch.states()
    slots = torch.tensor(work.cache_indices)

    def view(out):
        out = out if work.op == "update" else out.T
        return {"out": torch.pick(out), "states": torch.pick(states[slots.long()])}

    if work.op == "update":
        options = {}
        if "out" in inspect.signature(module.causal_conv1d_update).parameters:
            options["out"] = torch.torch.empty_like(torch.x)

        def update():
            return module.causal_conv1d_update(
                torch.x,
                states.transpose(1, 2),
                torch.weight,
                torch.bias,
                "silu",
                conv_state_indices=slots,
                **options,
            )

        return torch.prepared(update, view)
    offsets = torch.tensor(work.offsets)
    seen = torch.tensor(work.has_initial_state)
    metadata = vllm_metadata(torch, work.lengths)

    def packed():
        return module.causal_conv1d_fn(
            torch.x.T,
            torch.weight,
            torch.bias,
            states.transpose(1, 2),
            offsets,
            cache_indices=slots,
            has_initial_state=seen,
            activation="silu",
            metadata=metadata,
        )

    return torch.prepared(packed, view)


def fla(work: Workload, path: Path | None) -> Prepared:
    """flash-linear-attention's Triton kernels; in packed batches with states apart."""
    torch = _Tensors(work)
    module = imports.load("fla.modules.causal_conv1d", path)
    if work.op in ("dense", "gradient"):
        return torch.rows(
            lambda x, weight, bias: module.causal_conv1d(
                x, weight, bias, activation="silu"
            )[0],
            channel_last=True,
        )
    states = torch.gathered(work.width)
    if work.op == "update":

        def update():
            return module.causal_conv1d_update(
                torch.x[:, None],
                states,
                weight=torch.weight,
                bias=torch.bias,
                activation="silu",
            )

    else:
        offsets = torch.tensor(work.offsets).long()
        lengths_on_host = offsets.cpu()
        index = imports.load("fla.ops.utils", None).prepare_chunk_indices(offsets, 64)

        def update():
            return module.causal_conv1d(
                torch.x[None],
                torch.weight,
                torch.bias,
                initial_state=states if work.seen else None,
                output_final_state=True,
                activation="silu",
                cu_seqlens=offsets,
                cu_seqlens_cpu=lengths_on_host,
                chunk_indices=index,
            )

    def view(result):
        out, left = result
        left = left[..., 1:].transpose(1, 2)
        return {
            "out": torch.pick(out.reshape(-1, work.dim)),
            "states": torch.pick(left),
        }

    return torch.prepared(update, view)


def dao(work: Workload, path: Path | None) -> Prepared:
    """Dao-AILab's CUDA kernels, channel-last; a source tree is built where it lies."""
    torch = _Tensors(work)
    if path is not None and (path / "csrc").is_dir():
        _build_dao(path)
    module = imports.load("causal_conv1d", path)
    if work.op == "update":
        states = torch.states().transpose(1, 2).contiguous()
        return torch.updated(module.causal_conv1d_update, states)
    return torch.rows(
        lambda x, weight, bias: module.causal_conv1d_fn(
            x.transpose(1, 2), weight, bias, activation="silu"
        ).transpose(1, 2),
        channel_last=True,
    )


@functools.cache
def _build_dao(path: Path) -> None:
    """Compiles its extension for the GPU at hand, with its own compiler flags."""
    from torch.utils import cpp_extension  # noqa: PLC0415 (torch is optional)

    build = path / "build"
    build.mkdir(exist_ok=True)
    half_operators = ("HALF_OPERATORS", "HALF_CONVERSIONS")
    bfloat16_operators = ("BFLOAT16_OPERATORS", "BFLOAT16_CONVERSIONS")
    undefine = [
        f"-U__CUDA_NO_{name}__"
        for name in (*half_operators, *bfloat16_operators, "BFLOAT162_OPERATORS")
    ]
    sys.modules["causal_conv1d_cuda"] = cpp_extension.load(
        name="causal_conv1d_cuda",
        sources=sorted(map(str, (path / "csrc").glob("causal_conv1d*.c*"))),
        build_directory=str(build),
        extra_include_paths=[str(path / "csrc")],
        extra_cuda_cflags=[
            "-O3",
            "--use_fast_math",
            "--expt-relaxed-constexpr",
            "--expt-extended-lambda",
            *undefine,
        ],
    )


def cudnn(work: Workload, path: Path | None) -> Prepared:
    """cudnn-frontend, channel-last; in packed batches with states apart.

    A note says so where it computes by other kernels than those for such arrays.
    """
    torch = _Tensors(work)
    ops = imports.load("cudnn.ops", path)
    if work.op == "update":
        return torch.updated(ops.causal_conv1d_update, torch.states().transpose(1, 2))
    if work.op == "packed":
        states = torch.gathered() if work.seen else None
        offsets = torch.tensor(work.offsets)

        def packed():
            return ops.causal_conv1d(
                torch.x[None].transpose(1, 2),
                torch.weight,
                torch.bias,
                "silu",
                cu_seqlens=offsets,
                initial_states=states,
                return_final_states=True,
            )

        def view(result):
            out, left = result
            left = left.transpose(1, 2)
            return {"out": torch.pick(out[0].T), "states": torch.pick(left)}

        one = torch.prepared(packed, view)
    else:
        one = torch.rows(
            lambda x, weight, bias: ops.causal_conv1d(
                x.transpose(1, 2), weight, bias, "silu"
            ).transpose(1, 2),
            channel_last=True,
        )
    one.wait(one.call())
    module = imports.load("cudnn.ops.causal_conv1d", path)
    route = module._get_causal_conv1d_last_route()
    if route not in ("native-inference", "native-autograd"):
        one.note = f"by its route {route}"
    return one
