"""Augmentation of whole batches on the device: RandAugment, random erasing, then mixup or cutmix.

All draws are made on the host, from the clips' own seeds, and sent at once: nothing waits for the device, and what becomes of
a clip does not depend on the size of the batch.
"""

import math
from collections.abc import Sequence
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from stts_lightning.training.randaugment import BatchRandAugment
from stts_lightning.training.transfer import sent_to

ERASING, MIXING = 1, 2
"""Which draws of a clip they are: those of one kind tell nothing of another's."""
BOX_AREA = (0.02, 1 / 3)
"""Share of the picture that is erased; timm's, as all numbers here."""
BOX_ASPECT = (0.3, 1 / 0.3)
ATTEMPTS = 10
"""Boxes that may be drawn until one fits into the picture."""


class Box(NamedTuple):
    """Rows and columns of a picture, from the first to before the last."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def area(self) -> int:
        """Pixels in it."""
        return (self.bottom - self.top) * (self.right - self.left)


class Mix(NamedTuple):
    """How a clip and its partner are mixed.

    Attributes:
        weight: of the clip's own pixels outside of the box.
        box: where the partner's pixels are.
        share: of the clip's own label.
    """

    weight: float
    box: Box
    share: float


def _random(seed: int, kind: int) -> Random:
    return Random(seed * 4 + kind)


def erased_box(random: Random, probability: float, height: int, width: int) -> Box | None:
    """The box that random erasing takes from a picture; None where it is left as it is."""
    if random.random() > probability:
        return None
    low, high = (math.log(aspect) for aspect in BOX_ASPECT)
    for _ in range(ATTEMPTS):
        area = random.uniform(*BOX_AREA) * height * width
        aspect = math.exp(random.uniform(low, high))
        rows, columns = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if rows < height and columns < width:
            top, left = random.randint(0, height - rows), random.randint(0, width - columns)
            return Box(top, top + rows, left, left + columns)
    return None


def drawn_mix(random: Random, mixup: float, cutmix: float, height: int, width: int) -> Mix:
    """How a pair is mixed: by mixup or cutmix, with even chances where both are on."""
    if cutmix and (not mixup or random.random() < 0.5):
        side = math.sqrt(1 - random.betavariate(cutmix, cutmix))
        rows, columns = int(height * side), int(width * side)
        row, column = random.randrange(height), random.randrange(width)
        # What lies beyond the border is cut off, and the label follows what is left.
        box = Box(
            max(row - rows // 2, 0),
            min(row + (rows + 1) // 2, height),
            max(column - columns // 2, 0),
            min(column + (columns + 1) // 2, width),
        )
        return Mix(1.0, box, 1 - box.area / (height * width))
    weight = random.betavariate(mixup, mixup)
    return Mix(weight, Box(0, 0, 0, 0), weight)


class BatchAugment:
    """RandAugment, random erasing, and mixup or cutmix, on clips.

    The distributions are timm's, whose classes are made for images: here a box lies at the same place in all frames, in space
    only, and a clip's share in the label is its share of the picture.

    Args:
        num_classes: number of classes.
        mixup: alpha of mixup's Beta distribution; 0 is no mixup.
        cutmix: the same for cutmix. Where both are on, each pair has either, with even chances.
        erasing: probability that a box of a clip (2 to 33 % of the picture) becomes noise.
        randaugment: a policy of `BatchRandAugment`, or None.

    Clips are mixed with those of the next video of the batch, each pair in a way of its own, so that what becomes of a clip
    depends on its video's draw and not on the size of the batch.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(
        self,
        num_classes: int,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        erasing: float = 0.0,
        randaugment: str | None = None,
    ) -> None:
        for name, value, limit in (("mixup", mixup, math.inf), ("cutmix", cutmix, math.inf), ("erasing", erasing, 1.0)):
            if not 0 <= value <= limit:
                raise ValueError(f"augment.{name}={value}: must lie in 0 to {limit}")
        self.num_classes, self.mixup, self.cutmix, self.erasing = num_classes, mixup, cutmix, erasing
        self.randaugment = None if randaugment is None else BatchRandAugment(randaugment)

    def check_batch(self, videos: int) -> None:
        """Raise ValueError unless batches of so many videos can be mixed, each with its neighbour."""
        if (self.mixup or self.cutmix) and videos % 2:
            raise ValueError(f"augment.mixup, augment.cutmix: need an even number of videos a device; here it is {videos}")

    def pixels(self, clip: Tensor, draws: Sequence[int]) -> Tensor:
        """What comes before the normalisation: RandAugment on clips `(B, 3, T, H, W)` uint8, draws as in `__call__`."""
        return clip if self.randaugment is None else self.randaugment(clip, _seeds(draws, len(clip)))

    def __call__(self, clip: Tensor, label: Tensor, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            clip: `(B, 3, T, H, W)` float, normalised; changed in place.
            label: `(B,)` int64.
            draws: of each of the batch's videos, whose clips stand together; what becomes of those follows from it.

        Returns:
            The clips, and probabilities of the classes `(B, num_classes)` where clips are mixed, else the labels.
        """
        if self.erasing:
            self._erase(clip, _seeds(draws, len(clip)))
        return self._mix(clip, label, draws) if self.mixup or self.cutmix else (clip, label)

    def _erase(self, clip: Tensor, seeds: Sequence[int]) -> None:
        noise = torch.Generator(clip.device)
        for one, seed in zip(clip, seeds, strict=True):
            random = _random(seed, ERASING)
            if box := erased_box(random, self.erasing, *clip.shape[-2:]):
                # A seed is given to the kernel as it is launched.
                noise.manual_seed(random.getrandbits(62))
                one[..., box.top : box.bottom, box.left : box.right].normal_(generator=noise)

    def _mix(self, clip: Tensor, label: Tensor, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        height, width = clip.shape[-2:]
        copies, pairs = len(clip) // len(draws), len(draws) // 2
        target = (label[:, None] == torch.arange(self.num_classes, device=label.device)).to(clip.dtype)
        if not pairs:
            return clip, target
        seeds = _seeds(draws, len(clip))
        mixes = [
            drawn_mix(_random(seeds[2 * pair * copies + copy], MIXING), self.mixup, self.cutmix, height, width)
            for pair in range(pairs)
            for copy in range(copies)
        ]
        numbers = sent_to([number for mix in mixes for number in (mix.weight, *mix.box, mix.share)], clip.device)
        weight, top, bottom, left, right, share = numbers.view(pairs, 1, copies, 6, 1, 1).unbind(3)
        row = torch.arange(height, device=clip.device).view(-1, 1)
        column = torch.arange(width, device=clip.device)
        inside = ((row >= top) & (row < bottom)) & ((column >= left) & (column < right))
        own = (weight * ~inside).to(clip.dtype)[:, :, :, None, None]  # (pairs, 1, copies, 1, 1, H, W)

        def mixed(values: Tensor, weights: Tensor) -> None:
            """Weigh the values of each clip and those of its partner, in place; the last of an odd number of videos stays."""
            paired = values[: 2 * pairs * copies].unflatten(0, (pairs, 2, copies))
            torch.lerp(paired.flip(1), paired, weights, out=paired)

        mixed(clip, own)
        mixed(target, share[..., 0].to(clip.dtype))
        return clip, target


def _seeds(draws: Sequence[int], clips: int) -> list[int]:
    """A seed for each clip, of each video's draw as many as it has clips."""
    return [draw + copy for draw in draws for copy in range(clips // len(draws))]
