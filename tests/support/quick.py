"""`jax.jit` for sweeps over many shapes, which run each program a few times only.

XLA:CPU then optimises machine code less, which takes a third of the time: the HLO, and
what it means, are the same. Where copies in programs are counted it is not used; and as
users compile them, the ops run in tests of values and gradients under jit, of donation,
scans over layers, exports and several processes.
"""

import contextlib
import functools
from unittest import mock

import jax

from tests.support.platforms import ON_CPU

LESS_WORK = {
    "xla_backend_optimization_level": 0,
    "xla_cpu_parallel_codegen_split_count": 1,
    "xla_cpu_use_fusion_emitters": False,  # jax 0.11 has no such choice any more
}


@functools.cache
def options() -> dict:
    """Those of `LESS_WORK` that this XLA knows."""
    known = {}
    for name, value in LESS_WORK.items() if ON_CPU else ():
        trial = jax.jit(lambda x: x + 1, compiler_options={name: value})
        try:
            trial.lower(1.0).compile()
        except jax.errors.JaxRuntimeError:
            continue
        known[name] = value
    return known


def jit(function, **how):
    """As `jax.jit`; not to be called from another jitted function."""
    return jax.jit(function, **how, compiler_options=options())


@contextlib.contextmanager
def compilation():
    """For what is jitted elsewhere, by an engine or a program.

    What it lowers and compiles itself, as an engine its steps, gets the options above.
    """
    compile_lowered, usual = jax.stages.Lowered.compile, options()

    def compile_quickly(lowered, compiler_options=None):
        return compile_lowered(lowered, usual | (compiler_options or {}))

    jax.config.update("jax_disable_most_optimizations", ON_CPU)
    try:
        with mock.patch.object(jax.stages.Lowered, "compile", compile_quickly):
            yield
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
