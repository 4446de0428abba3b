"""GFLOPs as the field counts them: fvcore, one multiply-add is 1, fused attention included, nothing left out silently."""

import logging
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis

from stts_lightning.classifier import VideoClassifier

PARTS = ("stem", "attention", "pooling", "MLP", "norms", "merging", "selectors", "head")

# Which part a module's own operations belong to; the first match wins.
_PART_OF = (
    (r"backbone\.slots\..*", "selectors"),
    (r"head", "head"),
    (r"backbone\.patch_\w+", "stem"),
    (r".*\.pool_[qkv](\..*)?", "pooling"),
    (r".*\.merge(\..*)?", "merging"),
    (r".*\.attn(\..*)?", "attention"),
    (r".*\.(mlp(\..*)?|proj)", "MLP"),
    (r".*norm\d?", "norms"),
)


@dataclass(frozen=True)
class Cost:
    """What one clip costs in evaluation.

    Attributes:
        gflops: all that is counted: convolutions, linear layers, attention products, and LayerNorms at 5 an element. Also
            what published code works out to mask it, where a module spares it and says so (`hidden_macs`).
        parts: the same by part of the model, every part once.
        uncounted: operators that are not counted, and how often each runs: additions, softmax, GELU, max-pooling ...
    """

    gflops: float
    parts: dict[str, float]
    uncounted: dict[str, int]


def part_of(module: str) -> str:
    """The part of the model that a module's own operations belong to, by the module's name."""
    return next((part for pattern, part in _PART_OF if re.fullmatch(pattern, module)), "other")


def _attention(inputs: Sequence[Any], _: Sequence[Any]) -> int:
    """Two products of scaled-dot-product attention, which fvcore itself counts as 0."""
    q, k, v = (value.type().sizes() for value in inputs[:3])
    return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])


def count(model: VideoClassifier) -> Cost:
    """Cost of one clip (one view) in evaluation, with hard selection and scorers, traced through the model itself."""
    training = model.training
    model.eval()
    clip = torch.zeros(1, 3, *model.backbone.clip_size, device=model.mean.device)
    logging.getLogger("fvcore.nn.jit_analysis").setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Tracing warns of Python numbers; every shape here is fixed.
            analysis = FlopCountAnalysis(model, clip).set_op_handle("aten::scaled_dot_product_attention", _attention)
            analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
            by_module = analysis.by_module()
            uncounted = dict(analysis.unsupported_ops().most_common())
    finally:
        model.train(training)
    parts: dict[str, float] = {part: 0.0 for part in PARTS}
    for name in by_module:
        below = sum(by_module[child] for child in by_module if child and child.rpartition(".")[0] == name and child != name)
        own = by_module[name] - below + getattr(model.get_submodule(name), "hidden_macs", 0)
        if own:
            part = part_of(name)
            parts[part] = parts.get(part, 0.0) + own / 1e9
    return Cost(sum(parts.values()), {part: value for part, value in parts.items() if value}, uncounted)


def count_gflops(model: VideoClassifier) -> float:
    """GFLOPs of one clip; see `count`."""
    return count(model).gflops
