import json
from pathlib import Path
from typing import Any

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.analysis.closed_form import UnwrittenCost, closed_form, within_budget
from stts_lightning.analysis.flops import count
from stts_lightning.selection.spec import SelectionError, SelectionSpec

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


@pytest.mark.parametrize(("backbone", "arguments"), [("mvit_tiny", {"size": (64, 96)}), ("video_swin_tiny", {"size": 56})])
def test_the_closed_form_tells_of_selections_that_are_not_built(backbone: str, arguments: dict[str, Any]) -> None:
    plain = create_model(backbone, None, 7, **arguments)
    for selection in ("t0_0.6_s3_0.5", "t1_0.5_s1_0.5_t4_0.5", "s2_0.9"):
        spec = SelectionSpec.of(selection)
        assert closed_form(plain, spec) == pytest.approx(count(create_model(backbone, spec, 7, **arguments)).gflops, rel=1e-12)
    with pytest.raises(SelectionError, match="slots.t9: no block 9; this backbone has 0 to 5"):
        closed_form(plain, SelectionSpec.of("t9_0.5"))
    with pytest.raises(UnwrittenCost, match="selector attention"):
        closed_form(plain, SelectionSpec.of({"slots": {"t1": 0.5}, "selector": "attention"}))


@pytest.mark.parametrize("backbone", ["mvit_tiny", "video_swin_tiny"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_a_budget_is_used_up(backbone: str, share: float) -> None:
    """Against every selection of one temporal and one spatial slot, written out."""
    model = create_model(backbone, None, 7)
    budget = share * closed_form(model)
    choices = within_budget(model, budget, [0, 3])
    found = {(s.slots[0].name if s.slots else "", str(s)) for s, _, _ in choices}
    assert len(found) == len(choices)
    side_at = {0: 16, 3: model.backbone.block_sizes[3][1]}

    def cost(keep: int, side: int, t: int, s: int) -> float:
        slots = {f"t{t}": {"keep": keep}} if keep < 8 else {}
        slots |= {f"s{s}": {"side": side}} if side < side_at[s] else {}
        return closed_form(model, SelectionSpec.of({"slots": slots}))

    for selection, kept, gflops in choices:
        assert gflops <= budget
        assert gflops == pytest.approx(closed_form(model, selection))
        assert set(kept) == {slot.name for slot in selection.slots}
    expected = set()
    for t in (0, 3):
        for s in (0, 3):
            fits = {(k, h) for k in range(1, 9) for h in range(1, side_at[s] + 1) if cost(k, h, t, s) <= budget}
            for k, h in fits:
                if not any(a >= k and b >= h and (a, b) != (k, h) for a, b in fits):
                    expected.add((t if k < 8 else None, k, s if h < side_at[s] else None, h if h < side_at[s] else None))
    shown = set()
    for selection, _, _ in choices:
        at = {slot.axis: slot for slot in selection.slots}
        t, s = at.get("t"), at.get("s")
        shown.add((t.block if t else None, t.keep if t else 8, s.block if s else None, s.side if s else None))
    assert shown == expected


def test_a_budget_beyond_the_plain_model_and_one_below_all() -> None:
    model = create_model("mvit_tiny", None, 7)
    (only,) = within_budget(model, 1.0, [0])
    assert not only.selection.slots
    assert within_budget(model, 1e-6, [0]) == []
