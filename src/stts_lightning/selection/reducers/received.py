"""Pruning by attention that tokens receive: EViT (Liang et al., ICLR 2022) and the pruning of EVAD (Chen et al., ICCV 2023).

EViT ranks tokens by the class token's attention. VideoMAE has no class token: here both rank them by the attention that they
receive from all tokens, the mean over heads and queries, as EVAD does.
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.reducer import Given, Reducer, ReducerContext, Tokens, where_kept


class Received(Reducer):
    """Keeps the tokens that receive most attention, ceil(ratio * N) of them, in order of falling attention (EVAD)."""

    needs = frozenset({"received"})
    fused: ClassVar[int] = 0
    """Tokens that come out beside those that are kept."""

    def __init__(self, context: ReducerContext) -> None:
        super().__init__(context)
        self.ratio = context.slot.ratio
        self.falls = self.ratio is not None

    def count(self, context: ReducerContext) -> int:
        """A share is rounded up, as in the published codes, and does not count the fused token."""
        return super().count(context) if context.slot.ratio is None else self.of(context.slot.ratio, context.tokens)

    def of(self, ratio: float, tokens: int) -> int:
        """How many come out of `tokens`."""
        return min(math.ceil(ratio * tokens) + self.fused, tokens)

    def comes_out(self, tokens: int) -> int:
        """How many come out now of those that arrive: more than in evaluation while the ratio falls, see `RatioAnnealing`."""
        if not (self.training and self.more and self.ratio is not None):
            return self.out_tokens
        return self.of(self.ratio + (1 - self.ratio) * self.more, tokens)

    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Tokens `(B, N, C)` -> `(B, N', C)`; see `Reducer.forward`."""
        assert given.received is not None, "the backbone does not tell the attention received, which this reducer needs"
        arrived = tokens.x.shape[1]
        out = self.comes_out(arrived)
        if out == arrived and self.fused:
            return tokens, torch.arange(arrived, device=tokens.x.device).expand(tokens.x.shape[0], -1)
        order = given.received.argsort(-1, descending=True)
        indices, others = order[:, : out - self.fused], order[:, out - self.fused :]
        return self.joined(tokens.take(indices), tokens, others, given.received), where_kept(indices, arrived)

    def joined(self, kept: Tokens, tokens: Tokens, others: Tensor, received: Tensor) -> Tokens:
        """What comes out: the kept tokens alone. `others` are the indices of the rest, `(B, N - K)`."""
        return kept


class EViT(Received):
    """The same, and one token more: the sum of all others, weighted by their attention (EViT, Sec. 3.2).

    The weights are not divided by their sum, as in the published code. Later blocks treat it as any token. With
    `callbacks.ratio.until` the ratio falls from 1 during training.
    """

    fused = 1

    def joined(self, kept: Tokens, tokens: Tokens, others: Tensor, received: Tensor) -> Tokens:
        """The kept tokens `(B, K, C)` and the fused one, last: `(B, K + 1, C)`."""
        weights = received.gather(1, others).to(tokens.x.dtype)
        fused = torch.einsum("bn,bnc->bc", weights, tokens.take(others).x)
        sizes = kept.sizes if kept.sizes is None else torch.cat((kept.sizes, torch.ones_like(kept.sizes[:, :1])), 1)
        return Tokens(torch.cat((kept.x, fused.unsqueeze(1)), 1), sizes)
