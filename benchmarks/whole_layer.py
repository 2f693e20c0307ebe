"""A layer's step between its projections: the conv, then the SSD.

Of Mamba2-2.7B, for a mixed batch. Both read their columns out of what the in-projection
leaves, z | x | B | C | dt, as serving does. Sequences of one token decode, from their
states; longer ones are prompts and start from zero.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import programs
from benchmarks.cases import OURS, Candidate
from benchmarks.ssd_peers import Tensors, vllm_prompts
from benchmarks.ssd_workload import SsdWorkload
from benchmarks.timing import Prepared
from benchmarks.vllm import vllm_metadata, vllm_ops
from benchmarks.workload import Workload, compare
from jax_causal_conv import build_metadata, causal_conv1d_fn, ssd_packed


@dataclasses.dataclass(frozen=True)
class LayerWorkload:
    """One step of a layer.

    Attributes:
        lengths: tokens of each sequence.
        dtype: of the projection and the conv's cache.
        heads: H.
        dim: P, channels of a head.
        state_size: K; there is one group.
        width: W.
    """

    lengths: tuple[int, ...]
    dtype: str = "bfloat16"
    heads: int = 80
    dim: int = 64
    state_size: int = 128
    width: int = 4

    ops = ("layer",)

    @property
    def split(self) -> tuple[int, int, int]:
        """Channels of x, B and C."""
        return self.heads * self.dim, self.state_size, self.state_size

    @functools.cached_property
    def conv(self) -> Workload:
        """The conv's inputs."""
        slots = self.ssd.slots
        return Workload(
            "packed", self.lengths, sum(self.split), self.width, self.dtype, slots
        )

    @functools.cached_property
    def ssd(self) -> SsdWorkload:
        """The SSD's, but for x, B and C; slots, too."""
        return SsdWorkload(
            "ssd_packed",
            self.lengths,
            self.dtype,
            heads=self.heads,
            dim=self.dim,
            state_size=self.state_size,
        )

    @functools.cached_property
    def projected(self) -> jax.Array:
        """What the in-projection leaves; z, which nobody is to read, is NaN."""
        z = jnp.full((self.conv.tokens, self.split[0]), np.nan, self.dtype)
        return jnp.concatenate([z, self.conv.x, self.ssd.dt], axis=1)

    @property
    def nbytes(self) -> int:
        """Bytes that must be read or written once: between the two ops nothing."""
        itemsize = jnp.dtype(self.dtype).itemsize
        of_token = sum(self.split) + self.heads + self.split[0]
        states = self.conv.dim * (self.width - 1) * itemsize
        states += self.heads * self.dim * self.state_size * 4
        moved = 2 * len(self.lengths) - self.ssd.prompts
        filters = self.conv.dim * (self.width + 1) * itemsize
        return self.conv.tokens * of_token * itemsize + moved * states + filters

    # ---- The exact answer ----------------------------------------------------------

    @functools.cached_property
    def channels(self) -> np.ndarray:
        """The conv's channels that the compared heads of the SSD depend on."""
        heads = self.ssd.compared[:, None] * self.dim + np.arange(self.dim)
        shared = np.arange(self.split[0], sum(self.split))
        return np.concatenate([heads.ravel(), shared])

    @functools.cached_property
    def expected(self) -> dict[str, np.ndarray]:
        """Results in float64: those of the SSD, and "conv_states" `(N, W-1, C)`."""
        x, states = (
            np.asarray(a[..., self.channels].astype(jnp.float32), np.float64)
            for a in (self.conv.x, self.conv.states()[self.ssd.cache_indices])
        )
        weight, bias = (
            np.asarray(a[self.channels].astype(jnp.float32), np.float64)
            for a in (self.conv.weight, self.conv.bias)
        )
        past = np.where(self.ssd.has_initial_state[:, None, None], states, 0)
        rows = [
            np.concatenate(pair)
            for pair in zip(past, np.split(x, self.ssd.offsets[1:-1]), strict=True)
        ]
        windows = [
            np.lib.stride_tricks.sliding_window_view(row, self.width, axis=0)
            for row in rows
        ]
        pre = (np.concatenate(windows) * weight).sum(-1) + bias
        exact = self._ssd_of(pre / (1 + np.exp(-pre))).expected
        return exact | {"conv_states": np.stack([r[1 - self.width :] for r in rows])}

    def _ssd_of(self, filtered: np.ndarray) -> SsdWorkload:
        """The SSD of what the conv makes; heads that are not compared are zero."""
        tokens, heads = self.conv.tokens, self.ssd.compared
        x, B, C = np.split(
            filtered, np.cumsum([len(heads) * self.dim, self.state_size]), 1
        )
        every = np.zeros((tokens, self.heads, self.dim), np.float32)
        every[:, heads] = x.reshape(tokens, len(heads), self.dim)
        work = dataclasses.replace(self.ssd)
        vars(work).update(x=every, B=jnp.asarray(B[:, None]), C=jnp.asarray(C[:, None]))
        return work

    def errors(self, got: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Of each result the largest difference over the largest value.

        Raises:
            WrongResult: one is too large, or a result has the wrong shape.
        """
        got = dict(got)
        left = {"conv_states": got.pop("conv_states")}
        own = dataclasses.replace(self.ssd)
        vars(own)["expected"] = self.expected
        return own.errors(got) | compare(left, self.expected, 0.0)


# ---- Who takes part ----------------------------------------------------------------


def ours(
    work: LayerWorkload, path: Path | None = None, *, precision: str | None = None
) -> Prepared:
    """This package: both ops in one jitted program."""
    shared = {
        "query_start_loc": jnp.asarray(work.ssd.offsets),
        "cache_indices": jnp.asarray(work.ssd.cache_indices),
        "has_initial_state": jnp.asarray(work.ssd.has_initial_state),
    }
    metadata = build_metadata(work.ssd.offsets, work.conv.tokens)
    arrays = {
        "projected": work.projected,
        "filters": (work.conv.weight, work.conv.bias),
        "ssd": {name: getattr(work.ssd, name) for name in ("A", "D", "dt_bias")},
        "shared": shared,
        "metadata": jax.tree.map(jnp.asarray, metadata),
    }

    def layer(caches, arrays):
        conv_states, ssm_states = caches
        projected, shared = arrays["projected"], arrays["shared"]
        (x, B, C), conv_states = causal_conv1d_fn(
            projected,
            *arrays["filters"],
            conv_states,
            metadata=arrays["metadata"],
            channel_offset=work.split[0],
            split=work.split,
            **shared,
        )
        y, ssm_states = ssd_packed(
            x.reshape(-1, work.heads, work.dim),
            projected[:, -work.heads :],
            B=B[:, None],
            C=C[:, None],
            ssm_states=ssm_states,
            max_prefills=work.ssd.prompts,
            dt_softplus=True,
            precision=precision,
            **arrays["ssd"],
            **shared,
        )
        return y, (conv_states, ssm_states)

    step = jax.jit(layer, donate_argnums=0)
    holder = [(work.conv.states(), work.ssd.states())]
    by = programs.implementation(step.lower(holder[0], arrays))

    def call():
        y, holder[0] = step(holder[0], arrays)
        return y, holder[0]

    def view(result):
        y, (conv_states, ssm_states) = result
        slots = work.ssd.cache_indices
        left = jnp.take(conv_states, slots, axis=0)[..., work.channels]
        return {
            "y": work.ssd.pick(y),
            "states": work.ssd.pick_states(ssm_states, slots),
            "unused": work.ssd.pick_states(ssm_states, work.ssd.unused_slots),
            "conv_states": np.asarray(left.astype(jnp.float32)),
        }

    # Waiting for the caches would keep them from being donated to the next call.
    def wait(result):
        jax.block_until_ready(result[0])

    return Prepared(call, wait, view, implementation=by)


def _vllm(work: LayerWorkload, path: Path | None) -> Prepared:
    """The Triton kernels of vLLM, in the order in which its mixer calls them.

    Decodes and prompts apart, each through the conv and the SSD; metadata is made
    before. The decodes' conv gets an output of its own: in place, it would filter what
    it has filtered in the call before.
    """
    conv = vllm_ops("causal_conv1d", path)
    torch = Tensors(work.ssd)
    size = work.state_size
    decodes = len(work.lengths) - work.ssd.prompts
    if any(work.lengths[i] > 1 for i in range(decodes)):
        raise ValueError("decodes do not come first")
    projected = torch.tensor(work.projected)
    xbc, dt = projected[:, work.split[0] : -work.heads], projected[:, -work.heads :]
    filters = torch.tensor(work.conv.weight), torch.tensor(work.conv.bias)
    conv_cache, ssm_states = torch.tensor(work.conv.states()), torch.states()
    conv_states = conv_cache.transpose(1, 2)
    out = torch.torch.empty_like(torch.x)
    filtered = torch.torch.empty_like(xbc[:decodes])
    seen = torch.tensor(work.ssd.has_initial_state)[decodes:]

    def apart(xbc, dt) -> dict[str, Any]:
        x, B, C = torch.torch.split(xbc, work.split, dim=-1)
        return {
            "x": x.view(-1, work.heads, work.dim),
            "dt": dt,
            "B": B.view(-1, 1, size),
            "C": C.view(-1, 1, size),
        }

    def fixed(arguments: dict[str, Any]) -> dict[str, Any]:
        return {k: a for k, a in arguments.items() if k not in ("x", "dt", "B", "C")}

    parts = []
    if work.ssd.prompts:
        scan = vllm_ops("ssd_combined", path).mamba_chunk_scan_combined_varlen
        of_prompts = fixed(vllm_prompts(torch, decodes))
        metadata = vllm_metadata(torch, work.lengths[decodes:])

        def prompts():
            rows = conv.causal_conv1d_fn(
                xbc[decodes:].transpose(0, 1),
                *filters,
                conv_states,
                of_prompts["cu_seqlens"],
                cache_indices=torch.slots[decodes:],
                has_initial_state=seen,
                activation="silu",
                metadata=metadata,
            ).transpose(0, 1)
            own = apart(rows, dt[decodes:])
            scan(**own, **of_prompts, out=out[decodes:], final_states_out=ssm_states)

        parts.append(prompts)
    if decodes:
        update = vllm_ops("mamba_ssm", path).selective_state_update
        of_decodes = fixed(torch.decode_arguments(decodes))
        of_channels = dt[:decodes, :, None].expand(-1, -1, work.dim)

        def decode():
            rows = conv.causal_conv1d_update(
                xbc[:decodes],
                conv_states,
                *filters,
                "silu",
                conv_state_indices=torch.slots[:decodes],
                out=filtered,
            )
            update(
                ssm_states, **apart(rows, of_channels), **of_decodes, out=out[:decodes]
            )

        parts.append(decode)

    def call():
        for part in parts:
            part()
        return out

    one = torch.cached(call, ssm_states)
    channels = torch.tensor(work.channels).long()

    def view(y):
        left = conv_cache[torch.slots.long()][..., channels]
        return one.view(y) | {"conv_states": left.float().cpu().numpy()}

    return dataclasses.replace(one, view=view)


CANDIDATES = (
    Candidate(OURS, ours, ("layer",)),
    Candidate(
        f"{OURS}, rounding",
        functools.partial(ours, precision="default"),
        ("layer",),
        platforms=("gpu",),
    ),
    Candidate("vLLM", _vllm, ("layer",), platforms=("gpu",), package="vllm"),
)
