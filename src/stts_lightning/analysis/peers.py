"""What a model is measured beside: torchvision's models with the same weights, and ours as papers' code is often written."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stts_lightning.backbones import mvit, video_swin
from stts_lightning.backbones.checkpoints import load_checkpoint, recognised
from stts_lightning.backbones.registry import BackboneError
from stts_lightning.classifier import VideoClassifier, create_model
from stts_lightning.layers.linear import Linear
from stts_lightning.selection.noise import Noise
from stts_lightning.selection.selector import Selection
from stts_lightning.selection.spatial import SpatialSelector
from stts_lightning.selection.spec import SelectionSpec
from stts_lightning.selection.temporal import TemporalSelector
from stts_lightning.selection.topk import MonteCarlo, hard_topk

TORCHVISION = {"mvit_v1_b": "mvit_b16", "swin3d_b": "video_swin_b", "swin3d_s": "video_swin_s", "swin3d_t": "video_swin_t"}
"""Models of torchvision, and ours of the same weights."""


def torchvision_model(name: str, **backbone: Any) -> tuple[nn.Module, VideoClassifier]:
    """One of torchvision's models with weights drawn at random, and ours with the same weights.

    Raises:
        BackboneError: for a name that has no counterpart here.
    """
    if name not in TORCHVISION:
        raise BackboneError(f"torchvision:{name}: allowed are {', '.join(TORCHVISION)}")
    from torchvision.models import video

    theirs: nn.Module = getattr(video, name)(weights=None).eval()
    checkpoint = recognised(Path(f"torchvision's {name}"), theirs.state_dict())
    ours = create_model(TORCHVISION[name], None, 400, **{**checkpoint.backbone(), **backbone}).eval()
    load_checkpoint(ours, checkpoint, SelectionSpec())
    return theirs, ours


def textbook(model: VideoClassifier) -> VideoClassifier:
    """The same model with the same weights, as published code writes it: the formulation that ours is measured against.

    Attention as two products with the whole matrix of weights between them; shifted windows by rolling, padding and
    masking; heads pooled as clips of their own; every window of a spatial slot unfolded; every noise sample an indicator.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        for kind, written in _WRITTEN.items():
            if type(module) is kind:
                module.__class__ = written  # The same attributes; another forward.
    for module in model.modules():
        if isinstance(module, TextbookTemporal | TextbookSpatial) and isinstance(module.estimator, MonteCarlo):
            module.estimator = OneHot(module.estimator.samples)
    return model


class TextbookLinear(Linear):
    """A linear layer, then GELU."""

    def forward(self, input: Tensor) -> Tensor:
        """See `Linear.forward`."""
        x = F.linear(input, self.weight, self.bias)
        return F.gelu(x) if self.gelu else x


def _attended(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1) @ v


class TextbookPooledAttention(mvit.PooledAttention):
    """Pooling attention with its weights held."""

    def forward(self, x: Tensor, norm: nn.Module, tell: bool = False, cls_only: bool = False) -> tuple[Tensor, Tensor | None]:
        """See `PooledAttention.forward`."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(norm(x)).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = (self._pooled(part, pool) for part, pool in zip(qkv, (self.pool_q, self.pool_k, self.pool_v), strict=True))
        return self.proj(_attended(q, k, v).transpose(1, 2).reshape(batch, -1, channels)), None

    def _pooled(self, x: Tensor, pool: mvit.Pool | None) -> Tensor:
        """Tokens of heads `(B, D, 1 + N, C/D)`, pooled."""
        if pool is None:
            return x
        batch, heads, _, channels = x.shape
        grid = x[:, :, 1:].reshape(batch * heads, *self.size, channels).permute(0, 4, 1, 2, 3).contiguous()
        grid = pool.conv(grid).reshape(batch, heads, channels, -1).transpose(2, 3)
        return pool.norm(torch.cat((x[:, :, :1], grid), dim=2))


class TextbookMViTBlock(mvit.Block):
    """A block that takes all tokens at once, to the end."""

    def ends(self) -> bool:
        """See `Block.ends`."""
        return False


class TextbookWindowAttention(video_swin.WindowAttention):
    """Window attention: pad, roll, cut, attend with bias and mask, join, roll back, crop."""

    def forward(self, x: Tensor, norm: nn.Module) -> Tensor:
        """See `WindowAttention.forward`."""
        x = norm(x)
        plan, (batch, _, channels) = self.plan, x.shape
        window, shift, heads = plan.window, plan.shift, self.heads
        ends = [-n % m for n, m in zip(plan.size, window, strict=True)]
        grid = F.pad(x.view(batch, *plan.size, channels), (0, 0, 0, ends[2], 0, ends[1], 0, ends[0]))
        full = grid.shape[1:4]
        counts = [n // m for n, m in zip(full, window, strict=True)]

        def cut(tokens: Tensor) -> Tensor:
            t, h, w = counts
            parts = tokens.view(-1, t, window[0], h, window[1], w, window[2], tokens.shape[-1]).permute(0, 1, 3, 5, 2, 4, 6, 7)
            return parts.reshape(-1, t * h * w, window[0] * window[1] * window[2], tokens.shape[-1])

        rows = cut(grid.roll([-s for s in shift], (1, 2, 3)))
        q, k, v = self.qkv(rows).unflatten(-1, (3, heads, -1)).permute(3, 0, 1, 4, 2, 5)
        size = rows.shape[2]
        bias = self.relative_position_bias_table[plan.bias_index].view(size, size, heads).permute(2, 0, 1)
        if any(shift):
            region = torch.zeros(full, device=x.device)
            for axis, (n, m, s) in enumerate(zip(full, window, shift, strict=True)):
                place = torch.arange(n, device=x.device).view([-1 if i == axis else 1 for i in range(3)])
                region = region * 3 + (place >= n - m).float() + (place >= n - s).float() * (s > 0)
            region = cut(region.view(1, *full, 1))[0, :, :, 0]
            mask = torch.where(region[:, :, None] == region[:, None], 0.0, -100.0)
            bias = bias + mask.unsqueeze(1)  # (windows, D, N, N)
        rows = self.proj(_attended(q, k, v, bias).transpose(2, 3).flatten(3))
        t, h, w = counts
        rows = rows.view(batch, t, h, w, *window, channels).permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, *full, channels)
        t, h, w = plan.size
        return rows.roll(shift, (1, 2, 3))[:, :t, :h, :w].reshape(x.shape)


class OneHot:
    """The Top-K's estimate with every sample's indicator, `(B, S, K, N)`, made and kept for the backward pass."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, scores: Tensor, k: int, sigma: Tensor, noise: Noise) -> Tensor:
        """See `Estimator`."""
        drawn = noise.normal((scores.shape[0], self.samples, scores.shape[1]), scores.device)
        return _OneHotTopK.apply(scores, drawn, sigma, k)  # type: ignore[return-value]


class _OneHotTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, noise: Tensor, sigma: Tensor, k: int) -> Tensor:
        indices = hard_topk(scores.unsqueeze(1) + sigma * noise, k)
        samples = F.one_hot(indices, scores.shape[1]).float()
        ctx.save_for_backward(samples, noise, sigma)
        return samples.mean(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        samples, noise, sigma = ctx.saved_tensors
        jacobian = torch.einsum("bskn,bsm->bknm", samples, noise) / (noise.shape[1] * sigma)
        return torch.einsum("bkn,bknm->bm", grads[0], jacobian), None, None, None


class TextbookTemporal(TemporalSelector):
    """Frames by products with an indicator, also in evaluation."""


class TextbookSpatial(SpatialSelector):
    """All windows of a grid unfolded; one of them kept by a product with an indicator."""

    def forward(self, grid: Tensor, sigma: Tensor, noise: Noise, attention: Tensor | None = None) -> tuple[Tensor, Selection]:
        """See `Selector.forward`."""
        batch, frames, _, _, channels = grid.shape
        scores = self.anchor_scores(grid)
        best = scores.detach().argmax(-1).view(batch, frames)
        weights = self.estimator(scores, 1, sigma, noise) if self.training else F.one_hot(best, scores.shape[-1]).float()
        columns = F.unfold(grid.flatten(0, 1).permute(0, 3, 1, 2), self.window, stride=self.strides)  # (B T, C h w, G)
        kept = columns @ weights.view(batch * frames, -1, 1)
        kept = kept.view(batch, frames, channels, *self.window).permute(0, 1, 3, 4, 2)
        return kept, Selection(self.slot, best, self.windows_of(best), scores.view(batch, frames, -1), None)


_WRITTEN: dict[type[nn.Module], type[nn.Module]] = {
    Linear: TextbookLinear,
    mvit.PooledAttention: TextbookPooledAttention,
    mvit.Block: TextbookMViTBlock,
    video_swin.WindowAttention: TextbookWindowAttention,
    TemporalSelector: TextbookTemporal,
    SpatialSelector: TextbookSpatial,
}


@torch.inference_mode()
def difference(one: Callable[[Tensor], Tensor], other: Callable[[Tensor], Tensor], clip: Tensor) -> float:
    """Largest difference of two models' logits of a clip."""
    return float((one(clip).float() - other(clip).float()).abs().max())
