"""Which selections a budget of GFLOPs allows.

A search asks for the cost of hundreds of selections. `count` takes some tenths of a second for one, so that the costs of
the backbones are also written out here, from sizes alone. Tests hold them equal to `count`.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from stts_lightning.analysis.flops import NORM, count_gflops
from stts_lightning.backbones.mvit import Block as MViTBlock
from stts_lightning.backbones.mvit import MViT, pooled
from stts_lightning.backbones.mvit_v2 import Block as MViTv2Block
from stts_lightning.backbones.mvit_v2 import MViTv2
from stts_lightning.backbones.video_swin import Block as SwinBlock
from stts_lightning.backbones.video_swin import Stage, VideoSwin, windows
from stts_lightning.backbones.vit import ViT
from stts_lightning.classifier import VideoClassifier, create_model
from stts_lightning.selection.scorer import SCORERS
from stts_lightning.selection.selector import GridSize
from stts_lightning.selection.spec import SelectionError, SelectionSpec, SlotSpec

SCORED = {"learned", "gumbel", "tokens"}
"""Selectors that run a scorer on all candidates."""
FREE = {"random", "uniform", "centre", "norm", "difference", "random_tokens"}
"""Selectors that cost nothing that is counted."""

Cut = Callable[[int, GridSize, int], GridSize]
"""Block, size of the grid that reaches its slots, and channels -> size of the grid that reaches the block."""


class Choice(NamedTuple):
    """A selection and its cost."""

    selection: SelectionSpec
    gflops: float


def within_budget(model: VideoClassifier, budget: float, blocks: list[int]) -> list[Choice]:
    """All selections of at most one temporal and one spatial slot that fit a budget and waste none of it.

    Such a selection cannot keep one frame more, or a wider window, at the same places.

    Args:
        model: an unpruned model; may lie on the meta device.
        budget: GFLOPs of one clip.
        blocks: before which slots may stand.

    Returns:
        The most expensive first.

    Raises:
        SelectionError: for a block that the backbone does not have.
    """
    sizes = model.backbone.block_sizes
    if missing := [block for block in blocks if not 0 <= block < len(sizes)]:
        raise SelectionError(f"budget_blocks: no block {missing[0]}; this backbone has 0 to {len(sizes) - 1}")
    unpruned = _with(model, [])
    if (gflops := cost(model, unpruned)) <= budget:
        return [Choice(unpruned, gflops)]
    pairs = [(temporal, spatial) for temporal in (None, *blocks) for spatial in (None, *blocks)]
    choices = [choice for temporal, spatial in pairs for choice in _maximal(model, budget, temporal, spatial)]
    return sorted(choices, key=lambda choice: -choice.gflops)


def _maximal(model: VideoClassifier, budget: float, temporal: int | None, spatial: int | None) -> Iterator[Choice]:
    """The selections of `within_budget` with a temporal and a spatial slot before just these blocks."""
    sizes = model.backbone.block_sizes
    frames = 1 if temporal is None else sizes[temporal][0]
    sides = 1 if spatial is None else min(sizes[spatial][1:])
    widest = 0  # The widest window that fits with more frames.
    for keep in range(frames, 0, -1):
        for side in range(sides, widest, -1):
            slots = [SlotSpec(f"t{temporal}", keep=keep)] if keep < frames else []
            slots += [SlotSpec(f"s{spatial}", side=side)] if side < sides else []
            selection = _with(model, slots)
            gflops = cost(model, selection)
            if gflops <= budget:
                widest = side
                if len(slots) == (temporal is not None) + (spatial is not None):  # Else it is one of other blocks, found there.
                    yield Choice(selection, gflops)
                break


def _with(model: VideoClassifier, slots: list[SlotSpec]) -> SelectionSpec:
    return SelectionSpec.of({**model.slots.selection.to_dict(), "slots": {slot.name: slot.to_dict() for slot in slots}})


def cost(model: VideoClassifier, selection: SelectionSpec) -> float:
    """GFLOPs of one clip, as if a model had this selection: equal to `count_gflops`, and quick for the backbones here."""
    total = 0

    def cut(block: int, size: GridSize, dim: int) -> GridSize:
        nonlocal total
        for slot in sorted(selection.slots, key=lambda slot: "ts".index(slot.axis)):
            if slot.block == block:
                total += _scorer(slot, size, dim, selection)
                size = (slot.frames(size[0]), *size[1:]) if slot.axis == "t" else (size[0], *slot.window(*size[1:]))
        return size

    backbone = model.backbone
    written = {MViT: _mvit, MViTv2: partial(_mvit_v2, selection=selection), VideoSwin: _swin, ViT: _vit}.get(type(backbone))
    counted = {slot.selector or selection.selector for slot in selection.slots} <= SCORED | FREE
    if written is None or not counted or any(slot.axis == "r" for slot in selection.slots):
        with torch.device("meta"):
            return count_gflops(create_model(**{**model.recipe, "selection": selection.to_dict()}))
    return (written(backbone, cut) + total + backbone.out_dim * model.num_classes) / 1e9


def _scorer(slot: SlotSpec, size: GridSize, dim: int, selection: SelectionSpec) -> int:
    """Multiply-adds of a slot's scorer: its linear layers and norms act on each candidate."""
    if (slot.selector or selection.selector) not in SCORED:
        return 0
    scorer = SCORERS[selection.scorer]
    with torch.device("meta"):
        layers = list(scorer(scorer.frame_width * dim if slot.axis == "t" else dim).modules())
    candidates = size[0] if slot.axis == "t" else math.prod(size)
    linear = sum(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    norms = sum(NORM * layer.weight.numel() for layer in layers if isinstance(layer, nn.LayerNorm))
    return candidates * (linear + norms)


def _mvit(backbone: MViT, cut: Cut) -> int:
    frames, height, width = backbone.clip_size
    dim = backbone.patch_embed.out_channels
    size: GridSize = (frames // 2, height // 4, width // 4)
    total = math.prod(size) * dim * 3 * 3 * 7 * 7
    for number, block in enumerate(backbone.blocks):
        assert isinstance(block, MViTBlock)
        attn, dim = block.attn, block.attn.qkv.in_features
        size = cut(number, size, dim)
        out = block.norm2.weight.numel() if isinstance(block.proj, nn.Identity) else block.proj.out_features
        tokens = math.prod(size) + 1
        keys = math.prod(pooled(size, attn.kv_stride)) + 1
        size = pooled(size, attn.q_stride)
        queries = math.prod(size) + 1
        pools = [queries] * (attn.pool_q is not None) + [keys, keys]
        total += tokens * dim * 3 * dim + queries * dim * dim  # into and out of attention
        total += sum((n - 1) * dim * 27 + NORM * n * dim for n in pools)  # the class token skips the convolution
        total += 2 * queries * keys * dim
        total += NORM * (tokens + queries) * dim
        total += queries * (dim * 4 * dim + 4 * dim * out + (dim * out if out != dim else 0))
    return total + NORM * backbone.out_dim


def _mvit_v2(backbone: MViTv2, cut: Cut, selection: SelectionSpec) -> int:
    frames, height, width = backbone.clip_size
    size: GridSize = (frames // 2, height // 4, width // 4)
    total = math.prod(size) * backbone.patch_embed.out_channels * 3 * 3 * 7 * 7
    moved = min((slot.block for slot in selection.slots if slot.axis == "s"), default=math.inf)
    for number, block in enumerate(backbone.blocks):
        assert isinstance(block, MViTv2Block)
        attn, dim, out = block.attn, block.attn.qkv.in_features, block.attn.proj.in_features
        size = cut(number, size, dim)
        tokens, key_size = math.prod(size) + 1, pooled(size, attn.kv_stride)
        size = pooled(size, attn.q_stride)
        queries, keys = math.prod(size) + 1, math.prod(key_size) + 1
        tables = [attn.rel_pos_h.shape[0], attn.rel_pos_w.shape[0]]
        # Where windows may lie differently, queries are multiplied with the whole tables.
        whole = number >= moved and backbone.displacements == "picture"
        total += tokens * dim * 3 * out + queries * out * out + (tokens * dim * out if dim != out else 0)
        total += sum((n - 1) * out * 27 + NORM * n * out for n in (queries, keys, keys))
        total += 2 * queries * keys * out
        total += (queries - 1) * out * (key_size[0] + (sum(tables) if whole else sum(key_size[1:])))
        total += NORM * (tokens * dim + queries * out) + queries * 8 * out * out
    return total + NORM * backbone.out_dim


def _swin(backbone: VideoSwin, cut: Cut) -> int:
    t, h, w = (math.ceil(n / p) for n, p in zip(backbone.clip_size, backbone.patch, strict=True))
    dim = backbone.patch_embed.out_channels
    total = t * h * w * dim * (3 * math.prod(backbone.patch) + NORM)
    size: GridSize = (t, h, w)
    number = 0
    for stage in backbone.stages:
        assert isinstance(stage, Stage)
        for place, block in enumerate(stage.blocks):
            assert isinstance(block, SwinBlock)
            dim = block.attn.qkv.in_features
            size = cut(number, size, dim)
            number += 1
            tokens = math.prod(size)
            window, _ = windows(size, backbone.window, place % 2 == 1, backbone.window_policy)
            padded = math.prod(math.ceil(n / m) * m for n, m in zip(size, window, strict=True))
            total += tokens * dim * (4 * dim + 8 * dim + 2 * NORM) + 2 * padded * math.prod(window) * dim
        if stage.merge is not None:
            size = (size[0], math.ceil(size[1] / 2), math.ceil(size[2] / 2))
            total += math.prod(size) * 4 * dim * (2 * dim + NORM)
    return total + NORM * math.prod(size) * backbone.out_dim


def _vit(backbone: ViT, cut: Cut) -> int:
    dim, size = backbone.out_dim, backbone.grid
    total = math.prod(size) * dim * 3 * math.prod(backbone.patch_embed.kernel_size)
    for number in range(len(backbone.blocks)):
        size = cut(number, size, dim)
        tokens = math.prod(size)
        total += tokens * dim * (4 * dim + 8 * dim + 2 * NORM) + 2 * tokens * tokens * dim
    return total + NORM * dim
