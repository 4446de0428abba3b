"""Every backbone leaves Python with the batch size free, and says the same outside."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stts_lightning import VideoClassifier, create_model
from stts_lightning.analysis.exporting import _reason, export
from stts_lightning.backbones import list_backbones
from stts_lightning.selection.reducers import REDUCERS

# Two stages, a shifted block and a padded grid.
SWIN: dict[str, Any] = {"frames": 8, "size": (40, 48), "dim": 8, "depths": (1, 2), "heads": (1, 2), "window": (4, 4, 4)}
VIT: dict[str, Any] = {"frames": 8, "size": (32, 48), "patch": 8, "dim": 16, "depth": 2, "heads": 2}
V2: dict[str, Any] = {"frames": 8, "size": 32, "dim": 8, "depth": 3, "stages": (1, 2)}
SMALL: dict[str, dict[str, Any]] = {
    "mvit_b16": {"frames": 8, "size": 32, "dim": 8, "depth": 2, "stages": (1,)},
    "mvit_tiny": {},
    "video_swin_b": SWIN,
    "video_swin_s": SWIN,
    "video_swin_t": {**SWIN, "window_policy": "official"},
    "video_swin_tiny": {},
    "vit_s": VIT,
    "vit_b": VIT,
    "vit_l": {**VIT, "positions": "learned"},
    "vit_tiny": {},
    "mvit_v2_s": V2,
    "mvit_v2_b": {**V2, "displacements": "window"},
    "mvit_v2_tiny": {},
}
SLOTS = {"t0": {"t0": 0.5}, "s1": {"s1": 0.6}, "t0_s1": {"t0": 0.5, "s1": 0.6}}
OPERATORS = {"learned": {}, "official": {"scorer": "official"}, "uniform": {"selector": "uniform"}}
SELECTIONS: dict[str, Any] = {
    "none": None,
    **{
        f"{operator} {place}": {"slots": slots, **choice}
        for operator, choice in OPERATORS.items()
        for place, slots in SLOTS.items()
        if operator != "uniform" or place == "t0"  # Windows have no uniform choice.
    },
}
# What the normal run exports: each family and each operator. S differs from B and T in sizes alone, which are given here.
NORMAL = {
    ("mvit_b16", "learned t0_s1"),
    ("mvit_tiny", "uniform t0"),
    ("video_swin_b", "official t0_s1"),
    ("video_swin_t", "learned t0_s1"),
    ("video_swin_tiny", "none"),
    ("vit_b", "learned t0_s1"),
    ("mvit_v2_s", "learned t0_s1"),
}


def built(name: str, selection: Any) -> VideoClassifier:
    torch.manual_seed(0)
    return create_model(name, selection, 3, **SMALL[name]).eval()


def clips(model: VideoClassifier, batch: int) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 3, *model.backbone.clip_size), dtype=torch.uint8)


def cases() -> list[Any]:
    return [
        pytest.param(name, selection, id=f"{name} {selection}", marks=[] if (name, selection) in NORMAL else pytest.mark.slow)
        for name in list_backbones()
        for selection in SELECTIONS
    ]


@pytest.mark.parametrize(("name", "selection"), cases())
def test_exported_programs_take_any_batch_and_equal_the_model(name: str, selection: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = built(name, SELECTIONS[selection])
    written = export(model, ["torch", "onnx"], tmp_path / "model")
    assert all(file["difference"] < 1e-5 for file in written)
    program = torch.export.load(tmp_path / "model.pt2").module()
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        clip = clips(model, batch)
        with torch.no_grad():
            expected = model(clip)
            torch.testing.assert_close(program(clip), expected, atol=1e-5, rtol=1e-4)
        (logits,) = session.run(None, {"clip": clip.numpy()})
        np.testing.assert_allclose(logits, expected.numpy(), atol=1e-5, rtol=1e-4)


# The check of the clip's size holds for the traced size alone, as it should: only the batch is free.
@pytest.mark.filterwarnings("ignore:Converting a tensor to a Python boolean:torch.jit.TracerWarning")
@pytest.mark.parametrize("selection", ["none", "learned t0_s1", "official t0_s1", "uniform t0"])
@pytest.mark.parametrize("name", list_backbones())
def test_a_traced_model_takes_any_batch_and_equals_the_model(name: str, selection: str) -> None:
    model = built(name, SELECTIONS[selection])
    with torch.no_grad():
        traced: Any = torch.jit.trace(model, clips(model, 2), check_trace=False)
        for batch in (1, 3):
            clip = clips(model, batch)
            torch.testing.assert_close(traced(clip), model(clip), atol=1e-5, rtol=1e-4)


def test_selection_by_attention_is_exported(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = create_model(
        "mvit_b16", {"slots": {"s1": 0.5}, "selector": "attention"}, 3, **{**SMALL["mvit_b16"], "size": (40, 48)}
    )
    (file,) = export(model.eval(), ["onnx"], tmp_path / "model")
    assert file["difference"] < 1e-5


@pytest.mark.parametrize("name", ["torch", "onnx"])
def test_random_selection_is_exported_too(name: str, tmp_path: Path) -> None:
    if name == "onnx":
        pytest.importorskip("onnxruntime")
    model = built("mvit_b16", {"slots": {"t0": 0.5, "s1": 0.5}, "selector": "random"})
    (file,) = export(model, [name], tmp_path / "model")
    assert file["difference"] < 1e-5


@pytest.mark.parametrize("selector", ["learned", "norm", "centre"])
def test_segments_are_exported(selector: str, tmp_path: Path) -> None:
    """As the recipe of the study has them: one segment and one window for the clip, the first frame scored as the next."""
    pytest.importorskip("onnxruntime")
    together = {"frames": "segment", "first_frame": "next", "windows": "motion", "normalize": "windows", "scorer": "deviation"}
    model = create_model("mvit_tiny", {"slots": {"t0": 0.5, "s0": 0.5}, "selector": selector, **together}, 3, size=64).eval()
    for file in export(model, ["torch", "onnx"], tmp_path / "model"):
        assert file["difference"] < 1e-5


@pytest.mark.parametrize("kind", sorted(REDUCERS))
def test_reducers_are_exported(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = create_model("vit_tiny", {"slots": {"r0": 0.7}, "reducer": kind}, 3).eval()
    for file in export(model, ["torch", "onnx"], tmp_path / "model"):
        assert file["difference"] < 1e-5


def test_an_error_tells_the_first_cause_in_one_line() -> None:
    try:
        try:
            raise ValueError("no function for aten.x\nnodes ...")
        except ValueError as error:
            raise RuntimeError("general advice") from error
    except RuntimeError as error:
        assert _reason(error) == "no function for aten.x"
    assert _reason(ValueError()) == "ValueError"
