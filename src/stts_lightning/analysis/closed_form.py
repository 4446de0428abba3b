"""Costs written out from the architecture: what the counter must agree with, and quick to ask."""

import math

from torch import nn

from stts_lightning.backbones.mvit import Block as MViTBlock
from stts_lightning.backbones.mvit import MViT, pooled
from stts_lightning.backbones.registry import Backbone
from stts_lightning.backbones.video_swin import Block as SwinBlock
from stts_lightning.backbones.video_swin import Stage, VideoSwin, windows
from stts_lightning.classifier import VideoClassifier
from stts_lightning.selection.selector import Selector
from stts_lightning.selection.siblings import AnchorFeatures

NORM = 5
"""What fvcore counts for an element of a LayerNorm with weights."""


def _scorers(backbone: Backbone) -> float:
    """Linear layers and norms of all scorers: candidates times weights."""
    total = 0
    for name, selector in backbone.slots.selectors.named_children():
        assert isinstance(selector, Selector)
        if selector.needs_attention or isinstance(selector, AnchorFeatures):
            raise TypeError(f"the cost of {type(selector).__name__} is not written out in analysis/closed_form.py")
        candidates = selector.in_size[0] if name.startswith("t") else math.prod(selector.in_size)
        for layer in selector.modules():
            if isinstance(layer, nn.Linear):
                total += candidates * layer.in_features * layer.out_features
            if isinstance(layer, nn.LayerNorm):
                total += NORM * candidates * layer.weight.numel()
    return total


def _mvit(backbone: MViT) -> float:
    frames, height, width = backbone.clip_size
    dim = backbone.patch_embed.out_channels
    total = frames // 2 * (height // 4) * (width // 4) * dim * 3 * 3 * 7 * 7
    for block, size in zip(backbone.blocks, backbone.block_sizes, strict=True):
        assert isinstance(block, MViTBlock)
        attn, dim = block.attn, block.attn.qkv.in_features
        out = block.norm2.weight.numel() if isinstance(block.proj, nn.Identity) else block.proj.out_features
        tokens = math.prod(size) + 1
        queries = math.prod(pooled(size, attn.q_stride)) + 1
        keys = math.prod(pooled(size, attn.kv_stride)) + 1
        pools = [queries] * (attn.pool_q is not None) + [keys, keys]
        total += tokens * dim * 3 * dim + queries * dim * dim  # into and out of attention
        total += sum((n - 1) * dim * 27 + NORM * n * dim for n in pools)  # the class token passes the convolution by
        total += 2 * queries * keys * dim
        total += NORM * (tokens + queries) * dim
        total += queries * (dim * 4 * dim + 4 * dim * out + (dim * out if out != dim else 0))
    return total + NORM * backbone.out_dim


def _swin(backbone: VideoSwin) -> float:
    sizes = iter(backbone.block_sizes)
    t, h, w = (math.ceil(n / p) for n, p in zip(backbone.clip_size, backbone.patch, strict=True))
    dim = backbone.patch_embed.out_channels
    total = t * h * w * dim * (3 * math.prod(backbone.patch) + NORM)
    size = (t, h, w)
    for stage in backbone.stages:
        assert isinstance(stage, Stage)
        for block in stage.blocks:
            assert isinstance(block, SwinBlock)
            size, dim = next(sizes), block.attn.qkv.in_features
            tokens = math.prod(size)
            window, _ = windows(size, block.attn.window, block.attn.shifted, block.attn.policy)
            padded = math.prod(math.ceil(n / m) * m for n, m in zip(size, window, strict=True))
            total += tokens * dim * (4 * dim + 8 * dim + 2 * NORM) + 2 * padded * math.prod(window) * dim
        if stage.merge is not None:
            size = (size[0], math.ceil(size[1] / 2), math.ceil(size[2] / 2))
            total += math.prod(size) * 4 * dim * (2 * dim + NORM)
    return total + NORM * math.prod(size) * backbone.out_dim


def closed_form(model: VideoClassifier) -> float:
    """GFLOPs of one clip in evaluation, from the sizes of the model's grids alone; the model may lie on the meta device.

    Raises:
        TypeError: for a backbone whose cost is not written out here.
    """
    backbone = model.backbone
    if isinstance(backbone, MViT):
        total = _mvit(backbone)
    elif isinstance(backbone, VideoSwin):
        total = _swin(backbone)
    else:
        raise TypeError(f"the cost of {type(backbone).__name__} is not written out in analysis/closed_form.py")
    return (total + _scorers(backbone) + backbone.out_dim * model.head.out_features) / 1e9
