"""STTS without the rectangle: the perturbed Top-K of learned scores over all tokens of a clip, in time and space at once."""

import torch
from torch import Tensor

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.reducer import Given, Reducer, ReducerContext, Tokens, where_kept
from stts_lightning.selection.selector import SoftTopK, build_scorer
from stts_lightning.selection.topk import hard_topk


class JointTopK(Reducer):
    """Keeps the tokens with the highest learned scores (Eq. 2-9 with N = T H W candidates), in input order."""

    places = ("before", "inside")

    def __init__(self, context: ReducerContext) -> None:
        super().__init__(context)
        self.scorer = build_scorer(context.selection, context.dim, "r")
        self.soft_topk = SoftTopK(context.selection)

    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Tokens `(B, N, C)` -> `(B, N', C)`; see `Reducer.forward`."""
        scores = self.scorer.normalize(self.scorer(tokens.x).float())
        indices = hard_topk(scores.detach(), self.out_tokens)
        where = where_kept(indices, self.in_tokens)
        if not self.training:
            return tokens.take(indices), where
        indicator = self.soft_topk(scores, self.out_tokens, sigma, noise)
        mixed = torch.matmul(indicator.to(tokens.x.dtype), tokens.x)
        return tokens.take(indices)._replace(x=mixed), where
