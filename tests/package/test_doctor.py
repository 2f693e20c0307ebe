"""`python -m jax_causal_conv`: its words, its exit status, and that it always runs."""

import dataclasses
import os
import subprocess
import sys

import jax
import pytest

from jax_causal_conv import doctor
from tests.support import gpu_compiler

HEALTHY = doctor.Facts(
    versions={"jax": "0.11.2", "jaxlib": "0.11.2", "jax-triton": "0.4.1"}
    | {"triton": "3.9.0", "jax-cuda13-plugin": "0.11.2"},
    devices=["cuda:0 (NVIDIA H200)"],
    backend="gpu",
    capability=90,
    has_gpu=True,
    has_driver=True,
    platforms="",
    bridge_error=None,
    kernels={"causal_conv1d_fn": "8.0", "causal_conv1d_update": "8.0"},
    kernel_errors={},
    chosen="Triton",
    assemblers=[doctor.Assembler("/usr/bin/ptxas", "13.0", None)],
)
NO_GPU = dataclasses.replace(
    HEALTHY, backend="cpu", has_gpu=False, has_driver=False, chosen="XLA"
)
NOT_THERE = "ModuleNotFoundError: No module named 'jax_triton'"
OLD_PTXAS = "ptxas fatal: Unsupported .version 9.4; current version is '9.0'"

# (changes to healthy facts, words of the trouble, words of its cure)
KNOWN_TROUBLES = {
    "jax_triton_is_absent": (
        {"bridge_error": NOT_THERE},
        "not installed",
        "jax[cuda13]",
    ),
    "jax_triton_without_plugin": (
        {
            "bridge_error": "ImportError: jax-triton requires JAX to be installed with "
            "GPU support."
        },
        "refuses to be imported",
        "jax[cuda13]",
    ),
    "jax_triton_with_an_old_triton": (
        {
            "versions": HEALTHY.versions | {"triton": "3.6.0"},
            "kernel_errors": {"causal_conv1d_fn": "AttributeError: anything"},
        },
        "needs triton 3.7",
        "triton>=3.7",
    ),
    "dead_code_elimination": (
        {
            "kernel_errors": {
                "causal_conv1d_fn": "TypeError: _triton_kernel_call_dce_rule() takes 2 "
                "positional arguments but 3 were given"
            }
        },
        "jax 0.12",
        "jax<0.12",
    ),
    "old_ptxas": (
        {"kernel_errors": {"causal_conv1d_fn": f"XlaRuntimeError: {OLD_PTXAS}"}},
        "too old for the PTX",
        "triton<3.7",
    ),
    "plugin_of_another_version": (
        {"versions": HEALTHY.versions | {"jax-cuda13-plugin": "0.10.2"}},
        "jax-cuda13-plugin 0.10.2",
        "jax-cuda13-plugin==0.11.2",
    ),
    "driver_without_jax_support": (
        {"has_gpu": False, "backend": "cpu"},
        "jax sees no GPU",
        "jax[cuda13]",
    ),
    "unknown": (
        {"kernel_errors": {"causal_conv1d_fn": "ValueError: a surprise"}},
        "a surprise",
        "report it",
    ),
}


@pytest.mark.parametrize("trouble", KNOWN_TROUBLES)
def test_trouble_on_a_gpu_is_named_with_its_cure_and_fails(trouble):
    changes, words, cure = KNOWN_TROUBLES[trouble]
    facts = dataclasses.replace(HEALTHY, **changes)
    (found,) = doctor.diagnose(facts)
    assert words in found.words
    assert cure in found.cure
    assert doctor.exit_status([found]) == 1
    report = doctor.render(facts, [found])
    assert found.words in report
    assert found.cure in report


def test_healthy_gpu_has_no_trouble():
    troubles = doctor.diagnose(HEALTHY)
    assert troubles == []
    assert doctor.exit_status(troubles) == 0
    assert "troubles: none" in doctor.render(HEALTHY, troubles)


def test_the_same_trouble_of_two_kernels_is_named_once():
    errors = dict.fromkeys(HEALTHY.kernels, OLD_PTXAS)
    facts = dataclasses.replace(HEALTHY, kernel_errors=errors)
    assert len(doctor.diagnose(facts)) == 1


def test_old_ptxas_alone_does_not_fail_where_the_kernels_ran():
    assembler = doctor.Assembler("/usr/bin/ptxas", "12.0", OLD_PTXAS)
    facts = dataclasses.replace(HEALTHY, assemblers=[assembler])
    (found,) = doctor.diagnose(facts)
    assert "too old" in found.words
    assert doctor.exit_status([found]) == 0


def test_nothing_fails_without_a_gpu():
    facts = dataclasses.replace(NO_GPU, bridge_error=NOT_THERE, kernels={})
    troubles = doctor.diagnose(facts)
    assert doctor.exit_status(troubles) == 0
    assert "XLA, because jax's default backend is cpu" in doctor.render(facts, troubles)


def test_gpu_that_the_user_switched_off_does_not_fail():
    facts = dataclasses.replace(NO_GPU, has_driver=True, platforms="cpu")
    (found,) = doctor.diagnose(facts)
    assert "JAX_PLATFORMS=cpu" in found.words
    assert doctor.exit_status([found]) == 0


def run_doctor(before=""):
    """The program in a process of its own, without a GPU; `before` runs first."""
    code = f"{before}\nimport runpy\n"
    code += "runpy.run_module('jax_causal_conv', run_name='__main__')"
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False,
        capture_output=True,
        text=True,
        cwd=gpu_compiler.REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )


def test_report_says_what_a_bug_report_needs():
    run = run_doctor()
    assert run.returncode == 0, run.stderr
    for words in ("python 3", "jax 0", "jaxlib 0", "jax-causal-conv 0", "devices: "):
        assert words in run.stdout
    assert "implementation=None becomes XLA" in run.stdout
    assert "kernels for sm_90 (no GPU here)" in run.stdout
    if gpu_compiler.missing_for_kernels() is None:
        assert "causal_conv1d_fn: compiles, PTX " in run.stdout
        assert "causal_conv1d_update: compiles, PTX " in run.stdout


def test_kernel_that_disagrees_with_xla_is_an_error(monkeypatch):
    def probe(x, *_, implementation):
        return x + (implementation == "triton")

    monkeypatch.setitem(doctor._PROBES, "causal_conv1d_fn", probe)
    errors = doctor._run_kernels(["causal_conv1d_fn"], jax.devices("cpu")[0])
    assert "kernel and XLA differ by 1" in errors["causal_conv1d_fn"]


def test_kernel_that_agrees_with_xla_is_none(monkeypatch):
    monkeypatch.setitem(doctor._PROBES, "same", lambda x, *_, implementation: x)
    assert doctor._run_kernels(["same"], jax.devices("cpu")[0]) == {}


HIDE = """
import sys
class Hide:
    def find_spec(name, *_):
        if name.split(".")[0] == {module!r}:
            raise ModuleNotFoundError(f"No module named '{{name}}'", name=name)
sys.meta_path.insert(0, Hide)
"""


@pytest.mark.parametrize("module", ["triton", "jax_triton"])
def test_report_is_written_where_a_package_is_absent(module):
    run = run_doctor(HIDE.format(module=module))
    assert run.returncode == 0, run.stderr
    assert "cannot be tried" in run.stdout
    assert "cure: pip install" in run.stdout
