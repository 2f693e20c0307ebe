"""Everybody who can compute an `SsdWorkload`: this package and the peers.

As in `peers`, each gets its inputs in the layout that suits it before the clock starts.
All but jax-linear-attention apply bias and softplus of dt themselves, to dt as the
projection leaves it; that one gets `SsdWorkload.steps`.
"""

import dataclasses
import functools
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import imports, programs
from benchmarks.cases import BY_XLA, OURS, Candidate
from benchmarks.ssd_workload import SsdWorkload
from benchmarks.tensors import Torch
from benchmarks.timing import Prepared
from benchmarks.vllm import vllm_ops
from jax_causal_conv import ssd, ssd_packed

# What Mamba2's configuration says; vLLM and mamba_ssm tune their kernels for it.
_CHUNK = 256

# ---- This package ------------------------------------------------------------------


def ours(
    work: SsdWorkload,
    path: Path | None = None,
    *,
    implementation: str | None = None,
    precision: str | None = None,
) -> Prepared:
    """This package; with "xla", what XLA makes of it; with a precision, by that."""
    options: dict[str, Any] = {
        "dt_softplus": True,
        "implementation": implementation,
        "precision": precision,
    }
    arrays = {"dt": work.dt, "dt_bias": work.dt_bias}
    arrays |= {"x": work.x, "A": work.A, "B": work.B, "C": work.C, "D": work.D}
    if work.op == "ssd":
        return _jax_rows(work, lambda arrays: (ssd(**arrays, **options), None), arrays)
    arrays |= {
        "query_start_loc": jnp.asarray(work.offsets),
        "cache_indices": jnp.asarray(work.cache_indices),
        "has_initial_state": jnp.asarray(work.has_initial_state),
    }
    options["max_prefills"] = work.prompts

    def packed(states, arrays):
        return ssd_packed(ssm_states=states, **arrays, **options)

    step = jax.jit(packed, donate_argnums=0)
    holder = [work.states()]
    by = programs.implementation(step.lower(holder[0], arrays))

    def call():
        y, holder[0] = step(holder[0], arrays)
        return y, holder[0]

    def view(result):
        y, states = result
        return {
            "y": work.pick(y),
            "states": work.pick_states(states, work.cache_indices),
            "unused": work.pick_states(states, work.unused_slots),
        }

    # Waiting for the cache would keep it from being donated to the next call.
    def wait(result):
        jax.block_until_ready(result[0])

    return Prepared(call, wait, view, implementation=by)


def _jax_rows(work: SsdWorkload, function: Callable, arrays: dict) -> Prepared:
    """`y, final states = function(arrays)`, those with an axis of tokens in rows.

    Final states are `(B, H, P, K)`, or None.
    """
    rows, length = len(work.lengths), work.lengths[0]
    by_token = {
        name: array.reshape(rows, length, *array.shape[1:])
        for name, array in arrays.items()
        if name in ("x", "dt", "B", "C")
    }
    arrays = arrays | by_token
    step = jax.jit(function)
    by = programs.implementation(step.lower(arrays))

    def view(result):
        y, states = result
        seen = {"y": work.pick(y.reshape(work.x.shape))}
        if states is not None:
            seen["states"] = work.pick_states(states, np.arange(rows))
        return seen

    return Prepared(functools.partial(step, arrays), view=view, implementation=by)


# ---- Peers -------------------------------------------------------------------------


def _jax_linear_attention(work: SsdWorkload, path: Path | None) -> Prepared:
    """Its `mamba2_ssd` of equal rows, which knows neither slots nor packed batches."""
    keeps_state = _keeps_float32_state(work)
    module = imports.load("jla.layers.ssm", path)
    # By name, since it would else fall back in silence.
    impl = "mosaic_gpu" if jax.default_backend() == "gpu" else "auto"

    def rows(arrays):
        y, states = module.mamba2_ssd(
            arrays["x"],
            arrays["dt"],
            arrays["A"],
            arrays["B"],
            arrays["C"],
            d=arrays["D"],
            output_final_state=keeps_state,
            impl=impl,
        )
        return y, states.swapaxes(2, 3) if keeps_state else None

    arrays = {"x": work.x, "dt": work.steps, "A": work.A}
    arrays |= {"B": work.B, "C": work.C, "D": work.D}
    return _jax_rows(work, rows, arrays)


def _keeps_float32_state(work: SsdWorkload) -> bool:
    """Whether a peer must return states, which it does in float32 alone."""
    keeps = work.op == "ssd_packed"
    if keeps and work.state_dtype != "float32":
        raise imports.Absent("its states are float32")
    return keeps


class Tensors(Torch):
    """A workload's inputs as tensors, and the way back."""

    def __init__(self, work: SsdWorkload):
        super().__init__()
        self.work = work
        inputs = work.x, work.dt, work.B, work.C, work.A, work.D, work.dt_bias
        self.x, self.dt, self.B, self.C, self.A, self.D, self.dt_bias = map(
            self.tensor, inputs
        )
        self.slots = self.tensor(work.cache_indices)

    def states(self) -> Any:
        return self.tensor(self.work.states())

    def pick(self, tensor) -> np.ndarray:
        """The compared heads of a tensor `(…, H, P)`, in NumPy."""
        heads = self.torch.as_tensor(self.work.compared, device=tensor.device)
        return tensor.index_select(tensor.dim() - 2, heads).float().cpu().numpy()

    def pick_states(self, states, slots: np.ndarray) -> np.ndarray:
        """The compared heads of some of the states `(S, H, P, K)`, in NumPy."""
        slots, heads = (
            self.torch.as_tensor(a, device=states.device).long()
            for a in (slots, self.work.compared)
        )
        return states[slots[:, None], heads].float().cpu().numpy()

    def cached(self, call: Callable, states) -> Prepared:
        """`y = call()` that updates the cache in place."""

        def view(y):
            return {
                "y": self.pick(y),
                "states": self.pick_states(states, self.work.cache_indices),
                "unused": self.pick_states(states, self.work.unused_slots),
            }

        return self.prepared(call, view)

    def decode_arguments(self, rows: int) -> dict[str, Any]:
        """What both `selective_state_update`s take for the first rows, but the states.

        A, D and dt are the same for all channels of a head: stride 0, which the
        kernels look for.
        """
        heads, dim, size = self.work.heads, self.work.dim, self.work.state_size
        return {
            "x": self.x[:rows],
            "dt": self.dt[:rows, :, None].expand(-1, -1, dim),
            "A": self.A[:, None, None].expand(heads, dim, size),
            "B": self.B[:rows],
            "C": self.C[:rows],
            "D": self.D[:, None].expand(heads, dim),
            "dt_bias": self.dt_bias[:, None].expand(heads, dim),
            "dt_softplus": True,
            "state_batch_indices": self.slots[:rows],
        }


def _vllm(work: SsdWorkload, path: Path | None) -> Prepared:
    """The Triton kernels of vLLM: one for decodes, and five for prompts.

    As its mixer calls them, for a batch that its scheduler has put in order: decodes
    come first.
    """
    torch = Tensors(work)
    states = torch.states()
    out = torch.torch.empty_like(torch.x)
    decodes = len(work.lengths) - work.prompts
    if any(work.lengths[i] > 1 for i in range(decodes)):
        raise ValueError("decodes do not come first")
    decode = torch.decode_arguments(decodes)
    prompts = vllm_prompts(torch, decodes)
    if decodes:
        update = vllm_ops("mamba_ssm", path).selective_state_update
    if work.prompts:
        scan = vllm_ops("ssd_combined", path).mamba_chunk_scan_combined_varlen

    def call():
        if decodes:
            update(states, out=out[:decodes], **decode)
        if work.prompts:
            scan(out=out[decodes:], final_states_out=states, **prompts)
        return out

    return torch.cached(call, states)


def vllm_prompts(torch: Tensors, decodes: int) -> dict[str, Any]:
    """What its scan takes for the prompts behind the decodes, and its metadata."""
    work = torch.work
    lengths = np.array(work.lengths[decodes:], np.int32)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    chunks = -(-lengths // _CHUNK)
    starts = [
        start + _CHUNK * np.arange(count)
        for start, count in zip(offsets[:-1], chunks, strict=True)
    ]
    numbers = {
        "cu_seqlens": offsets,
        "cu_chunk_seqlens": np.concatenate([*starts, offsets[-1:]]),
        "last_chunk_indices": np.cumsum(chunks) - 1,
        "seq_idx": np.repeat(np.arange(len(chunks)), chunks),
    }
    return {
        "x": torch.x[decodes:],
        "dt": torch.dt[decodes:],
        "A": torch.A,
        "B": torch.B[decodes:],
        "C": torch.C[decodes:],
        "chunk_size": _CHUNK,
        "D": torch.D,
        "dt_bias": torch.dt_bias,
        "dt_softplus": True,
        "state_dtype": getattr(torch.torch, work.state_dtype),
        "final_state_indices": torch.slots[decodes:],
        **{name: torch.tensor(a.astype(np.int32)) for name, a in numbers.items()},
    }


def _mamba_ssm(work: SsdWorkload, path: Path | None) -> Prepared:
    """The Triton kernels of mamba_ssm: decodes, or fresh rows of one length."""
    torch = Tensors(work)
    if "ssd_decode" in work.ops:
        module = _mamba_ssm_ops("selective_state_update", path)
        states, arguments = torch.states(), torch.decode_arguments(len(work.lengths))
        return torch.cached(
            lambda: module.selective_state_update(states, **arguments), states
        )
    keeps_state = _keeps_float32_state(work)
    module = _mamba_ssm_ops("ssd_combined", path)
    rows, length = len(work.lengths), work.lengths[0]
    x, dt, B, C = (
        tensor.reshape(rows, length, *tensor.shape[1:])
        for tensor in (torch.x, torch.dt, torch.B, torch.C)
    )

    def call():
        return module.mamba_chunk_scan_combined(
            x,
            dt,
            torch.A,
            B,
            C,
            _CHUNK,
            D=torch.D,
            dt_bias=torch.dt_bias,
            dt_softplus=True,
            return_final_states=keeps_state,
        )

    def view(result):
        y, states = result if keeps_state else (result, None)
        seen = {"y": torch.pick(y.reshape(work.x.shape))}
        if states is not None:
            seen["states"] = torch.pick_states(states, np.arange(rows))
        return seen

    return torch.prepared(call, view)


def mamba_ssm_gradients(
    work: SsdWorkload, path: Path | None, arrays: dict[str, jax.Array], dy: jax.Array
) -> Prepared:
    """Its scan of equal rows and, from y's cotangent, the gradients of all arrays."""
    torch = Tensors(work)
    module = _mamba_ssm_ops("ssd_combined", path)
    inputs = {k: torch.tensor(array).requires_grad_() for k, array in arrays.items()}
    names = ("x", "dt", "A", "B", "C")
    cotangent = torch.tensor(dy)

    def call():
        y = module.mamba_chunk_scan_combined(
            *(inputs[name] for name in names),
            _CHUNK,
            D=inputs["D"],
            dt_bias=inputs["dt_bias"],
            dt_softplus=True,
        )
        return y, *torch.torch.autograd.grad(y, tuple(inputs.values()), cotangent)

    def view(result):
        return {"y": torch.pick(result[0].detach().reshape(work.x.shape))}

    one = torch.prepared(call, view, gradient=True)
    return dataclasses.replace(one, nbytes=0)


def _mamba_ssm_ops(name: str, path: Path | None) -> types.ModuleType:
    """A module of its Triton ops; from a path without what the package imports."""
    full = f"mamba_ssm.ops.triton.{name}"
    if path is None:
        return imports.load(full, None)
    with imports.stand_in("mamba_ssm", {}, path):
        return imports.load(full, path)


# ---- Who takes part ----------------------------------------------------------------

_GPU = ("gpu",)

ROUNDING = f"{OURS}, rounding"
CANDIDATES = (
    Candidate(OURS, ours, ("ssd_packed", "ssd")),
    Candidate(
        ROUNDING,
        functools.partial(ours, precision="default"),
        ("ssd_packed", "ssd"),
        platforms=_GPU,
    ),
    Candidate(
        BY_XLA,
        functools.partial(ours, implementation="xla"),
        ("ssd_packed", "ssd"),
        platforms=_GPU,
    ),
    Candidate("vLLM", _vllm, ("ssd_packed",), platforms=_GPU, package="vllm"),
    Candidate(
        "mamba_ssm",
        _mamba_ssm,
        ("ssd_decode", "ssd_rows", "ssd"),
        platforms=_GPU,
        package="mamba-ssm",
    ),
    Candidate(
        "jax-linear-attention",
        _jax_linear_attention,
        ("ssd_rows", "ssd"),
        package="jax-linear-attention",
    ),
)
