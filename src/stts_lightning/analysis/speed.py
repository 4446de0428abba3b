"""Seconds and bytes: several pieces of work timed in turns, so that a noisy machine is as unkind to each."""

import contextlib
import gc
import itertools
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from stts_lightning.classifier import VideoClassifier
from stts_lightning.kernels import prepacked_weights
from stts_lightning.kernels.cpu.linear import available, mkldnn_linear

Work = Callable[[], object]

DeviceTimer = Callable[[Work, float], float]
"""Seconds that a device itself takes for a piece of work, given the seconds that the host takes to launch it."""

SHORTEST = 0.02
"""Seconds below which a piece of work is repeated within one measurement."""

CYCLES = 2e9
"""A second in cycles of a GPU, rather too many than too few."""


def device_name(device: torch.device) -> str:
    """The device in words, as a figure of speed needs it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or 'CPU'}, {torch.get_num_threads()} threads"


def wait(device: torch.device) -> None:
    """Until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def float32_products(tf32: bool) -> Iterator[None]:
    """Float32 products and convolutions of a GPU in TF32, or in float32 in full (torch's default allows it to cuDNN)."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def device_timer(device: torch.device) -> DeviceTimer | None:
    """A timer by the device's own events; None for a CPU.

    Around work on an idle device, events would tell the wall clock again: between two kernels the device waits for the next
    launch. So it is kept busy beforehand, for as long as the host needs to launch everything. What is more launches than fit
    in line (about 1,000), or waits for the device itself, is told too long: never more than the wall clock, though.
    """
    if device.type != "cuda":
        return None
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(work: Work, launching: float) -> float:
        with torch.cuda.device(device):
            wait(device)
            torch.cuda._sleep(int(CYCLES * (1.2 * launching + 5e-4)))
            begin.record()
            work()
            end.record()
            wait(device)
        return begin.elapsed_time(end) / 1e3

    return seconds


@dataclass(frozen=True)
class Timing:
    """Seconds that a piece of work took: median, the quartiles, and how often it was measured.

    Attributes:
        device: what the device took for it; None where there is no timer for that.
    """

    median: float
    low: float
    high: float
    rounds: int
    device: "Timing | None" = None

    @classmethod
    def of(cls, seconds: list[float], device: "Timing | None" = None) -> "Timing":
        """Summary of measurements, two or more."""
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), low, high, len(seconds), device)

    @property
    def bound_by(self) -> str | None:
        """What a user waits for: "device", if it is at work for nine tenths of the time or more, else "host"."""
        if self.device is None:
            return None
        return "device" if self.device.median >= 0.9 * self.median else "host"


def in_turns(
    works: Mapping[str, Work],
    device: torch.device,
    seconds: float = 10.0,
    rounds: int = 5,
    warmup: int = 2,
    on_device: DeviceTimer | None = None,
) -> dict[str, Timing]:
    """Time pieces of work side by side: each once a round, rounds beginning with another one each time.

    Args:
        works: by name.
        device: where they run.
        seconds: how long to go on, if that makes more rounds than asked for.
        rounds: how often at least, 2 or more.
        warmup: runs of each beforehand.
        on_device: also times one run of each a round on the device.
    """
    repeats: dict[str, int] = {}
    launching: dict[str, float] = {}
    for name, work in works.items():
        took = launching[name] = SHORTEST
        for _ in range(warmup):
            start = time.perf_counter()
            work()
            launching[name] = time.perf_counter() - start
            wait(device)
            took = time.perf_counter() - start
        repeats[name] = max(1, min(1000, round(SHORTEST / max(took, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in works}
    device_times: dict[str, list[float]] = {name: [] for name in works}
    names, begun = list(works), time.perf_counter()
    for number in itertools.count():
        if number >= rounds and time.perf_counter() - begun > seconds:
            break
        for name in names[number % len(names) :] + names[: number % len(names)]:
            start = time.perf_counter()
            for _ in range(repeats[name]):
                works[name]()
            wait(device)
            times[name].append((time.perf_counter() - start) / repeats[name])
            if on_device is not None:
                device_times[name].append(on_device(works[name], launching[name]))
    return {
        name: Timing.of(taken, Timing.of(device_times[name]) if device_times[name] else None) for name, taken in times.items()
    }


def matmul(device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Work], float]:
    """Large products of square matrices, by each library at hand, to know the most that the device does.

    Returns:
        The works, and the floating-point operations of one of them.
    """
    side = 8192 if device.type == "cuda" else 4096 if dtype == torch.float32 else 6144
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    works: dict[str, Work] = {"matmul": lambda: a @ b}
    if device.type == "cpu" and dtype == torch.float32 and available():
        works["linear"] = lambda: mkldnn_linear(a, b, None)
    return works, 2.0 * side**3


@contextlib.contextmanager
def _without_stderr() -> Iterator[None]:
    """Nothing of what the process writes to its standard error: torch's profiler writes there as it starts and stops."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def peak_memory(work: Work, device: torch.device, runs: int = 1) -> int | None:
    """Bytes that a piece of work holds at its peak beyond what it leaves behind; None where that cannot be told.

    Args:
        work: not run before.
        device: where it runs.
        runs: how many, after the first, are watched. `CAPTURED` for CUDA graphs: a replay allocates nothing, but while torch
            captures (at the second run), what the graph will hold counts as allocated, as in a run without graphs.
    """
    work()  # What is made once (the optimiser's state) is there then.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        for _ in range(runs):
            work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with _without_stderr(), profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    results: Any = getattr(seen.profiler, "kineto_results", None)
    if results is None:
        return None
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in events), initial=0))


CAPTURED = 3
"""Runs that are watched where CUDA graphs are captured: one more than are needed."""


def graph_memory(device: torch.device) -> int:
    """Bytes of the device's memory that all CUDA graphs keep for themselves, whether they run or not.

    Graphs take their memory from private pools, which are not given back while a graph lives. Graphs of torch.compile share one.
    """
    if device.type != "cuda":
        return 0
    index = torch.cuda.current_device() if device.index is None else device.index
    here: list[dict[str, Any]] = [segment for segment in torch.cuda.memory_snapshot() if segment["device"] == index]
    return sum(segment["total_size"] for segment in here if tuple(segment["segment_pool_id"]) != (0, 0))


@prepacked_weights()
@torch.inference_mode()
def clips_per_second(
    model: VideoClassifier, device: torch.device | str, batch: int | None = None, seconds: float = 2.0
) -> dict[str, Any]:
    """Clips a second of forward passes as a model is tested, with hard selection: the median of three or more.

    Args:
        model: moved to the device, and put in evaluation mode.
        device: where to measure.
        batch: clips at a time; None is 8 on a GPU and 1 elsewhere.
        seconds: how long to measure, at least three passes.

    Returns:
        clips_per_second, and under `measured_on` the device and the batch: figures of others do not compare.
    """
    device = torch.device(device)
    model = model.to(device).eval()
    batch = batch or (8 if device.type == "cuda" else 1)
    clip = torch.zeros(batch, 3, *model.backbone.clip_size, dtype=torch.uint8, device=device)
    timing = in_turns({"forward": lambda: model(clip)}, device, seconds, rounds=3, warmup=1)["forward"]
    return {"clips_per_second": round(batch / timing.median, 3), "measured_on": f"{device_name(device)}, batch {batch}"}
