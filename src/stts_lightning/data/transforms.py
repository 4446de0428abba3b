"""Crops, flips and colour on clips, with torchvision's v2 transforms: one draw for all frames of a clip."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2


class TrainTransform:
    """Random resized crop and horizontal flip; RandAugment on request.

    Args:
        size: height and width of the clip in pixels.
        scale: range of the crop's share of the area.
        ratio: range of the crop's aspect ratio.
        flip: probability of a horizontal flip; 0 where left and right matter.
        randaugment: magnitude 0-30 of RandAugment, or None.
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        randaugment: int | None = None,
    ) -> None:
        crop = v2.RandomResizedCrop(_pair(size), (scale[0], scale[1]), (ratio[0], ratio[1]), antialias=True)
        steps: list[torch.nn.Module] = [crop]
        if flip > 0:
            steps.append(v2.RandomHorizontalFlip(flip))
        if randaugment is not None:
            steps.append(v2.RandAugment(num_ops=4, magnitude=randaugment))
        self.steps = v2.Compose(steps)

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames `(T, 3, H, W)` uint8 -> `(1, T, 3, size, size)` uint8."""
        return self.steps(frames)[None]


class EvalTransform:
    """Resize the short side; crop the centre, or crop three times along the longer side.

    Args:
        size: height and width of the crop in pixels.
        short_side: what the shorter side is resized to; None is, as in the field, 256 for crops of 224; "crop" is the crop's
            longer side.
        crops: 1, the centre; or 3, both ends and the centre of the longer side.
    """

    def __init__(self, size: int | Sequence[int], short_side: int | str | None = None, crops: int = 1) -> None:
        self.height, self.width = _pair(size)
        longest = max(self.height, self.width)
        short = {None: round(longest * 256 / 224), "crop": longest}.get(short_side, short_side)
        if not isinstance(short, int) or short < longest:
            raise ValueError(f"short_side={short}: must be at least the crop, {longest}, or 'crop'")
        if crops not in (1, 3):
            raise ValueError(f"clip.test_crops={crops}: allowed are 1 and 3")
        self.crops = crops
        self.resize = v2.Resize(short, antialias=True)

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames `(T, 3, H, W)` uint8 -> `(crops, T, 3, size, size)` uint8."""
        frames = self.resize(frames)
        down, right = frames.shape[-2] - self.height, frames.shape[-1] - self.width
        centre = (round(down / 2), round(right / 2))
        corners = [centre]
        if self.crops == 3:
            ends = ((0, centre[1]), (down, centre[1])) if down > right else ((centre[0], 0), (centre[0], right))
            corners = [ends[0], centre, ends[1]]
        return torch.stack([frames[..., top : top + self.height, left : left + self.width] for top, left in corners])


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
