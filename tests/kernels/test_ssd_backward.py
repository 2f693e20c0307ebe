"""The kernels of the SSD's gradient, in Triton's interpreter.

Sizes are around the edges of tiles and groups of tiles. Every output is NaN before a
kernel runs, so that what no program writes shows.
"""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("triton")

from jax_causal_conv.operands import SSDSpec
from tests.support import guard
from tests.support.races import ORDERS, Recorder, race
from tests.support.ssd_backward import assert_close, draw, expected, launch
from tests.support.ssd_cases import BFLOAT16, FLOAT16

pytestmark = pytest.mark.usefixtures("quick_compilation")

SPEC = SSDSpec(16, dt_softplus=True)
SMALL = {"chunk": 16, "tiles": 2, "head_tiles": 2}
ALL_BFLOAT16 = dict.fromkeys(("x", "B", "C", "dt"), BFLOAT16)
IDS = [
    [4] * 10 + [-1] * 3 + [4] * 14 + [7] * 13,
    [-1] * 18 + [2] + [3] * 21,
    [-2] * 40,
]

CASES = {  # operands, and changes to tiles and spec
    "one token": (draw(0, 2, 1), {}, {}),
    "a tile less one": (draw(1, 1, 15), SMALL, {}),
    "a tile": (draw(2, 1, 16, state=None), SMALL, {}),
    "a tile and one": (draw(3, 1, 17, final=False), SMALL, {}),
    "a group": (draw(4, 2, 32, D=2), SMALL, {}),
    "a group and one": (draw(5, 1, 33, state=None, final=False), SMALL, {}),
    "groups of one tile": (
        draw(6, 1, 35, D=None),
        SMALL | {"tiles": 1, "head_tiles": 1},
        {},
    ),
    "groups of three": (draw(7, 1, 55, bias=False), SMALL | {"tiles": 3}, {}),
    "groups of four": (draw(8, 1, 130), SMALL | {"tiles": 4}, {}),
    "groups of heads": (draw(9, 1, 40, heads=6, groups=3, D=2), SMALL, {}),
    "heads in blocks": (
        draw(10, 1, 40, heads=5),
        SMALL | {"item_block": 2, "h_block": 2},
        {},
    ),
    "channels in blocks": (
        draw(11, 1, 40, dim=35, size=18, groups=2),
        SMALL | {"p_block": 16, "item_block": 2},
        {},
    ),
    "states in parts": (
        draw(20, 2, 35, size=32),
        SMALL | {"p_block": 16, "state_k": 16},
        {},
    ),
    "states that are not cut": (draw(21, 1, 20, dim=64, size=70), {}, {}),
    "bfloat16": (draw(12, 1, 40, **ALL_BFLOAT16), SMALL, {}),
    "float16": (draw(13, 1, 40, x=FLOAT16, B=FLOAT16, C=FLOAT16), SMALL, {}),
    "mixed dtypes": (
        draw(14, 1, 40, x=BFLOAT16, C=FLOAT16, dt=FLOAT16, state=BFLOAT16),
        SMALL,
        {},
    ),
    "documents": (draw(15, 3, 40, ids=IDS), SMALL, {}),
    "documents, no states": (
        draw(16, 3, 40, ids=IDS, state=None, final=False, **ALL_BFLOAT16),
        SMALL | {"tiles": 4},
        {},
    ),
    "limits": (draw(17, 1, 40), SMALL, {"dt_limit": (0.5, 1.0)}),
    "raw steps": (
        draw(18, 1, 40)._replace(dt=np.full((1, 40, 2), 0.3, np.float32)),
        SMALL,
        {"dt_softplus": False},
    ),
    "the kernels' own tiles": (draw(19, 1, 150), {}, {}),
}


def spec_of(changes):
    return dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_float64(name):
    operands, tile, changes = CASES[name]
    spec = spec_of(changes)
    got = launch(spec, operands, guard.caller(), **tile)
    narrow = any(a.dtype.itemsize == 2 for a in (operands.x, operands.B, operands.C))
    assert_close(got, expected(spec, operands), 3e-5 if narrow else 1e-5)


def test_default_precision_rounds_products_and_no_more():
    operands = draw(20, 1, 70, **ALL_BFLOAT16)
    spec = spec_of({"exact": False})
    got, want = (
        launch(spec, operands, guard.caller(), **SMALL),
        expected(SPEC, operands),
    )
    assert_close(got, want, 2e-2)
    with pytest.raises(AssertionError):
        assert_close(got, want, 3e-5)


def test_padding_has_no_gradient_and_no_influence():
    operands = draw(21, 3, 40, ids=IDS)
    clean = launch(SPEC, operands, guard.caller(), **SMALL)
    padding = np.asarray(IDS) < 0
    bad = {}
    for name in ("x", "dt", "B", "C", "dy"):
        bad[name] = getattr(operands, name).copy()
        bad[name][padding] = np.nan
    got = launch(SPEC, operands._replace(**bad), guard.caller(), **SMALL)
    for name, array in got.items():
        np.testing.assert_array_equal(array, clean[name], name)
    for name in ("x", "dt", "B", "C"):
        assert (got[name][padding] == 0).all(), name


ORDERED = ("groups of heads", "channels in blocks", "documents")


@pytest.mark.parametrize("name", ORDERED)
def test_order_of_programs_does_not_matter(name):
    operands, tile, _ = CASES[name]
    first = None
    for order, programs in ORDERS.items():
        got = launch(SPEC, operands, guard.caller(programs), **tile)
        first = first or got
        for gradient, array in got.items():
            np.testing.assert_array_equal(
                array, first[gradient], f"{order}: {gradient}"
            )


@pytest.mark.parametrize("name", ORDERED)
def test_no_interleaving_of_threads_matters(name):
    operands, tile, _ = CASES[name]
    kernels = []

    def call(launch):
        recorder = Recorder()
        results = recorder.caller()(launch)
        kernels.append(launch.kernel)
        hazard = race(recorder.accesses, barriers_needed=False)
        assert hazard is None, f"{launch.kernel}: {hazard}"
        return results

    launch(SPEC, operands, call, **tile)
    assert len(kernels) == 6
