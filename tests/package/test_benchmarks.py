"""What benchmarks rest on: exact answers, checks first, failures as rows."""

import ast
import functools
import importlib
import json
import os
import subprocess
import sys
import types
from dataclasses import asdict, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import (
    compare_sass,
    engine_peers,
    imports,
    machine_code,
    peers,
    programs,
    serving,
    ssd_peers,
    ssd_steps,
    suites,
    timing,
    tune,
    whole_layer,
)
from benchmarks.cases import BY_XLA, FALLBACK, OURS, Case, Options, Row, run_case
from benchmarks.compare_sass import Code, Key
from benchmarks.imports import Absent
from benchmarks.model_shapes import MODELS
from benchmarks.ours import ours
from benchmarks.ssd_workload import SsdWorkload
from benchmarks.suites import calls_into
from benchmarks.timing import Prepared
from benchmarks.tune import Change, changes
from benchmarks.workload import Workload, WrongResult
from jax_causal_conv.mamba2 import Mamba2Config, Request
from tests.support import REPOSITORY, reference, ssd_reference

pytestmark = pytest.mark.usefixtures("quick_compilation")

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
            errors = work.errors(one.view(one.call()))
            assert max(errors.values()) < 1e-4, candidate.name
            assert one.implementation == "XLA"


SSD = {
    "decode": SsdWorkload("ssd_packed", (1,) * 3, "float32", "float32", 4, 8, 8, 2),
    "mixed": SsdWorkload("ssd_packed", (1, 1, 9, 5), "float32", "float32", 4, 8, 8, 2),
    "rows": SsdWorkload("ssd_packed", (7, 7), "float32", "float32", 4, 8, 8, 2),
    "dense": SsdWorkload("ssd", (7, 7), "float32", "float32", 4, 8, 8, 2),
}


@pytest.mark.parametrize("name", SSD)
def test_expected_results_of_the_ssd_are_those_of_the_reference(name):
    work = SSD[name]
    arrays = [np.asarray(a, np.float64) for a in (work.x, work.dt, work.A)]
    arrays[1] = np.logaddexp(0, arrays[1] + np.asarray(work.dt_bias, np.float64))
    arrays += [np.asarray(a, np.float64) for a in (work.B, work.C, work.D)]
    if work.op == "ssd":
        rows = [
            a.reshape(2, 7, *a.shape[1:]) if a.shape[0] == 14 else a for a in arrays
        ]
        y, _ = ssd_reference.ssd(*rows)
        y, states = y.reshape(work.x.shape), None
    else:
        y, states = ssd_reference.ssd_packed(
            *arrays,
            np.asarray(work.states()),
            work.offsets,
            cache_indices=work.cache_indices,
            has_initial_state=work.has_initial_state,
        )
    np.testing.assert_allclose(work.expected["y"], y[:, work.compared], atol=1e-9)
    if states is not None:
        left = states[work.cache_indices][:, work.compared]
        np.testing.assert_allclose(work.expected["states"], left, atol=1e-9)


@pytest.mark.parametrize("name", SSD)
def test_the_ssd_computes_its_workload(name):
    one = ssd_peers.ours(SSD[name], implementation="xla")
    errors = SSD[name].errors(one.view(one.call()))
    assert max(errors.values()) < 1e-6 and one.implementation == "XLA"
    assert ("states" in errors) == ("unused" in errors) == (name != "dense")


def test_gradients_of_the_ssd_are_timed_with_what_they_belong_to():
    work = SSD["dense"]
    case = ssd_steps.training_case("case", work, replace(QUICK, with_peers=False))
    assert set(case.prepare) == {OURS, ssd_peers.ROUNDING}
    one = case.prepare[OURS]()
    result = one.call()
    assert max(work.errors(one.view(result)).values()) < 1e-6
    gradients = result[1]
    assert set(gradients) == {"x", "dt", "A", "B", "C", "D", "dt_bias"}
    assert all(np.abs(array).max() > 0 for array in gradients.values())


@pytest.mark.parametrize("op", ["gradient", "prefill"])
def test_the_mixer_computes_its_workload(op):
    mixers = pytest.importorskip("benchmarks.mixers")
    work = mixers.MixerWorkload(op, 2, 5, d_model=32)
    one = mixers.ours(work)
    found = one.view(one.call())
    assert max(work.errors(found).values()) < 1e-5
    parameters = set(mixers.named(mixers.nnx.state(work.mixer)))
    results = {"gradient": {"u"} | parameters, "prefill": {"conv", "ssm"}}
    assert set(found) == {"out"} | results[op]


def test_steps_of_training_are_those_of_the_model():
    """With its layers scanned."""
    steps = pytest.importorskip("benchmarks.training_steps")
    sizes = {"d_state": 4, "headdim": 8, "chunk_size": 4}
    config = steps.Mamba2Config(vocab_size=11, d_model=8, n_layers=2, **sizes)
    training = steps.Training(config, "float32", rows=2, length=6)
    one = training.prepared("conv")
    losses = [float(one.call()) for _ in range(3)]
    assert one.tokens == 12 and one.memory > 0
    model = steps.Mamba2LM(replace(config, n_layers=1), rngs=steps.nnx.Rngs(0))
    model.layers = steps.nnx.List([model.layers[0]] * 2)
    logits = jax.jit(lambda tokens: jax.nn.log_softmax(model(tokens)))(
        training.tokens[:, :-1]
    )
    targets = np.asarray(training.tokens)[:, 1:, None]
    want = -np.take_along_axis(np.asarray(logits), targets, axis=-1).mean()
    assert losses[0] == pytest.approx(want, rel=1e-5)
    assert losses[2] < losses[0]


def test_the_bytes_of_the_ssd_are_counted():
    state = 4 * 8 * 8 * 4
    token = (2 * 4 * 8 + 4 + 2 * 2 * 8) * 4
    assert SSD["decode"].nbytes == 3 * token + 6 * state
    assert SSD["mixed"].nbytes == 16 * token + 6 * state
    assert SSD["dense"].nbytes == 14 * token


LAYER = whole_layer.LayerWorkload((1, 1, 9, 5), "float32", 4, 8, 8)


def test_a_whole_layer_computes_its_workload():
    work = LAYER
    one = whole_layer.ours(work)
    result = one.call()
    got = one.view(result)
    errors = work.errors(got)
    assert max(errors.values()) < 1e-6 and one.implementation == "XLA"
    assert errors.keys() == {"y", "states", "unused", "conv_states"}
    for name in errors:
        with pytest.raises(WrongResult, match=name):
            work.errors(got | {name: got[name] + 1})


def test_a_whole_layer_is_the_conv_and_then_the_ssd():
    work = LAYER
    seen = {
        "cache_indices": work.ssd.cache_indices,
        "has_initial_state": work.ssd.has_initial_state,
    }
    conv = [work.conv.x, work.conv.weight, work.conv.bias, work.conv.states()]
    filtered, conv_states = reference.causal_conv1d_fn(
        *map(np.asarray, conv), work.ssd.offsets, **seen
    )
    x, B, C = np.split(filtered, np.cumsum(work.split)[:2], axis=1)
    dt = np.logaddexp(0, np.asarray(work.ssd.dt + work.ssd.dt_bias, np.float64))
    y, states = ssd_reference.ssd_packed(
        x.reshape(-1, 4, 8),
        dt,
        np.asarray(work.ssd.A, np.float64),
        B[:, None],
        C[:, None],
        np.asarray(work.ssd.D, np.float64),
        np.asarray(work.ssd.states()),
        work.ssd.offsets,
        **seen,
    )
    heads, slots = work.ssd.compared, work.ssd.cache_indices
    expected = work.expected
    np.testing.assert_allclose(expected["y"], y[:, heads], atol=1e-6)
    np.testing.assert_allclose(expected["states"], states[slots][:, heads], atol=1e-6)
    left = conv_states[slots][..., work.channels]
    np.testing.assert_array_equal(expected["conv_states"], left)


def test_a_wrong_result_is_found():
    got = {"out": MIXED.expected["out"].copy()}
    assert MIXED.errors(got) == {"out": 0}
    for wrong in (np.nan, 1.0):
        got["out"][3, 5] = MIXED.expected["out"][3, 5] + wrong
        with pytest.raises(WrongResult, match="out is off by"):
            MIXED.errors(got)
    with pytest.raises(WrongResult, match="out is"):
        MIXED.errors({"out": got["out"][1:]})


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
        OURS: lambda: ours(MIXED),
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


class OnGpu(Options):
    """As if there were a GPU, but for how it is timed."""

    on_gpu = True


def test_tables_say_loudly_where_xla_stood_in_for_kernels(tmp_path):
    cli = pytest.importorskip("benchmarks.__main__")
    rich = pytest.importorskip("rich.console")

    def by(name):
        return lambda: Prepared(lambda: None, implementation=name)

    prepare = {
        OURS: by("XLA"),
        f"{OURS}, rounding": by("Triton"),
        BY_XLA: by("XLA"),
        "24 convs": by("XLA"),
        "empty step": by("XLA"),
        "flax": by("XLA"),
    }
    case = Case("mixed", "batch", 1.0, "bfloat16", prepare, ours=("24 convs",))
    rows = run_case(case, OnGpu(seconds=0.0))
    assert [r.candidate for r in rows if r.fell_back] == [OURS, "24 convs"]
    for row in rows:
        assert (FALLBACK in row.note) == row.fell_back
        assert bool(row.microseconds) and row.implementation
    console = rich.Console(
        width=200, record=True, quiet=False, file=(tmp_path / "o").open("w")
    )
    console.print(cli.table("mixed", rows))
    assert f"{FALLBACK} in 2 of 6 rows" in console.export_text()
    assert cli.fallbacks([row for row in rows if not row.fell_back]) == ""
    assert FALLBACK in cli._line(rows)
    # On a CPU XLA is what is wanted.
    assert not any(row.fell_back for row in run_case(case, QUICK))


@pytest.mark.parametrize("suite", ["mixed", "layers", "ssd_training", "layer", "moves"])
def test_every_row_of_ours_says_which_implementation_ran(suite, monkeypatch):
    """Of one small case of each suite, prepared and not timed."""
    monkeypatch.setattr(suites, "DIM", 24)
    monkeypatch.setattr(suites, "TOKENS", 24)
    monkeypatch.setattr(suites, "_LAYERS", 1)
    case = next(iter(suites.SUITES[suite](Options(dtypes=("float32",)))))
    ours = [name for name in case.prepare if case.wants_kernels(name)]
    assert ours, f"{suite} has no row of this package"
    assert case.prepare[ours[0]]().implementation == "XLA"


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
    with imports.stand_in("absent_package", {"ANSWER": 42}):
        assert imports.load("kernels_of_a_peer", file).ANSWER == 42
    assert not any(name.startswith("absent_package") for name in sys.modules)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("absent_package")


def test_files_of_a_package_are_loaded_and_the_rest_of_it_is_stood_in(tmp_path):
    folder = tmp_path / "half_package" / "ops"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").write_text("raise ImportError('not to be run')")
    (folder / "real.py").write_text("from half_package.rest import NAME\nX = NAME + 1")
    with imports.stand_in("half_package", {"NAME": 1}, tmp_path):
        assert imports.load("half_package.ops.real", tmp_path).X == 2
    assert "half_package.ops.real" in sys.modules  # Triton looks kernels up there
    assert "half_package.rest" not in sys.modules


TUNED = {
    "packed": Workload("packed", (1, 7, 1, 40), 40, 3, "float32", slots=9),
    "update": Workload("update", (1,) * 4, 40, 3, "float32", slots=9),
    "dense": Workload("dense", (40, 40), 40, 3, "float32"),
    "gradient": Workload("gradient", (40, 40), 40, 3, "float32"),
}


@pytest.mark.parametrize("op", TUNED)
def test_kernels_with_changed_tiles_compute_the_workload(op):
    pytest.importorskip("triton")
    interpreter = pytest.importorskip("jax_causal_conv.kernels.interpreter")
    work, change = TUNED[op], Change(block_n=16, num_warps=2, block_m=8)
    chosen = change.of(tune.default_tiles(work))
    assert (chosen.block_n, chosen.block_m, chosen.num_warps) == (16, 8, 2)
    launches = []

    def call(launch):
        launches.append(launch)
        return interpreter.call(launch)

    one = tune.prepared(work, chosen, call)
    errors = work.errors(one.view(one.call()))
    assert max(errors.values()) < 1e-4
    assert {(launch.num_warps, launch.constants.BLOCK_N) for launch in launches} == {
        (2, 16)
    }


def test_tiles_are_named_on_the_command_line():
    assert Change.parsed("128x1x8") == Change(128, 1, 8)
    assert Change.parsed("64x2") == Change(64, 2)
    assert Change.parsed("64x2+") == Change(64, 2, ahead=1)
    assert Change.parsed("64x2x8-") == Change(64, 2, 8, ahead=0)
    for text in ("64", "64x0", "64x1x2x3", "64xa"):
        with pytest.raises(ValueError, match=text if text == "64x0" else None):
            Change.parsed(text)


def test_a_search_times_all_changes_and_other_chunks_of_the_best():
    times = {Change(): 3.0, Change(64): 1.0, Change(128): 2.0, Change(256): 4.0}
    asked = []

    def outcomes(changes):
        asked.append(changes)
        return {c: _took(times.get(replace(c, block_m=None))) for c in changes}

    found = tune.search(list(times), outcomes, (8, 16))
    best = [Change(64), Change(128), Change()]
    assert asked == [
        list(times),
        [replace(c, block_m=m) for c in best for m in (8, 16)],
    ]
    assert len(found) == 10
    assert tune.search(list(times), outcomes, ()).keys() == times.keys()


def _took(time):
    return timing.Timing(time, time, time, 1, "wall")


def test_changed_tiles_are_compiled_without_a_gpu():
    if reason := machine_code.missing_for_kernels():
        pytest.skip(reason)
    (model,) = [m for m in MODELS if m.name == "Mamba2-2.7B"]
    assert changes("decode 256")[0] == Change()
    found = tune.compile_change("decode 256", model, Change(block_n=256, num_warps=2))
    assert "0 B spilled" in found


SERVED = serving.Serving(
    Mamba2Config(
        vocab_size=64, d_model=64, n_layers=1, headdim=16, d_state=4, chunk_size=4
    ),
    serving.Load(
        4, 32, 6, longest=12, shared=8, own=4, prompts=4, block=4, drafts=3, steps=4
    ),
    "float32",
    on_gpu=False,
)
ENGINE_ROW = functools.partial(Row, "engine", "some states", 4, "float32")


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_engine_is_timed_in_steps(on_gpu, monkeypatch):
    kernels = {"update_kernel": [1.0] * 20, "loop_fusion": [3.0] * 20}
    seen = "profiler", kernels
    monkeypatch.setattr(timing, "device_kernels", lambda *_: seen)
    served = serving.Serving(SERVED.config, SERVED.load, "float32", on_gpu)
    # Without prompts, so soonest compiled.
    decode, *rest = served.steps("bfloat16", ENGINE_ROW)
    assert decode.candidate == "decode step" and decode.note.startswith("4 tokens;")
    assert decode.tokens_per_second == pytest.approx(4e6 / decode.microseconds)
    if not on_gpu:
        (convs,) = rest
        assert convs.candidate == "convs of a decode step" and convs.microseconds > 0
        return
    assert [row.candidate for row in rest] == [
        f"decode step: {part}" for part in serving.PARTS
    ]
    conv, ssd = rest[:2]
    assert conv.microseconds == 1 and conv.implementation == "Triton"
    assert ssd.microseconds == 0 and ssd.implementation == "XLA"
    assert [row.fell_back for row in rest] == [False, True, *[False] * 4]


def test_no_step_is_compiled_while_steps_are_timed():
    engine = SERVED.engine(ssm_dtype="bfloat16")
    with pytest.raises(RuntimeError, match="compiled while steps were timed"):
        serve_one(engine)
    steps = serve_one(engine)
    assert [step.prefill_tokens for step in steps] == [1, 0, 0]


def serve_one(engine):
    with serving.without_compiling(engine) as steps:
        engine.submit(Request([1], max_new_tokens=3))
        engine.run()
    return steps


def test_the_engine_has_hits_and_misses_in_its_prefix_cache():
    missed, hit = SERVED.prefixes(ENGINE_ROW)
    assert "; 0.0% of the prompts' tokens from the cache" in missed.note
    assert "; 66.7% of the prompts' tokens from the cache" in hit.note


def test_as_many_drafts_are_right_as_are_said_to_be():
    notes = [row.note for row in SERVED.drafts(ENGINE_ROW)]
    for note, accepted, tokens in zip(
        notes, ("0.0%", "33.3%", "100.0%"), ("1.00", "2.00", "4.00"), strict=True
    ):
        said = f"{accepted} of the drafts accepted, {tokens} tokens a request"
        assert said in note


def test_what_becomes_of_another_framework_is_told(tmp_path, monkeypatch):
    """It is measured, it fails by itself, or it is not there and nothing is said."""

    def rows(**paths):
        options = Options(dtypes=("float32",), paths=paths)
        return engine_peers.measure(SERVED.config, 4, (2, 6), options, ENGINE_ROW)

    monkeypatch.setattr(Options, "on_gpu", True)
    fake = types.SimpleNamespace(
        float32="float32",
        cuda=types.SimpleNamespace(synchronize=lambda: None),
        randint=lambda high, shape, device: np.zeros(shape, np.int32),
    )
    torch = types.SimpleNamespace(torch=fake)
    monkeypatch.setattr(engine_peers, "Torch", lambda: torch)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    assert rows() == []  # mamba_ssm is not installed
    (failed,) = rows(**{"mamba-ssm": tmp_path / "nowhere"})
    assert failed.note.startswith("failed: FileNotFoundError")
    folder = tmp_path / "mamba_ssm" / "models"
    folder.mkdir(parents=True)
    (folder / "config_mamba.py").write_text("MambaConfig = dict\n")
    (folder / "mixer_seq_simple.py").write_text(
        "import time\n"
        "class MambaLMHeadModel:\n"
        "    def __init__(self, config, device, dtype):\n"
        "        assert config['ssm_cfg']['headdim'] == 16 and dtype == 'float32'\n"
        "    def generate(self, tokens, length, top_k, cg=False):\n"
        "        time.sleep(1e-3 * (length - tokens.shape[1]))\n"
    )
    step, prompts = rows(**{"mamba-ssm": tmp_path})
    assert step.candidate == "decode step of mamba_ssm" and step.microseconds > 0
    assert step.tokens_per_second == pytest.approx(4e6 / step.microseconds)
    assert prompts.tokens_per_second == pytest.approx(12e6 / prompts.microseconds)
    for name in ("config_mamba", "mixer_seq_simple"):
        del sys.modules[f"mamba_ssm.models.{name}"]


def test_the_time_of_a_step_goes_to_its_parts():
    kernels = {
        "packed_kernel": [1.0, 3.0],
        "update_kernel": [2.0],
        "decode_kernel": [10.0, 10.0],
        "chunks_kernel": [4.0],
        "nvjet_tst_64x8_64x16_4x1_v_bz_TNT": [6.0],
        "gemm_fusion_dot_3": [2.0],
        "loop_add_fusion_12": [8.0],
        "MemcpyD2D": [2.0],
    }
    found = serving.parts(kernels, count=2, sampling=1.5, wall=30.0)
    assert {part: time for part, (time, _) in found.items()} == {
        "conv": 3.0,
        "SSD": 12.0,
        "matmuls": 4.0,
        "sampling": 1.5,
        "other kernels": 3.5,
        "host, and gaps": 6.0,
    }
    assert found["SSD"][1] == "decode_kernel 10 us, chunks_kernel 2 us"
    assert serving.parts(kernels, 2, 1.5, wall=20.0)["host, and gaps"][0] == 0


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


def test_parts_of_steps_are_drawn_as_bars(tmp_path):
    plots = pytest.importorskip("benchmarks.plots")
    steps = {
        f"{step}: {part}": time
        for step in ("decode step", "step with prompts")
        for part, time in (("conv", 1e3), ("SSD", 9e3))
    }
    rows = [
        asdict(ENGINE_ROW(who, time, time, time)) | {"fell_back": True}
        for who, time in steps.items()
    ]
    figure = plots._figure("engine", rows, "somewhere")
    (axis,) = figure.axes
    widths = [bar.get_width() for bars in axis.containers for bar in bars]
    assert widths == [1, 1, 9, 9]  # part by part, in ms
    texts = [text.get_text() for text in axis.texts]
    assert texts.count("90%") == 2 and texts.count(" 10.0 ms") == 2
    assert FALLBACK in figure.get_suptitle()


def test_benchmarks_import_neither_tests_nor_each_other_in_circles():
    imported = {}
    for path in (REPOSITORY / "benchmarks").glob("*.py"):
        found = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        assert not [name for name in found if name.split(".")[0] == "tests"], path
        imported[f"benchmarks.{path.stem}"] = found - {f"benchmarks.{path.stem}"}
    while leaves := {m for m, found in imported.items() if not found & set(imported)}:
        for leaf in leaves:
            del imported[leaf]
    assert not imported, f"these import each other: {sorted(imported)}"


def test_tables_say_whose_kernels_a_program_calls():
    lowered = jax.jit(jnp.sin).lower(1.0)
    assert programs.implementation(lowered) == "XLA"


OLD = Code("k", 40, 0, 0, 0, 12.0, ("LDG R1, [c[0x0][0x210]]", "STG R1"))


@pytest.mark.parametrize(
    "new, verdict",
    [
        (OLD, "identical"),
        (
            replace(OLD, sass=("LDG R1, [c[0x0][0x218]]", "STG R1")),
            "identical but for the order of its operands",
        ),
        (replace(OLD, sass=("STG R1",), registers=32), "no worse"),
        (replace(OLD, sass=("STG R1",), registers=41), "WORSE: registers"),
        (
            replace(OLD, sass=("STG R1",), spills=8, per_output=12.5),
            "WORSE: spilled, instr/output",
        ),
    ],
)
def test_machine_code_is_compared(new, verdict):
    (line,) = compare_sass.compare(Key("packed", "model", 90), [OLD], [new])
    assert line[-1] == verdict


def test_a_kernel_that_is_missing_or_fails_is_worse():
    key = Key("packed", "model", 90)
    (line,) = compare_sass.compare(key, [OLD], "ImportError: no")
    assert line[-1] == "WORSE: NEW ImportError: no"
    _, line = compare_sass.compare(key, [OLD, OLD], [OLD])
    assert line[-1] == "WORSE: a kernel in OLD alone"


def test_several_devices_serve_one_engine_after_the_other():
    child = subprocess.run(
        [sys.executable, "-m", "tests.support.scaling_worker"],
        check=False,
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
        timeout=300,
    )
    assert child.returncode == 0, child.stderr
    rows = json.loads(child.stdout.splitlines()[-1])
    ways = ["1 device", "2 devices by requests", "2 devices by heads"]
    assert [row["candidate"] for row in rows] == ways
    for row, slots in zip(rows, [4, 8, 4], strict=True):
        assert row["samples"] > 0
        made = row["tokens_per_second"] * row["microseconds"] / 1e6
        assert made == pytest.approx(slots)
