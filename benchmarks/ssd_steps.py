"""Whole steps around the SSD: its gradients, and states that move."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import imports, programs, ssd_peers
from benchmarks.cases import OURS, Case, Options
from benchmarks.ssd_workload import SsdWorkload
from benchmarks.timing import Prepared
from benchmarks.workload import normal
from jax_causal_conv import ssd, ssd_packed
from jax_causal_conv.mamba2 import DraftStates

_JAX_PEER = "jax-linear-attention"


def training_case(name: str, work: SsdWorkload, options: Options) -> Case:
    """Forward and backward of equal rows, beside the peers'.

    From y's cotangent, which is there before, y and the gradients of x, dt, A, B, C, D
    and, but for jax-linear-attention, which gets `SsdWorkload.steps`, of the bias of
    dt. Here y is compared with float64; the tests compare the gradients.
    """
    rows, length = len(work.lengths), work.lengths[0]

    def in_rows(array):
        return array.reshape(rows, length, *array.shape[1:])

    arrays = {"A": work.A, "D": work.D}
    arrays |= {"x": in_rows(work.x), "B": in_rows(work.B), "C": in_rows(work.C)}
    dy = normal(6, arrays["x"].shape, work.dtype)
    raw = {"dt": in_rows(work.dt), "dt_bias": work.dt_bias}
    steps = {"dt": in_rows(work.steps)}

    def ours(arrays, **options):
        return ssd(**arrays, dt_softplus=True, **options)

    def prepared(function: Callable, dt: dict[str, jax.Array]) -> Prepared:
        @jax.jit
        def step(arrays, dy):
            y, pull = jax.vjp(function, arrays)
            return y, *pull(dy)

        given = arrays | dt, dy
        by = programs.implementation(step.lower(*given))

        def view(result):
            return {"y": work.pick(result[0].reshape(work.x.shape))}

        call = functools.partial(step, *given)
        return Prepared(call, view=view, nbytes=0, implementation=by)

    def jax_linear_attention() -> Prepared:
        module = imports.load("jla.layers.ssm", options.paths.get(_JAX_PEER))
        impl = "mosaic_gpu" if jax.default_backend() == "gpu" else "auto"

        def peer(arrays):
            given = (arrays[name] for name in ("x", "dt", "A", "B", "C"))
            return module.mamba2_ssd(*given, d=arrays["D"], impl=impl)[0]

        return prepared(peer, steps)

    def mamba_ssm() -> Prepared:
        path = options.paths.get("mamba-ssm")
        return ssd_peers.mamba_ssm_gradients(work, path, arrays | raw, dy)

    prepare: dict[str, Callable[[], Prepared]] = {
        OURS: functools.partial(prepared, ours, raw),
        ssd_peers.ROUNDING: functools.partial(
            prepared, functools.partial(ours, precision="default"), raw
        ),
    }
    if options.with_peers:
        prepare[_JAX_PEER] = jax_linear_attention
        if options.on_gpu:
            prepare["mamba_ssm"] = mamba_ssm
    return Case("ssd_training", name, work.tokens, work.dtype, prepare, work)


_COPY = "copy"


def _prepared_copies(work: SsdWorkload, copies: int) -> Prepared:
    """What a cache with a state after each token would move, and nothing else.

    That is the other way to take drafts back: a step writes as many states as tokens.
    """
    shape = len(work.lengths), work.heads, work.dim, work.state_size
    states = jnp.ones(shape, work.state_dtype)

    def copied(states):
        return jnp.broadcast_to(states[:, None], (shape[0], copies, *shape[1:]))

    step = jax.jit(copied)
    by = programs.implementation(step.lower(states))
    return Prepared(functools.partial(step, states), implementation=by)


def moves_case(name: str, work: SsdWorkload, drafts: int) -> Case:
    """What a fork, a snapshot and a rollback cost beside a plain step of the SSD."""
    count = len(work.lengths)
    others = np.setdiff1d(np.arange(2 * count + 8), work.cache_indices)[:count]
    ends = np.array(work.lengths) // 2

    def prepared(
        slots: int, queries: int = 1, max_drafts: int = 0, **moves
    ) -> Prepared:
        lengths = np.array(work.lengths) * queries
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        tokens = np.arange(offsets[-1]) % work.tokens
        arrays = {name: getattr(work, name)[tokens] for name in ("x", "dt", "B", "C")}
        arrays |= {"A": work.A, "D": work.D, "dt_bias": work.dt_bias} | moves
        arrays |= {"query_start_loc": offsets, "cache_indices": work.cache_indices}
        arrays["has_initial_state"] = np.ones(count, bool)
        shape = slots, work.heads, work.dim, work.state_size
        states = jnp.ones(shape, work.state_dtype)
        if max_drafts:
            recent = slots, max_drafts
            states = DraftStates(
                states,
                jnp.ones((*recent, work.heads, work.dim), work.dtype),
                jnp.ones((*recent, work.heads)),
                jnp.ones((*recent, work.groups, work.state_size), work.dtype),
            )
        prompts = int((lengths > 1 + max_drafts).sum())

        def packed(states, arrays):
            options = {"dt_softplus": True, "max_prefills": prompts}
            return ssd_packed(ssm_states=states, **arrays, **options)

        step = jax.jit(packed, donate_argnums=0)
        holder = [states]
        by = programs.implementation(step.lower(holder[0], arrays))

        def call():
            y, holder[0] = step(holder[0], arrays)
            return y

        return Prepared(call, implementation=by)

    slots = 2 * count + 8
    prepare = {
        "plain": functools.partial(prepared, slots),
        "forks": functools.partial(prepared, slots, write_indices=others),
        "snapshots": functools.partial(
            prepared, slots, snapshot_ends=ends, snapshot_indices=others
        ),
    }
    if work.prompts == 0:
        rejected = np.arange(count) % (drafts + 1)
        prepare[f"{1 + drafts} tokens, by chunks"] = functools.partial(
            prepared, slots, 1 + drafts
        )
        prepare[f"{drafts} drafts, some rejected"] = functools.partial(
            prepared, slots, 1 + drafts, drafts, num_rejected_tokens=rejected
        )
        prepare[f"{_COPY}: a state read, {1 + drafts} written"] = functools.partial(
            _prepared_copies, work, 1 + drafts
        )
    return Case(
        "moves",
        name,
        work.tokens,
        work.dtype,
        prepare,
        yardstick="plain",
        ours=tuple(name for name in prepare if not name.startswith(_COPY)),
    )
