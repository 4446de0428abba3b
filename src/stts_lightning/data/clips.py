"""Clips of one video, for use from Python."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stts_lightning.data.decode import open_video
from stts_lightning.data.sampling import SAMPLINGS
from stts_lightning.data.transforms import EvalTransform


@dataclass(frozen=True)
class ClipRule:
    """Which clips of a video a model is tested on: arguments of `read_clips`.

    Raises:
        ValueError: names an argument, what was found and what is allowed.
    """

    views: int = 5
    crops: int = 1
    stride: int = 4
    sampling: str = "slowfast"
    short_side: int | str | None = None

    def __post_init__(self) -> None:
        for name, found, right, allowed in (
            ("views", self.views, self.views >= 1, "1 or more"),
            ("crops", self.crops, self.crops in (1, 3), "1, 3"),
            ("stride", self.stride, self.stride >= 1, "1 or more"),
            ("sampling", self.sampling, self.sampling in SAMPLINGS, ", ".join(SAMPLINGS)),
        ):
            if not right:
                raise ValueError(f"{name}={found}: allowed are {allowed}")

    def changed(self, **changes: Any) -> "ClipRule":
        """Another rule that differs in some arguments. Raises ValueError for one that there is not."""
        known = [field.name for field in fields(self)]
        if unknown := next((name for name in changes if name not in known), None):
            raise ValueError(f"{unknown}: no such argument; there are {', '.join(known)}")
        return replace(self, **changes)

    @classmethod
    def of(cls, clip: Mapping[str, Any]) -> "ClipRule":
        """Of the section `clip` of a run's configuration."""
        short = clip["test_short_side"] if clip.get("test_short_side") is not None else clip.get("short_side")
        return cls(clip["test_views"], clip["test_crops"], clip["stride"], clip["sampling"], short)


def read_clips(
    path: str | Path,
    clip_size: Sequence[int],
    views: int = 5,
    crops: int = 1,
    stride: int = 4,
    sampling: str = "slowfast",
    short_side: int | str | None = None,
) -> Tensor:
    """Read the clips of a test from a video; a model averages their softmax.

    Args:
        path: a file, or a folder with a picture for each frame.
        clip_size: frames, height and width of a clip: `model.backbone.clip_size`.
        views: clips, spread over the video.
        crops: crops of each clip, 1 or 3.
        stride: source frames from one frame of a clip to the next; see `Sampling`.
        sampling: a name of `SAMPLINGS`.
        short_side: of the resized frames; see `EvalTransform`.

    Returns:
        `(views * crops, 3, T, H, W)` uint8, the crops of a clip one after the other.

    Raises:
        DecodeError: if the video does not decode: names it.
        ValueError: see `ClipRule`.
    """
    ClipRule(views, crops, stride, sampling, short_side)  # Refuses what there is not.
    frames, *size = clip_size
    with open_video(path) as video:
        indices = SAMPLINGS[sampling](frames, stride).views(len(video), views, video.rate)
        pixels = torch.from_numpy(video.frames(indices.ravel())).permute(0, 3, 1, 2)
    clips = EvalTransform(size, short_side, crops)(pixels).unflatten(1, (views, frames))  # (crops, views, T, 3, H, W)
    return clips.permute(1, 0, 3, 2, 4, 5).flatten(0, 1).contiguous()
