"""A whole model over the devices of a mesh."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from .mesh import place
from .mixer import Mamba2Mixer
from .model import Mamba2LM


def tensor_parallel(model: Mamba2LM, mesh: Mesh, axis: str) -> Mamba2LM:
    """The model with every layer divided over an axis of a mesh.

    Each device gets a share of the heads, with their columns of in_proj and channels of
    the conv, and with its own copy of the columns B and C where there are fewer groups
    than devices; and a share of the vocabulary in the head, if it divides evenly and
    is not the embedding table. `init_cache` of the result divides caches alike. A layer
    then communicates in the sum of out_proj and, where n does not divide `n_groups`, in
    the norm. Tokens and index arguments are the same on every device.

    Args:
        model: with one shard, as `load` makes it. It is left as it is.
        mesh: with automatic or explicit axes.
        axis: its axis, of n devices: n divides the number of heads, and `n_groups` or
            is a multiple of it.

    Returns:
        A `Mamba2LM` with `num_shards=n`, whose parameters lie on the mesh.

    Raises:
        ValueError: the model has shards already, the mesh no such axis, or n does not
            fit the model.

    Example:
        >>> mesh = jax.make_mesh((4,), ("model",))
        >>> model = tensor_parallel(load("mamba2-2.7b"), mesh, "model")
        >>> cache = model.init_cache(num_slots=8)
        >>> @nnx.jit(donate_argnums=2)
        ... def step(model, tokens, cache, offsets, slots, seen):
        ...     return model.packed(tokens, cache, offsets, cache_indices=slots,
        ...                         has_initial_state=seen)
        >>> logits, cache = step(model, tokens, cache, offsets, slots, seen)
    """
    if axis not in mesh.shape:
        raise ValueError(
            f"axis must be one of the mesh's axes {mesh.axis_names}, got {axis!r}"
        )
    if model.num_shards != 1:
        raise ValueError(f"model must have one shard, got {model.num_shards}")
    divided = nnx.eval_shape(
        lambda: Mamba2LM(
            model.config,
            dtype=model.dtype,
            param_dtype=model.param_dtype,
            precision=model.precision,
            implementation=model.implementation,
            num_shards=mesh.shape[axis],
            rngs=nnx.Rngs(0),
        )
    )
    placed = []
    mixers = [layer.mixer for layer in divided.layers]
    where: Any
    for where, param in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        array = param[...]
        if where[0] == "layers":
            array, spec = _divided(mixers[where[1]], where[2:], array)
        else:
            even = model.config.vocab_size % mesh.shape[axis] == 0
            spec = (None, True) if where[0] == "lm_head" and even else ()
        sharding = NamedSharding(mesh, P(*(axis if over else None for over in spec)))
        placed.append((where, param.replace(place(array, sharding))))
    return nnx.merge(nnx.split(divided, nnx.Param)[0], nnx.from_flat_state(placed))


def _divided(
    mixer: Mamba2Mixer, where: tuple, array: jax.Array
) -> tuple[jax.Array, tuple]:
    """A layer's parameter in the mixer's order, and which dimensions are divided."""
    match where[1:]:
        case ("in_proj", _):
            lead = array.ndim - 1
            return array[..., mixer.in_proj_order], (*[None] * lead, True)
        case ("conv", _):
            return array[mixer.conv_order], (True,)
        case ("out_proj", "kernel"):
            return array, (True,)
        case _:
            return array, ()
