"""A time-boxed share of the differential fuzzing, and tests of the fuzzer itself.

The seed comes from the commit, so each commit sees other cases and a failure can be
repeated. What earlier runs found is kept below as tests of its own.
"""

import dataclasses
import subprocess
import sys

import numpy as np
import pytest

from tests.support import REPOSITORY, cases, checks, fuzz, reference, ssd_cases
from tests.support.cases import FLOATS, PackedShape, UpdateShape

SECONDS = 15


def commit_seed():
    """A number that the commit determines; 0 outside a repository."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return 0
    return int(commit[:8], 16)


def test_xla_and_kernels_agree_with_the_reference_on_random_cases(capsys):
    seed = commit_seed()
    tally = fuzz.run(seed, seconds=SECONDS)
    with capsys.disabled():
        print(f"\nfuzz, seed {seed}, {SECONDS} s: {tally}")
    assert not tally.failures, "\n\n".join(tally.failures)
    assert tally.cases > 0
    assert tally.interpreted > 0 or not fuzz.HAS_TRITON


def test_same_numbers_give_the_same_case():
    for number in range(20):
        one, other = (fuzz.case_of(3, number, 7) for _ in range(2))
        assert one[0] == other[0]
        assert one[1].options == other[1].options
        for name, array in one[1].arrays.items():
            if array is not None:
                checks.assert_same_bits(
                    array.view(np.uint8), other[1].arrays[name].view(np.uint8)
                )


def test_configurations_cover_the_contract():
    drawn = [fuzz.draw_configuration(np.random.default_rng([0, n])) for n in range(600)]
    shapes = [configuration.shape for configuration in drawn]
    packed = [shape for shape in shapes if isinstance(shape, PackedShape)]
    update = [shape for shape in shapes if isinstance(shape, UpdateShape)]
    assert {shape.width for shape in shapes} >= {*range(1, 9), 9, 64}
    assert {shape.x_dtype for shape in shapes} == {*FLOATS, fuzz.FLOAT64}
    assert {str(shape.index_dtype) for shape in shapes} == set(fuzz.INDEX_DTYPES)
    assert any(shape.cache_seqlens for shape in update)
    assert any((shape.num_queries or 1) > shape.state_len for shape in update)
    assert any(shape.num_rejected_tokens for shape in update)
    assert any(shape.block_m is None for shape in packed)
    assert any(shape.num_tokens == 0 for shape in packed)
    assert any(shape.state_len == 0 for shape in shapes)
    assert any(shape.num_slots == 0 for shape in shapes)
    assert any(configuration.x64 for configuration in drawn)
    assert any(configuration.snapshot is not None for configuration in drawn)


def test_configurations_cover_the_ssd():
    drawn = [
        fuzz.draw_ssd_configuration(np.random.default_rng([0, n])) for n in range(400)
    ]
    shapes = [configuration.shape for configuration in drawn]
    packed = [shape for shape in shapes if isinstance(shape, ssd_cases.PackedShape)]
    assert {shape.x for shape in shapes} == {*FLOATS, fuzz.FLOAT64}
    assert {shape.state for shape in shapes} == {None, *FLOATS, fuzz.FLOAT64}
    assert {str(shape.index) for shape in packed} == set(fuzz.INDEX_DTYPES)
    assert {shape.max_prefills for shape in packed} == {None, 0, 1, 2}
    assert {shape.drafts for shape in packed} == {0, 1, 2, 3}
    assert {dict(c.tile).get("stretch") for c in drawn} == {None, 0, 1, 2}
    assert len(packed) < len(shapes)
    for name in ("num_tokens", "num_slots", "num_seqs"):
        assert any(getattr(shape, name) == 0 for shape in packed), name
    for name in ("bias", "d"):
        assert any(getattr(shape, name) is None for shape in shapes), name
    for name in ("dt_softplus", "d_by_channel"):
        assert {getattr(shape, name) for shape in shapes} == {False, True}, name


@pytest.mark.parametrize("wrong", ["y", "states"])
def test_a_wrong_result_of_the_ssd_is_found(monkeypatch, wrong):
    call = ssd_cases.call

    def perturbed(case, implementation):
        y, states = call(case, implementation)
        return (y + y.dtype.type(0.5), states) if wrong == "y" else (y, states + 7)

    monkeypatch.setattr(ssd_cases, "call", perturbed)
    tally = fuzz.run(1, start=fuzz.SSD_EVERY - 1, count=5)
    assert len(tally.failures) == 1
    assert "python -m tests.support.fuzz --seed 1 --replay 3 0" in tally.failures[0]


@pytest.mark.parametrize("wrong", ["out", "states", "dtype"])
def test_a_wrong_result_is_found_and_named(monkeypatch, wrong):
    """Perturb what XLA returns: the fuzzer must say which case to replay."""
    call = checks.call

    def perturbed(case, implementation, **options):
        out, states = call(case, implementation, **options)
        if wrong == "out":
            out = out + out.dtype.type(0.5)
        elif wrong == "states":
            states = np.full_like(states, 7)
        else:
            out = out.astype(np.float64 if out.dtype != np.float64 else np.float32)
        return out, states

    monkeypatch.setattr(checks, "call", perturbed)
    tally = fuzz.run(1, count=fuzz.CASES_PER_CONFIGURATION)
    assert tally.configurations == 1
    assert len(tally.failures) == 1
    assert "python -m tests.support.fuzz --seed 1 --replay 0 0" in tally.failures[0]


def test_command_line_replays_a_case():
    command = [
        sys.executable,
        "-m",
        "tests.support.fuzz",
        "--seed",
        "1",
        "--replay",
        "2",
        "3",
    ]
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "passed" in done.stdout


# What the fuzzer found.


def test_interpreted_kernel_rounds_new_rows_to_the_nearest_bfloat16():
    """Triton's interpreter truncates float32 to bfloat16; here it must not."""
    pytest.importorskip("triton")
    shape = UpdateShape(
        num_rows=3, num_queries=None, num_slots=4, channels=17, width=4, state_len=6
    )
    for x_dtype in FLOATS[:2]:
        wide = dataclasses.replace(shape, x_dtype=x_dtype, state_dtype=FLOATS[2])
        case = cases.update_case(wide, np.random.default_rng(0))
        # Above, below and exactly between neighbours, with even and odd last digits.
        pattern = 1 + np.arange(17) / 2**8 + 2.0**-10 * (np.arange(17) % 3 - 1)
        case = case.replace(x=np.resize(pattern, (3, 17)).astype(x_dtype))
        checks.check(case, "interpret")


def test_interpreted_kernel_rounds_its_output_once():
    """Half a unit in the last place, not one, where nothing but rounding happens."""
    pytest.importorskip("triton")
    x = np.float32(1 + np.arange(64) / 2**10)[:, None]
    shape = PackedShape(
        num_tokens=64, num_seqs=1, num_slots=1, channels=1, width=1, state_len=1
    )
    shape = dataclasses.replace(
        shape, x_dtype=FLOATS[2], bias_dtype=None, activation=None
    )
    case = cases.packed_case(shape, np.random.default_rng(0))
    weight = np.array([[1 + 2**-7]], np.float32)  # products need 15 bits
    case = case.replace(
        x=x.astype(FLOATS[2]),
        weight=weight,
        query_start_loc=np.array([0, 64], np.int32),
        cache_indices=np.array([0], np.int32),
    )
    for implementation in ("xla", "interpret"):
        out, _ = checks.call(case, implementation)
        exact, _ = reference.causal_conv1d_fn(**case.arrays, **case.options)
        checks.assert_same_bits(out, exact.astype(FLOATS[2]), implementation)
