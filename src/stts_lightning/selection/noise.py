"""Where noise comes from: a seed of each clip, so that a clip draws the same in whatever batch and process it stands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Random numbers whose rows follow from the seeds of a batch's clips alone: not from its size, nor from the process.

    Attributes:
        seeds: of each clip; None draws from torch's default generator.
        salt: tells apart what draws from the same seeds.
    """

    seeds: Sequence[int] | None = None
    salt: int = 0

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal numbers; the first dimension is a multiple of the clips' number, each clip's rows together."""
        return self._filled(shape, device, Tensor.normal_)

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Numbers in [0, 1), laid out as in `normal`."""
        return self._filled(shape, device, Tensor.uniform_)

    def _filled(self, shape: Sequence[int], device: torch.device, fill: Callable[..., Tensor]) -> Tensor:
        out = torch.empty(tuple(shape), device=device)
        if self.seeds is None:
            return fill(out)
        if len(out) % len(self.seeds):
            raise ValueError(f"noise for {len(out)} rows from the seeds of {len(self.seeds)} clips")
        generator = torch.Generator(device)
        for rows, seed in zip(out.view(len(self.seeds), -1), self.seeds, strict=True):
            # manual_seed mixes neighbouring seeds well enough for Philox and MT.
            fill(rows, generator=generator.manual_seed((seed * 1009 + self.salt) % 2**63))
        return out
