"""Crops, flips and colour on clips, with torchvision's v2 transforms and timm's RandAugment: one draw for a clip."""

import random
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import crop, pil_to_tensor, resize, to_pil_image
from torchvision.tv_tensors import BoundingBoxes, Video


class ClipRandAugment:
    """timm's RandAugment, the same draw for all frames of a clip.

    Args:
        policy: in timm's words, as "rand-m7-n4-mstd0.5-inc1": 4 operations, each applied with probability 0.5, of magnitude
            7 (of 10) with a standard deviation of 0.5, growing in strength with it.
        size: height and width of the frames in pixels; bounds translations.

    Raises:
        ValueError: for a policy that timm does not know.
    """

    def __init__(self, policy: str, size: tuple[int, int]) -> None:
        limits = {"translate_const": int(0.45 * min(size)), "interpolation": Image.Resampling.BICUBIC}
        try:
            self.augment = rand_augment_transform(policy, limits)
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"clip.train_transform.randaugment={policy!r}: expected as in rand-m7-n4-mstd0.5-inc1 (magnitude, operations, "
                "spread of the magnitude, growing strength)"
            ) from error

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames `(T, 3, H, W)` uint8 -> the same."""
        # timm draws from the global generators: each frame starts them anew. Workers have generators of their own.
        seed = int(torch.randint(2**31, ()))
        python, numpy = random.getstate(), np.random.get_state()
        done = []
        try:
            for frame in frames:
                random.seed(seed)
                np.random.seed(seed)
                done.append(pil_to_tensor(self.augment(to_pil_image(frame))))
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
        return torch.stack(done)


class TrainTransform:
    """Random resized crop and horizontal flip; RandAugment and several copies on request.

    Args:
        size: height and width of the clip in pixels.
        scale: range of the crop's share of the area.
        ratio: range of the crop's aspect ratio.
        flip: probability of a horizontal flip; 0 where left and right matter.
        randaugment: a policy of `ClipRandAugment`, or None. It comes after the crop, which spares three quarters of the work.
        copies: differently augmented copies of each decoded clip (repeated augmentation).
    """

    def __init__(
        self,
        size: int | Sequence[int],
        scale: Sequence[float] = (0.08, 1.0),
        ratio: Sequence[float] = (3 / 4, 4 / 3),
        flip: float = 0.5,
        randaugment: str | None = None,
        copies: int = 1,
    ) -> None:
        if copies < 1:
            raise ValueError(f"clip.train_transform.copies={copies}: must be 1 or more")
        self.copies = copies
        part = v2.RandomResizedCrop(_pair(size), (scale[0], scale[1]), (ratio[0], ratio[1]), antialias=True)
        self.geometry = v2.Compose([part, v2.RandomHorizontalFlip(flip)] if flip > 0 else [part])
        self.colours = None if randaugment is None else ClipRandAugment(randaugment, _pair(size))

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames `(T, 3, H, W)` uint8 -> `(copies, T, 3, size, size)` uint8."""
        return torch.stack([self._recoloured(self.geometry(frames)) for _ in range(self.copies)])

    def with_boxes(self, frames: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and where boxes `(T, 4)` come to lie: `(copies, T, 4)`. RandAugment, which may shift, is not followed."""
        copies: list[tuple[Tensor, Tensor]] = []
        for _ in range(self.copies):
            clip, moved = self.geometry(Video(frames), _pixels(boxes, frames))
            copies.append((self._recoloured(clip.as_subclass(Tensor)), _shares(moved)))
        clips, shares = zip(*copies, strict=True)
        return torch.stack(clips), torch.stack(shares)

    def _recoloured(self, clip: Tensor) -> Tensor:
        return clip if self.colours is None else self.colours(clip)


class EvalTransform:
    """Resize, keeping the aspect; crop the centre, or crop three times along the side that is left over.

    Args:
        size: height and width of the crop in pixels.
        short_side: what the shorter side is resized to. None is, as in the field, 256 for crops of 224: 8/7 of the smallest
            picture that covers the crop; "crop" is that picture itself.
        crops: 1, the centre; or 3, both ends and the centre of the side that is left over.
    """

    def __init__(self, size: int | Sequence[int], short_side: int | str | None = None, crops: int = 1) -> None:
        self.height, self.width = _pair(size)
        longest = max(self.height, self.width)
        if short_side not in (None, "crop") and (not isinstance(short_side, int) or short_side < longest):
            raise ValueError(
                f"clip.short_side, clip.test_short_side={short_side}: must be at least the crop, {longest} px, or 'crop', or "
                "null (256/224 of the crop)"
            )
        if crops not in (1, 3):
            raise ValueError(f"clip.test_crops={crops}: allowed are 1 and 3")
        self.short_side, self.crops = short_side, crops

    def _resized(self, height: int, width: int) -> list[int]:
        """Size of a picture after the resize: the shorter side alone for square crops, else both."""
        if isinstance(self.short_side, int):
            return [self.short_side]
        zoom = 1.0 if self.short_side == "crop" else 256 / 224
        if self.height == self.width:
            return [round(self.height * zoom)]
        zoom *= max(self.height / height, self.width / width)
        return [max(round(height * zoom), self.height), max(round(width * zoom), self.width)]

    def _corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """Top and left of the crops of a resized picture."""
        down, right = height - self.height, width - self.width
        centre = (round(down / 2), round(right / 2))
        if self.crops == 1:
            return [centre]
        first, last = ((0, centre[1]), (down, centre[1])) if down > right else ((centre[0], 0), (centre[0], right))
        return [first, centre, last]

    def __call__(self, frames: Tensor) -> Tensor:
        """Frames `(T, 3, H, W)` uint8 -> `(crops, T, 3, size, size)` uint8."""
        frames = resize(frames, self._resized(frames.shape[-2], frames.shape[-1]), antialias=True)
        corners = self._corners(frames.shape[-2], frames.shape[-1])
        return torch.stack([frames[..., top : top + self.height, left : left + self.width] for top, left in corners])

    def with_boxes(self, frames: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and where boxes `(T, 4)` come to lie: `(crops, T, 4)`."""
        placed = resize(_pixels(boxes, frames), self._resized(frames.shape[-2], frames.shape[-1]))
        assert isinstance(placed, BoundingBoxes)
        corners = self._corners(*placed.canvas_size)
        moved = [crop(placed, top, left, self.height, self.width) for top, left in corners]
        return self(frames), torch.stack([_shares(one) for one in moved])


def _pixels(boxes: Tensor, frames: Tensor) -> BoundingBoxes:
    """Boxes as shares of the frames -> in pixels, which torchvision's transforms follow."""
    height, width = frames.shape[-2:]
    sides = torch.tensor([width, height, width, height])
    return BoundingBoxes(boxes * sides, format="XYXY", canvas_size=(height, width))  # type: ignore[call-overload]


def _shares(boxes: Tensor) -> Tensor:
    """Boxes in pixels -> as shares of their canvas; NaN for what was cut away."""
    assert isinstance(boxes, BoundingBoxes)
    height, width = boxes.canvas_size
    shares = boxes.as_subclass(Tensor) / torch.tensor([width, height, width, height])
    gone = (shares[:, 2:] <= shares[:, :2]).any(-1, keepdim=True)
    return shares.masked_fill(gone, torch.nan)


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])
