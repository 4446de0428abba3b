"""Where noise comes from: a seed of each clip, so that a clip draws the same in whatever batch and process it stands."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Noise:
    """Random numbers whose rows follow from the seeds of a batch's clips alone: not from its size, nor from the process.

    Attributes:
        seeds: of each clip, int64; None draws from torch's default generator.
        salt: tells apart what draws from the same seeds.
    """

    seeds: Tensor | None = None
    salt: int = 0

    @classmethod
    def of(cls, seeds: Sequence[int], salt: int = 0) -> "Noise":
        """Noise of clips with these seeds."""
        return cls(torch.tensor(list(seeds), dtype=torch.int64), salt)

    def normal(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Standard normal numbers; the first dimension is a multiple of the clips' number, each clip's rows together."""
        if self.seeds is None:
            return torch.randn(tuple(shape), device=device)
        return _seeded_normal(self._mixed(1009), list(shape), device)

    def uniform(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Numbers in [0, 1), laid out as in `normal`."""
        if self.seeds is None:
            return torch.rand(tuple(shape), device=device)
        return _seeded_uniform(self._mixed(1009), list(shape), device)

    def repeatable(self, shape: Sequence[int], device: torch.device) -> Tensor:
        """Numbers in [0, 1), laid out as in `normal`, the same on every device."""
        assert self.seeds is not None
        return _seeded_uniform(self._mixed(1_000_003), list(shape), torch.device("cpu")).to(device)

    def _mixed(self, factor: int) -> Tensor:
        """Seeds told apart by the salt. manual_seed mixes neighbouring ones well enough for Philox and MT."""
        assert self.seeds is not None
        return (self.seeds * factor + self.salt).bitwise_and(2**63 - 1)


# Operators of their own, so that torch.compile neither looks into the loop over clips nor takes seeds for constants.
@torch.library.custom_op("stts::seeded_normal", mutates_args=())
def _seeded_normal(seeds: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    return _filled(seeds, shape, device, Tensor.normal_)


@torch.library.custom_op("stts::seeded_uniform", mutates_args=())
def _seeded_uniform(seeds: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    return _filled(seeds, shape, device, Tensor.uniform_)


def _shaped(seeds: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    return torch.empty(tuple(shape), device=device)


_seeded_normal.register_fake(_shaped)  # pyright: ignore[reportUnknownMemberType]
_seeded_uniform.register_fake(_shaped)  # pyright: ignore[reportUnknownMemberType]


def _filled(seeds: Tensor, shape: Sequence[int], device: torch.device, fill: Callable[..., Tensor]) -> Tensor:
    out = torch.empty(tuple(shape), device=device)
    if len(out) % len(seeds):
        raise ValueError(f"noise for {len(out)} rows from the seeds of {len(seeds)} clips")
    generator = torch.Generator(device)
    for rows, seed in zip(out.view(len(seeds), -1), map(int, seeds), strict=True):
        fill(rows, generator=generator.manual_seed(seed))
    return out
