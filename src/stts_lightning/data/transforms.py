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
        """Frames `(T, 3, H, W)` uint8 -> `(T, 3, size, size)` uint8."""
        return self.steps(frames)


class EvalTransform:
    """Resize the short side, crop the centre.

    Args:
        size: height and width of the crop in pixels.
        short_side: what the shorter side is resized to; as in the field, 256 for crops of 224.
    """

    def __init__(self, size: int | Sequence[int], short_side: int | None = None) -> None:
        height, width = _pair(size)
        short = short_side if short_side is not None else round(max(height, width) * 256 / 224)
        if short < max(height, width):
            raise ValueError(f"short_side={short}: must be at least the crop, {max(height, width)}")
        self.steps = v2.Compose([v2.Resize(short, antialias=True), v2.CenterCrop([height, width])])

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames `(T, 3, H, W)` uint8 -> `(T, 3, size, size)` uint8."""
        return self.steps(frames)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
