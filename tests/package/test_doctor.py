"""`python -m jax_causal_conv`: its words, its exit status, and that it always runs."""

import dataclasses
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import jax
import pytest

from jax_causal_conv import doctor
from tests.support import gpu_compiler

HEALTHY = doctor.Facts(
    versions={"jax": "0.11.2", "jaxlib": "0.11.2", "jax-triton": "0.4.1"}
    | {"triton": "3.9.0", "jax-cuda13-plugin": "0.11.2"},
    devices=["cuda:0 (NVIDIA H200)"],
    backend="gpu",
    start_error=None,
    capability=90,
    has_gpu=True,
    has_driver=True,
    platforms="",
    plugin_error=None,
    bridge_error=None,
    kernels={"causal_conv1d_fn": "8.0", "causal_conv1d_update": "8.0"},
    kernel_errors={},
    chosen="Triton",
    assemblers=[doctor.Assembler("/usr/bin/ptxas", "13.0", None)],
)
NO_GPU = dataclasses.replace(
    HEALTHY, backend="cpu", has_gpu=False, has_driver=False, chosen="XLA"
)
NO_PLUGIN = dataclasses.replace(
    NO_GPU,
    versions=HEALTHY.versions | {"jax-cuda13-plugin": None},
    plugin_error="jax's CUDA plugin is not installed",
    kernels={},
)
OTHER_PLUGIN = {
    "versions": HEALTHY.versions | {"jax-cuda13-plugin": "0.10.2"},
    "plugin_error": "jax uses no CUDA plugin of another version than jaxlib's",
    "kernels": {},
}
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
        OTHER_PLUGIN,
        "jax-cuda13-plugin 0.10.2",
        "jax-cuda13-plugin==0.11.2",
    ),
    "driver_without_jax_support": (
        {"has_gpu": False, "backend": "cpu"},
        "jax sees no GPU",
        "jax[cuda13]",
    ),
    "driver_without_plugin": (
        {f.name: getattr(NO_PLUGIN, f.name) for f in dataclasses.fields(NO_PLUGIN)}
        | {"has_driver": True},
        "jax sees no GPU",
        "jax[cuda13]",
    ),
    "jax_cannot_start": (
        {"start_error": "AssertionError", "platforms": "cuda", "backend": "none"},
        "jax cannot start (JAX_PLATFORMS=cuda): AssertionError",
        "leave JAX_PLATFORMS unset",
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


def test_neither_gpu_nor_plugin_is_no_trouble():
    troubles = doctor.diagnose(NO_PLUGIN)
    assert troubles == []
    assert doctor.exit_status(troubles) == 0
    report = doctor.render(NO_PLUGIN, troubles)
    assert "XLA, because jax's default backend is cpu" in report
    assert "would need an NVIDIA GPU with its driver, Linux, and jax's CUDA" in report
    assert 'pip install "jax[cuda13]"' in report
    assert "not tried: jax's CUDA plugin is not installed" in report


def test_plugin_without_a_gpu_needs_only_the_gpu():
    report = doctor.render(NO_GPU, doctor.diagnose(NO_GPU))
    assert "would need an NVIDIA GPU with its driver\n" in report
    assert "pip install" not in report


def test_old_ptxas_is_no_trouble_without_a_gpu():
    assembler = doctor.Assembler("/usr/bin/ptxas", "12.0", OLD_PTXAS)
    facts = dataclasses.replace(NO_GPU, assemblers=[assembler])
    assert doctor.diagnose(facts) == []
    assert OLD_PTXAS in doctor.render(facts, [])


def test_plugin_of_another_version_does_not_fail_without_a_gpu():
    troubles = doctor.diagnose(dataclasses.replace(NO_GPU, **OTHER_PLUGIN))
    (found,) = troubles
    assert "0.10.2 is not made for jaxlib 0.11.2" in found.words
    assert doctor.exit_status(troubles) == 0


@pytest.mark.parametrize(
    ("plugins", "has_gpu", "words"),
    [
        ({"jax-cuda13-plugin": "0.11.2"}, False, None),
        ({"jax-cuda13-plugin": "0.11.2+cuda13"}, False, None),
        ({"jax-cuda13-plugin": "0.11.0", "jax-cuda12-plugin": "0.11.2"}, True, None),
        ({"jax-cuda13-plugin": "0.11.2.1"}, True, "another version"),
        ({"jax-cuda13-plugin": "0.11"}, False, "another version"),
        ({"jax-cuda13-pjrt": "0.11.2"}, False, "not installed"),
        ({}, False, "not installed"),
        ({}, True, None),
    ],
)
def test_only_a_plugin_of_jaxlibs_version_compiles_kernels(plugins, has_gpu, words):
    versions = {"jaxlib": "0.11.2", "jax-cuda12-plugin": None} | plugins
    error = doctor._plugin_error(versions, has_gpu)
    assert error is None if words is None else words in error


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


@pytest.mark.parametrize("platforms", ["cuda", "cuda,cpu", "gpu"])
def test_gpu_that_the_user_asked_for_fails_if_jax_sees_none(platforms):
    facts = dataclasses.replace(NO_GPU, has_driver=True, platforms=platforms)
    assert doctor.exit_status(doctor.diagnose(facts)) == 1


def run_python(*arguments, python=sys.executable, platforms="cpu"):
    """A process of its own, in which jax sees no GPU."""
    return subprocess.run(
        [python, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=gpu_compiler.REPOSITORY,
        env=os.environ | {"JAX_PLATFORMS": platforms},
    )


def run_doctor(before=""):
    """The program; `before` runs first."""
    code = f"{before}\nimport runpy\n"
    code += "runpy.run_module('jax_causal_conv', run_name='__main__')"
    return run_python("-c", code)


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


def test_help_says_what_the_exit_status_means():
    run = run_python("-m", "jax_causal_conv", "--help")
    assert run.returncode == 0, run.stderr
    assert "python -m jax_causal_conv" in run.stdout
    for status in ("0  what", "1  jax cannot start", "2  the command line"):
        assert status in run.stdout
    assert "ptxas" not in run.stdout, "help is not followed by a report"


def test_unknown_option_is_an_error_of_the_command_line():
    run = run_python("-m", "jax_causal_conv", "--hepl")
    assert run.returncode == 2
    assert "--hepl" in run.stderr


def test_report_is_written_where_jax_cannot_start():
    run = run_python("-m", "jax_causal_conv", platforms="nowhere")
    assert run.returncode == 1, run.stderr
    assert "devices: none" in run.stdout
    assert "not tried: jax cannot start" in run.stdout
    assert "jax cannot start (JAX_PLATFORMS=nowhere): " in run.stdout
    assert "report it" not in run.stdout


@pytest.fixture(scope="module")
def python_without_plugin(tmp_path_factory):
    """The interpreter of a virtual environment with all that is here but the plugin.

    It is what `pip install` gives whoever has no GPU. Packages are links, so that
    nothing is downloaded.
    """
    folder = tmp_path_factory.mktemp("without_plugin")
    venv.create(folder, symlinks=True, with_pip=False)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    here = [Path(p) for p in sys.path if p.endswith(("site-packages", "dist-packages"))]
    for entry in (entry for site in here for entry in site.iterdir()):
        link = packages / entry.name
        # Importable modules, and what is known of the packages that they come from.
        is_plugin = entry.name.startswith(("jax_cuda", "jax_plugins"))
        if not is_plugin and not link.exists():
            link.symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.skipif(doctor._DRIVER.exists(), reason="a GPU's driver calls for a plugin")
@pytest.mark.parametrize("platforms", ["", "cpu"])
def test_environment_without_plugin_has_no_trouble(python_without_plugin, platforms):
    run = run_python(
        *("-W", "error", "-m", "jax_causal_conv"),
        python=python_without_plugin,
        platforms=platforms,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert "jax-cuda13-plugin, jax-cuda13-pjrt" in run.stdout
    assert "implementation=None becomes XLA" in run.stdout
    assert "not tried: jax's CUDA plugin is not installed" in run.stdout
    assert run.stdout.endswith("troubles: none\n")
    assert "report" not in run.stdout
    assert run.stderr == ""


OPS = """
import jax, jax.numpy as jnp, numpy as np
from jax_causal_conv import causal_conv1d_fn, ssd_packed
offsets = np.array([0, 1, 7], np.int32)
batch = {"cache_indices": np.array([2, 0], np.int32)}
batch["has_initial_state"] = np.array([True, False])
x, weight = jnp.ones((8, 16), jnp.bfloat16), jnp.ones((16, 4))
y, _ = causal_conv1d_fn(
    x, weight, None, jnp.zeros((3, 3, 16), jnp.bfloat16), offsets,
    activation=None, **batch,
)
x, B = x.reshape(8, 4, 4), jnp.ones((8, 1, 8))
z, _ = ssd_packed(
    x, jnp.ones((8, 4)), -jnp.ones(4), B, B, None, jnp.zeros((3, 4, 4, 8)), offsets,
    **batch,
)
print(float(y[0, 0]), y.shape, z.shape, jax.default_backend())
"""


def test_ops_run_without_a_word_in_an_environment_without_plugin(python_without_plugin):
    run = run_python("-W", "error", "-c", OPS, python=python_without_plugin)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "1.0 (8, 16) (8, 4, 4) cpu\n"
    assert run.stderr == ""


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
    assert "not tried: " in run.stdout
    if gpu_compiler.missing_for_kernels() is None:
        assert "cure: pip install" in run.stdout
