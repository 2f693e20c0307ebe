"""`jax_causal_conv.mamba2` as a library: its names, and what they need."""

import subprocess
import sys

import pytest

pytest.importorskip("flax")
pytest.importorskip("safetensors")

import jax_causal_conv
from jax_causal_conv import mamba2


def test_every_public_name_is_found():
    for name in mamba2.__all__:
        assert getattr(mamba2, name) is not None, name
    with pytest.raises(AttributeError, match="no attribute 'Mamba3LM'"):
        mamba2.Mamba3LM  # noqa: B018 (to ask for it is the test)


def test_names_with_two_homes_mean_the_same():
    from jax_causal_conv import nnx

    assert mamba2.ssd is jax_causal_conv.ssd
    assert mamba2.ssd_packed is jax_causal_conv.ssd_packed
    for name in ("GatedRMSNorm", "Mamba2Cache", "Mamba2Mixer"):
        assert getattr(nnx, name) is getattr(mamba2, name)


@pytest.mark.parametrize(
    ("missing", "name"), [("flax", "Mamba2LM"), ("safetensors", "load")]
)
def test_without_the_extra_the_op_works_and_the_rest_names_the_cure(missing, name):
    code = f"""
import sys
sys.modules[{missing!r}] = None  # importing it now fails
from jax_causal_conv.mamba2 import Mamba2Config, SamplingParams, sample, ssd
try:
    from jax_causal_conv.mamba2 import {name}
except ImportError as error:
    assert 'pip install "jax-causal-conv[mamba2]"' in str(error), error
    assert {missing!r} in str(error), error
else:
    sys.exit("no error")
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
