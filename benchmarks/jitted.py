"""Functions of JAX that compute a `Workload`, made ready to be timed."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import programs
from benchmarks.timing import Prepared
from benchmarks.workload import Workload


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


def rows(work: Workload, forward: Callable) -> Prepared:
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
