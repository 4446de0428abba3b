"""Measured speed of a model as it is tested: hard selection, no gradients."""

import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from stts_lightning.classifier import VideoClassifier


def device_name(device: torch.device) -> str:
    """The device in words, as a figure of speed needs it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
    return f"{model or 'CPU'}, {torch.get_num_threads()} threads"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def clips_per_second(
    model: VideoClassifier, device: torch.device | str, batch: int | None = None, seconds: float = 2.0
) -> dict[str, Any]:
    """Clips a second of forward passes: the median of three or more, after one to warm up.

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
    model(clip)
    _wait(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        model(clip)
        _wait(device)
        times.append(time.perf_counter() - start)
    speed = batch / statistics.median(times)
    return {"clips_per_second": round(speed, 3), "measured_on": f"{device_name(device)}, batch {batch}"}
