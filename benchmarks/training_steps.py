"""A whole training step of a Mamba2 model: forward, loss, backward and AdamW.

Parameters and AdamW's moments are float32, activations of the case's dtype. The layers
are scanned over their stacked parameters, so that XLA compiles one of them and not 48,
and begin with the same numbers. All candidates of a case go on from one state, which
each call donates: a second one would not fit beside it.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from benchmarks import programs
from benchmarks.cases import OURS, Case, Options
from benchmarks.serving import SHAPES
from benchmarks.timing import Prepared
from jax_causal_conv.arguments import Implementation
from jax_causal_conv.mamba2 import Mamba2Config, Mamba2LM

# What the backward pass finds in memory of each layer, beside its input.
_in_scan = functools.partial(jax.checkpoint, prevent_cse=False)
KEPT: dict[str, Callable[[Callable], Callable]] = {
    "nothing": _in_scan,
    "conv": functools.partial(
        _in_scan, policy=jax.checkpoint_policies.save_only_these_names("conv")
    ),
    "everything": lambda layer: layer,
}


class Layers(nnx.Module):
    """The layers of a model as one: a scan over their stacked parameters.

    Attributes:
        layer: one of them, with parameters `(L, ...)`.
        kept: a key of `KEPT`.
    """

    def __init__(self, layer: nnx.Module, kept: str):
        self.layer = layer
        self.kept = kept

    def __call__(self, hidden: jax.Array, **rows: Any) -> jax.Array:
        graphdef, params = nnx.split(self.layer)

        def one(hidden, params):
            return nnx.merge(graphdef, params)(hidden, **rows), None

        return jax.lax.scan(KEPT[self.kept](one), hidden, params)[0]


class Training:
    """A model in training: its state, its step, and tokens to train on.

    Attributes:
        rows: B.
        length: T, of each row.
    """

    def __init__(self, config: Mamba2Config, dtype: str, rows: int, length: int):
        self._config, self._dtype = config, dtype
        self.rows, self.length = rows, length
        self.optimizer = optax.adamw(1e-3)

    def graphdef(self, kept: str, implementation: Implementation = None) -> Any:
        """The model's structure, for `nnx.merge` with its parameters."""
        make = functools.partial(self._model, kept, implementation)
        return nnx.split(nnx.eval_shape(make))[0]

    def _model(self, kept: str, implementation: Implementation = None) -> Any:
        """The model with one layer, which stands for all."""
        model: Any = Mamba2LM(
            dataclasses.replace(self._config, n_layers=1),
            dtype=self._dtype,
            implementation=implementation,
            rngs=nnx.Rngs(0),
        )
        model.layers = nnx.List([Layers(model.layers[0], kept)])
        return model

    @functools.cached_property
    def state(self) -> list[Any]:
        """Parameters and AdamW's moments; each step replaces them."""
        model: Any = self._model("nothing")
        graphdef, params = nnx.split(model.layers[0].layer)
        count = self._config.n_layers
        params = jax.tree.map(lambda a: jnp.stack([a] * count), params)
        model.layers[0].layer = nnx.merge(graphdef, params)
        params = nnx.state(model)
        return [params, self.optimizer.init(params)]

    @functools.cached_property
    def tokens(self) -> jax.Array:
        """`(B, T + 1)`: of each row the last token is a target alone."""
        shape = self.rows, self.length + 1
        return jax.random.randint(jax.random.key(0), shape, 0, self._config.vocab_size)

    def step(self, graphdef: Any) -> Callable:
        """From the state and tokens to the loss and the next state."""

        def loss(params, tokens):
            logits, targets = nnx.merge(graphdef, params)(tokens[:, :-1]), tokens[:, 1:]
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
            return losses.mean()

        def step(params, moments, tokens):
            value, gradients = jax.value_and_grad(loss)(params, tokens)
            updates, moments = self.optimizer.update(gradients, moments, params)
            return value, optax.apply_updates(params, updates), moments

        return step

    def prepared(self, kept: str, implementation: Implementation = None) -> Prepared:
        """A step to be timed, if the device has the memory for it."""
        step = jax.jit(
            self.step(self.graphdef(kept, implementation)), donate_argnums=(0, 1)
        )
        lowered = step.lower(*self.state, self.tokens)
        compiled = lowered.compile()
        memory = programs.peak_bytes(compiled)
        limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit", memory)
        if memory > limit:
            needed, there = memory / 2**30, limit / 2**30
            raise MemoryError(f"it takes {needed:.1f} GiB, there are {there:.1f}")

        def call():
            loss, *self.state = compiled(*self.state, self.tokens)
            return loss

        return Prepared(
            call,
            clock="wall",
            nbytes=0,
            tokens=self.rows * self.length,
            memory=memory,
            implementation=programs.implementation(lowered),
        )


def case(shape: str, dtype: str, options: Options) -> Case:
    """Steps that keep nothing, the conv's output or everything, and one by XLA."""
    rows, length = (8, 2048) if options.on_gpu else (2, 256)
    training = Training(SHAPES[shape], dtype, rows, length)
    prepare = {
        OURS: functools.partial(training.prepared, "nothing"),
        f"{OURS}, conv kept": functools.partial(training.prepared, "conv"),
    }
    if options.on_gpu:
        prepare[f"{OURS}, by XLA"] = functools.partial(
            training.prepared, "nothing", "xla"
        )
    if shape != "780m":  # 119 GiB, which XLA tries in vain to make fewer
        prepare[f"{OURS}, everything kept"] = functools.partial(
            training.prepared, "everything"
        )
    name = f"Mamba2 {shape}, {rows} x {length:,} tokens"
    return Case("training_step", name, rows * length, dtype, prepare)
