"""Where and with what a benchmark runs."""

import datetime
import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "jax-triton", "triton", "torch", "flax", "numpy")


def describe() -> dict[str, Any]:
    """The device, its platform, versions, XLA's flags and the date."""
    device = jax.devices()[0]
    name = device.device_kind
    if device.platform == "cpu":
        name = f"{_processor()}, {os.cpu_count()} cores"
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "device": name,
        "platform": device.platform,
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "date": datetime.date.today().isoformat(),
    }


def title(machine: dict[str, Any]) -> str:
    """One line about a machine, with the versions that matter on it."""
    names = ["jax", "torch"]
    if machine["platform"] != "cpu":
        names[1:1] = ["jax-triton", "triton"]
    known = machine["versions"]
    return ", ".join(
        [machine["device"], *(f"{n} {known[n]}" for n in names if n in known)]
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()
