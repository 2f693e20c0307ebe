"""Hosts whose kernels cannot be lowered import the package and run the XLA path.

That is without Triton (macOS, TPU), and without jax's CUDA plugin (what pip gives).
"""

import subprocess
import sys
import textwrap

import pytest

from tests.support.platforms import needs_triton

MISSING = {
    "triton": """
        for name in ("triton", "jax_triton"):
            sys.modules[name] = None  # importing it raises ImportError
    """,
    "plugin": """
        from jaxlib import plugin_support
        plugin_support.import_from_plugin = lambda *names, **how: None
    """,
}
PROLOGUE = """
import warnings
import jax
import jax.numpy as jnp
import numpy as np
import jax_causal_conv
x, w, s = jnp.ones((4, 8)), jnp.ones((8, 3)), jnp.zeros((2, 2, 8))
q = np.array([0, 3, 4])
args = (x, w, None, s, q)
"""


@pytest.fixture(params=["triton", pytest.param("plugin", marks=needs_triton)])
def run(request):
    """Runs a script where something is missing, and returns what it prints."""

    def run_script(body: str) -> str:
        parts = MISSING[request.param], PROLOGUE, body
        script = "import sys\n" + "\n".join(map(textwrap.dedent, parts))
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run_script


def test_every_op_runs_and_differentiates(run):
    out = run("""
        y, states = jax.jit(jax_causal_conv.causal_conv1d_fn)(*args)
        z, _ = jax_causal_conv.causal_conv1d_update(x[:2], states, w)
        g = jax.grad(lambda w: jax_causal_conv.causal_conv1d(x[None], w).sum())(w)
        print(y.shape, z.shape, g.shape)
    """)
    assert out.split("\n")[0] == "(4, 8) (2, 8) (8, 3)"


def test_lowering_for_cuda_falls_back_to_xla_and_says_so_once(run):
    out = run("""
        step = jax.jit(lambda x: jax_causal_conv.causal_conv1d_fn(x, *args[1:]))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for tokens in (4, 5):
                traced = step.trace(jnp.ones((tokens, 8)))
                text = traced.lower(lowering_platforms=("cuda",)).as_text()
        messages = [str(w.message) for w in caught]
        messages = [m for m in messages if "causal conv uses XLA" in m]
        print(len(messages), "pip install" in messages[0], "triton" in text)
    """)
    assert out.split("\n")[0] == "1 True False"


def test_asking_for_the_kernels_names_the_cure(run):
    out = run("""
        def step(x):
            return jax_causal_conv.causal_conv1d_fn(
                x, *args[1:], implementation="triton"
            )
        try:
            jax.jit(step).trace(x).lower(lowering_platforms=("cuda",))
        except ImportError as error:
            print("pip install" in str(error))
    """)
    assert out.split("\n")[0] == "True"
