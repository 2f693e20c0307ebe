"""Runs exported programs in a process without this package, Triton or jax-triton.

    python exported_worker.py FOLDER

For every `NAME.export` in the folder there is a `NAME.in`, pickled: arguments and
cotangents. `NAME.out` gets the results and the gradients, pickled. Programs whose name
starts with "metadata" may import the package; they come last.
"""

import pickle
import sys
from pathlib import Path

ABSENT = ("triton", "jax_triton", "jax_causal_conv")
for module in ABSENT:
    sys.modules[module] = None  # importing it raises ImportError

import jax
import numpy as np


def main(folder: Path) -> None:
    files = sorted(folder.glob("*.export"), key=lambda f: f.stem.startswith("metadata"))
    for file in files:
        if file.stem.startswith("metadata"):
            sys.modules.pop("jax_causal_conv", None)
            import jax_causal_conv.metadata  # noqa: F401 - registers ConvMetadata
        arguments, cotangents = pickle.loads(file.with_suffix(".in").read_bytes())
        program = jax.export.deserialize(file.read_bytes())
        results = program.call(*arguments)
        gradients = program.vjp().call(*jax.tree.leaves(arguments), *cotangents)
        output = jax.tree.map(np.asarray, (results, gradients))
        file.with_suffix(".out").write_bytes(pickle.dumps(output))
    assert all(sys.modules.get(module) is None for module in ABSENT[:2])


if __name__ == "__main__":
    main(Path(sys.argv[1]))
