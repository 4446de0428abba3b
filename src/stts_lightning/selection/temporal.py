"""Temporal selection (paper Sec. 3.3, Eq. 9): keep the K most informative of the M frames, in their order."""

import torch
from torch import Tensor

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import GridSize, Selection, Selector, SlotContext, SoftTopK, build_scorer
from stts_lightning.selection.topk import hard_topk


class FrameSelector(Selector):
    """What all temporal selectors share: how many frames they keep, and keeping them."""

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        frames, height, width = context.size
        self.keep = context.slot.frames(frames)
        self._out_size = (self.keep, height, width)

    @property
    def out_size(self) -> GridSize:
        """See `Selector.out_size`."""
        return self._out_size

    def take(self, grid: Tensor, scores: Tensor, indices: Tensor) -> tuple[Tensor, Selection]:
        """Keep whole frames: grid `(B, T, H, W, C)`, indices `(B, K)` ascending -> `(B, K, H, W, C)`."""
        rows = torch.arange(grid.shape[0], device=grid.device).unsqueeze(1)
        return grid[rows, indices], Selection(self.slot, indices, None, scores, None)

    def mix(self, grid: Tensor, scores: Tensor, indicator: Tensor) -> tuple[Tensor, Selection]:
        """Weighted sums of all frames, Y^T x (Eq. 9): indicator `(B, K, T)` -> `(B, K, H, W, C)`."""
        kept = torch.matmul(indicator.to(grid.dtype), grid.flatten(2)).reshape(-1, self.keep, *grid.shape[2:])
        return kept, Selection(self.slot, hard_topk(scores.detach(), self.keep), None, scores, indicator)

    def extra_repr(self) -> str:
        """What is kept, in integers."""
        return f"{self.keep} of {self.in_size[0]} frames"


class TemporalSelector(FrameSelector):
    """Scores each frame by its pooled tokens and keeps the best K.

    In training the frames that come out are weighted sums of all frames, Y^T x (Eq. 9); in evaluation they are the
    frames of one hard Top-K.
    """

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        self.scorer = build_scorer(context.selection, context.dim, "t")
        self.soft_topk = SoftTopK(context.selection)

    def scores(self, described: Tensor) -> Tensor:
        """Normalised score of each frame, from descriptors: `(B, T, E)` -> `(B, T)`."""
        return self.scorer.normalize(self.scorer(described).float())

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, K, H, W, C)`; see `Selector.forward`."""
        scores = self.scores(self.scorer.describe_frames(grid))
        if self.training:
            return self.mix(grid, scores, self.soft_topk(scores, self.keep, sigma, noise))
        return self.take(grid, scores, hard_topk(scores, self.keep))
