"""What benchmarks rest on: exact answers, checks first, failures as rows."""

import importlib
import json
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers, timing
from benchmarks.peers import OURS, Absent
from benchmarks.suites import Case, Options, calls_into, run_case
from benchmarks.timing import Prepared
from benchmarks.tune import Change, applied, changes
from benchmarks.workload import Workload, WrongResult
from jax_causal_conv.kernels import tiles
from tests.support import reference

MIXED = Workload("packed", (1, 7, 1, 12), 40, 3, "float32", slots=9)
GRADIENT = Workload("gradient", (9, 9), 40, 3, "float32")
QUICK = Options(seconds=0.0)


def test_expected_results_are_those_of_the_reference():
    out, states = reference.causal_conv1d_fn(
        *map(np.asarray, (MIXED.x, MIXED.weight, MIXED.bias, MIXED.states())),
        MIXED.offsets,
        cache_indices=MIXED.cache_indices,
        has_initial_state=MIXED.has_initial_state,
    )
    expected = MIXED.expected
    np.testing.assert_allclose(expected["out"], out[:, MIXED.channels], atol=1e-9)
    left = states[MIXED.cache_indices][..., MIXED.channels]
    np.testing.assert_array_equal(expected["states"], left)


def test_expected_gradients_are_finite_differences():
    exact, rng = GRADIENT.expected, np.random.default_rng(1)
    base = {"x": GRADIENT.x, "weight": GRADIENT.weight, "bias": GRADIENT.bias}
    for name, array in base.items():
        axis = 0 if name == "weight" else -1
        step = jnp.asarray(rng.normal(size=array.shape), jnp.float32)
        slopes = []
        for sign in (1, -1):
            moved = replace(GRADIENT)
            vars(moved).update(base | {name: array + sign * 1e-3 * step})
            dy = GRADIENT.pick(GRADIENT.dy).astype(np.float64)
            slopes.append((moved.expected["out"] * dy).sum())
        direction = GRADIENT.pick(step, axis)
        assert (slopes[0] - slopes[1]) / 2e-3 == pytest.approx(
            (exact[f"d{name}"] * direction).sum(), rel=1e-3
        )


@pytest.mark.parametrize("op", ["packed", "update", "dense", "gradient"])
def test_candidates_of_jax_compute_the_workload(op):
    lengths = {"packed": (1, 7, 1, 12), "update": (1,) * 4}.get(op, (9, 9))
    work = Workload(op, lengths, 40, 4, "float32", slots=9)
    for candidate in peers.CANDIDATES[:3]:
        if candidate.takes(work):
            one = candidate.prepare(work, None)
            assert work.error(one.view(one.call())) < 1e-4, candidate.name


def test_a_wrong_result_is_found():
    got = {"out": MIXED.expected["out"].copy()}
    assert MIXED.error(got) == 0
    for wrong in (np.nan, 1.0):
        got["out"][3, 5] = MIXED.expected["out"][3, 5] + wrong
        with pytest.raises(WrongResult, match="out is off by"):
            MIXED.error(got)
    with pytest.raises(WrongResult, match="out is"):
        MIXED.error({"out": got["out"][1:]})


def test_failing_peers_are_reported_and_the_others_timed():
    def absent():
        raise Absent("nowhere")

    def broken():
        raise ImportError("no such library")

    def wrong():
        out = {"out": MIXED.expected["out"] + 1}
        return Prepared(lambda: None, view=lambda _: out)

    def fails_later():
        calls = iter(range(2))
        return Prepared(lambda: next(calls))

    prepare = {
        OURS: lambda: peers.ours(MIXED),
        "absent": absent,
        "broken": broken,
        "wrong": wrong,
        "fails later": fails_later,
    }
    case = Case("suite", "case", 1.0, "float32", prepare, MIXED, yardstick=OURS)
    rows = {row.candidate: row for row in run_case(case, QUICK)}
    assert "absent" not in rows
    assert rows[OURS].microseconds > 0 and rows[OURS].of_yardstick == 1
    assert rows[OURS].error < 1e-4 and rows[OURS].nbytes == MIXED.nbytes
    assert rows["broken"].note == "failed: ImportError: no such library"
    assert rows["wrong"].note.startswith("wrong: out is off by")
    assert rows["fails later"].note.startswith("failed: StopIteration")
    assert not any(rows[n].microseconds for n in ("broken", "wrong", "fails later"))


def test_candidates_take_turns():
    order = []
    prepared = {
        name: Prepared(lambda name=name: order.append(name), lambda _: None)
        for name in "ab"
    }
    times = timing.measure(prepared, seconds=0, rounds=3, on_error=pytest.fail)
    assert times["a"].samples == times["b"].samples == 3
    rounds = "".join(order)[6:]  # behind three warm-up calls of each
    assert rounds.replace("aa", "a").count("ab") >= 3


def test_ratios_are_those_of_the_same_rounds():
    slow = timing.Timing(30.0, 20, 80, 3, "wall", rounds=(20.0, 80.0, 30.0))
    fast = timing.Timing(15.0, 10, 40, 3, "wall", rounds=(10.0, 40.0, 15.0, 1.0))
    assert slow.over(fast) == 2
    assert timing.Timing(30.0, 1, 99, 2, "jax.profiler").over(fast) == 2


def test_a_file_is_loaded_without_the_package_around_it(tmp_path):
    file = tmp_path / "kernels.py"
    file.write_text(
        "from absent_package.deep.inside import ANSWER\nimport absent_package.x\n"
    )
    with peers._stand_in("absent_package", {"ANSWER": 42}):
        assert peers._import("kernels_of_a_peer", file).ANSWER == 42
    assert not any(name.startswith("absent_package") for name in sys.modules)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("absent_package")


def test_tiles_change_only_within():
    before = tiles.choose(5376, 4, 3, 32, 2)
    block_m = tiles.default_block_m(2048, 4)
    with applied(Change(block_n=512, num_warps=2, block_m=128)):
        from jax_causal_conv import build_metadata

        within = tiles.choose(5376, 4, 3, 32, 2)
        assert (within.block_n, within.num_warps) == (512, 2)
        assert within.group == before.group
        assert build_metadata(np.array([0, 2048]), 2048).block_m == 128
    assert tiles.choose(5376, 4, 3, 32, 2) == before
    assert tiles.default_block_m(2048, 4) == block_m
    assert changes("prefill")[0] == Change()


def test_python_calls_into_a_folder_are_counted():
    folder = str(importlib.import_module("jax_causal_conv").__path__[0])
    metadata = importlib.import_module("jax_causal_conv").build_metadata
    assert calls_into(folder, lambda: metadata(np.array([0, 4]), 4)) > 0
    assert calls_into(folder, lambda: jax.jit(jnp.sin)(1.0)) == 0


def test_results_are_written_and_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    console = pytest.importorskip("rich.console").Console(quiet=True)
    from benchmarks import __main__ as cli

    file = tmp_path / "out.json"
    cli.run(["metadata", "--seconds", "0.01", "--json", str(file)], console)
    result = json.loads(file.read_text())
    assert result["machine"]["versions"]["jax"] == jax.__version__
    assert {row["axis"] for row in result["rows"]} == {16, 256, 4096}
    cli._draw(result, tmp_path / "plots", console)
    drawn = {path.name for path in (tmp_path / "plots").iterdir()}
    assert drawn == {"metadata.png", "metadata.svg"}
