"""The one contract of every reducer: tokens in, fewer tokens out, and a record of where each went. It keeps no grid.

Selectors (`selector`) cut rectangles, which convolutions and windows need. A plain ViT needs none: a reducer may drop or merge
any of its tokens. It acts within a block, between attention and MLP, or before it.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import GridSize, Selection
from stts_lightning.selection.spec import SelectionError, SelectionSpec, SlotSpec


class Tokens(NamedTuple):
    """Tokens of a batch.

    Attributes:
        x: `(B, N, C)`.
        sizes: of how many tokens of the grid each is the mean, `(B, N)` float32; None where all are 1.
        real: False for those that only fill up a shorter row, `(B, N)` bool; None where there are none.
    """

    x: Tensor
    sizes: Tensor | None = None
    real: Tensor | None = None

    def take(self, indices: Tensor) -> "Tokens":
        """Some of the tokens, in the order of indices `(B, K)`."""
        x = self.x.gather(1, indices.unsqueeze(-1).expand(-1, -1, self.x.shape[-1]))
        return Tokens(x, *(None if row is None else row.gather(1, indices) for row in self[1:]))

    def bias(self, proportional: bool) -> Tensor | None:
        """What is added to the logits of attention, `(B, 1, 1, N)`; None for nothing.

        The logarithm of the sizes: a token that stands for two receives as much attention as the two would (ToMe, Sec. 3).
        Filling receives none.

        Args:
            proportional: whether sizes count.
        """
        bias = self.sizes.log() if proportional and self.sizes is not None else None
        if self.real is not None:
            bias = torch.zeros_like(self.real, dtype=torch.float32) if bias is None else bias
            bias = bias.masked_fill(~self.real, -torch.inf)
        return None if bias is None else bias.to(self.x.dtype)[:, None, None]

    def mean(self, proportional: bool) -> Tensor:
        """Mean of all tokens, `(B, C)`, weighted by their sizes if `proportional`; filling does not count."""
        weights = self.sizes if proportional else None
        if self.real is not None:
            weights = self.real.float() if weights is None else weights * self.real
        if weights is None:
            return self.x.mean(1)
        return torch.einsum("bn,bnc->bc", (weights / weights.sum(1, keepdim=True)).to(self.x.dtype), self.x)


class Given(NamedTuple):
    """What a reducer is given beside the tokens, as far as it `needs` it.

    Attributes:
        keys: of the block's attention, mean over heads, `(B, N, C / D)`.
        received: attention that each token receives, mean over heads and queries, `(B, N)`.
        clip: the clip, normalised, `(B, 3, T, H, W)`.
    """

    keys: Tensor | None = None
    received: Tensor | None = None
    clip: Tensor | None = None


class Reduction(NamedTuple):
    """What one reducer did to one batch.

    Attributes:
        slot: name of the slot, as `r3`.
        where: for each token that reached it, its number among those that came out, or -1 if it was dropped, `(B, N)` int64.
    """

    slot: str
    where: Tensor

    def after(self, before: Tensor | None) -> Tensor:
        """Where the tokens of the grid are after this reducer, `(B, N)`, from where they were before it (None: all in place)."""
        if before is None:
            return self.where
        return torch.where(before < 0, -1, self.where.gather(1, before.clamp_min(0)))


Record = Selection | Reduction
"""What a slot did to one batch."""


@dataclass(frozen=True)
class ReducerContext:
    """Where a reducer stands: all it may know of the backbone.

    Attributes:
        name: of the slot at this block, as `r3`.
        slot: how much it keeps.
        block: number of the block, from 0.
        tokens: that reach it.
        grid: frames, height and width of the grid that the tokens were, before the first reducer.
        clip_size: frames, height and width of a clip in pixels.
        std: of each channel of the pixels, by which the clip was divided.
        dim: channels.
        selection: the operator.
    """

    name: str
    slot: SlotSpec
    block: int
    tokens: int
    grid: GridSize
    clip_size: GridSize
    std: tuple[float, float, float]
    dim: int
    selection: SelectionSpec


class Reducer(nn.Module, ABC):
    """Base of all reducers. A new one is a subclass in a file of its own, named by `selection.reducer` or in a slot.

    Attributes:
        places: where it can act, its usual place first: "inside" a block, between attention and MLP, or "before" it.
        needs: names of `Given` that it reads.
        alone: whether other kinds of reducers cannot stand beside it: how many tokens come out is not always the same.
        masks: whether in training it drops tokens by their size alone, and removes none.
        falls: whether it can keep more than its ratio in training.
        more: how much more it then keeps: 1 is all, 0 its ratio; see `RatioAnnealing`.
    """

    places: ClassVar[tuple[str, ...]] = ("inside",)
    needs: ClassVar[frozenset[str]] = frozenset()
    alone: bool = False
    masks: ClassVar[bool] = False
    falls: bool = False
    more: float = 0.0

    def __init__(self, context: ReducerContext) -> None:
        super().__init__()
        self.name = context.name
        self.place = context.slot.place or self.places[0]
        if self.place not in self.places:
            raise SelectionError(
                f"selection.slots.{context.slot.name}.place={self.place}: this reducer acts {' or '.join(self.places)} a block"
            )
        self.grid = context.grid
        self.in_tokens = context.tokens
        self.out_tokens = self.count(context)
        if not 1 <= self.out_tokens <= context.tokens:
            raise SelectionError(
                f"selection.slots.{context.slot.name}.{context.slot.given}: would keep {self.out_tokens} of the "
                f"{context.tokens} tokens that reach block {context.block}; at least 1 must be left"
            )

    def count(self, context: ReducerContext) -> int:
        """How many tokens come out."""
        if context.slot.threshold is not None:
            raise SelectionError(
                f"selection.slots.{context.slot.name}.{context.slot.given}: only rlt and rlt_lengths take a threshold"
            )
        return context.slot.tokens(context.tokens)

    @abstractmethod
    def forward(self, tokens: Tokens, given: Given, sigma: Tensor, noise: Noise) -> tuple[Tokens, Tensor]:
        """Reduce.

        Args:
            tokens: x `(B, N, C)`.
            given: what it needs beside them.
            sigma: 0-d, standard deviation of the noise of learned reducers.
            noise: where random numbers come from.

        Returns:
            The tokens that are left, x `(B, N', C)`, and where each went, see `Reduction.where`.
        """

    def loss(self) -> Tensor | None:
        """What is added to the loss of a training step, of the last forward pass, 0-d; None for nothing."""
        return None

    def mean_tokens(self) -> float | None:
        """Mean number of tokens that came out in evaluation, where it depends on the clip; else None."""
        return None

    def forget_seen(self) -> None:
        """Begin that mean anew."""

    def extra_repr(self) -> str:
        """What is kept, in integers."""
        return f"{self.out_tokens} of {self.in_tokens} tokens"


@dataclass  # Not frozen: the compiler of torch 2.11 cannot make one of those within a graph.
class Reducing:
    """A reducer with what it draws from: what a block calls between attention and MLP."""

    reducer: Reducer
    sigma: Tensor
    noise: Noise

    @property
    def needs(self) -> frozenset[str]:
        """See `Reducer`."""
        return self.reducer.needs

    def __call__(self, tokens: Tokens, given: Given) -> tuple[Tokens, Tensor]:
        """See `Reducer.forward`."""
        return self.reducer(tokens, given, self.sigma, self.noise)


def where_kept(indices: Tensor, tokens: int) -> Tensor:
    """`Reduction.where` of kept tokens: indices `(B, K)` of N tokens -> `(B, N)`."""
    batch, kept = indices.shape
    numbers = torch.arange(kept, device=indices.device).expand(batch, -1)
    return torch.full((batch, tokens), -1, device=indices.device).scatter(1, indices, numbers)
