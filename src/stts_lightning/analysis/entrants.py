"""The models of a benchmark, each built from a text: ours, those of runs, and torchvision's."""

import ast
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from stts_lightning.analysis import peers
from stts_lightning.analysis.flops import count_gflops
from stts_lightning.classifier import create_model, load_model
from stts_lightning.selection.spec import SelectionError, SelectionSpec

OF_SELECTION = "selection."
"""Begins the keys of a text that are the selection's; others are the backbone's."""


@dataclass(frozen=True)
class Entrant:
    """A model that is measured.

    Attributes:
        name: as it was asked for.
        model: on its device, in evaluation.
        clip: frames, height, width.
        gflops: of one clip in evaluation.
        family: models of one family differ in selection alone.
        unpruned: whether it keeps all tokens.
        difference: largest difference of logits from its counterpart of ours, for a peer.
    """

    name: str
    model: nn.Module
    clip: tuple[int, int, int]
    gflops: float
    family: str
    unpruned: bool
    difference: float | None = None


def entrant(text: str, device: torch.device, compare: bool = True) -> Entrant:
    """Build what a text names.

    Args:
        text: `backbone`, `backbone:selection`, and `:key=value` for each argument of the backbone, or of the selection where
            the key is that of the configuration (`selection.reducer`); after `plain:`, without kernels. Or
            `torchvision:name`, of which no part may be chosen. Or `run:FOLDER`, the model of a run, and `unpruned:FOLDER`, the
            same without selection.
        device: where it is put.
        compare: run a peer and its counterpart once, for `Entrant.difference`.

    Raises:
        BackboneError, SelectionError: for what there is not.
    """
    torch.manual_seed(0)
    if text.startswith("torchvision:"):
        name = text.removeprefix("torchvision:")
        theirs, ours = peers.torchvision_model(name)
        size = ours.backbone.clip_size
        theirs, gflops = theirs.to(device), count_gflops(ours)
        difference = peers.difference(theirs, ours.to(device), torch.randn(1, 3, *size).to(device)) if compare else None
        return Entrant(text, theirs, size, gflops, text, True, difference)
    kind, _, folder = text.partition(":")
    if kind in ("run", "unpruned"):
        trained = load_model(folder)
        if kind == "unpruned":
            trained = create_model(**{**trained.recipe, "selection": None})
        gflops = count_gflops(trained.eval())
        return Entrant(text, trained.to(device), trained.backbone.clip_size, gflops, folder, trained.slots.empty)
    kernels = "none" if text.startswith("plain:") else "auto"
    backbone, *parts = text.removeprefix("plain:").split(":")
    arguments = {key: _value(value) for key, _, value in (part.partition("=") for part in parts if "=" in part)}
    chosen = {key.removeprefix(OF_SELECTION): arguments.pop(key) for key in [*arguments] if key.startswith(OF_SELECTION)}
    if "slots" in chosen:
        raise SelectionError(f"{text}: give slots in the paper's notation, as in vit_b:r0_0.5")
    selections = [part for part in parts if "=" not in part] or ["none"]
    selection = SelectionSpec.of({**SelectionSpec.of(selections[0]).to_dict(), **chosen})
    model = create_model(backbone, selection, kernels=kernels, **arguments).eval()
    family = ":".join([kernels, backbone, *(part for part in parts if "=" in part and not part.startswith(OF_SELECTION))])
    gflops = count_gflops(model)
    return Entrant(text, model.to(device), model.backbone.clip_size, gflops, family, model.slots.empty)


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def texts_of_run(folder: str) -> list[str]:
    """What names the model of a run, after the same without selection where that is another."""
    return [f"run:{folder}"] if load_model(folder).slots.empty else [f"unpruned:{folder}", f"run:{folder}"]
