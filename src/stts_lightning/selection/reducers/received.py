"""Pruning by attention that tokens receive: EViT (Liang et al., ICLR 2022) and the pruning of EVAD (Chen et al., ICCV 2023).

EViT ranks tokens by the class token's attention. VideoMAE has no class token: here both rank them by the attention that they
receive from all tokens, the mean over heads and queries, as EVAD does.
"""

import math

import torch
from torch import Tensor

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.reducer import Given, Reducer, ReducerContext, Tokens, where_kept


class Received(Reducer):
    """Keeps the tokens that receive most attention, ceil(ratio * N) of them, in order of falling attention (EVAD)."""

    needs = frozenset({"received"})

    def count(self, context: ReducerContext) -> int:
        """A share is rounded up, as in the published codes."""
        return super().count(context) if context.slot.ratio is None else math.ceil(context.slot.ratio * context.tokens)

    def ranked(self, tokens: Tokens, given: Given, keep: int) -> tuple[Tokens, Tensor, Tensor]:
        """The best tokens, their indices `(B, keep)`, and those of all others."""
        assert given.received is not None
        order = given.received.argsort(-1, descending=True)
        return tokens.take(order[:, :keep]), order[:, :keep], order[:, keep:]

    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Tokens `(B, N, C)` -> `(B, N', C)`; see `Reducer.forward`."""
        kept, indices, _ = self.ranked(tokens, given, self.out_tokens)
        return kept, where_kept(indices, self.in_tokens)


class EViT(Received):
    """The same, and one token more: the sum of all others, weighted by their attention (EViT, Sec. 3.2).

    The weights are not divided by their sum, as in the published code. Later blocks treat it as any token. Differs from the
    published code: there the ratio falls from 1 during training.
    """

    def count(self, context: ReducerContext) -> int:
        """Where a share is given, one more than `Received`, unless all are kept; else all but as many as are to be taken away."""
        more = 0 if context.slot.drop is not None else 1
        return min(super().count(context) + more, context.tokens)

    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Tokens `(B, N, C)` -> `(B, N', C)`, the fused token last; see `Reducer.forward`."""
        if self.out_tokens == self.in_tokens:
            return tokens, torch.arange(self.in_tokens, device=tokens.x.device).expand(tokens.x.shape[0], -1)
        assert given.received is not None
        kept, indices, others = self.ranked(tokens, given, self.out_tokens - 1)
        weights = given.received.gather(1, others).to(tokens.x.dtype)
        fused = torch.einsum("bn,bnc->bc", weights, tokens.take(others).x)
        sizes = kept.sizes if kept.sizes is None else torch.cat((kept.sizes, torch.ones_like(kept.sizes[:, :1])), 1)
        return Tokens(torch.cat((kept.x, fused.unsqueeze(1)), 1), sizes), where_kept(indices, self.in_tokens)
