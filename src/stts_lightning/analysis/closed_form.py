"""Costs written out from the architecture: what the counter must agree with, and quick to ask of any selection.

Nothing is built or run: grids shrink by the rules of `selection.spec`, and layers are multiplied out.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from stts_lightning.backbones.mvit import Block as MViTBlock
from stts_lightning.backbones.mvit import MViT, pooled
from stts_lightning.backbones.registry import Backbone
from stts_lightning.backbones.video_swin import Block as SwinBlock
from stts_lightning.backbones.video_swin import Stage, VideoSwin, windows
from stts_lightning.classifier import VideoClassifier
from stts_lightning.selection.scorer import SCORERS
from stts_lightning.selection.selector import GridSize
from stts_lightning.selection.spec import SelectionError, SelectionSpec, SlotSpec

NORM = 5
"""What fvcore counts for an element of a LayerNorm with weights."""

SCORING = ("learned", "gumbel", "tokens")
"""Selectors that run a scorer over all candidates; of the others only `FREE` are written out here."""
FREE = ("random", "uniform", "centre", "norm", "difference", "random_tokens")


class UnwrittenCost(TypeError):
    """A backbone or selector whose cost is not written out here; `flops.count` knows it."""

    def __init__(self, what: str) -> None:
        super().__init__(f"the cost of {what} is not written out in analysis/closed_form.py")


class Place(NamedTuple):
    """A slot, the grid that reaches it, and the channels of that."""

    slot: SlotSpec
    size: GridSize
    dim: int


class _Cuts:
    """What slots make of grids along a backbone, and a record of it."""

    def __init__(self, selection: SelectionSpec) -> None:
        self.selection = selection
        self.places: list[Place] = []

    def __call__(self, block: int, size: GridSize, dim: int) -> GridSize:
        for slot in sorted(self.selection.slots, key=lambda slot: "ts".index(slot.axis)):
            if slot.block == block:
                self.places.append(Place(slot, size, dim))
                size = (slot.frames(size[0]), *size[1:]) if slot.axis == "t" else (size[0], *slot.window(*size[1:]))
        return size


def _scorers(places: list[Place], selection: SelectionSpec) -> float:
    """Linear layers and norms of all scorers: candidates times weights."""
    total = 0
    for slot, size, dim in places:
        kind = slot.selector or selection.selector
        if kind in FREE:
            continue
        if kind not in SCORING:
            raise UnwrittenCost(f"selector {kind}")
        scorer = SCORERS[selection.scorer]
        with torch.device("meta"):
            layers = scorer(scorer.frame_width * dim if slot.axis == "t" else dim).modules()
        candidates = size[0] if slot.axis == "t" else math.prod(size)
        for layer in layers:
            if isinstance(layer, nn.Linear):
                total += candidates * layer.in_features * layer.out_features
            if isinstance(layer, nn.LayerNorm):
                total += NORM * candidates * layer.weight.numel()
    return total


def _mvit(backbone: MViT, cuts: _Cuts) -> float:
    frames, height, width = backbone.clip_size
    dim = backbone.patch_embed.out_channels
    size: GridSize = (frames // 2, height // 4, width // 4)
    total = math.prod(size) * dim * 3 * 3 * 7 * 7
    for number, block in enumerate(backbone.blocks):
        assert isinstance(block, MViTBlock)
        attn, dim = block.attn, block.attn.qkv.in_features
        size = cuts(number, size, dim)
        out = block.norm2.weight.numel() if isinstance(block.proj, nn.Identity) else block.proj.out_features
        tokens = math.prod(size) + 1
        keys = math.prod(pooled(size, attn.kv_stride)) + 1
        size = pooled(size, attn.q_stride)
        queries = math.prod(size) + 1
        pools = [queries] * (attn.pool_q is not None) + [keys, keys]
        total += tokens * dim * 3 * dim + queries * dim * dim  # into and out of attention
        total += sum((n - 1) * dim * 27 + NORM * n * dim for n in pools)  # the class token passes the convolution by
        total += 2 * queries * keys * dim
        total += NORM * (tokens + queries) * dim
        total += queries * (dim * 4 * dim + 4 * dim * out + (dim * out if out != dim else 0))
    return total + NORM * backbone.out_dim


def _swin(backbone: VideoSwin, cuts: _Cuts) -> float:
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
            size = cuts(number, size, dim)
            number += 1
            tokens = math.prod(size)
            window, _ = windows(size, backbone.window, place % 2 == 1, backbone.window_policy)
            padded = math.prod(math.ceil(n / m) * m for n, m in zip(size, window, strict=True))
            total += tokens * dim * (4 * dim + 8 * dim + 2 * NORM) + 2 * padded * math.prod(window) * dim
        if stage.merge is not None:
            size = (size[0], math.ceil(size[1] / 2), math.ceil(size[2] / 2))
            total += math.prod(size) * 4 * dim * (2 * dim + NORM)
    return total + NORM * math.prod(size) * backbone.out_dim


def closed_form(model: VideoClassifier, selection: SelectionSpec | None = None) -> float:
    """GFLOPs of one clip in evaluation, from sizes alone; the model may lie on the meta device.

    Args:
        model: gives backbone and head.
        selection: as if the model had this one; None is its own.

    Raises:
        UnwrittenCost: for a backbone or selector whose cost is not written out here.
        SelectionError: if the selection cannot be honoured.
    """
    return _cost(model, selection or model.slots.selection)[0]


def _cost(model: VideoClassifier, selection: SelectionSpec) -> tuple[float, list[Place]]:
    backbone: Backbone = model.backbone
    cuts = _Cuts(selection)
    if isinstance(backbone, MViT):
        total = _mvit(backbone, cuts)
    elif isinstance(backbone, VideoSwin):
        total = _swin(backbone, cuts)
    else:
        raise UnwrittenCost(type(backbone).__name__)
    met = {place.slot.name for place in cuts.places}
    if lost := [slot for slot in selection.slots if slot.name not in met]:
        last = len(backbone.block_sizes) - 1
        raise SelectionError(f"selection.slots.{lost[0].name}: no block {lost[0].block}; this backbone has 0 to {last}")
    total += _scorers(cuts.places, selection) + backbone.out_dim * model.head.out_features
    return total / 1e9, cuts.places


class Choice(NamedTuple):
    """A selection, what it keeps and what it costs."""

    selection: SelectionSpec
    kept: dict[str, str]
    gflops: float


def within_budget(model: VideoClassifier, budget: float, blocks: list[int]) -> list[Choice]:
    """All selections of at most one temporal and one spatial slot that a budget allows and that leave none of it unused.

    Such a selection cannot keep one frame more, or a wider window, at the same places.

    Args:
        model: gives backbone, head and the operator; its slots are left aside.
        budget: GFLOPs of one clip.
        blocks: before which slots may stand.

    Returns:
        The dearest first.

    Raises:
        SelectionError: for a block that the backbone does not have.
    """
    plain = model.slots.selection
    cost, _ = _cost(model, _with(plain, ()))
    if cost <= budget:
        return [Choice(_with(plain, ()), {}, cost)]
    pairs = [(temporal, spatial) for temporal in (None, *blocks) for spatial in (None, *blocks)]
    found = [choice for temporal, spatial in pairs for choice in _maximal(model, budget, temporal, spatial)]
    return sorted(found, key=lambda choice: -choice.gflops)


def _maximal(model: VideoClassifier, budget: float, temporal: int | None, spatial: int | None) -> Iterator[Choice]:
    """The selections of `within_budget` with slots before just these blocks."""
    plain = model.slots.selection
    whole = [SlotSpec(f"{axis}{block}", ratio=1.0) for axis, block in (("t", temporal), ("s", spatial)) if block is not None]
    sizes = {place.slot.axis: place.size for place in _cost(model, _with(plain, whole))[1]}
    frames = sizes["t"][0] if "t" in sizes else 1
    sides = min(sizes["s"][1:]) if "s" in sizes else 1
    widest = 0  # The widest window that the budget allows with more frames.
    for keep in range(frames, 0, -1):
        for side in range(sides, widest, -1):
            slots = [SlotSpec(f"t{temporal}", keep=keep)] if keep < frames else []
            slots += [SlotSpec(f"s{spatial}", side=side)] if side < sides else []
            selection = _with(plain, slots)
            gflops, places = _cost(model, selection)
            if gflops <= budget:
                widest = side
                if len(slots) == len(whole):  # Else it is one of other blocks, and found there.
                    yield Choice(selection, {p.slot.name: _words(p) for p in places}, gflops)
                break


def _with(selection: SelectionSpec, slots: Sequence[SlotSpec]) -> SelectionSpec:
    return SelectionSpec.of({**selection.plain(), "slots": {slot.name: slot.plain() for slot in slots}})


def _words(place: Place) -> str:
    slot, (frames, height, width), _ = place
    return f"{slot.keep} of {frames} frames" if slot.axis == "t" else f"{slot.side}x{slot.side} of {height}x{width}"
