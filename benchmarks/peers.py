"""Everybody who can compute a `Workload`: this package, yardsticks, and the peers.

A peer is imported where it is installed, or from a path that the user gives; none of
its code is here. Each gets its inputs in the layout that suits it, before the clock
starts, and computes what it can: where it knows no slots, the slots' states have been
gathered for it. What fails to import, to run or to be right is reported as such.
"""

import functools
import inspect
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import imports, programs
from benchmarks.cases import BY_XLA, OURS, Candidate
from benchmarks.tensors import Torch
from benchmarks.timing import Prepared
from benchmarks.workload import Workload
from jax_causal_conv import (
    build_metadata,
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
)
from jax_causal_conv.op.primitive import (
    DEFAULT_COMPUTE_CAPABILITY,
    visible_compute_capability,
)

# ---- This package, and yardsticks --------------------------------------------------


def _batch(work: Workload) -> dict[str, Any]:
    """What `causal_conv1d_fn` wants to know of a packed batch, on the device."""
    metadata = build_metadata(work.offsets, work.tokens)
    return {
        "cache_indices": jnp.asarray(work.cache_indices),
        "has_initial_state": jnp.asarray(work.has_initial_state),
        "metadata": jax.tree.map(jnp.asarray, metadata),
    }


def ours(
    work: Workload, path: Path | None = None, *, implementation: str | None = None
) -> Prepared:
    """This package; with "xla", what XLA makes of it on a GPU."""
    x, weight, bias = work.x, work.weight, work.bias
    if work.op == "packed":
        options, offsets = _batch(work), jnp.asarray(work.offsets)

        def packed(states, x, weight, bias, offsets, options):
            return causal_conv1d_fn(
                x,
                weight,
                bias,
                states,
                offsets,
                implementation=implementation,
                **options,
            )

        return with_states(work, packed, x, weight, bias, offsets, options)
    if work.op == "update":

        def update(states, x, weight, bias, slots):
            return causal_conv1d_update(
                x,
                states,
                weight,
                bias,
                "silu",
                conv_state_indices=slots,
                implementation=implementation,
            )

        slots = jnp.asarray(work.cache_indices)
        return with_states(work, update, x, weight, bias, slots)
    return _jax_rows(
        work,
        lambda x, weight, bias: causal_conv1d(
            x, weight, bias, activation="silu", implementation=implementation
        ),
    )


def projected(work: Workload, first: int, width: int, split, *, cut: bool) -> Prepared:
    """This package on columns of an array that is `width` wide, with results in parts.

    With `cut` the columns are cut out before the call, and its result apart after it.
    """
    behind = width - first - work.dim
    x = jnp.pad(work.x, ((0, 0), (first, behind)), constant_values=np.nan)

    def packed(states, x, weight, bias, offsets, options):
        columns = {} if cut else {"channel_offset": first, "split": split}
        if cut:
            x = x[:, first : first + work.dim]
        out, states = causal_conv1d_fn(
            x, weight, bias, states, offsets, **columns, **options
        )
        if cut:
            out = tuple(jnp.split(out, np.cumsum(split)[:-1], axis=-1))
        return out, states

    arguments = work.weight, work.bias, jnp.asarray(work.offsets), _batch(work)
    return with_states(work, packed, x, *arguments)


def with_states(work: Workload, function: Callable, *args: Any) -> Prepared:
    """`(out, states) = function(states, *args)` with a donated cache."""
    step = jax.jit(function, donate_argnums=0)
    holder = [work.states()]
    lowered = step.lower(holder[0], *args)
    note = ""
    if jax.default_backend() == "cpu":
        hlo = lowered.compile().as_text() or ""
        if copies := programs.cache_copies(hlo, holder[0].shape):
            note = f"{copies} copies of the cache"

    def call():
        out, holder[0] = step(holder[0], *args)
        return out, holder[0]

    def view(result):
        out, states = result
        if isinstance(out, tuple):
            out = jnp.concatenate(out, axis=-1)
        left = jnp.take(states, work.cache_indices, axis=0)
        return {"out": work.pick(out), "states": work.pick(left)}

    # Waiting for the cache would keep it from being donated to the next call.
    def wait(result):
        jax.block_until_ready(result[0])

    by = programs.implementation(lowered)
    return Prepared(call, wait, view, note=note, implementation=by)


def _jax_rows(work: Workload, forward: Callable) -> Prepared:
    """`forward(x (B, T, D), weight, bias)`, or with all its gradients."""
    x = work.x.reshape(work.rows)
    if work.op != "gradient":
        step: Any = jax.jit(forward)
        inputs: tuple = (x, work.weight, work.bias)

        def view(out):
            return {"out": work.pick(_flat(out))}

    else:

        @jax.jit
        def step(x, weight, bias, dy):
            out, pull = jax.vjp(forward, x, weight, bias)
            return out, *pull(dy)

        inputs = x, work.weight, work.bias, work.dy.reshape(work.rows)

        def view(result):
            out, dx, dweight, dbias = result
            return {
                "out": work.pick(_flat(out)),
                "dx": work.pick(_flat(dx)),
                "dweight": work.pick(dweight, 0),
                "dbias": work.pick(dbias),
            }

    by = programs.implementation(step.lower(*inputs))
    return Prepared(functools.partial(step, *inputs), view=view, implementation=by)


def _flat(array):
    return array.reshape(-1, array.shape[-1])


def copy(work: Workload, path: Path | None = None) -> Prepared:
    """A copy that reads and writes as many bytes as the op must, into a new array."""
    source = jnp.ones(work.nbytes // 2, jnp.uint8)
    return Prepared(functools.partial(jax.jit(jnp.copy), source))


def memcpy(work: Workload, path: Path | None = None) -> Prepared:
    """The same on a CPU into memory that is there already, perhaps in its caches."""
    source = np.ones(work.nbytes // 2, np.uint8)
    target = np.zeros_like(source)
    return Prepared(functools.partial(np.copyto, target, source), lambda _: None)


def silu(work: Workload, path: Path | None = None) -> Prepared:
    """`jax.nn.silu` of the same x: a yardstick for what computes as many outputs."""
    return Prepared(functools.partial(jax.jit(jax.nn.silu), work.x))


def launch(work: Workload, path: Path | None = None) -> Prepared:
    """A Triton kernel that does nothing, called as ours are: no call takes less."""
    import triton  # noqa: PLC0415 (only where there is a GPU)

    from jax_causal_conv.kernels import bridge, record  # noqa: PLC0415 (jax-triton)

    kernel = triton.jit(_nothing)
    capability = visible_compute_capability() or DEFAULT_COMPUTE_CAPABILITY

    def step(x):
        out = jax.ShapeDtypeStruct((1,), work.dtype)
        nothing = record.Launch(kernel, _One(x), _One(out), 1, 1, constants=None)
        return bridge.call(nothing, compute_capability=capability)

    return Prepared(functools.partial(jax.jit(step), work.x), nbytes=0)


class _One(NamedTuple):
    array: Any


def _nothing(inputs, outputs, C: "tl.constexpr"):  # noqa: F821 (for Triton)
    pass


# ---- JAX peers ---------------------------------------------------------------------


def _nnx_conv(work: Workload, path: Path | None) -> Prepared:
    """A depthwise `flax.nnx.Conv` and silu."""
    nnx = imports.load("flax.nnx", path)
    layer = nnx.Conv(
        work.dim,
        work.dim,
        work.width,
        padding=((work.width - 1, 0),),
        feature_group_count=work.dim,
        dtype=work.dtype,
        param_dtype=work.dtype,
        rngs=nnx.Rngs(0),
    )
    graph, _ = nnx.split(layer)

    def forward(x, weight, bias):
        state = nnx.State({"kernel": weight.T[:, None], "bias": bias})
        return jax.nn.silu(nnx.merge(graph, state)(x))

    return _jax_rows(work, forward)


def _mamba2_jax(work: Workload, path: Path | None) -> Prepared:
    """The conv of mamba2-jax (of bonsai's Mamba2, too) and silu."""
    modeling = imports.load("mamba2_jax.modeling", path)
    nnx = imports.load("flax.nnx", None)
    layer = modeling.DepthwiseConv1d(work.dim, work.width, rngs=nnx.Rngs(0))
    graph, _ = nnx.split(layer)

    def conv(x, weight, bias, states=None):
        state = nnx.State({"conv": {"kernel": weight.T[:, None], "bias": bias}})
        out, states = nnx.merge(graph, state)(x, states)
        return jax.nn.silu(out), states

    if work.op != "update":
        return _jax_rows(work, lambda *args: conv(*args)[0])

    @functools.partial(jax.jit, donate_argnums=0)
    def step(states, x, weight, bias):
        out, states = conv(x[:, None], weight, bias, states)
        return out[:, 0], states

    gathered = work.states()[work.cache_indices].swapaxes(1, 2)
    holder = [jnp.array(gathered)]

    def call():
        out, holder[0] = step(holder[0], work.x, work.weight, work.bias)
        return out, holder[0]

    def view(result):
        out, states = result
        return {"out": work.pick(out), "states": work.pick(states.swapaxes(1, 2))}

    by = programs.implementation(step.lower(holder[0], work.x, work.weight, work.bias))
    return Prepared(
        call, lambda result: result[0].block_until_ready(), view, implementation=by
    )


def _tpu_inference(work: Workload, path: Path | None) -> Prepared:
    """Tpu-inference's `ragged_conv1d`, and silu as its layer applies it."""
    name = "tpu_inference.layers.common.ragged_conv1d_jax"
    module = imports.load(name, path)
    batch = len(work.lengths)
    decodes = sum(length == 1 for length in work.lengths)
    # Its three numbers: rows that decode, those or whole prefills, all rows.
    distribution = jnp.array([decodes, decodes, batch], jnp.int32)

    def step(states, x, weight, bias, offsets, slots, seen, distribution):
        out, states = module.ragged_conv1d(
            x,
            states,
            weight[:, None],
            bias,
            offsets,
            slots,
            distribution,
            seen,
            kernel_size=work.width,
        )
        return jax.nn.silu(out), states

    return with_states(
        work,
        step,
        work.x,
        work.weight,
        work.bias,
        jnp.asarray(work.offsets),
        jnp.asarray(work.cache_indices),
        jnp.asarray(work.has_initial_state),
        distribution,
    )


def _jax_linear_attention(work: Workload, path: Path | None) -> Prepared:
    """The short conv of jax-linear-attention: its kernels on a GPU, else plain JAX."""
    module = imports.load("jla.layers.conv", path)
    equinox = imports.load("equinox", None)
    # By name, since it would else fall back in silence.
    impl = "mosaic_gpu" if jax.default_backend() == "gpu" else "xla"
    layer = module.ShortConv(work.dim, work.width, use_bias=True, impl=impl)

    def forward(x, weight, bias):
        def parameters(layer):
            return layer.weight, layer.bias

        return equinox.tree_at(parameters, layer, (weight, bias))(x)[0]

    return _jax_rows(work, forward)


# ---- PyTorch peers -----------------------------------------------------------------


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


def _torch_conv(work: Workload, path: Path | None) -> Prepared:
    """A depthwise `F.conv1d` of `(B, D, T)` and silu."""
    torch = _Tensors(work)
    functional = torch.torch.nn.functional

    def forward(x, weight, bias):
        padded = functional.pad(x, (work.width - 1, 0))
        out = functional.conv1d(padded, weight[:, None], bias, groups=work.dim)
        return functional.silu(out)

    return torch.rows(forward, channel_last=False)


def _torch_roll(work: Workload, path: Path | None) -> Prepared:
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


def _vllm(work: Workload, path: Path | None) -> Prepared:
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


def _fla(work: Workload, path: Path | None) -> Prepared:
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


def _dao(work: Workload, path: Path | None) -> Prepared:
    """Dao-AILab's CUDA kernels, channel-last; a source tree is built where it lies."""
    torch = _Tensors(work)
    if path is not None and (path / "csrc").is_dir():
        _build_dao(path)
    module = imports.load("causal_conv1d", path)
    if work.op == "update":
        states = torch.states().transpose(1, 2).contiguous()
        slots = torch.tensor(work.cache_indices)

        def update():
            return module.causal_conv1d_update(
                torch.x,
                states,
                torch.weight,
                torch.bias,
                "silu",
                conv_state_indices=slots,
            )

        def view(out):
            left = states[slots.long()].transpose(1, 2)
            return {"out": torch.pick(out), "states": torch.pick(left)}

        return torch.prepared(update, view)
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


# ---- Who takes part ----------------------------------------------------------------

_ROWS = ("dense", "gradient")
_GPU = ("gpu",)

CANDIDATES = (
    Candidate(OURS, ours, ("packed", "update", *_ROWS)),
    Candidate(
        BY_XLA,
        functools.partial(ours, implementation="xla"),
        ("packed", "update", *_ROWS),
        platforms=_GPU,
    ),
    Candidate("flax nnx.Conv + silu", _nnx_conv, _ROWS),
    Candidate("mamba2-jax", _mamba2_jax, ("update", *_ROWS), package="mamba2-jax"),
    Candidate(
        "tpu-inference", _tpu_inference, ("packed", "update"), package="tpu-inference"
    ),
    Candidate(
        "jax-linear-attention",
        _jax_linear_attention,
        _ROWS,
        package="jax-linear-attention",
    ),
    Candidate("torch F.conv1d + silu", _torch_conv, _ROWS),
    Candidate("torch, padded or rolled", _torch_roll, ("update", "dense")),
    Candidate("vLLM", _vllm, ("packed", "update"), platforms=_GPU, package="vllm"),
    Candidate(
        "flash-linear-attention",
        _fla,
        ("packed", "update", *_ROWS),
        platforms=_GPU,
        package="fla",
    ),
    Candidate(
        "causal-conv1d",
        _dao,
        ("update", *_ROWS),
        platforms=_GPU,
        package="causal-conv1d",
    ),
)
YARDSTICKS = {
    "copy": Candidate("copy", copy, ()),
    "memcpy": Candidate("memcpy", memcpy, ()),
    "silu(x)": Candidate("silu(x)", silu, ()),
    "empty kernel": Candidate("empty kernel", launch, ()),
}
