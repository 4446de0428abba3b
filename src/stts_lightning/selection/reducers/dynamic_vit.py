"""DynamicViT (Rao et al., NeurIPS 2021, Sec. 3): tokens are dropped by a scorer that is trained with masks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.reducer import Given, Reducer, ReducerContext, Tokens, where_kept
from stts_lightning.selection.spec import SelectionError
from stts_lightning.selection.topk import hard_topk

LEAST = 1e-6
"""Size of a dropped token in training."""


class DynamicViT(Reducer):
    """Keeps the tokens that a small network decides for, before a block.

    In training nothing is removed: a decision of each token, by a Gumbel-Softmax passed straight through, is its size, so that
    a dropped token receives no attention and has no part in the mean. A loss holds the mean share of what is kept to the ratio:
    `ratio_weight` times the squared difference, averaged over the stages. In evaluation the best tokens are kept.

    Differs from the published code: a stage counts kept tokens from those that reach it, rounded, and not from all. Its
    losses on the logits and on the final tokens of a teacher are `distill.teacher` and `distill.tokens`.
    """

    places = ("before",)
    alone = True
    masks = True
    ratio_weight = 2.0

    def __init__(self, context: ReducerContext) -> None:
        super().__init__(context)
        if not context.selection.proportional_attention or not context.selection.proportional_pooling:
            raise SelectionError(
                f"selection.slots.{context.slot.name}: the reducer dynamic_vit masks tokens by their size; "
                "selection.proportional_attention and selection.proportional_pooling must be true"
            )
        dim = context.dim
        stages = sum(len(slot.blocks) for slot in context.selection.slots if slot.axis == "r")
        self.weight = self.ratio_weight / stages
        self.features = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU())
        self.score = nn.Sequential(
            nn.Linear(dim, dim // 2), nn.GELU(), nn.Linear(dim // 2, dim // 4), nn.GELU(), nn.Linear(dim // 4, 2)
        )
        self.kept_share: Tensor | None = None
        """Of all tokens, after this stage, mean of the last training batch, 0-d."""
        self.target = self.out_tokens / context.grid[0] / context.grid[1] / context.grid[2]

    def decide(self, tokens: Tokens) -> Tensor:
        """Logarithms of the chances to be kept and to be dropped: `(B, N, C)` -> `(B, N, 2)`."""
        local, context = self.features(tokens.x).chunk(2, dim=-1)
        alive = torch.ones_like(local[..., :1]) if tokens.sizes is None else tokens.sizes.unsqueeze(-1).to(local.dtype)
        context = (context * alive).sum(1, keepdim=True) / alive.sum(1, keepdim=True)
        return self.score(torch.cat((local, context.expand_as(local)), -1)).float().log_softmax(-1)

    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Tokens `(B, N, C)` -> `(B, N', C)`, in training `(B, N, C)` with sizes; see `Reducer.forward`."""
        chances = self.decide(tokens)
        if not self.training:
            indices = hard_topk(chances[..., 0], self.out_tokens)
            return tokens.take(indices), where_kept(indices, self.in_tokens)
        uniform = noise.uniform(chances.shape, chances.device).clamp(1e-9, 1 - 1e-7)
        soft = (chances - torch.log(-torch.log(uniform))).softmax(-1)[..., 0]
        hard = (soft.detach() > 0.5).float()
        before = torch.ones_like(hard) if tokens.sizes is None else (tokens.sizes - LEAST).clamp_min(0)
        alive = (hard + soft - soft.detach()) * before
        self.kept_share = alive.mean()
        where = torch.where(alive.detach() > 0.5, torch.arange(alive.shape[1], device=alive.device), -1)
        return Tokens(tokens.x, alive + LEAST), where

    def loss(self) -> Tensor | None:
        """The loss of this stage: how far the share that is kept is from the ratio."""
        share, self.kept_share = self.kept_share, None
        return None if share is None else self.weight * F.mse_loss(share, torch.full_like(share, self.target))
