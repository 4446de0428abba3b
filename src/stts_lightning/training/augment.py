"""Augmentation of whole batches on the device: random erasing, then mixup or cutmix, with timm's classes."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let all that is random follow from a seed, and leave every generator as it was."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class BatchAugment:
    """Random erasing, and mixup or cutmix, on clips.

    timm's classes are made for images. Here they see all frames of a clip as channels of one picture: a box lies at the same
    place in all frames, in space only, and a clip's share in the label is its share of the picture.

    Args:
        num_classes: number of classes.
        mixup: alpha of mixup's Beta distribution; 0 is no mixup.
        cutmix: the same for cutmix. Where both are on, each pair has either, with even chances.
        erasing: probability that a box of a clip (2 to 33 % of the picture) becomes noise.

    Clips are mixed with those of the next video of the batch, each pair in a way of its own, so that what becomes of a clip
    depends on its video's draw and not on the size of the batch.

    Raises:
        ValueError: for a value out of range.
    """

    def __init__(self, num_classes: int, mixup: float = 0.0, cutmix: float = 0.0, erasing: float = 0.0) -> None:
        for name, value, limit in (("mixup", mixup, np.inf), ("cutmix", cutmix, np.inf), ("erasing", erasing, 1.0)):
            if not 0 <= value <= limit:
                raise ValueError(f"augment.{name}={value}: must lie in 0 to {limit}")
        self.num_classes = num_classes
        # The loss smooths labels, mixed ones too.
        self.mixing = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes) if mixup or cutmix else None
        self.erasing = erasing

    def check_batch(self, videos: int) -> None:
        """Raise ValueError unless batches of so many videos can be mixed, each with its neighbour."""
        if self.mixing and videos % 2:
            raise ValueError(f"augment.mixup, augment.cutmix: need an even number of videos a device; here it is {videos}")

    def __call__(self, clip: Tensor, label: Tensor, draws: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Augment a batch.

        Args:
            clip: `(B, 3, T, H, W)` float, normalised; changed in place.
            label: `(B,)` int64.
            draws: of each of the batch's videos, whose clips stand together; what becomes of those follows from it.

        Returns:
            The clips, and probabilities of the classes `(B, num_classes)` where clips are mixed, else the labels.
        """
        flat = clip.flatten(1, 2)
        copies = len(clip) // len(draws)
        if self.erasing:
            for number, draw in enumerate(draws):
                with _seeded(draw, clip.device):
                    of_video = flat[number * copies : (number + 1) * copies]
                    RandomErasing(self.erasing, mode="pixel", device=clip.device)(of_video)  # pyright: ignore[reportArgumentType]
        if self.mixing is None:
            return flat.view_as(clip), label
        target = F.one_hot(label, self.num_classes).to(clip.dtype)  # What stays of the last of an odd number of videos.
        for number in range(0, len(draws) - 1, 2):
            with _seeded(draws[number] + 1, clip.device):
                for first in range(number * copies, (number + 1) * copies):
                    pair = [first, first + copies]
                    flat[pair], target[pair] = self.mixing(flat[pair], label[pair])
        return flat.view_as(clip), target
