"""Everybody who can compute a `Workload`: this package and the peers.

A peer is imported where it is installed, or from a path that the user gives; none of
its code is here. Each gets its inputs in the layout that suits it, before the clock
starts, and computes what it can: where it knows no slots, the slots' states have been
gathered for it. What fails to import, to run or to be right is reported as such.
"""

import functools

from benchmarks import jax_peers, torch_peers
from benchmarks.cases import BY_XLA, OURS, Candidate
from benchmarks.ours import ours

_ROWS = ("dense", "gradient")
_GPU = ("gpu",)

CANDIDATES = (
    Candidate(OURS, ours, ("packed", "update", *_ROWS)),
    Candidate(
        BY_XLA,
        functools.partial(ours, implementation="xla"),
        ("packed", "update", *_ROWS),
        platforms=_GPU,
    ),
    Candidate("flax nnx.Conv + silu", jax_peers.nnx_conv, _ROWS),
    Candidate(
        "mamba2-jax", jax_peers.mamba2_jax, ("update", *_ROWS), package="mamba2-jax"
    ),
    Candidate(
        "tpu-inference",
        jax_peers.tpu_inference,
        ("packed", "update"),
        package="tpu-inference",
    ),
    Candidate(
        "jax-linear-attention",
        jax_peers.jax_linear_attention,
        _ROWS,
        package="jax-linear-attention",
    ),
    Candidate("torch F.conv1d + silu", torch_peers.torch_conv, _ROWS),
    Candidate("torch, padded or rolled", torch_peers.torch_roll, ("update", "dense")),
    Candidate(
        "vLLM", torch_peers.vllm, ("packed", "update"), platforms=_GPU, package="vllm"
    ),
    Candidate(
        "flash-linear-attention",
        torch_peers.fla,
        ("packed", "update", *_ROWS),
        platforms=_GPU,
        package="fla",
    ),
    Candidate(
        "causal-conv1d",
        torch_peers.dao,
        ("update", *_ROWS),
        platforms=_GPU,
        package="causal-conv1d",
    ),
    Candidate(
        "cudnn-frontend",
        torch_peers.cudnn,
        ("packed", "update", *_ROWS),
        platforms=_GPU,
        package="cudnn-frontend",
    ),
)
