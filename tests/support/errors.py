"""Calls that must raise while they are traced, and dtypes that no argument may have."""

import jax
import ml_dtypes
import numpy as np
import pytest

f32, i32 = np.float32, np.int32

FLOAT8 = ml_dtypes.float8_e4m3fn
NO_FLOATS = [i32, np.int8, np.uint8, bool, np.complex64, FLOAT8]
NO_INTEGERS = [f32, np.float16, bool, np.complex64]


def array(*shape, dtype=f32):
    return np.zeros(shape, dtype)


def raises(function, arguments, change, error, fragments, trace=True):
    """Calls with one argument changed; arrays become tracers."""
    arguments = arguments | change
    traced = {k: v for k, v in arguments.items() if trace and hasattr(v, "shape")}
    static = {k: v for k, v in arguments.items() if k not in traced}
    with pytest.raises(error) as caught:
        jax.eval_shape(lambda kw: function(**kw, **static), traced)
    for fragment in fragments:
        assert fragment in str(caught.value), (fragment, str(caught.value))


def shape_id(value):
    if isinstance(value, np.ndarray):
        return str(value.shape)
    return value if isinstance(value, str) else None
