"""The suite of several devices, on two of a CPU.

    python -m tests.support.scaling_worker

Its rows are printed as JSON. It fails where one engine is made before the last is gone.
"""

import dataclasses
import json
import weakref

import jax

jax.config.update("jax_num_cpu_devices", 2)

from benchmarks import scaling
from benchmarks.cases import Options
from tests.support import quick


def main() -> None:
    engines = weakref.WeakSet()

    class Counted(scaling.Engine):
        def __init__(self, *arguments, **options):
            assert not engines, "the engine before is still there"
            super().__init__(*arguments, **options)
            engines.add(self)

    scaling.Engine = Counted
    with quick.compilation():
        rows = scaling.case(Options(dtypes=("float32",))).measure()
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    main()
