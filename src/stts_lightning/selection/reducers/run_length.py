"""Run-length tokens: RLT (Choudhury et al., "Don't Look Twice", NeurIPS 2024, Sec. 3). Needs no training.

A token whose pixels hardly differ from those of the token before it in time is left out, before the first block. The published
code strings clips together; here those of a batch are as long as the longest, and what fills up the others is not seen.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.reducer import Given, Reducer, ReducerContext, Tokens, where_kept
from stts_lightning.selection.spec import SelectionError
from stts_lightning.selection.topk import hard_topk

IMAGENET_STD = (0.229, 0.224, 0.225)
"""The threshold is on pixels that were divided by it."""


class RunLength(Reducer):
    """Keeps the tokens that changed by more than a threshold; or, given a ratio, the number of tokens that changed most.

    The change of a token is the mean, over its pixels and channels, of |its last frame - the first frame of the token before|.
    Tokens of the first frames are all kept. The paper's way is a threshold (0.1); a ratio is a variant with a budget.
    """

    places = ("before",)
    needs = frozenset({"clip"})

    def __init__(self, context: ReducerContext) -> None:
        threshold = context.slot.threshold
        if context.block or context.tokens != math.prod(context.grid) or context.grid[0] * 2 != context.clip_size[0]:
            raise SelectionError(
                f"selection.slots.{context.slot.name}: the reducer rlt compares the pixels of all tokens of a clip; it stands "
                "before block 0 (r0), with no slot before it"
            )
        if context.grid[0] < 2:
            raise SelectionError(
                f"selection.slots.{context.slot.name}: the reducer rlt compares a token with that of two frames before; a clip "
                f"of {context.clip_size[0]} frames has none"
            )
        super().__init__(context)
        self.threshold = threshold
        self.alone = self.threshold is not None
        self.patch = context.clip_size[1] // context.grid[1]
        scale = torch.tensor([own / imagenet for own, imagenet in zip(context.std, IMAGENET_STD, strict=True)])
        self.register_buffer("scale", scale.view(1, 3, 1, 1, 1), persistent=False)
        self.scale: Tensor
        self.register_buffer("seen", torch.zeros(2, dtype=torch.float64), persistent=False)
        self.seen: Tensor
        """With a threshold: how many tokens were kept in evaluation, and of how many clips."""
        if self.out_tokens < self.grid[1] * self.grid[2] and threshold is None:
            raise SelectionError(
                f"selection.slots.{context.slot.name}.{context.slot.given}: would keep {self.out_tokens} tokens; the reducer rlt "
                f"keeps all {self.grid[1] * self.grid[2]} of the first frame"
            )

    def count(self, context: ReducerContext) -> int:
        """See `Reducer.count`; all, where a threshold decides."""
        return context.tokens if context.slot.threshold is not None else super().count(context)

    def change(self, clip: Tensor) -> Tensor:
        """How much each token changed, infinite in the first frame: clip `(B, 3, T, H, W)` -> `(B, N)`, in the order t, h, w."""
        scaled = clip.float() * self.scale
        difference = (scaled[:, :, 3::2] - scaled[:, :, :-2:2]).abs().mean(1)  # (B, T / 2 - 1, H, W)
        means = F.avg_pool2d(difference, self.patch)
        return torch.cat((means.new_full((means.shape[0], 1, *means.shape[2:]), torch.inf), means), 1).flatten(1)

    def choose(self, clip: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What is kept of a clip `(B, 3, T, H, W)`: indices `(B, N')`, `Reduction.where` and `Tokens.real`."""
        change = self.change(clip.detach())
        if self.threshold is None:
            indices = hard_topk(change, self.out_tokens)
            return indices, where_kept(indices, self.in_tokens), None
        keep = change > self.threshold
        lengths = keep.sum(1)
        # torch's meta device knows shapes alone: as if all were kept.
        longest = self.in_tokens if lengths.is_meta else int(lengths.max())
        if not self.training and not lengths.is_meta:
            self.seen += torch.stack((lengths.sum(), lengths.new_tensor(len(lengths))))
        # Kept tokens first, each in input order; the rest of a row is filling.
        indices = keep.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
        real = torch.arange(longest, device=keep.device) < lengths.unsqueeze(1)
        return indices, torch.where(keep, keep.cumsum(1) - 1, -1), real

    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Tokens `(B, N, C)` -> `(B, N', C)`, in input order; see `Reducer.forward`."""
        assert given.clip is not None
        indices, where, real = self.choose(given.clip)
        return self.taken(tokens, indices, where)._replace(real=real), where

    def taken(self, tokens: Tokens, indices: Tensor, where: Tensor) -> Tokens:
        """The kept tokens `(B, N', C)`, by their indices `(B, N')`; `where` is `Reduction.where`."""
        return tokens.take(indices)

    def mean_tokens(self) -> float | None:
        """See `Reducer.mean_tokens`."""
        kept, clips = float(self.seen[0]), float(self.seen[1])
        return kept / clips if clips else None

    def forget_seen(self) -> None:
        """See `Reducer.forget_seen`."""
        self.seen.zero_()

    def extra_repr(self) -> str:
        """What is kept."""
        return super().extra_repr() if self.threshold is None else f"tokens that changed by more than {self.threshold:g}"


class RunLengthEncoded(RunLength):
    """The same, and each kept token is told for how long it stands: a learned vector of its run length is added to it.

    A run lasts until the next token that is kept at the same place, or until the end of the clip. In the published code this is
    an option, off in the shipped configurations. There a run of 1 has a vector as well; here it has none, so that a clip of which
    all is kept is that of the unpruned model. The bias of the patch embedding can stand for it.
    """

    def __init__(self, context: ReducerContext) -> None:
        super().__init__(context)
        self.of_length = nn.Parameter(torch.empty(self.grid[0] - 1, context.dim))
        nn.init.trunc_normal_(self.of_length, std=0.02)

    def run_lengths(self, where: Tensor) -> Tensor:
        """How many frames of the grid each kept token stands for, from 1: `Reduction.where` `(B, N)` -> `(B, N)` int64."""
        frames = self.grid[0]
        keep = (where >= 0).view(where.shape[0], frames, -1)  # (B, T, H W)
        time = torch.arange(frames, device=where.device)
        later = keep.unsqueeze(1) & (time[None, :] > time[:, None])[None, :, :, None]  # (B, T, T, H W), from and to
        following = torch.where(later, time[None, None, :, None], frames).amin(2)
        return (following - time[:, None]).flatten(1)

    def taken(self, tokens: Tokens, indices: Tensor, where: Tensor) -> Tokens:
        """The kept tokens, each with the vector of its run length."""
        kept = super().taken(tokens, indices, where)
        lengths = self.run_lengths(where).gather(1, indices)
        table = F.pad(self.of_length, (0, 0, 1, 0)).to(kept.x.dtype)  # Nothing for a run of 1.
        return kept._replace(x=kept.x + F.embedding(lengths - 1, table))
