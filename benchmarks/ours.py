"""This package as a candidate: its ops, and what surrounds them in a model."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import jitted
from benchmarks.timing import Prepared
from benchmarks.workload import Workload
from jax_causal_conv import (
    build_metadata,
    causal_conv1d,
    causal_conv1d_fn,
    causal_conv1d_update,
)


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

        return jitted.with_states(work, packed, x, weight, bias, offsets, options)
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
        return jitted.with_states(work, update, x, weight, bias, slots)
    return jitted.rows(
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
    return jitted.with_states(work, packed, x, *arguments)
