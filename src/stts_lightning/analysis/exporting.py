"""A model as a program without its Python: torch.export and ONNX, hard selection inside, any batch; each compared with it."""

import importlib
import importlib.util
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stts_lightning.classifier import VideoClassifier
from stts_lightning.errors import UserError

ONNX = ("onnx", "onnxscript", "onnxruntime")


class ExportError(UserError):
    """What does not go: names the format and why."""


class Logits(nn.Module):
    """The part that is exported: `clip` `(B, 3, T, H, W)` uint8 -> logits `(B, num_classes)`."""

    def __init__(self, model: VideoClassifier) -> None:
        super().__init__()
        self.model = model

    def forward(self, clip: Tensor) -> Tensor:
        """See the class."""
        return self.model(clip)


@contextmanager
def _quiet() -> Iterator[None]:
    """Exporters tell much of themselves."""
    before = {name: logging.getLogger(name).level for name in ("torch.onnx", "onnxscript", "onnx_ir")}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in before:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


def _clips(model: VideoClassifier, batch: int) -> Tensor:
    generator = torch.Generator().manual_seed(batch)
    return torch.randint(0, 256, (batch, 3, *model.backbone.clip_size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def export(model: VideoClassifier, formats: list[str], out: Path) -> list[dict[str, Any]]:
    """Write a model and compare what was written, loaded anew, with the model on another batch size than it was traced with.

    Args:
        model: in evaluation mode, on the CPU.
        formats: of "torch" (`out`.pt2) and "onnx" (`out`.onnx).
        out: path without a suffix.

    Returns:
        For each format: file, bytes, difference (largest, of logits), batch (of the comparison).

    Raises:
        ValueError: for an unknown format.
        ExportError: if a package is missing or the model cannot be written in a format.
    """
    if unknown := [name for name in formats if name not in ("torch", "onnx")]:
        raise ValueError(f"formats={unknown[0]}: allowed are torch, onnx")
    if "onnx" in formats and (lacking := [name for name in ONNX if importlib.util.find_spec(name) is None]):
        raise ExportError(
            f"formats=onnx: {', '.join(lacking)} not installed; pip install 'stts-lightning[export]', or formats=[torch]"
        )
    module = Logits(model.cpu().eval())
    traced, other = _clips(model, 2), _clips(model, 3)
    # Before the trace: what a backbone works out once for a size must be made of real tensors.
    expected = module(other)
    module(traced)
    try:
        with _quiet():
            program = torch.export.export(
                module, (traced,), dynamic_shapes={"clip": {0: torch.export.Dim("batch", min=1, max=4096)}}
            )
    except Exception as error:
        raise ExportError(f"formats={','.join(formats)}: this model cannot be traced: {_reason(error)}") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    files: list[dict[str, Any]] = []
    for name in formats:
        file = out.with_name(f"{out.name}.{'pt2' if name == 'torch' else 'onnx'}")
        with _quiet():
            logits = _torch(program, file, other) if name == "torch" else _onnx(program, file, other)
        difference = float((logits - expected).abs().max())
        files.append(
            {"format": name, "file": str(file), "bytes": os.path.getsize(file), "difference": difference, "batch": len(other)}
        )
    return files


def _reason(error: BaseException) -> str:
    """First line of the first error: exporters wrap it in general advice."""
    while error.__cause__:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0]


def _torch(program: Any, file: Path, clip: Tensor) -> Tensor:
    torch.export.save(program, file)
    return torch.export.load(file).module()(clip)


def _onnx(program: Any, file: Path, clip: Tensor) -> Tensor:
    try:
        onnx = torch.onnx.export(program, dynamo=True, verbose=False, input_names=["clip"], output_names=["logits"])
        assert onnx is not None
        onnx.save(str(file))
    except Exception as error:
        raise ExportError(f"formats=onnx: this model cannot be written: {_reason(error)}") from error
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: clip.numpy()})[0])
