"""A model card: where weights come from, what they are, how they load."""

import hashlib
from pathlib import Path

from stts_lightning.analysis.flops import count_gflops
from stts_lightning.backbones.checkpoints import Checkpoint
from stts_lightning.classifier import VideoClassifier


def sha256(path: str | Path) -> str:
    """Hash of a file, in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_card(model: VideoClassifier, source: Checkpoint, converted: str | Path, licence: str | None = None) -> str:
    """The card of a converted file, in Markdown.

    Args:
        model: with the weights.
        source: the file they come from.
        converted: the safetensors file that holds them now.
        licence: of the weights; None names the licence of the code that writes such files.
    """
    size = "x".join(map(str, model.backbone.clip_size))
    slots = "; ".join(f"{name.upper()}: {text}" for name, text in model.slots.describe().items())
    rows = {
        "source": f"{source.path.name}, {source.layout.name} layout",
        "sha256 of the source": sha256(source.path),
        "sha256 of this file": sha256(converted),
        "licence": licence or f"that of the publisher; the code that writes such files is under {source.layout.licence}",
        "model": f"{model.recipe['backbone']}, {size}, {model.num_classes} classes",
        "selection": slots or "none",
        "choices": ", ".join(f"{k}={v}" for k, v in model.backbone.variant().items()) or "-",
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "GFLOPs a view": f"{count_gflops(model):.2f}",
        "normalisation": f"mean {model.backbone.mean}, standard deviation {model.backbone.std}",
    }
    lines = [f"# {Path(converted).name}", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    call = f'model = stts_lightning.load_model("{Path(converted).name}")'
    return "\n".join([*lines, "", "```python", "import stts_lightning", "", call, "```", ""])
