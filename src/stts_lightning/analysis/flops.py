"""GFLOPs as the field counts them: one multiply-add is 1, attention products and norms included, nothing left out silently."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from stts_lightning.classifier import VideoClassifier, create_model

PARTS = ("stem", "attention", "pooling", "MLP", "norms", "merging", "selectors", "reducers", "head")

# Which part a module's own operations belong to; the first match wins.
_PART_OF = (
    (r"backbone\.(slots\.reducers|blocks\.\d+\.reducer)(\..*)?", "reducers"),
    (r"backbone\.slots\..*", "selectors"),
    (r"backbone", "head"),  # The mean of all tokens.
    (r"head", "head"),
    (r"backbone\.patch_\w+", "stem"),
    (r".*\.pool_[qkv](\..*)?", "pooling"),
    (r".*\.merge(\..*)?", "merging"),
    (r".*\.attn(\..*)?", "attention"),
    (r".*\.(mlp(\..*)?|proj)", "MLP"),
    (r".*norm\d?", "norms"),
)

_VIEWS = {"view", "_unsafe_view", "reshape", "expand", "permute", "transpose", "t", "slice", "select", "unbind", "split"}
_VIEWS |= {"split_with_sizes", "squeeze", "unsqueeze", "unfold", "alias", "detach", "chunk", "_reshape_alias"}


@dataclass(frozen=True)
class Cost:
    """What one clip costs in evaluation.

    Attributes:
        gflops: convolutions, linear layers, attention products, and 5 for each element of a LayerNorm, as fvcore counts them.
        parts: the same by part of the model, every part once.
        uncounted: operators that are not counted, and how often each runs: additions, softmax, GELU, max-pooling ...
    """

    gflops: float
    parts: dict[str, float]
    uncounted: dict[str, int]


def part_of(module: str) -> str:
    """The part of the model that a module's own operations belong to, by the module's name."""
    return next((part for pattern, part in _PART_OF if re.fullmatch(pattern, module)), "other")


NORM = 5
"""What counts for an element of a LayerNorm with weights, as in fvcore."""


def _layer_norm(shape: Sequence[int], *_: object, **__: object) -> int:
    # All counts are halved in the end, as torch counts two for a multiply-add.
    return 2 * NORM * math.prod(shape)


COUNTED = {torch.ops.aten.native_layer_norm: _layer_norm}
"""Operators that are counted besides those that torch's counter knows."""


class _Uncounted(TorchDispatchMode):
    """Counts the calls of operators that do arithmetic and have no count."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        packet = func._overloadpacket
        if packet not in flop_registry and packet not in COUNTED and packet.__name__ not in _VIEWS:
            self.calls[f"aten::{packet.__name__}"] += 1
        return func(*args, **kwargs or {})


def _parent(name: str, names: Mapping[str, object]) -> str:
    """The innermost of the modules that hold a module."""
    while (name := name.rpartition(".")[0]) and name not in names:
        pass
    return name


def _caller(name: str, model: VideoClassifier) -> str:
    """A module's name, below the module that runs it: a reducer is kept beside the blocks, and may be run by one of them."""
    found = re.fullmatch(r"backbone\.slots\.reducers\.r(\d+)(.*)", name)
    if found is None or model.slots.reducer(int(found[1])) is None:
        return name
    return f"backbone.blocks.{found[1]}.reducer{found[2]}"


def count(model: VideoClassifier) -> Cost:
    """Cost of one clip (one view) in evaluation, with hard selection and scorers.

    The model runs on torch's meta device, which knows shapes alone: no weight is read and nothing is computed.
    """
    tensors = itertools.chain(model.named_parameters(), model.named_buffers())
    shapes: dict[str, Tensor] = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors}
    clip = torch.empty(1, 3, *model.backbone.clip_size, device="meta")
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), _Uncounted() as uncounted, FlopCounterMode(display=False, custom_mapping=COUNTED) as counter:
            # By each tensor's first name alone: a module that several blocks share would be given back the wrong one otherwise.
            torch.func.functional_call(model, shapes, clip, tie_weights=False)
    finally:
        model.train(training)
    counted = counter.get_flop_counts()
    # By module, the operations of the modules in it included; the whole model is counted under the name "Global".
    costs = {_caller(name.partition(".")[2], model): sum(of.values()) for name, of in counted.items() if name != "Global"}
    parts: dict[str, int] = dict.fromkeys(PARTS, 0)
    for name, cost in costs.items():
        # What the module does itself: less what the modules right below it do (lists and dictionaries of modules never run).
        below = (other for other in costs if other and _parent(other, costs) == name)
        alone = cost - sum(costs[other] for other in below)
        if alone:
            parts[part_of(name)] = parts.get(part_of(name), 0) + alone
    # torch counts two for a multiply-add.
    gflops = {part: operations / 2e9 for part, operations in parts.items() if operations}
    return Cost(sum(parts.values()) / 2e9, gflops, dict(uncounted.calls.most_common()))


def cost_as_tested(model: VideoClassifier, views: int) -> dict[str, float]:
    """Cost of what a test has kept, where that depends on its clips, under the names of `result.json`; else empty.

    It is that of a clip with the mean number of tokens.
    """
    seen = model.slots.as_seen()
    if seen is None:
        return {}
    with torch.device("meta"):
        alike = create_model(**{**model.recipe, "selection": seen})
    gflops = count_gflops(alike)
    return {
        "gflops_per_view": round(gflops, 4),
        "gflops": round(gflops * views, 4),
        "tokens_kept": round(alike.slots.share, 6),
    }


def count_gflops(model: VideoClassifier) -> float:
    """GFLOPs of one clip; see `count`."""
    return count(model).gflops
