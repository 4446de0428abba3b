"""timm's RandAugment for whole batches on the device: timm draws, and each operation sees all clips that are due for it."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tv

from stts_lightning.training.transfer import sent_to

GREY = 128
"""What timm fills with where a shifted picture leaves the frame."""


class Step(NamedTuple):
    """An operation on a clip.

    Attributes:
        name: timm's.
        values: timm's arguments for it, after the draw of the magnitude and its sign.
    """

    name: str
    values: tuple[float, ...]


def _noted(name: str, steps: tuple[Step, ...], *values: float, **_: Any) -> tuple[Step, ...]:
    """In the place of an operation of timm's on a picture: notes that it is due."""
    return (*steps, Step(name, values))


class RandAugmentDraws:
    """What timm's RandAugment would do to a clip, without doing it.

    timm's own transform draws: only its operations on pictures are replaced by notes. So the choice of operations, their
    probabilities, magnitudes and signs are timm's, whatever its policy language becomes.

    Args:
        policy: in timm's words; see `data.transforms.ClipRandAugment`.

    Raises:
        ValueError: for a policy that timm does not know, or one with an operation that has no counterpart here.
    """

    def __init__(self, policy: str) -> None:
        try:
            self.transform = rand_augment_transform(policy, {"img_mean": (GREY,) * 3})
        except (AssertionError, ValueError) as error:
            raise ValueError(
                f"augment.randaugment={policy!r}: expected as in rand-m7-n4-mstd0.5-inc1 (magnitude, operations, spread of the "
                "magnitude, growing strength)"
            ) from error
        for operation in self.transform.ops:
            if operation.name not in KINDS:
                raise ValueError(f"augment.randaugment={policy!r}: its {operation.name} cannot be done on the device")
            operation.aug_fn = partial(_noted, operation.name)

    def __call__(self, seeds: Sequence[int]) -> list[tuple[Step, ...]]:
        """Steps of clips, each following from its seed alone; the global generators are left as they were."""
        # timm draws from the global generators of random and numpy.
        python, of_numpy = random.getstate(), np.random.get_state()
        steps: list[tuple[Step, ...]] = []
        try:
            for seed in seeds:
                random.seed(seed)
                np.random.seed([seed % 2**32, seed // 2**32 % 2**32])
                steps.append(self.transform(()))
        finally:
            random.setstate(python)
            np.random.set_state(of_numpy)
        return steps


# Operations on pixels `(n, 3, T, H, W)` uint8. Their values `(n, k)` float32 lie on the device: nothing waits for it.
# The arithmetic is PIL's, which cuts off the fraction of what it blends.


def _wide(values: Tensor) -> Tensor:
    return values.view(-1, 1, 1, 1, 1)


def _blended(other: Tensor, pixels: Tensor, factor: Tensor) -> Tensor:
    """From another picture (factor 0) to this one (1), and beyond."""
    return (pixels - other).mul_(_wide(factor)).add_(other).clamp_(0, 255).to(torch.uint8)


def _grey(pixels: Tensor) -> Tensor:
    """Brightness `(n, 1, T, H, W)` float32, whole numbers: PIL's fixed-point weights, whose sum float32 holds exactly."""
    red, green, blue = pixels.split(1, dim=1)
    total = red.float().mul_(19595).add_(green, alpha=38470).add_(blue, alpha=7471)
    return total.add_(32768).div_(65536).floor_()


def _color(pixels: Tensor, values: Tensor) -> Tensor:
    return _blended(_grey(pixels), pixels.float(), values)


def _contrast(pixels: Tensor, values: Tensor) -> Tensor:
    # Whole numbers: a sum of them does not depend on its order.
    mean = _grey(pixels).sum((-2, -1), keepdim=True, dtype=torch.int64) / (pixels.shape[-2] * pixels.shape[-1])
    return _blended((mean + 0.5).floor_(), pixels.float(), values)


def _brightness(pixels: Tensor, values: Tensor) -> Tensor:
    return (pixels * _wide(values)).clamp_(0, 255).to(torch.uint8)


def _sharpness(pixels: Tensor, values: Tensor) -> Tensor:
    # PIL's SMOOTH: 1 around 5 in the middle, over 13; the outermost pixels stay.
    frames = pixels.flatten(1, 2).float()
    inner = frames[..., 1:-1, 1:-1]
    smooth = frames.clone()
    smooth[..., 1:-1, 1:-1] = (F.avg_pool2d(frames, 3, 1) * 9).add_(inner, alpha=4).div_(13).add_(0.5).floor_()
    return _blended(smooth.view(pixels.shape), frames.view(pixels.shape), values)


def _solarize(pixels: Tensor, values: Tensor) -> Tensor:
    return torch.where(pixels < _wide(values), pixels, ~pixels)


def _solarize_add(pixels: Tensor, values: Tensor) -> Tensor:
    # What is added is at most 128: no sum that is taken leaves uint8.
    return torch.where(pixels < 128, pixels + _wide(values.to(torch.uint8)), pixels)


def _posterize(pixels: Tensor, values: Tensor) -> Tensor:
    # The half: a power may come out a little too large.
    return pixels & _wide((256.5 - 2 ** (8 - values)).to(torch.uint8))


def _per_channel(operation: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Of torchvision, which takes pictures of one channel; PIL does each channel by itself."""
    return lambda pixels, _: operation(pixels.flatten(0, 2).unsqueeze(1)).view(pixels.shape)


def _blur(pixels: Tensor, values: Tensor) -> Tensor:
    taps = torch.arange(-BLUR, BLUR + 1, device=pixels.device)
    weights = torch.exp(-0.5 * (taps / values) ** 2)
    weights = (weights / weights.sum(1, keepdim=True)).view(-1, 1, 1, 1, 2 * BLUR + 1)
    frames = F.pad(pixels.flatten(1, 2).float(), (BLUR,) * 4, mode="replicate").unflatten(1, pixels.shape[1:3])
    for dim in (-1, -2):
        size, wide = pixels.shape[dim], frames
        frames = wide.narrow(dim, 0, size) * weights[..., :1]
        for tap in range(1, 2 * BLUR + 1):
            frames = frames.addcmul_(wide.narrow(dim, tap, size), weights[..., tap : tap + 1])
    return frames.add_(0.5).clamp_(0, 255).to(torch.uint8)


BLUR = 6
"""Pixels to each side that a blur sees: three times timm's widest."""


def _affine(pixels: Tensor, values: Tensor) -> Tensor:
    """Pictures as an affine map of places sees them, bicubic; values: its six numbers, in half sides from the centre."""
    height, width = pixels.shape[-2:]
    # No matrix product: under autocast or TF32 it would place pixels by a mantissa of 8 or 10 bits.
    down = torch.arange(1 - height, height, 2, device=pixels.device).div(height).view(1, -1, 1)
    right = torch.arange(1 - width, width, 2, device=pixels.device).div(width).view(1, 1, -1)
    a, b, c, d, e, f = (number.view(-1, 1, 1) for number in values.unbind(1))
    grid = torch.stack([a * right + b * down + c, d * right + e * down + f], -1)
    # PIL repeats the border for pixels whose centre lies inside, and fills those whose does not.
    outside = ((grid < -1) | (grid >= 1)).any(-1)[:, None]
    moved = F.grid_sample(pixels.flatten(1, 2).float(), grid, "bicubic", "border", align_corners=False)
    return moved.add_(0.5).clamp_(0, 255).masked_fill_(outside, GREY).to(torch.uint8).view(pixels.shape)


def _matrix(step: Step, height: int, width: int) -> list[float]:
    """The six numbers of timm's affine operations: from a place in the result to the one in the picture, for `_affine`."""
    (value,) = step.values
    a, b, c, d, e, f = 1.0, 0.0, 0.0, 0.0, 1.0, 0.0
    if step.name == "ShearX":
        b = value
    elif step.name == "ShearY":
        d = value
    elif step.name == "TranslateXRel":
        c = value * width
    elif step.name == "TranslateYRel":
        f = value * height
    else:
        angle = np.radians(value)
        a, b, d, e = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        c, f = (width - a * width - b * height) / 2, (height - d * width - e * height) / 2
    across, along = height / width, width / height
    return [a, b * across, a + b * across + 2 * c / width - 1, d * along, e, d * along + e + 2 * f / height - 1]


Operation = Callable[[Tensor, Tensor], Tensor]
AFFINE = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
KINDS: dict[str, Operation] = {
    "AutoContrast": _per_channel(tv.autocontrast),
    "Equalize": _per_channel(tv.equalize),
    "Invert": lambda pixels, _: ~pixels,
    "Posterize": _posterize,
    "PosterizeIncreasing": _posterize,
    "Solarize": _solarize,
    "SolarizeIncreasing": _solarize,
    "SolarizeAdd": _solarize_add,
    "Color": _color,
    "ColorIncreasing": _color,
    "Contrast": _contrast,
    "ContrastIncreasing": _contrast,
    "Brightness": _brightness,
    "BrightnessIncreasing": _brightness,
    "Sharpness": _sharpness,
    "SharpnessIncreasing": _sharpness,
    "Desaturate": _color,
    "GaussianBlur": _blur,
    **dict.fromkeys(AFFINE, _affine),
}
"""Operations by timm's names. Those of one function are done together, each clip with its own values."""


def _numbers(step: Step, height: int, width: int) -> list[float]:
    """What an operation is told of a step."""
    if step.name in AFFINE:
        return _matrix(step, height, width)
    # timm takes so much of the colour away; it does so in float64.
    return [min(1.0, max(0.0, 1 - value)) for value in step.values] if step.name == "Desaturate" else list(step.values)


class Round(NamedTuple):
    """An operation, the clips of a batch that it is for, and the values for each."""

    operation: Operation
    clips: list[int]
    values: list[list[float]]


def rounds(steps: Sequence[tuple[Step, ...]], height: int, width: int) -> list[Round]:
    """Steps of clips, put together to few rounds of many clips; each clip's stay in their order."""
    waiting = [list(one) for one in steps]
    done: list[Round] = []
    while due := Counter(KINDS[one[0].name] for one in waiting if one):
        operation = due.most_common(1)[0][0]
        clips = [clip for clip, one in enumerate(waiting) if one and KINDS[one[0].name] is operation]
        taken = [waiting[clip].pop(0) for clip in clips]
        values = [_numbers(step, height, width) for step in taken]
        done.append(Round(operation, clips, values))
    return done


class BatchRandAugment:
    """timm's RandAugment on clips of a batch, on their device; one draw for all frames of a clip.

    The pictures differ from PIL's by at most a grey level, but for shears, rotations and shifts: PIL's bicubic is a little
    sharper than torch's (a cubic of -1, and of -0.75).

    Args:
        policy: in timm's words, as "rand-m7-n4-mstd0.5-inc1"; see `data.transforms.ClipRandAugment`.

    Raises:
        ValueError: see `RandAugmentDraws`.
    """

    def __init__(self, policy: str) -> None:
        self.draws = RandAugmentDraws(policy)

    def __call__(self, clip: Tensor, seeds: Sequence[int]) -> Tensor:
        """Augment a batch.

        Args:
            clip: `(B, 3, T, H, W)` uint8.
            seeds: of each clip; what becomes of it follows from its own.

        Returns:
            Such clips, in memory of their own.
        """
        clip = clip.clone(memory_format=torch.contiguous_format)
        order = rounds(self.draws(seeds), *clip.shape[-2:])
        # All that the device must know, at once. Numbers of clips are exact in float32.
        numbers = [float(number) for one in order for number in one.clips]
        numbers += [value for one in order for values in one.values for value in values]
        if not numbers:
            return clip
        sent = sent_to(numbers, clip.device)
        at = sum(len(one.clips) for one in order)
        places = sent[:at].long().split([len(one.clips) for one in order])
        with torch.autocast(clip.device.type, enabled=False):
            for (operation, clips, values), place in zip(order, places, strict=True):
                width = len(values[0])
                own = sent[at : at + len(clips) * width].view(len(clips), width)
                clip.index_copy_(0, place, operation(clip.index_select(0, place), own))
                at += own.numel()
        return clip
