import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.analysis.closed_form import closed_form
from stts_lightning.analysis.flops import count

CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("mvit_tiny", None, {}),
    ("mvit_tiny", "t0_0.6_s2_0.6", {}),
    ("mvit_tiny", {"slots": {"t1": 0.5, "s3": 0.6}, "scorer": "official"}, {}),
    ("mvit_tiny", {"slots": {"t2": 0.5, "s2": 0.6}, "selector": "random"}, {"size": (64, 96)}),
    ("video_swin_tiny", "t0_0.6_s3_0.6", {}),
    ("video_swin_tiny", None, {"size": (56, 72), "window_policy": "official"}),
    ("video_swin_tiny", "t2_0.7", {"size": (56, 72)}),
]


@pytest.mark.parametrize(("backbone", "selection", "arguments"), CASES)
def test_the_count_agrees_with_the_closed_form(backbone: str, selection: Any, arguments: dict[str, Any]) -> None:
    model = create_model(backbone, selection, 7, **arguments)
    cost = count(model)
    assert cost.gflops == pytest.approx(closed_form(model), rel=1e-12)
    assert sum(cost.parts.values()) == pytest.approx(cost.gflops, rel=1e-12)
    assert "other" not in cost.parts
    assert {"aten::gelu", "aten::add"} <= set(cost.uncounted)
    assert not {"aten::linear", "aten::matmul", "aten::conv3d", "aten::scaled_dot_product_attention"} & set(cost.uncounted)


def closed(backbone: str, selection: Any, **arguments: Any) -> float:
    with torch.device("meta"):
        return closed_form(create_model(backbone, selection, **arguments))


@pytest.mark.reference
def test_official_figures(shared: Path) -> None:
    """What fvcore counts of the official models, by the closed form and with the official scorer."""
    rows = json.loads((shared / "golden/mvit/flops_official.json").read_text())
    for name, keep, side in (("t0_0.6_s4_0.9", 5, 13), ("t0_0.4_s4_0.6", 3, 11), ("t0_0.9_s4_0.9", 7, 13)):
        slots = {"t0": {"keep": keep}, "s4": {"side": side}}
        found, official = closed("mvit_b16", {"slots": slots, "scorer": "official"}), rows[name]
        official = official["fvcore"] / 1e9
        assert found == pytest.approx(official, rel=2e-3), name
    swin = json.loads((shared / "golden/video_swin/meta.json").read_text())["configs"]
    assert closed("video_swin_b", None) == pytest.approx(swin["unpruned"]["gflops"], rel=1e-4)
    # 6 frames need no padding, so that there is nothing that we spare.
    keep6 = {"slots": {"t0": {"keep": 6}}, "scorer": "official"}
    assert closed("video_swin_b", keep6) == pytest.approx(swin["t0_0.375"]["gflops"], rel=1e-4)
