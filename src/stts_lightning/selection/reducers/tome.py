"""Token merging: ToMe (Bolya et al., "Token Merging: Your ViT but Faster", ICLR 2023, Sec. 3). Needs no training."""

import torch
from torch import Tensor
from torch.nn import functional as F

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.reducer import Given, Reducer, ReducerContext, Tokens
from stts_lightning.selection.spec import SelectionError


class ToMe(Reducer):
    """Merges the most similar tokens, in pairs of one from each half of the tokens.

    The halves are every second token. Each of the first half is matched with the most similar of the second, by the cosine of
    their keys; the best of these pairs become one token, their mean by size. Order of what comes out, as in the published code:
    those of the first half that are left, by falling similarity, then the second half. At most half of the tokens go.
    """

    needs = frozenset({"keys"})

    def count(self, context: ReducerContext) -> int:
        """See `Reducer.count`; where more tokens than half are to be taken away, half go, as in the published code."""
        if context.slot.ratio is not None and context.slot.ratio < 0.5:
            raise SelectionError(
                f"selection.slots.{context.slot.name}.ratio={context.slot.ratio}: the reducer tome merges tokens in pairs and "
                "keeps half of them or more; merge in several blocks, as in r3_0.5_r4_0.6"
            )
        return max(super().count(context), context.tokens - context.tokens // 2)

    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Tokens `(B, N, C)` -> `(B, N', C)`; see `Reducer.forward`."""
        assert given.keys is not None, "the backbone gives no keys, which the reducer tome needs"
        x = tokens.x
        merged, left = self.in_tokens - self.out_tokens, (self.in_tokens + 1) // 2
        with torch.no_grad():
            keys = F.normalize(given.keys.float(), dim=-1)
            best, into = (keys[:, ::2] @ keys[:, 1::2].mT).max(-1)  # of each of the first half, `(B, N / 2)`
            order = best.argsort(-1, descending=True)
            source, rest = order[:, :merged], order[:, merged:]
            target = into.gather(1, source)
            # Numbers among what comes out: the rest of the first half, then the second half.
            where = torch.empty(x.shape[:2], dtype=torch.int64, device=x.device)
            first = torch.empty_like(order)
            first.scatter_(1, rest, torch.arange(left - merged, device=x.device).expand_as(rest))
            first.scatter_(1, source, target + left - merged)
            where[:, ::2] = first
            where[:, 1::2] = torch.arange(left - merged, self.out_tokens, device=x.device)
        ones = torch.ones(x.shape[:2], device=x.device)
        sizes = ones if tokens.sizes is None else tokens.sizes
        out = sizes.new_zeros(x.shape[0], self.out_tokens).scatter_add(1, where, sizes)
        shares = sizes / out.gather(1, where)  # of each token in the one that it becomes a part of
        weighted = x * shares.unsqueeze(-1).to(x.dtype)
        mixed = x.new_zeros(x.shape[0], self.out_tokens, x.shape[-1])
        mixed = mixed.scatter_add(1, where.unsqueeze(-1).expand_as(x), weighted)
        return Tokens(mixed, out), where
