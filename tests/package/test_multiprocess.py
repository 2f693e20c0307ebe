"""The ops and the engine in a run of several processes, as on several hosts."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

from tests.support import REPOSITORY

PROCESSES = 2
TIMEOUT = 240  # seconds, for all processes together


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_workers(module: str, folder: Path) -> list[tuple[int | None, str]]:
    """Exit status (None: it was still running) and output of each process."""
    port = str(free_port())
    # As many devices as each asks for, whatever this process was told.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    logs = [folder / f"{rank}.log" for rank in range(PROCESSES)]
    workers: list[subprocess.Popen] = []
    try:
        for rank, log in enumerate(logs):
            command = [sys.executable, "-m", module, str(rank), str(PROCESSES), port]
            with log.open("w") as output:
                workers.append(
                    subprocess.Popen(
                        command,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        cwd=REPOSITORY,
                        env=environment,
                    )
                )
        codes = wait_for(workers)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return [(code, log.read_text()) for code, log in zip(codes, logs, strict=True)]


def wait_for(workers: list[subprocess.Popen]) -> list[int | None]:
    """Until all have ended, or one has failed and the others wait for it in vain."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        codes = [worker.poll() for worker in workers]
        if None not in codes or any(codes) or time.monotonic() > deadline:
            return codes
        time.sleep(0.1)


def outputs_of(module: str, folder: Path) -> list[str]:
    results = run_workers(module, folder)
    report = "\n".join(
        f"process {rank} ended with {code}:\n{output[-4000:]}"
        for rank, (code, output) in enumerate(results)
    )
    assert [code for code, _ in results] == [0] * PROCESSES, report
    return [output for _, output in results]


def test_processes_that_share_the_channels_compute_their_part_alone(tmp_path):
    outputs_of("tests.support.distributed_worker", tmp_path)


def test_processes_that_share_an_engine_get_the_tokens_of_one_device(tmp_path):
    outputs = outputs_of("tests.support.distributed_engine", tmp_path)
    (tokens,) = {output.strip().splitlines()[-1] for output in outputs}
    assert tokens.startswith("[["), tokens
