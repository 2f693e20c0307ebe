"""The engine's programs update the caches in place, as XLA optimises them for users.

So this is apart from the engine's other tests, which have programs compiled quickly.
"""

import re

import pytest

nnx = pytest.importorskip("flax.nnx")

import jax
import numpy as np

from jax_causal_conv.mamba2 import Engine, Mamba2Config, Mamba2LM


@pytest.mark.skipif(
    jax.default_backend() == "cpu" and jax.__version_info__ < (0, 11),
    reason="XLA:CPU copies a donated cache before jax 0.11",
)
def test_no_step_and_no_resumption_copies_the_caches():
    sizes = {"d_model": 32, "d_state": 16, "headdim": 16, "chunk_size": 8}
    config = Mamba2Config(vocab_size=17, n_layers=1, **sizes)
    engine = Engine(
        Mamba2LM(config, rngs=nnx.Rngs(0)),
        num_slots=40,
        max_tokens_per_step=200,
        decode_buckets=[40],
        token_buckets=[200],
        prefix_slots=7,
        draft=lambda requests: [],
        max_drafts=2,
    )
    device = engine._device
    slots = len(device.state.newest)
    assert slots == 47
    programs = [device.executable(bucket, False).as_text() for bucket in engine.buckets]
    saved = device.save(0, 0)
    lowered = device._load.lower(device.state, np.int32(0), np.int32(0), saved)
    programs.append(lowered.compile().as_text())
    for text in programs:
        assert f"f32[{slots}," in text
        assert not (
            copies := re.findall(rf"= f32\[{slots},[\d,]+\]\S* copy\(.*", text)
        ), copies
