"""Calls of the gradient of `ssd` by its kernels, with tiles that a test chooses."""

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_causal_conv.kernels import launch_ssd_backward, record, tiles
from jax_causal_conv.kernels.record import Call
from jax_causal_conv.operands import SSDBackwardOperands, SSDSpec
from jax_causal_conv.xla import ssd
from tests.support import ssd_reference as reference
from tests.support.ssd_cases import Case

FLOAT32 = np.dtype(np.float32)
TERMS = ssd.SSD_GRADIENTS


def draw(
    seed: int,
    rows: int,
    length: int,
    *,
    heads: int = 2,
    dim: int = 3,
    groups: int = 1,
    size: int = 4,
    x: Any = FLOAT32,
    B: Any = FLOAT32,
    C: Any = FLOAT32,
    dt: Any = FLOAT32,
    D: int | None = 1,
    bias: bool = True,
    state: Any = FLOAT32,
    final: bool = True,
    ids: Any = None,
) -> SSDBackwardOperands:
    """Operands; D is how many axes it has, None for no D."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=FLOAT32):
        return rng.standard_normal(shape).astype(np.float32).astype(dtype)

    states = None if state is None else normal(rows, heads, dim, size, dtype=state)
    dfinal = None
    if final:
        kind = FLOAT32 if state is None else state
        dfinal = normal(rows, heads, dim, size, dtype=kind)
    return SSDBackwardOperands(
        x=normal(rows, length, heads, dim, dtype=x),
        dt=normal(rows, length, heads, dtype=dt),
        A=-np.exp(normal(heads)),
        B=normal(rows, length, groups, size, dtype=B),
        C=normal(rows, length, groups, size, dtype=C),
        D=None if D is None else normal(*(heads, dim)[:D]),
        dt_bias=normal(heads) if bias else None,
        states=states,
        segment_ids=None if ids is None else np.asarray(ids, np.int32),
        dy=normal(rows, length, heads, dim, dtype=x),
        dfinal=dfinal,
    )


def operands_of(case: Case) -> tuple[SSDSpec, SSDBackwardOperands]:
    """The gradient of a case of dense rows, with cotangents of ones."""
    arrays, shape = case.arrays, case.shape
    state = arrays["initial_state"]
    spec = SSDSpec(
        16,
        dt_softplus=shape.dt_softplus,
        dt_limit=shape.dt_limit,
        exact=shape.precision != "default",
    )
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    return spec, SSDBackwardOperands(
        *(arrays[name] for name in names),
        states=state,
        segment_ids=arrays["segment_ids"],
        dy=np.ones_like(arrays["x"]),
        dfinal=None if state is None else np.ones_like(state),
    )


def tile_of(operands: SSDBackwardOperands, **changes) -> tiles.SsdBackwardTiles:
    """The tiles of a call, with other fields: `chunk`, `tiles`, `item_block`, …"""
    x, B = operands.x, operands.B
    dtypes = [a.dtype for a in (x, B, operands.C)]
    chosen = tiles.ssd_backward(
        x.shape[2:],
        B.shape[2:],
        max(dtype.itemsize for dtype in dtypes),
        *x.shape[:2],
        all(dtype == jnp.bfloat16 for dtype in dtypes),
    )
    return dataclasses.replace(chosen, **changes)


def launch(
    spec: SSDSpec, operands: SSDBackwardOperands, call: Call, **tile
) -> dict[str, np.ndarray]:
    """The gradients by name, all launches being run through `call`."""
    given = jax.tree.map(jnp.asarray, operands)
    results = record.run(
        launch_ssd_backward.backward(spec, given, tile_of(operands, **tile)), call
    )
    return named(results, operands)


def named(results: Any, operands: SSDBackwardOperands) -> dict[str, np.ndarray]:
    """Results by name; of a D with one value a head only the sum counts."""
    gradients = dict(zip(TERMS, map(np.asarray, results), strict=False))
    if operands.D is None or operands.D.ndim == 1:
        gradients["D"] = gradients["D"].sum(1)
    if operands.D is None:
        del gradients["D"]
    return gradients


def expected(spec: SSDSpec, operands: SSDBackwardOperands) -> dict[str, np.ndarray]:
    """The gradients in float64, by the adjoint of the recurrence.

    Where steps are not just softplus of what is given, by XLA.
    """
    if spec.limits_dt or not spec.dt_softplus:
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda a: jnp.asarray(a.astype(np.float64)), operands)
            return named(
                jax.jit(ssd.dense_backward, static_argnums=0)(spec, wide), wide
            )
    x, states = operands.x, operands.states
    rows, length, heads, dim = x.shape
    D = np.zeros(heads) if operands.D is None else operands.D
    fixed = {
        "A": operands.A,
        "D": np.broadcast_to(D.reshape(heads, -1), (heads, dim)),
        "dt_bias": np.zeros(heads) if operands.dt_bias is None else operands.dt_bias,
    }
    tokens = {name: getattr(operands, name) for name in ("x", "dt", "B", "C")}
    total = {name: np.zeros(array.shape) for name, array in (tokens | fixed).items()}
    zeros = np.zeros((heads, dim, operands.B.shape[-1]))
    ids = operands.segment_ids
    if states is not None:
        total["states"] = np.zeros(states.shape)
    for row in range(rows):
        runs = [(0, length)]
        if ids is not None:
            change = np.flatnonzero(np.diff(ids[row])) + 1
            runs = itertools.pairwise([0, *change.tolist(), length])
            runs = [(begin, end) for begin, end in runs if ids[row, begin] >= 0]
        left = zeros if operands.dfinal is None else operands.dfinal[row]
        if not runs and states is not None:  # the state passes by
            total["states"][row] = left
        for begin, end in runs:
            at = (row, slice(begin, end))
            enters = begin == 0 and states is not None
            found = reference.gradients(
                **{name: array[at] for name, array in tokens.items()},
                **fixed,
                state=states[row] if enters else zeros,
                dy=operands.dy[at],
                dstate=left if end == runs[-1][1] else zeros,
            )
            for name in tokens:
                total[name][at] = found[name]
            for name in fixed:
                total[name] += found[name]
            if enters:
                total["states"][row] = found["state"]
    return named([total[name] for name in TERMS if name in total], operands)


def assert_close(got, want, tolerance: float) -> None:
    """Over the largest value of each gradient; what is rounded may be off by that."""
    assert got.keys() == want.keys()
    for name, exact in want.items():
        array = got[name]
        assert array.shape == exact.shape, name
        rounding = {2: 2.0**-8, 4: 0.0}[array.dtype.itemsize]
        if array.dtype == np.float16:
            rounding = 2.0**-11
        largest = abs(exact).max() if exact.size else 0.0
        error = abs(array.astype(np.float64) - exact)
        allowed = tolerance * largest + rounding * abs(exact) + 1e-30
        assert (error <= allowed).all(), (
            f"{name}: off by {np.max(error)} of {largest}, NaN: {np.isnan(error).sum()}"
        )
    assert not any(math.isnan(float(a.astype(np.float64).sum())) for a in got.values())
