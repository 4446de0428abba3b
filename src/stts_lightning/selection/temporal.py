"""Temporal selection (paper Sec. 3.3, Eq. 9): keep the K most informative of the M frames, in their order."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import GridSize, Selection, Selector, SlotContext, SoftTopK, build_scorer
from stts_lightning.selection.topk import hard_topk


class FrameSelector(Selector):
    """What all temporal selectors share: how many frames they keep, and keeping them.

    Candidates are single frames, of which K are picked, or segments of K consecutive frames, of which one is
    (`selection.frames=segment`): N = T, or N = T - K + 1.
    """

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        frames, height, width = context.size
        self.keep = context.slot.frames(frames)
        self._out_size = (self.keep, height, width)
        self.of_segments = context.selection.frames == "segment"
        self.picks = 1 if self.of_segments else self.keep
        """Candidates that are picked."""

    @property
    def out_size(self) -> GridSize:
        """See `Selector.out_size`."""
        return self._out_size

    def candidates(self, scores: Tensor) -> Tensor:
        """Score of each candidate, of a segment the mean of its frames: `(B, T)` -> `(B, N)`."""
        return F.avg_pool1d(scores.unsqueeze(1), self.keep, 1).squeeze(1) if self.of_segments else scores

    def best(self, scores: Tensor) -> Tensor:
        """Kept frames of the best candidates: `(B, N)` -> `(B, K)`, ascending."""
        if self.first_as_next:
            # The first two frames have the same score: of equal ones the earlier is kept, on every device and in exported files.
            at = torch.arange(scores.shape[-1], device=scores.device)
            this, other = scores.unsqueeze(2), scores.unsqueeze(1)
            before = (other > this) | ((other == this) & (at < at.unsqueeze(1)))
            scores = -before.sum(-1).float()
        picked = hard_topk(scores, self.picks)
        return picked + torch.arange(self.keep, device=picked.device) if self.of_segments else picked

    def of_frames(self, indicator: Tensor) -> Tensor:
        """An indicator of candidates as one of frames: `(B, 1 or K, N)` -> `(B, K, T)`."""
        if not self.of_segments:
            return indicator
        # The k-th frame of a segment lies k frames behind its first.
        return torch.cat([F.pad(indicator, (k, self.keep - 1 - k)) for k in range(self.keep)], 1)

    def take(self, grid: Tensor, scores: Tensor, indices: Tensor) -> tuple[Tensor, Selection]:
        """Keep whole frames: grid `(B, T, H, W, C)`, indices `(B, K)` ascending -> `(B, K, H, W, C)`."""
        rows = torch.arange(grid.shape[0], device=grid.device).unsqueeze(1)
        return grid[rows, indices], Selection(self.slot, indices, None, scores, None)

    def mix(self, grid: Tensor, scores: Tensor, indicator: Tensor) -> tuple[Tensor, Selection]:
        """Weighted sums of all frames, Y^T x (Eq. 9), of the scores of frames `(B, T)` and an indicator of candidates.

        Grid `(B, T, H, W, C)`, indicator `(B, 1 or K, N)` -> `(B, K, H, W, C)`.
        """
        weights = self.of_frames(indicator)
        kept = torch.matmul(weights.to(grid.dtype), grid.flatten(2)).reshape(-1, self.keep, *grid.shape[2:])
        return kept, Selection(self.slot, self.best(self.candidates(scores.detach())), None, scores, weights)

    def extra_repr(self) -> str:
        """What is kept, in integers."""
        return f"{self.keep} of {self.in_size[0]} frames"


class TemporalSelector(FrameSelector):
    """Scores each frame by its pooled tokens and keeps the best K, or the best K in a row.

    In training the frames that come out are weighted sums of all frames, Y^T x (Eq. 9); in evaluation they are the
    frames of one hard Top-K.
    """

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        self.scorer = build_scorer(context.selection, context.dim, "t")
        self.soft_topk = SoftTopK(context.selection)

    def raw_scores(self, grid: Tensor) -> Tensor:
        """Score of each frame, not normalised: `(B, T, H, W, C)` -> `(B, T)`."""
        return self.scorer(self.with_first(self.scorer.describe_frames(self.judged(grid)))).float()

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, K, H, W, C)`; see `Selector.forward`."""
        raw = self.raw_scores(grid)
        scores = self.scorer.normalize(raw)
        if not self.training:
            return self.take(grid, scores, self.best(self.candidates(scores)))
        # Means of frames are close to each other: they, not the frames, are brought to [0, 1].
        candidates = self.scorer.normalize(self.candidates(raw)) if self.of_segments else scores
        return self.mix(grid, scores, self.soft_topk(candidates, self.picks, sigma, noise))
