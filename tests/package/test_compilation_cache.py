"""Restarted processes find what the first one compiled.

jax's persistent cache keys a program by its lowered text, so that text, kernels
included, must not depend on the process. Python's hash seed is what differs most.
"""

import hashlib
import json
import os
import subprocess
import sys

import jax
import pytest

from tests.support import REPOSITORY, checks, quick
from tests.support.gradients import (
    assert_values,
    draw_cotangents,
    function,
    names,
    one_of_each_op,
    split,
    weighted,
)
from tests.support.platforms import KERNEL_CALLS, needs_triton

COUNTED = {
    "/jax/compilation_cache/cache_hits": "hits",
    "/jax/compilation_cache/cache_misses": "misses",
}


def steps():
    """Each op with its gradients, as (case, jitted function, arguments)."""
    for case in one_of_each_op(41)[:3]:  # the ring is a variant of update
        run = function(case, None)

        def loss(floats, rest, cotangents, run=run):
            results = run(floats, rest)
            return weighted(results, cotangents), results

        arguments = *split(case), draw_cotangents(case)
        yield case, jax.jit(jax.grad(loss, has_aux=True)), arguments


def child(folder: str) -> None:
    """Runs all steps with the cache in `folder`, then lowers them for a GPU."""
    counts = {"hits": 0, "misses": 0}

    def count(event, **_):
        if event in COUNTED:
            counts[COUNTED[event]] += 1

    quick.options()  # tries programs of its own, which shall not count
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    jax.monitoring.register_event_listener(count)
    with quick.compilation():
        for case, step, arguments in steps():
            _, results = checks.to_host(step(*arguments))
            assert_values(results, case)
    programs = []
    for case, step, arguments in steps():
        text = step.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        programs.append((names(case)[0], text.count(KERNEL_CALLS[0]), sha256))
    print(json.dumps(counts | {"programs": programs}))


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """What two processes, one after the other, report of their work."""
    folder = tmp_path_factory.mktemp("cache")
    reports = []
    for hash_seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-m", __spec__.name, str(folder)],
            check=False,
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONHASHSEED": hash_seed},
            timeout=120,
        )
        assert run.returncode == 0, run.stderr[-4000:]
        reports.append(json.loads(run.stdout.splitlines()[-1]))
    return reports


def test_second_process_compiles_nothing(processes):
    first, second = processes
    assert first["misses"] > 0, "the cache was not in use"
    assert (second["misses"], second["hits"]) == (0, first["misses"] + first["hits"])


@needs_triton
def test_programs_for_a_gpu_are_the_same_bytes_in_every_process(processes):
    first, second = (process["programs"] for process in processes)
    for op, kernels, _ in first:
        assert kernels == 2, f"{op}: {kernels} kernels, not forward and backward"
    assert first == second


if __name__ == "__main__":
    child(sys.argv[1])
