"""Run a case, and compare with the reference within what the arithmetic allows.

An output is one float32-accumulated sum, perhaps silu of it, rounded once. So it must
be the float64 result rounded to x's dtype, within one unit in the last place, plus the
error of summing in float32. States hold copies: they must be equal bit for bit.
"""

import functools
import inspect

import jax
import ml_dtypes
import numpy as np

import jax_causal_conv
from tests.support import quick, reference
from tests.support.cases import Case, DenseShape, PackedShape

FAST = 4e-6  # relative error of exp2 and reciprocal as GPUs compute them
UNDERFLOW = 1e-35  # float32 subnormals may be flushed on the way to the result

STATIC = (
    "activation",
    "dilation",
    "residual",
    "pad_slot_id",
    "implementation",
    "return_final_state",
)


@functools.cache
def jitted(function):
    """One jitted version of a public op, shared by all tests of a process."""
    known = inspect.signature(function).parameters
    return quick.jit(function, static_argnames=[n for n in STATIC if n in known])


def to_host(tree):
    return jax.tree.map(np.asarray, tree)


def call(case: Case, implementation, *, metadata=None, final=True):
    """The op of a case on its arrays; eager if jit would narrow 64-bit integers."""
    if isinstance(case.shape, DenseShape):
        return _call_dense(case, implementation, final)
    packed = isinstance(case.shape, PackedShape)
    arrays = dict(case.arrays)
    if packed:
        function = jax_causal_conv.causal_conv1d_fn
        positional = ("x", "weight", "bias", "conv_states", "query_start_loc")
        if metadata is None and case.shape.block_m is not None:
            metadata = jax_causal_conv.build_metadata(
                arrays["query_start_loc"], len(arrays["x"]), block_m=case.shape.block_m
            )
        arrays["metadata"] = metadata
    else:
        function = jax_causal_conv.causal_conv1d_update
        positional = ("x", "conv_state", "weight", "bias")
    if case.shape.index_dtype.itemsize < 8 or jax.config.jax_enable_x64:
        function = jitted(function)
    leading = [arrays.pop(name) for name in positional]
    if not packed:
        leading.append(case.options["activation"])
    options = {k: v for k, v in case.options.items() if packed or k != "activation"}
    return to_host(
        function(*leading, **arrays, **options, implementation=implementation)
    )


def _call_dense(case: Case, implementation, final):
    arrays = dict(case.arrays)
    leading = [arrays.pop(name) for name in ("x", "weight", "bias")]
    options = case.options | {"return_final_state": final}
    function = jitted(jax_causal_conv.causal_conv1d)
    return to_host(
        function(*leading, **arrays, **options, implementation=implementation)
    )


def expected(case: Case):
    """float64 out, states, and the sum of |products| behind every output."""
    name = {PackedShape: "causal_conv1d_fn", DenseShape: "causal_conv1d"}
    function = getattr(reference, name.get(type(case.shape), "causal_conv1d_update"))
    out, states = function(**case.arrays, **case.options)
    floats = ("x", "weight", "bias", "conv_states", "conv_state", "initial_state")
    sizes = {
        name: abs(array) if name in floats and array is not None else array
        for name, array in case.arrays.items()
    }
    magnitude, _ = function(**sizes, **(case.options | {"activation": None}))
    return out, states, magnitude


def unit_in_last_place(values, dtype):
    info = ml_dtypes.finfo(dtype)
    _, exponent = np.frexp(values)  # |values| = m * 2**exponent, 0.5 <= m < 1
    smallest = int(np.log2(float(info.smallest_normal)))
    return float(info.eps) * np.exp2(np.maximum(exponent - 1, smallest))


def allowed_error(exact, magnitude, width, activation, dtype, residual=False):
    """One ulp of `dtype` and the error of W products summed in float32."""
    double = dtype == np.float64
    error = (width + 2) * np.finfo(np.float64 if double else np.float32).eps * magnitude
    known = reference.ACTIVATIONS[activation]
    if known.bent:  # what is computed by an exponential
        # The output may have x, which is less than the magnitude, added to it.
        size = abs(exact) + magnitude if residual else abs(exact)
        error = known.steepest * error + (1e-15 if double else FAST) * size + UNDERFLOW
    error = error + unit_in_last_place(exact, dtype)
    # Nothing but zeros: exactly zero.
    return np.where((magnitude == 0) & (exact == 0), 0, error)


def assert_output(got, exact, magnitude, width, activation, what="", residual=False):
    assert got.shape == exact.shape, f"out {got.shape}, expected {exact.shape}\n{what}"
    with np.errstate(all="ignore"):
        rounded = exact.astype(got.dtype).astype(np.float64)
        allowed = allowed_error(
            rounded, magnitude, width, activation, got.dtype, residual
        )
        values = got.astype(np.float64)
        error = np.where(values == rounded, 0, abs(values - rounded))
    bad = np.isfinite(exact) & ~(error <= allowed)
    bad |= ~np.isfinite(exact) & np.isfinite(values)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{bad.sum()} of {bad.size} outputs are wrong; first at {where}: "
            f"got {values[where]!r}, expected {rounded[where]!r} "
            f"(float64: {exact[where]!r}), allowed error {allowed[where]!r}\n{what}"
        )


def bits(array):
    return array.view(np.dtype(f"u{array.dtype.itemsize}"))


# Before jax 0.11, XLA:CPU updates a bfloat16 cache by way of float32, which keeps every
# number but sets the quiet bit of a NaN and drops its payload.
NAN_BITS_SURVIVE = jax.default_backend() != "cpu" or jax.__version_info__ >= (0, 11)


def assert_same_bits(got, want, what=""):
    """Equal as integers, NaN payloads and signs of zeros included."""
    assert got.dtype == want.dtype, f"dtype {got.dtype}, expected {want.dtype}\n{what}"
    assert got.shape == want.shape, f"shape {got.shape}, expected {want.shape}\n{what}"
    if not NAN_BITS_SURVIVE:
        with np.errstate(invalid="ignore"):
            both = np.isnan(got.astype(float)) & np.isnan(want.astype(float))
        got = np.where(both, want, got)
    bad = bits(got) != bits(want)
    if bad.any():
        where = tuple(int(i) for i in np.argwhere(bad)[0])
        raise AssertionError(
            f"{bad.sum()} of {bad.size} elements differ; first at {where}: "
            f"got {got[where]} ({bits(got)[where]:#x}), "
            f"expected {want[where]} ({bits(want)[where]:#x})\n{what}"
        )


def check(case: Case, implementation, *, metadata=None, final=True):
    """Run a case and compare outputs and states with the reference."""
    result = call(case, implementation, metadata=metadata, final=final)
    out, states = result if final else (result, None)
    exact, want_states, magnitude = expected(case)
    assert out.dtype == case.arrays["x"].dtype, f"out.dtype {out.dtype}\n{case}"
    width = case.arrays["weight"].shape[1]
    activation = case.options["activation"]
    residual = case.options["residual"]
    assert_output(out, exact, magnitude, width, activation, case, residual)
    if final:
        assert_same_bits(states, want_states, case)
