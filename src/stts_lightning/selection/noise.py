"""Where noise comes from: a seed of each clip, so that a clip draws the same in whatever batch and process it stands.

Numbers are computed from counters (SplitMix64: Steele, Lea and Flood, OOPSLA 2014): from seed, salt and position alone, by
elementwise arithmetic. So they are drawn on the clip's own device without asking the host, are the same on all devices, and
torch.compile fuses and captures them like any other arithmetic.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# As signed 64-bit numbers, in which torch's arithmetic wraps.
_STEP = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's output function: int64 -> int64, each bit of the result following from all bits of the input."""
    z = (z ^ _shifted(z, 30)) * _FIRST
    z = (z ^ _shifted(z, 27)) * _SECOND
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shift to the right, filling with zeros: torch's fills with the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def mixed_seeds(seeds: Sequence[int]) -> Tensor:
    """Seeds of clips, `(B,)` int64, told apart in all bits, however close they are."""
    return _mix(torch.tensor([seed % 2**63 for seed in seeds], dtype=torch.int64))


@dataclass(frozen=True)
class Noise:
    """Random numbers whose rows follow from the seeds of a batch's clips alone: not from its size, nor from the process.

    Attributes:
        seeds: of each clip, `(B,)` int64, as from `mixed_seeds`; None draws from torch's default generator.
        salt: tells apart what draws from the same seeds.
    """

    seeds: Tensor | None = None
    salt: int = 0

    @classmethod
    def of(cls, seeds: Sequence[int], salt: int = 0) -> "Noise":
        """Noise of clips with these seeds."""
        return cls(mixed_seeds(seeds), salt)

    @classmethod
    def of_content(cls, numbers: Tensor, salt: int = 0) -> "Noise":
        """Noise that follows from a number of each clip, `(B,)` int64, on its device."""
        return cls(_mix(numbers), salt)

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal numbers; the first dimension is a multiple of the clips' number, each clip's rows together."""
        if self.seeds is None:
            return torch.randn(tuple(shape), device=device)
        bits = self._bits(self.seeds, shape, device)
        # Box and Muller: a radius from the upper half, an angle from the lower one. The radius' number is never 0.
        radius = (_upper(bits) + 2**-24).log().mul(-2.0).sqrt()
        return radius * torch.cos(_lower(bits) * (2 * math.pi))

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Numbers in [0, 1), laid out as in `normal`."""
        if self.seeds is None:
            return torch.rand(tuple(shape), device=device)
        return _upper(self._bits(self.seeds, shape, device))

    def _bits(self, seeds: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
        """64 random bits for each number."""
        clips = seeds.shape[0]
        if shape[0] % clips:
            raise ValueError(f"noise for {shape[0]} rows from the seeds of {clips} clips")
        keys = _mix(seeds.to(device, non_blocking=True) + self.salt)
        numbers = shape[0] // clips * math.prod(shape[1:])  # of each clip
        counters = torch.arange(1, numbers + 1, device=device) * _STEP
        return _mix(keys.unsqueeze(1) + counters).view(tuple(shape))


def _upper(bits: Tensor) -> Tensor:
    """Numbers in [0, 1) from the upper half: float32 holds 24 bits exactly."""
    return _shifted(bits, 40).float() * 2**-24


def _lower(bits: Tensor) -> Tensor:
    """Numbers in [0, 1) from the lower half."""
    return (bits & (2**24 - 1)).float() * 2**-24
