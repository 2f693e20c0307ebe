"""One of several processes that share an engine.

    python -m tests.support.distributed_engine RANK PROCESSES PORT

Both axes of the mesh go from process to process: none has a whole model, nor all
devices of one share of the requests. Each prints the tokens that it has got.
"""

import json

from tests.support import processes

RANK, PROCESSES = processes.join(devices=2)

import jax
import numpy as np
from jax.sharding import Mesh

from jax_causal_conv.mamba2 import tensor_parallel
from tests.mamba2 import test_engine_mesh as cases


def main() -> None:
    devices = np.array(jax.devices()).reshape(PROCESSES, 2).T
    devices[1] = devices[1][::-1]
    mesh = Mesh(devices, ("data", "model"))
    model = tensor_parallel(cases.make_model(), mesh, "model")
    engine = cases.make_engine(
        model, mesh=mesh, data_axis="data", prefix_slots=2, prefix_block=2
    )
    tokens = cases.serve(engine, cases.disturb)
    if RANK == 0:  # The other one has nothing to do with this.
        assert tokens == cases.on_one_device()
    print(json.dumps(tokens))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
