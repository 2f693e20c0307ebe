"""Runs checks where jax has eight devices.

    python -m tests.support.eight_devices MODULE

Each of `MODULE.CHECKS` runs; a line of JSON says how it went, and the fixture
`on_eight_devices` tells pytest. pytest's own process keeps its single CPU device: their
number also decides how XLA:CPU divides its work.
"""

import contextlib
import functools
import importlib
import itertools
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable

import jax
import pytest

from tests.support import REPOSITORY

DEVICES = 8
TIMEOUT = 600  # seconds, for all checks of a module


class Checks(dict[str, Callable[[], None]]):
    """Functions that raise where something is wrong, by name.

    Attributes:
        around: makes the context that each runs in.
    """

    def __init__(self, around: Callable = contextlib.nullcontext):
        super().__init__()
        self.around = around

    def over(self, *parameters: Iterable) -> Callable:
        """Decorator: registers a function once for each combination of parameters."""
        return self.each(itertools.product(*parameters))

    def each(self, arguments: Iterable[tuple]) -> Callable:
        """Decorator: registers a function once for each tuple of arguments."""

        def register(check):
            for values in arguments:
                name = "-".join([check.__name__, *map(str, values)])
                assert name not in self, name
                self[name] = functools.partial(check, *values)
            return check

        return register


@pytest.fixture(scope="module")
def on_eight_devices(request) -> Callable[[str], None]:
    """Passes, fails or skips as the check of a name did in the child process."""
    results = run(request.module.__name__)

    def verify(name: str) -> None:
        result = results.get(name) or results["crash"]
        if result["skipped"]:
            pytest.skip(result["skipped"])
        assert result["failure"] is None, result["failure"]

    return verify


def run(module: str) -> dict[str, dict]:
    """Runs the checks of a module in a child process.

    Returns:
        For each name a dict: `seconds`, `skipped` (None, or the reason) and `failure`
        (None, or a traceback).
    """
    command = [sys.executable, "-m", "tests.support.eight_devices", module]
    child = subprocess.run(
        command,
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        timeout=TIMEOUT,
    )
    results = [
        json.loads(line) for line in child.stdout.splitlines() if line.startswith("{")
    ]
    if child.returncode:  # XLA ends the process if a device waits for others in vain
        crash = f"{' '.join(command)} ended here: {child.stderr[-4000:]}"
        results.append({"name": "crash", "skipped": None, "failure": crash})
    return {result.pop("name"): result for result in results}


def _result(name: str, check: Callable[[], None]) -> dict:
    start, skipped, failure = time.perf_counter(), None, None
    try:
        check()
    except pytest.skip.Exception as reason:
        skipped = str(reason)
    except Exception:
        failure = traceback.format_exc()
    seconds = round(time.perf_counter() - start, 2)
    return {"name": name, "seconds": seconds, "skipped": skipped, "failure": failure}


def main() -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES)
    module, *names = sys.argv[1:]
    checks = importlib.import_module(module).CHECKS
    assert jax.device_count() == DEVICES, jax.devices()
    for name in names or checks:
        with checks.around():
            result = _result(name, checks[name])
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
