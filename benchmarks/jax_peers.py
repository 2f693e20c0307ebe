"""Peers that run under JAX. Each function prepares a `Workload`."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks import imports, jitted, programs
from benchmarks.timing import Prepared
from benchmarks.workload import Workload


def nnx_conv(work: Workload, path: Path | None) -> Prepared:
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

    return jitted.rows(work, forward)


def mamba2_jax(work: Workload, path: Path | None) -> Prepared:
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
        return jitted.rows(work, lambda *args: conv(*args)[0])

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


def tpu_inference(work: Workload, path: Path | None) -> Prepared:
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

    return jitted.with_states(
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


def jax_linear_attention(work: Workload, path: Path | None) -> Prepared:
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

    return jitted.rows(work, forward)
