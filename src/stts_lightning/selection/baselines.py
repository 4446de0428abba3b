"""Siblings of the learned selectors: the baselines of Tables 1 and 4, the ablations of Table 6, and choices without training.

All keep the same numbers of frames and the same windows as the learned ones, so that a comparison is one of *which*.
"""

from abc import abstractmethod

import torch
from torch import Tensor

from stts_lightning.selection.noise import Noise
from stts_lightning.selection.oracle import OracleFrames, OracleWindow
from stts_lightning.selection.selector import GridSize, Selection, Selector, SlotContext, SoftTopK, build_scorer
from stts_lightning.selection.spatial import SpatialSelector, WindowSelector
from stts_lightning.selection.spec import SelectionError, SelectionSpec, SlotSpec, subclass_at
from stts_lightning.selection.temporal import FrameSelector, TemporalSelector
from stts_lightning.selection.topk import hard_topk, one_hot


def content_noise(slot: str, training: bool, shape: tuple[int, int], tokens: Tensor, noise: Noise) -> Tensor:
    """Uniform noise `(B, n)`; in evaluation it follows from slot and clip alone, so that a choice can be measured again.

    Args:
        slot: its name.
        training: whether `noise` is drawn from.
        shape: of the noise.
        tokens: of the clips, `(B, ...)`.
        noise: where random numbers come from in training.
    """
    if training:
        return noise.uniform(shape, tokens.device)
    numbers = tokens.flatten(1)
    # Some rounded values tell clips apart, whatever batch they stand in and to the last bits of whatever device.
    some = (numbers[:, :: max(numbers.shape[1] // 256, 1)].float() * 8).round().long()
    seeds = (some * torch.arange(1, some.shape[1] + 1, device=some.device).square()).sum(1)
    salt = sum(ord(letter) * 257**i for i, letter in enumerate(slot))
    return Noise.of_content(seeds, salt).uniform(shape, tokens.device)


class HardFrames(FrameSelector):
    """Keeps the best K frames, or the best K in a row, by some scores, in training and evaluation alike; nothing is learned."""

    @abstractmethod
    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Score of each frame, `(B, T)`, of a grid that with `selection.first_frame=next` lacks the first one."""

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, K, H, W, C)`; see `Selector.forward`."""
        # Attention needs a block before it, where the first frame is judged as all others.
        scores = self.with_first(self.scores(self.judged(grid.detach()), noise, attention).float())
        return self.take(grid, scores, self.best(self.candidates(scores)))


class RandomFrames(FrameSelector):
    """Random frames (Table 1, Rand.), or a random segment."""

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, K, H, W, C)`; see `Selector.forward`."""
        batch, frames = grid.shape[:2]
        candidates = frames - self.keep + 1 if self.of_segments else frames
        drawn = content_noise(self.slot, self.training, (batch, candidates), grid.detach(), noise)
        indices = self.best(drawn)
        scores = one_hot(indices, frames, drawn.dtype).sum(1) if self.of_segments else drawn
        return self.take(grid, scores, indices)


class GivenFrames(FrameSelector):
    """Always the same frames."""

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        chosen = torch.tensor(self.numbers(context.size[0]))
        self.register_buffer("chosen", chosen, persistent=False)
        self.register_buffer("marks", one_hot(chosen, context.size[0], torch.float32).sum(0), persistent=False)
        self.chosen: Tensor
        self.marks: Tensor

    @abstractmethod
    def numbers(self, frames: int) -> list[int]:
        """Which of a number of frames."""

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, K, H, W, C)`; see `Selector.forward`."""
        batch = grid.shape[0]
        return self.take(grid, self.marks.expand(batch, -1), self.chosen.expand(batch, -1))


class UniformFrames(GivenFrames):
    """The middles of K equal parts of the clip."""

    def numbers(self, frames: int) -> list[int]:
        """See `GivenFrames.numbers`."""
        parts = frames / self.keep
        return [int(i * parts + parts / 2) for i in range(self.keep)]


class CentreFrames(GivenFrames):
    """The K frames in the middle of the clip."""

    def numbers(self, frames: int) -> list[int]:
        """See `GivenFrames.numbers`."""
        first = (frames - self.keep) // 2
        return list(range(first, first + self.keep))


class NormFrames(HardFrames):
    """The frames with the largest mean token norm: a choice without training."""

    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Mean norm of a frame's tokens."""
        return _norm(grid).mean((2, 3))


class DifferenceFrames(HardFrames):
    """The frames that differ most from the one before (the first: from the one after): a choice without training."""

    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Mean norm of the tokens' change."""
        return _change(grid).mean((2, 3))


class AttentionFrames(HardFrames):
    """The frames to which the class token paid most attention in the block before (Table 1, Atten.)."""

    needs_attention = True

    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Attention of a frame."""
        assert attention is not None
        return attention.mean((2, 3))


class GumbelFrames(TemporalSelector):
    """The learned scorer with a Gumbel-Softmax instead of the perturbed Top-K (Table 1, GS).

    K draws without replacement: each is a softmax of the scores that the draws before have left, passed straight through.
    The paper does not give its temperature; it is 1 here.
    """

    temperature = 1.0

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, K, H, W, C)`; see `Selector.forward`."""
        scores = self.raw_scores(grid)
        raw = self.candidates(scores)
        if not self.training:
            return self.take(grid, scores, self.best(raw))
        uniform = noise.uniform(raw.shape, raw.device).clamp(1e-9, 1 - 1e-7)
        left = raw - torch.log(-torch.log(uniform))
        drawn = left.detach()
        order = drawn.topk(self.picks, dim=-1).indices
        draws: list[Tensor] = []
        for _ in range(self.picks):
            draws.append((left / self.temperature).softmax(-1))
            left = left + torch.log1p(-draws[-1].clamp_max(1 - 1e-6))
        # Frames keep the order of the input: the draw of the earliest frame comes first.
        ranks = order.argsort(-1)
        soft = torch.stack(draws, 1).gather(1, ranks.unsqueeze(-1).expand(-1, -1, raw.shape[1]))
        hard = one_hot(order.sort(-1).values, raw.shape[1], soft.dtype)
        kept, selection = self.mix(grid, scores, hard + soft - soft.detach())
        return kept, selection._replace(indices=self.best(drawn))


class HardWindows(WindowSelector):
    """Keeps of each frame, or of all frames of a clip, the window with the highest of some scores; nothing is learned."""

    @abstractmethod
    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Score of each anchor, `(B, T, G)`."""

    def of_tokens(self, tokens: Tensor) -> Tensor:
        """Mean score in each anchor: `(B, T, H, W)` -> `(B, T, G)`."""
        means = self.anchor_means(tokens.float().flatten(0, 1).unsqueeze(1))
        return means.view(*tokens.shape[:2], len(self.corners))

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, T, h, w, C)`; see `Selector.forward`."""
        scores = self.over_time(self.scores(grid.detach(), noise, attention)).expand(-1, grid.shape[1], -1)
        best = scores.argmax(-1)
        return self.take(grid, scores, self.windows_of(best), best)


class RandomWindow(HardWindows):
    """A random anchor of each frame (Table 1, Rand.)."""

    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Noise."""
        drawn = content_noise(self.slot, self.training, (grid.shape[0], grid.shape[1] * len(self.corners)), grid, noise)
        return drawn.view(*grid.shape[:2], len(self.corners))


class CentreWindow(HardWindows):
    """The window in the middle of each frame."""

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        (h, w), (_, height, width) = self.window, self.in_size
        self.register_buffer("middle", torch.tensor([(height - h) // 2, (width - w) // 2, h, w]), persistent=False)
        self.middle: Tensor

    def windows_of(self, best: Tensor) -> Tensor:
        """The one window, whatever the anchors."""
        return self.middle.expand(*best.shape, 4)

    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Nothing is scored."""
        return grid.new_zeros(*grid.shape[:2], 1, dtype=torch.float32)


class NormWindow(HardWindows):
    """The window with the largest mean token norm: a choice without training."""

    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Mean norm of an anchor's tokens."""
        return self.of_tokens(_norm(grid))


class DifferenceWindow(HardWindows):
    """The window that differs most from the frame before (of the first frame: after): a choice without training."""

    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Mean norm of the change of an anchor's tokens."""
        return self.of_tokens(self.with_first(_change(self.judged(grid))))


class AttentionWindow(HardWindows):
    """The window to which the class token paid most attention in the block before (Table 1, Atten.)."""

    needs_attention = True

    def scores(self, grid: Tensor, noise: Noise, attention: Tensor | None) -> Tensor:
        """Mean attention of an anchor."""
        assert attention is not None
        return self.of_tokens(attention)


class AnchorFeatures(SpatialSelector):
    """Learned, but scores the mean features of each anchor instead of averaging its tokens' scores (Table 6, "A")."""

    def window_scores(self, grid: Tensor) -> Tensor:
        """Score of each anchor's features: `(B, T, H, W, C)` -> `(B, T, G)`."""
        grid = self.scored(grid)
        batch, frames = grid.shape[:2]
        features = self.anchor_means(grid.flatten(0, 1).permute(0, 3, 1, 2)).transpose(1, 2)
        return self.normalized(self.over_time(self.scorer(features).float().view(batch, frames, -1)))


class TokenSelector(Selector):
    """Keeps single tokens of each frame instead of a window (Table 6, without anchors).

    As many as the window would hold, in input order, laid out as a grid of the window's size, which tears neighbours
    apart: the paper's reason for anchors.
    """

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        frames, height, width = context.size
        self._out_size = (frames, *context.slot.window(height, width))

    @property
    def out_size(self) -> GridSize:
        """See `Selector.out_size`."""
        return self._out_size

    @property
    def keep(self) -> int:
        """Tokens kept of each frame."""
        return self._out_size[1] * self._out_size[2]

    def take(self, grid: Tensor, scores: Tensor, indicator: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Keep the best tokens, or weighted sums: grid `(B, T, H, W, C)`, scores `(B T, N)` -> `(B, T, h, w, C)`.

        Args:
            grid: all tokens.
            scores: of each token of each frame.
            indicator: `(B T, K, N)` of Eq. 7; None keeps the tokens with the highest scores as they are.
        """
        batch, frames, _, _, channels = grid.shape
        tokens = grid.flatten(2, 3).flatten(0, 1)  # (B T, N, C)
        indices = hard_topk(scores.detach(), self.keep)
        if indicator is None:
            kept = tokens.gather(1, indices.unsqueeze(-1).expand(-1, -1, channels))
        else:
            kept = torch.matmul(indicator.to(grid.dtype), tokens)
        shape = (batch, frames, -1)
        selection = Selection(self.slot, indices.view(shape), None, scores.view(shape), None)
        return kept.view(batch, *self.out_size, channels), selection

    def extra_repr(self) -> str:
        """What is kept, in integers."""
        return f"{self.keep} of {self.in_size[1] * self.in_size[2]} tokens of each frame"


class Tokens(TokenSelector):
    """The tokens with the highest learned scores (Table 6, STTS without anchors)."""

    def __init__(self, context: SlotContext) -> None:
        super().__init__(context)
        self.scorer = build_scorer(context.selection, context.dim, "s")
        self.soft_topk = SoftTopK(context.selection)

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, T, h, w, C)`; see `Selector.forward`."""
        scores = self.scorer.normalize(self.scorer(grid.flatten(2, 3).flatten(0, 1)).float())
        return self.take(grid, scores, self.soft_topk(scores, self.keep, sigma, noise) if self.training else None)


class RandomTokens(TokenSelector):
    """Random tokens (Table 6, Rand. without anchors)."""

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """Grid `(B, T, H, W, C)` -> `(B, T, h, w, C)`; see `Selector.forward`."""
        batch, frames, height, width, _ = grid.shape
        drawn = content_noise(self.slot, self.training, (batch, frames * height * width), grid, noise)
        return self.take(grid, drawn.view(batch * frames, height * width))


def _norm(tokens: Tensor) -> Tensor:
    """Norm of each token: `(..., C)` -> `(...)`."""
    return tokens.float().square().sum(-1).sqrt()


def _change(grid: Tensor) -> Tensor:
    """Norm of each token's change from the frame before, of the first frame to the one after: `(B, T, H, W)`."""
    change = _norm(grid[:, 1:] - grid[:, :-1])
    if change.shape[1] == 0:
        return torch.zeros(grid.shape[:-1], device=grid.device)
    return torch.cat((change[:, :1], change), dim=1)


SELECTORS: dict[str, dict[str, type[Selector]]] = {
    "t": {
        "learned": TemporalSelector,
        "random": RandomFrames,
        "uniform": UniformFrames,
        "centre": CentreFrames,
        "norm": NormFrames,
        "difference": DifferenceFrames,
        "attention": AttentionFrames,
        "gumbel": GumbelFrames,
        "oracle": OracleFrames,
    },
    "s": {
        "learned": SpatialSelector,
        "random": RandomWindow,
        "centre": CentreWindow,
        "norm": NormWindow,
        "difference": DifferenceWindow,
        "attention": AttentionWindow,
        "anchor_features": AnchorFeatures,
        "tokens": Tokens,
        "random_tokens": RandomTokens,
        "oracle": OracleWindow,
    },
}

_REASONS = {
    ("s", "gumbel"): "; a Gumbel-Softmax keeps single tokens, which the spatial downsampling of these models cannot take",
}


def find_selector(slot: SlotSpec, selection: SelectionSpec) -> type[Selector]:
    """The class of a slot's selector. Raises SelectionError for a name that its axis does not have."""
    name = slot.selector or selection.selector
    if "." in name:
        return subclass_at(name, Selector, f"selection.slots.{slot.name}.selector")
    if name not in SELECTORS[slot.axis]:
        key = f"selection.slots.{slot.name}.selector" if slot.selector else f"selection.selector, at slot {slot.name}"
        allowed = ", ".join(SELECTORS[slot.axis])
        raise SelectionError(f"{key}={name!r}: allowed are {allowed}{_REASONS.get((slot.axis, name), '')}")
    return SELECTORS[slot.axis][name]
