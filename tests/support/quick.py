"""`jax.jit` for sweeps over many shapes, which run each program a few times only.

XLA:CPU then optimises machine code less, which takes a third of the time: the HLO, and
what it means, are the same. Where copies in programs are counted it is not used; and as
users compile them, the ops run in tests of values and gradients under jit, of donation,
scans over layers, exports and several processes.
"""

import contextlib
import functools

import jax
from jax._src import compiler

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
    """The same for what is jitted elsewhere, by an engine or a program.

    jax takes compiler options at `jax.jit` alone. So they are put in where it makes its
    own of them, which is not public: tests of everything else go without.
    """
    make, less = compiler.get_compile_options, options()
    before = jax.config.read("jax_disable_most_optimizations")

    def make_options(*args, env_options_overrides=None, **how):
        own = less | (env_options_overrides or {})
        return make(*args, env_options_overrides=own, **how)

    jax.config.update("jax_disable_most_optimizations", ON_CPU)
    compiler.get_compile_options = make_options
    try:
        yield
    finally:
        compiler.get_compile_options = make
        jax.config.update("jax_disable_most_optimizations", before)
