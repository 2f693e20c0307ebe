"""One of several processes that share the channels of every array.

    python -m tests.support.distributed_worker RANK PROCESSES PORT

Runs each op and its gradients on arrays that are sharded over all processes, and
compares what this process holds with the float64 reference.
"""

import re

from tests.support import processes

RANK, PROCESSES = processes.join()

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from tests.support import checks
from tests.support.gradients import (
    assert_gradient,
    draw_cotangents,
    expected_gradients,
    function,
    names,
    one_of_each_op,
    split,
    weighted,
)

CHANNELS = 8


def spec_of(name: str, array: np.ndarray) -> PartitionSpec:
    """Floats have their channels last, but a filter first."""
    if array.dtype.kind != "f":
        return PartitionSpec()
    if name == "weight":
        return PartitionSpec("channels", None)
    return PartitionSpec(*[None] * (array.ndim - 1), "channels")


def shard(mesh: Mesh, name: str, array: np.ndarray) -> jax.Array:
    sharding = NamedSharding(mesh, spec_of(name, array))
    return jax.make_array_from_callback(array.shape, sharding, array.__getitem__)


def own_part(array: jax.Array):
    """(index, NumPy array) of the one shard in this process: a part of the channels."""
    (mine,) = array.addressable_shards
    assert mine.data.size * jax.process_count() == array.size, array.sharding
    return mine.index, np.asarray(mine.data)


def check_op(mesh: Mesh, case) -> None:
    cotangents = draw_cotangents(case)
    run = function(case, None)

    def loss(floats, rest, cotangents):
        results = run(floats, rest)
        return weighted(results, cotangents), results

    def place(tree):
        return {name: shard(mesh, name, array) for name, array in tree.items()}

    arguments = *map(place, split(case)), tuple(shard(mesh, "", c) for c in cotangents)
    gradient = jax.jit(jax.grad(loss, has_aux=True))
    compiled = gradient.lower(*arguments).compile()
    talk = [
        line.strip()
        for line in compiled.as_text().splitlines()
        if re.search(r" (all-|collective-|reduce-scatter)[a-z\-]*\(", line)
    ]
    assert not talk, talk

    gradients, (out, state) = compiled(*arguments)
    op = names(case)[0]
    exact, want, magnitude = checks.expected(case)
    index, got = own_part(out)
    width, activation = case.shape.width, case.options["activation"]
    checks.assert_output(got, exact[index], magnitude[index], width, activation, op)
    index, got = own_part(state)
    checks.assert_same_bits(got, want[index], op)
    for name, (exact, allowed) in expected_gradients(case, cotangents).items():
        index, got = own_part(gradients[name])
        assert_gradient(got, exact[index], allowed[index], name, op)


def main() -> None:
    assert (jax.process_count(), jax.device_count()) == (PROCESSES, PROCESSES)
    mesh = Mesh(np.array(jax.devices()), ("channels",))
    for case in one_of_each_op(31, channels=CHANNELS)[:3]:  # without the ring
        check_op(mesh, case)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
