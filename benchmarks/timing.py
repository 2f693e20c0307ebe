"""How long something takes: one notion of time for all that are compared.

On an NVIDIA GPU it is the sum of the durations of all kernels and copies that a call
runs on the device, as jax's profiler records them (CUPTI sees the kernels of every
framework in the process); neither gaps between kernels nor the host count. Of each
kernel the median over calls is taken. Elsewhere it is the wall time of a finished call.

All candidates take turns, so that a change of the machine's mood meets all of them.
"""

import collections
import contextlib
import glob
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np

Clock = Literal["device", "wall", "dispatch"]

_WARMUP_CALLS = 3
_SLOW = 0.5  # seconds of a call that needs no more warming up
_MIN_ROUNDS = 3
_PROFILES, _CALLS_A_PROFILE = 2, 15


@dataclass
class Prepared:
    """Something to time, with its inputs in place.

    Attributes:
        call: starts one step; returns what `wait` waits for.
        wait: until that is finished.
        view: from the result of the first call to what it computed, for the check.
        clock: None is the platform's, "dispatch" the time until `call` returns.
        note: to be said in the table.
        by_torch: whether PyTorch runs it.
        nbytes: what must be moved once; None is the workload's.
        tokens: that a step trains on or reads; 0 where nobody asks.
        memory: bytes that a step takes, see `programs.peak_bytes`; likewise.
        implementation: of a program of JAX, see `programs.implementation`.
    """

    call: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    view: Callable[[Any], dict[str, np.ndarray]] | None = None
    clock: Clock | None = None
    note: str = ""
    by_torch: bool = False
    nbytes: int | None = None
    tokens: int = 0
    memory: int = 0
    implementation: str = ""


@dataclass(frozen=True)
class Timing:
    """Microseconds of one call.

    Attributes:
        median: of all samples, as are the 10th and 90th percentile.
        samples: how many.
        clock: "wall", "dispatch", or what measured the device.
        kernels: device activities of a call, where the device was timed.
        rounds: of each round of wall times.
    """

    median: float
    low: float
    high: float
    samples: int
    clock: str
    kernels: float | None = None
    rounds: tuple[float, ...] = ()

    def over(self, other: "Timing") -> float:
        """This time over another's: where both have rounds, the median of theirs.

        What slowed a whole round down, as other programs do, slowed both.
        """
        if self.rounds and other.rounds:
            pairs = zip(self.rounds, other.rounds, strict=False)
            return statistics.median(mine / its for mine, its in pairs)
        return self.median / other.median


@dataclass
class _Samples:
    clock: str = ""
    seconds: list[float] = field(default_factory=list)
    kernels: dict[str, list[float]] = field(
        default_factory=lambda: collections.defaultdict(list)
    )  # microseconds of each kernel
    calls: int = 0

    def timing(self) -> Timing:
        if self.kernels:
            low, median, high = (
                sum(float(np.percentile(d, q)) * len(d) for d in self.kernels.values())
                / self.calls
                for q in (10, 50, 90)
            )
            launches = sum(map(len, self.kernels.values())) / self.calls
            return Timing(median, low, high, self.calls, self.clock, launches)
        rounds = [seconds * 1e6 for seconds in self.seconds]
        low, median, high = map(float, np.percentile(rounds, [10, 50, 90]))
        return Timing(median, low, high, len(rounds), self.clock, rounds=tuple(rounds))


def measure(
    prepared: Mapping[str, Prepared],
    *,
    seconds: float,
    rounds: int = 30,
    on_error: Callable[[str, Exception], None],
) -> dict[str, Timing]:
    """Times all candidates in turns.

    Args:
        prepared: by name. `call` has run at least once.
        seconds: for all candidates together, each having as much: a slow one is out
            after a few rounds, and the others go on.
        rounds: at most so many. A device is profiled in the first two alone, for 15
            calls each.
        on_error: told of a candidate that raises, which is left out from then on.
    """
    alive, samples = dict(prepared), {name: _Samples() for name in prepared}
    platform: Clock = "device" if jax.default_backend() == "gpu" else "wall"
    repeats: dict[str, int] = {}
    spent = dict.fromkeys(prepared, 0.0)
    for number in range(-1, rounds):  # the first one warms up
        for name, one in list(alive.items()):
            if number >= _MIN_ROUNDS and spent[name] > seconds / len(prepared):
                continue
            began = time.perf_counter()
            try:
                clock = one.clock or platform
                if number < 0:
                    repeats[name] = _warm_up(one)
                elif clock != "device":
                    _wall(one, clock, repeats[name], samples[name])
                elif number < _PROFILES:
                    _device(one, samples[name])
            except Exception as error:  # a peer may fail in any way
                del alive[name], samples[name]
                on_error(name, error)
            if number >= 0:
                spent[name] += time.perf_counter() - began
    return {name: found.timing() for name, found in samples.items()}


def _warm_up(one: Prepared) -> int:
    """How many calls make one sample: at least a millisecond's worth."""
    times = []
    for _ in range(_WARMUP_CALLS):
        start = time.perf_counter()
        one.wait(one.call())
        times.append(time.perf_counter() - start)
        if times[-1] > _SLOW:
            break
    return max(1, min(20, int(1e-3 / max(min(times), 1e-6))))


def _wall(one: Prepared, clock: Clock, repeats: int, samples: _Samples) -> None:
    total = 0.0
    for _ in range(repeats):
        start = time.perf_counter()
        result = one.call()
        if clock == "wall":
            one.wait(result)
        total += time.perf_counter() - start
        one.wait(result)
    samples.clock = clock
    samples.seconds.append(total / repeats)


def _device(one: Prepared, samples: _Samples) -> None:
    clock, kernels = device_kernels(one, _CALLS_A_PROFILE)
    if not kernels:
        raise RuntimeError("no profiler saw a kernel of it")
    samples.clock = clock
    for name, durations in kernels.items():
        samples.kernels[name] += durations
    samples.calls += _CALLS_A_PROFILE


def device_kernels(one: Prepared, calls: int) -> tuple[str, dict[str, list[float]]]:
    """What measured, and microseconds of each kernel in `calls` calls.

    Should jax's profiler not see the kernels of another framework, torch's is asked;
    should that fail, too, the calls are timed by events around a CUDA graph of them,
    which has no gaps for the host either.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    options.host_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            for _ in range(calls):
                result = one.call()
            one.wait(result)
        paths = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        kernels = _read_profile(paths[0]) if paths else {}
    if kernels or not one.by_torch:
        return "jax.profiler", kernels
    with contextlib.suppress(Exception):  # both use CUPTI, and may not share it
        if kernels := _torch_kernels(one, calls):
            return "torch.profiler", kernels
    return "CUDA graph", _torch_graph(one, calls)


def _read_profile(path: str) -> dict[str, list[float]]:
    kernels = collections.defaultdict(list)
    for plane in jax.profiler.ProfileData.from_file(path).planes:
        if "/device:GPU" in plane.name:
            for line in plane.lines:
                if "Stream" in line.name:
                    for event in line.events:
                        kernels[event.name].append(event.duration_ns / 1e3)
    return kernels


def _torch_kernels(one: Prepared, calls: int) -> dict[str, list[float]]:
    from torch.autograd import DeviceType  # noqa: PLC0415 (torch is optional)
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415 (as above)

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(calls):
            result = one.call()
        one.wait(result)
    kernels = collections.defaultdict(list)
    for event in profiled.events():
        if event.device_type == DeviceType.CUDA:
            kernels[event.name].append(float(event.device_time))
    return kernels


def _torch_graph(one: Prepared, calls: int) -> dict[str, list[float]]:
    import torch  # noqa: PLC0415 (torch is optional)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            one.call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(2):  # the first replay uploads the graph
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
    return {"all of a call": [start.elapsed_time(end) * 1e3 / calls] * calls}


def median_seconds(call: Callable[[], Any], repeats: int) -> float:
    """Median wall time of a finished call, for what is compared with nothing."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return statistics.median(times)
