"""Published weights: which layout a file has, how its keys map onto ours, and a load that leaves nothing unsaid.

A layout is a table of rules (their pattern, our pattern); it is recognised by keys, never by the file's name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from stts_lightning.selection.spec import SelectionSpec

State = dict[str, Tensor]


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or does not fit the model: says what is missing, unexpected or mismatched."""


@dataclass(frozen=True)
class Layout:
    """How one family of files names the same weights.

    Attributes:
        name: for messages.
        signature: keys that only this layout has.
        rules: (pattern of their key, replacement to our key), tried in order; the first full match wins. An empty
            replacement leaves the key out: what can be computed.
        wrapper: key under which the file keeps its weights, if any.
        scorer: the scorer that selectors in such a file have.
        backbone: constructor arguments that this family implies.
        tuned: further ones, implied where the file holds selectors.
    """

    name: str
    signature: tuple[str, ...]
    rules: tuple[tuple[str, str], ...]
    wrapper: str | None = None
    scorer: str | None = None
    backbone: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Any] = field(default_factory=dict)


_SHARED = (
    (r"(blocks\.\d+\.(?:norm[12]|attn\.qkv)\..*)", r"backbone.\1"),
    (r"norm\.(weight|bias)", r"backbone.norm.\1"),
)

_SELECTORS = (
    (r"(?:backbone\.)?(time|space)_score_predictor\.(\d+)\.score_network\.in_conv\.(\d)\.(.*)", r"<\1 \2>.scorer.features.\3.\4"),
    (r"(?:backbone\.)?(time|space)_score_predictor\.(\d+)\.score_network\.out_conv\.(\d)\.(.*)", r"<\1 \2>.scorer.score.\3.\4"),
)

STTS_MVIT = Layout(
    name="official STTS / SlowFast MViT",
    signature=("cls_token", "pos_embed_spatial", "blocks.0.attn.qkv.weight", "head.projection.weight"),
    rules=(
        *_SHARED,
        (r"(cls_token|pos_embed_\w+)", r"backbone.\1"),
        (r"patch_embed\.proj\.(.*)", r"backbone.patch_embed.\1"),
        (r"(blocks\.\d+\.attn)\.pool_([qkv])\.weight", r"backbone.\1.pool_\2.conv.weight"),
        (r"(blocks\.\d+\.attn)\.norm_([qkv])\.(.*)", r"backbone.\1.pool_\2.norm.\3"),
        (r"(blocks\.\d+\.(?:attn\.proj|mlp\.fc[12]|proj)\..*)", r"backbone.\1"),
        (r"head\.projection\.(.*)", r"head.\1"),
        *_SELECTORS,
    ),
    wrapper="model_state",
    scorer="official",
    backbone={"pool_norm_eps": 1e-5},
)

TORCHVISION_MVIT = Layout(
    name="torchvision mvit_v1_b",
    signature=("pos_encoding.class_token", "conv_proj.weight", "head.1.weight"),
    rules=(
        *_SHARED,
        (r"pos_encoding\.class_token", "backbone.cls_token"),
        (r"pos_encoding\.class_pos", "backbone.pos_embed_class"),
        (r"pos_encoding\.(spatial|temporal)_pos", r"backbone.pos_embed_\1"),
        (r"conv_proj\.(.*)", r"backbone.patch_embed.\1"),
        (r"(blocks\.\d+)\.attn\.project\.0\.(.*)", r"backbone.\1.attn.proj.\2"),
        (r"(blocks\.\d+\.attn\.pool_[qkv])\.pool\.weight", r"backbone.\1.conv.weight"),
        (r"(blocks\.\d+\.attn\.pool_[qkv])\.norm_act\.0\.(.*)", r"backbone.\1.norm.\2"),
        (r"(blocks\.\d+\.mlp)\.0\.(.*)", r"backbone.\1.fc1.\2"),
        (r"(blocks\.\d+\.mlp)\.3\.(.*)", r"backbone.\1.fc2.\2"),
        (r"(blocks\.\d+)\.project\.(.*)", r"backbone.\1.proj.\2"),
        (r"head\.1\.(.*)", r"head.\1"),
    ),
    backbone={"pool_norm_eps": 1e-6},
)

_SWIN = (
    (r"(?:backbone\.)?patch_embed\.proj\.(.*)", r"backbone.patch_embed.\1"),
    (r"(?:backbone\.)?patch_embed\.norm\.(.*)", r"backbone.patch_norm.\1"),
    (r"(?:backbone\.)?norm\.(.*)", r"backbone.norm.\1"),
    (r".*\.attn\.relative_position_index", ""),
)

MMACTION_SWIN = Layout(
    name="official STTS / Video-Swin (mmaction)",
    signature=("backbone.patch_embed.proj.weight", "backbone.layers.0.blocks.0.attn.qkv.weight", "cls_head.fc_cls.weight"),
    rules=(
        *_SWIN,
        (r"backbone\.layers\.(\d+\.blocks\.\d+\..*)", r"backbone.stages.\1"),
        (r"backbone\.layers\.(\d+)\.downsample\.(.*)", r"backbone.stages.\1.merge.\2"),
        (r"cls_head\.fc_cls\.(.*)", r"head.\1"),
        *_SELECTORS,
    ),
    scorer="official",
    tuned={"window_policy": "official"},
)

TORCHVISION_SWIN = Layout(
    name="torchvision swin3d",
    signature=("patch_embed.proj.weight", "features.0.0.attn.qkv.weight", "head.weight"),
    rules=(
        *_SWIN,
        *((rf"features\.{2 * i}\.(\d+)\.mlp\.0\.(.*)", rf"backbone.stages.{i}.blocks.\1.mlp.fc1.\2") for i in range(4)),
        *((rf"features\.{2 * i}\.(\d+)\.mlp\.3\.(.*)", rf"backbone.stages.{i}.blocks.\1.mlp.fc2.\2") for i in range(4)),
        *((rf"features\.{2 * i}\.(\d+\..*)", rf"backbone.stages.{i}.blocks.\1") for i in range(4)),
        *((rf"features\.{2 * i + 1}\.(.*)", rf"backbone.stages.{i}.merge.\1") for i in range(3)),
        (r"head\.(.*)", r"head.\1"),
    ),
)

OWN = Layout(name="stts_lightning", signature=("backbone.norm.weight", "head.weight"), rules=((r"(.*)", r"\1"),))

LAYOUTS = (OWN, STTS_MVIT, TORCHVISION_MVIT, MMACTION_SWIN, TORCHVISION_SWIN)


@dataclass(frozen=True)
class Checkpoint:
    """Weights under the keys of their file, the layout those keys have, and (own files) how the model was built."""

    path: Path
    layout: Layout
    state: State
    model: Mapping[str, Any] | None = None

    @property
    def selector_keys(self) -> list[str]:
        """Keys of selectors, in the file's own words."""
        return [key for key in self.state if re.match(r"(backbone\.)?((time|space)_score_predictor|slots)\.", key)]

    def backbone(self) -> dict[str, Any]:
        """Constructor arguments of the backbone that this file implies."""
        return {**self.layout.backbone, **(self.layout.tuned if self.selector_keys else {})}

    def scorer(self) -> str | None:
        """The scorer that this file's selectors have, if it holds any."""
        if not self.selector_keys:
            return None
        if self.layout is OWN:
            return "official" if any(".scorer.features." in key for key in self.selector_keys) else "paper"
        return self.layout.scorer

    def translated(self, selection: SelectionSpec) -> State:
        """The weights under our keys. Keys that no rule maps keep their name, so that a load reports them."""
        return {ours: value for key, value in self.state.items() if (ours := _our_key(key, self.layout, selection))}


def _our_key(key: str, layout: Layout, selection: SelectionSpec) -> str:
    for pattern, replacement in layout.rules:
        if re.fullmatch(pattern, key):
            return _place(re.sub(pattern, replacement, key), selection)
    return key


def _place(key: str, selection: SelectionSpec) -> str:
    """Resolve "<time 0>", the n-th temporal selector in the order of blocks, to the slot of that number."""
    match = re.match(r"<(time|space) (\d+)>\.", key)
    if not match:
        return key
    names = [s.name for s in sorted(selection.slots, key=lambda slot: slot.block) if s.axis == match[1][0]]
    number = int(match[2])
    return key.replace(match[0], f"backbone.slots.selectors.{names[number]}.") if number < len(names) else key


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint and recognise its layout.

    Raises:
        CheckpointError: if there is no such file, it holds more than plain tensors and containers, or its keys belong
            to no known layout.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path}: no such file")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError, KeyError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"checkpoint {path}: not a readable file of plain weights ({reason})") from error
    if not isinstance(content, Mapping):
        raise CheckpointError(f"checkpoint {path}: holds a {type(content).__name__}, not a state dict")
    model = content.get("model") if "state_dict" in content else None
    for wrapper in ("state_dict", "model_state"):
        content = content.get(wrapper, content)
    state = {str(k).removeprefix("model."): v for k, v in content.items() if isinstance(v, Tensor)}
    for layout in LAYOUTS:
        if all(key in state for key in layout.signature):
            return Checkpoint(path, layout, state, model)
    known = ", ".join(layout.name for layout in LAYOUTS)
    raise CheckpointError(f"checkpoint {path}: its keys ({_some(state)}) belong to none of the known layouts: {known}")


def load_checkpoint(model: nn.Module, checkpoint: Checkpoint, selection: SelectionSpec, head: str = "keep") -> list[str]:
    """Load weights; fail unless all that is missing is new selectors (and the head, with head="reset").

    Args:
        model: a `VideoClassifier`, filled in place.
        checkpoint: from `read_checkpoint`.
        selection: the model's slots, in whose order the file numbers its selectors.
        head: "keep" loads the classifier's head; "reset" leaves the new one.

    Returns:
        Keys that stay as initialised.

    Raises:
        CheckpointError: with every missing, unexpected and mismatched key by kind.
    """
    if head not in ("keep", "reset"):
        raise CheckpointError(f"head={head!r}: must be 'keep' or 'reset'")
    target = model.state_dict()
    state = checkpoint.translated(selection)
    if head == "reset":
        state = {key: value for key, value in state.items() if not key.startswith("head.")}
    # Files differ in leading axes of size 1 (a class token of (96,) or (1, 1, 96)): the same numbers.
    state = {
        k: v.reshape(target[k].shape) if k in target and _squeezed(v) == _squeezed(target[k]) else v for k, v in state.items()
    }
    new_selectors = not checkpoint.selector_keys
    fresh = [
        k
        for k in target
        if k not in state and ((new_selectors and ".slots." in k) or (head == "reset" and k.startswith("head.")))
    ]
    missing = [k for k in target if k not in state and k not in fresh]
    unexpected = [k for k in state if k not in target]
    mismatched = [
        f"{k} {tuple(v.shape)} for {tuple(target[k].shape)}"
        for k, v in state.items()
        if k in target and v.shape != target[k].shape
    ]
    if missing or unexpected or mismatched:
        hint = (
            "; the class count differs: head=reset leaves the new head as initialised"
            if any(m.startswith("head.") for m in mismatched)
            else ""
        )
        raise CheckpointError(
            f"checkpoint {checkpoint.path} ({checkpoint.layout.name}) does not fit the model: "
            f"{len(missing)} missing [{_some(missing)}], {len(unexpected)} unexpected [{_some(unexpected)}], "
            f"{len(mismatched)} of another shape [{_some(mismatched)}]{hint}"
        )
    model.load_state_dict(state, strict=False)
    return fresh


def _squeezed(tensor: Tensor) -> list[int]:
    return [n for n in tensor.shape if n != 1]


def _some(keys: Iterable[str], limit: int = 4) -> str:
    keys = list(keys)
    return ", ".join(keys[:limit]) + (f", and {len(keys) - limit} more" if len(keys) > limit else "")
