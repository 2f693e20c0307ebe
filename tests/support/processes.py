"""How a worker becomes one of several processes that share their devices."""

import sys

import jax


def join(devices: int = 1) -> tuple[int, int]:
    """Reads `RANK PROCESSES PORT` from the command line, and meets the others.

    To be called before anything asks jax for its devices, as imports of tests do.

    Args:
        devices: how many CPU devices each process has.

    Returns:
        The process's rank, and how many there are.
    """
    rank, processes, port = map(int, sys.argv[1:])
    address = f"127.0.0.1:{port}"
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(
        address,
        processes,
        rank,
        coordinator_bind_address=address if rank == 0 else None,
        initialization_timeout=60,
    )
    return rank, processes
