"""Seconds and bytes: several pieces of work timed in turns, so that a noisy machine is as unkind to each."""

import gc
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from stts_lightning.classifier import VideoClassifier
from stts_lightning.kernels import prepacked_weights
from stts_lightning.kernels.cpu.linear import available, mkldnn_linear

Work = Callable[[], object]

SHORTEST = 0.02
"""Seconds below which a piece of work is repeated within one measurement."""


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


@dataclass(frozen=True)
class Timing:
    """Seconds that a piece of work took: median, the quartiles, and how often it was measured."""

    median: float
    low: float
    high: float
    rounds: int

    @classmethod
    def of(cls, seconds: list[float]) -> "Timing":
        """Summary of measurements, two or more."""
        low, _, high = statistics.quantiles(seconds, n=4, method="inclusive")
        return cls(statistics.median(seconds), low, high, len(seconds))


def in_turns(
    works: Mapping[str, Work], device: torch.device, seconds: float = 10.0, rounds: int = 5, warmup: int = 2
) -> dict[str, Timing]:
    """Time pieces of work side by side: each once a round, rounds beginning with another one each time.

    Args:
        works: by name.
        device: where they run.
        seconds: how long to go on, if that makes more rounds than asked for.
        rounds: how often at least, 2 or more.
        warmup: runs of each beforehand.
    """
    repeats: dict[str, int] = {}
    for name, work in works.items():
        took = SHORTEST
        for _ in range(warmup):
            start = time.perf_counter()
            work()
            wait(device)
            took = time.perf_counter() - start
        repeats[name] = max(1, min(1000, round(SHORTEST / max(took, 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in works}
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
    return {name: Timing.of(taken) for name, taken in times.items()}


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


def peak_memory(work: Work, device: torch.device) -> int | None:
    """Bytes that a piece of work holds at its peak beyond what it leaves behind; None where that cannot be told."""
    work()  # What is made once (the optimiser's state) is there then.
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu":
        return None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        work()
    results: Any = getattr(seen.profiler, "kineto_results", None)
    if results is None:
        return None
    events = sorted((e.start_ns(), e.nbytes()) for e in results.events() if e.name() == "[memory]")
    return max(itertools.accumulate((size for _, size in events), initial=0))


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
