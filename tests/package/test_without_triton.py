"""Hosts without Triton (macOS, TPU) import the package and run the XLA path."""

import subprocess
import sys
import textwrap

PROLOGUE = """
import sys
for name in ("triton", "jax_triton"):
    sys.modules[name] = None  # importing it raises ImportError
import warnings
import jax
import jax.numpy as jnp
import numpy as np
import jax_causal_conv
x, w, s = jnp.ones((4, 8)), jnp.ones((8, 3)), jnp.zeros((2, 2, 8))
q = np.array([0, 3, 4])
args = (x, w, None, s, q)
"""


def run(body: str) -> str:
    script = PROLOGUE + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_op_runs_and_differentiates():
    out = run("""
        y, states = jax.jit(jax_causal_conv.causal_conv1d_fn)(*args)
        z, _ = jax_causal_conv.causal_conv1d_update(x[:2], states, w)
        g = jax.grad(lambda w: jax_causal_conv.causal_conv1d(x[None], w).sum())(w)
        print(y.shape, z.shape, g.shape)
    """)
    assert out.split("\n")[0] == "(4, 8) (2, 8) (8, 3)"


def test_lowering_for_cuda_falls_back_to_xla_and_says_so_once():
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


def test_asking_for_the_kernels_names_the_cure():
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
