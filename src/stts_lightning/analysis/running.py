"""What a model costs where it runs, beside its GFLOPs: time, memory, and launches."""

import copy
import functools
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from stts_lightning.analysis.launches import count_forward
from stts_lightning.analysis.speed import Work, clips_per_second, in_turns, peak_memory
from stts_lightning.classifier import VideoClassifier, create_model
from stts_lightning.kernels import prepacked_weights

BATCHES = (1, 8)


def _forward(model: VideoClassifier, device: torch.device, batch: int) -> Work:
    clip = torch.zeros(batch, 3, *model.backbone.clip_size, dtype=torch.uint8, device=device)
    return lambda: model(clip)


def model_as_tested(model: VideoClassifier) -> VideoClassifier:
    """The model whose time tells that of a test: where thresholds decide what is kept, one that keeps its mean over the test.

    Time is measured on clips in which nothing moves; a threshold would keep hardly anything of them.
    """
    seen = model.slots.as_seen()
    if seen is None:
        return model
    kernels = "none" if model.backbone.kernels is None else "auto"
    alike = create_model(**{**model.recipe, "selection": seen, "kernels": kernels})
    alike.load_state_dict(model.state_dict())
    return alike.cast_weights(model.weight_dtype)


def launches(model: VideoClassifier) -> int | None:
    """Launches that one clip asks of a GPU, with weights in bfloat16: counted, not measured. None if they depend on the clip."""
    try:
        return count_forward(functools.partial(copy.deepcopy, model), 1, model.backbone.clip_size, "bf16-true").launches
    except DataDependentOutputException:
        return None


@prepacked_weights()
@torch.inference_mode()
def running_costs(model: VideoClassifier, device: torch.device | str, seconds: float = 2.0) -> dict[str, Any]:
    """Speed, memory and launches of a model as it is tested.

    Args:
        model: moved to the device, and put in evaluation mode.
        device: where to measure.
        seconds: how long to measure each batch, at least three passes.

    Returns:
        What `clips_per_second` returns, latency_ms of one clip, clips_per_second_of_8 and peak_megabytes of eight at a time, and
        `launches`.
    """
    device = torch.device(device)
    usual = clips_per_second(model, device, seconds=seconds)
    one, eight = (
        in_turns({"forward": _forward(model, device, batch)}, device, seconds, rounds=3, warmup=1)["forward"] for batch in BATCHES
    )
    memory = peak_memory(_forward(model, device, 8), device)
    return {
        **usual,
        "latency_ms": round(1e3 * one.median, 3),
        "clips_per_second_of_8": round(8 / eight.median, 3),
        "peak_megabytes": None if memory is None else round(memory / 1e6, 1),
        "launches": launches(model),
    }
