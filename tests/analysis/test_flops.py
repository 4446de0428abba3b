import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from fvcore.nn import FlopCountAnalysis

from stts_lightning import create_model
from stts_lightning.analysis.budget import cost, within_budget
from stts_lightning.analysis.flops import count, count_gflops
from stts_lightning.classifier import VideoClassifier
from stts_lightning.selection.spec import SelectionError, SelectionSpec

CASES: list[tuple[str, Any, dict[str, Any]]] = [
    ("mvit_tiny", None, {}),
    ("mvit_tiny", "t0_0.6_s2_0.6", {}),
    ("mvit_tiny", {"slots": {"t1": 0.5, "s3": 0.6}, "scorer": "official"}, {}),
    ("mvit_tiny", {"slots": {"t2": 0.5, "s2": 0.6}, "selector": "random"}, {"size": (64, 96)}),
    ("video_swin_tiny", "t0_0.6_s3_0.6", {}),
    ("video_swin_tiny", None, {"size": (56, 72), "window_policy": "official"}),
    ("video_swin_tiny", "t2_0.7", {"size": (56, 72)}),
    ("mvit_v2_tiny", None, {}),
    ("mvit_v2_tiny", "t0_0.6_s2_0.6", {}),
    ("vit_tiny", None, {}),
    ("vit_tiny", "t0_0.6_s2_0.6", {}),
    ("vit_tiny", "r1-3_0.7", {}),
    *(("vit_tiny", {"slots": {"r0": 0.5}, "reducer": kind}, {}) for kind in ("rlt", "topk")),
    *(("vit_tiny", {"slots": {"r1": 0.7, "r3": 0.6}, "reducer": kind}, {}) for kind in ("evit", "random", "dynamic_vit")),
]


def fvcore_gflops(model: VideoClassifier) -> tuple[float, float]:
    """The second opinion: fvcore, which traces the model, and counts no attention unless told how. And how exact it is."""

    def attention(inputs: Sequence[Any], _: Sequence[Any]) -> int:
        q, k, v = (value.type().sizes() for value in inputs[:3])
        return math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])

    analysis = FlopCountAnalysis(model.eval(), torch.zeros(1, 3, *model.backbone.clip_size))
    analysis.set_op_handle("aten::scaled_dot_product_attention", attention)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    # It reads the cost of an einsum from numpy's text, which has four digits.
    return analysis.total() / 1e9, analysis.by_operator()["einsum"] / 1e9 * 5e-4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("backbone", "selection", "arguments"), CASES)
def test_count_agrees_with_fvcore_and_the_written_out_cost(backbone: str, selection: Any, arguments: dict[str, Any]) -> None:
    model = create_model(backbone, selection, 7, **arguments)
    found = count(model)
    if model.slots.selection.selector != "random":  # fvcore cannot trace operators of one's own, which draw the noise.
        gflops, exact = fvcore_gflops(model)
        assert found.gflops == pytest.approx(gflops, rel=1e-12, abs=exact)
    assert found.gflops == pytest.approx(cost(model, model.slots.selection), rel=1e-12)
    assert sum(found.parts.values()) == pytest.approx(found.gflops, rel=1e-12)
    assert "other" not in found.parts and min(found.parts.values()) > 0
    assert {"aten::gelu", "aten::add"} <= set(found.uncounted)
    assert not {"aten::addmm", "aten::bmm", "aten::convolution", "aten::native_layer_norm"} & set(found.uncounted)


@pytest.mark.parametrize("backbone", ["mvit_tiny", "video_swin_tiny"])
def test_counting_reads_no_weight_and_leaves_the_model_as_it_was(backbone: str) -> None:
    model = create_model(backbone, "t0_0.5", 7).train()

    def state() -> dict[str, tuple[int, torch.device]]:
        tensors = itertools.chain(model.named_parameters(), model.named_buffers(remove_duplicate=False))
        return {name: (tensor.data_ptr(), tensor.device) for name, tensor in tensors}

    before = state()
    gflops = count_gflops(model)
    assert model.training and state() == before
    with torch.device("meta"):
        assert count_gflops(create_model(backbone, "t0_0.5", 7)) == gflops


def on_meta(backbone: str, selection: Any, **arguments: Any) -> float:
    with torch.device("meta"):
        return count_gflops(create_model(backbone, selection, **arguments))


@pytest.mark.reference
@pytest.mark.parametrize(
    ("backbone", "selection", "gflops"),
    [
        ("vit_s", None, 56.95),
        ("vit_b", None, 180.49),
        ("vit_l", None, 597.22),
        ("vit_b", "t0_0.6", 102.88),
        ("vit_s", "s4_0.6", 39.09),
    ],
)
def test_plain_vits_cost_what_is_published(backbone: str, selection: str | None, gflops: float) -> None:
    """57, 180 and 597 as published; to two digits, and with selection, as counted on the official model."""
    with torch.device("meta"):
        found = count(create_model(backbone, selection))
    assert found.gflops - found.parts.get("selectors", 0.0) == pytest.approx(gflops, abs=0.006)


def test_gflops_match_official_figures(shared: Path) -> None:
    """What fvcore counts of the official models, with the official scorer."""
    rows = json.loads((shared / "golden/mvit/flops_official.json").read_text())
    for name, keep, side in (("t0_0.6_s4_0.9", 5, 13), ("t0_0.4_s4_0.6", 3, 11), ("t0_0.9_s4_0.9", 7, 13)):
        slots = {"t0": {"keep": keep}, "s4": {"side": side}}
        found = on_meta("mvit_b16", {"slots": slots, "scorer": "official"})
        # The official code norms all tokens after the last block; here the class token alone goes on.
        tokens = keep * math.ceil(side / 2) ** 2
        assert found + 5 * tokens * 768 / 1e9 == pytest.approx(rows[name]["fvcore"] / 1e9, rel=1e-12), name
    swin = json.loads((shared / "golden/video_swin/meta.json").read_text())["configs"]
    assert on_meta("video_swin_b", None) == pytest.approx(swin["unpruned"]["gflops"], rel=1e-4)
    # 6 frames need no padding, so that there is nothing that we spare.
    keep6 = {"slots": {"t0": {"keep": 6}}, "scorer": "official"}
    assert on_meta("video_swin_b", keep6) == pytest.approx(swin["t0_0.375"]["gflops"], rel=1e-4)


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [
        ("mvit_tiny", {"size": (64, 96)}),
        ("mvit_v2_tiny", {"size": (64, 96)}),
        ("mvit_v2_tiny", {"displacements": "window"}),
        ("video_swin_tiny", {"size": 56}),
        ("vit_tiny", {"size": (64, 96)}),
    ],
)
def test_cost_of_selections_that_are_not_built(backbone: str, arguments: dict[str, Any]) -> None:
    unpruned = create_model(backbone, None, 7, **arguments)
    for selection in ("t0_0.6_s3_0.5", "t1_0.5_s1_0.5_t4_0.5", "s2_0.9"):
        spec = SelectionSpec.of(selection)
        assert cost(unpruned, spec) == pytest.approx(count_gflops(create_model(backbone, spec, 7, **arguments)), rel=1e-12)
    if backbone != "video_swin_tiny":  # A selector whose cost is not written out.
        spec = SelectionSpec.of({"slots": {"t1": 0.5}, "selector": "attention"})
        assert cost(unpruned, spec) == count_gflops(create_model(backbone, spec, 7, **arguments))
    with pytest.raises(SelectionError, match="budget_blocks: no block 9; this backbone has 0 to 5"):
        within_budget(unpruned, 1e-3, [0, 9])


@pytest.mark.parametrize("backbone", ["mvit_tiny", "video_swin_tiny"])
@pytest.mark.parametrize("share", [0.35, 0.6, 0.9])
def test_selections_within_a_budget_are_the_largest_that_fit(backbone: str, share: float) -> None:
    """Against every selection of one temporal and one spatial slot, written out."""
    model = create_model(backbone, None, 7)
    budget = share * count_gflops(model)
    choices = within_budget(model, budget, [0, 3])
    found = {str(choice.selection) for choice in choices}
    assert len(found) == len(choices)
    side_at = {0: 16, 3: model.backbone.block_sizes[3][1]}

    def cost_of(keep: int, side: int, t: int, s: int) -> float:
        slots = {f"t{t}": {"keep": keep}} if keep < 8 else {}
        slots |= {f"s{s}": {"side": side}} if side < side_at[s] else {}
        return cost(model, SelectionSpec.of({"slots": slots}))

    for selection, gflops in choices:
        assert gflops <= budget
        assert gflops == pytest.approx(cost(model, selection))
    expected = set()
    for t in (0, 3):
        for s in (0, 3):
            fits = {(k, h) for k in range(1, 9) for h in range(1, side_at[s] + 1) if cost_of(k, h, t, s) <= budget}
            for k, h in fits:
                if not any(a >= k and b >= h and (a, b) != (k, h) for a, b in fits):
                    expected.add((t if k < 8 else None, k, s if h < side_at[s] else None, h if h < side_at[s] else None))
    shown = set()
    for selection, _ in choices:
        at = {slot.axis: slot for slot in selection.slots}
        t, s = at.get("t"), at.get("s")
        shown.add((t.block if t else None, t.keep if t else 8, s.block if s else None, s.side if s else None))
    assert shown == expected


def test_budget_above_the_unpruned_model_and_below_every_selection() -> None:
    model = create_model("mvit_tiny", None, 7)
    (only,) = within_budget(model, 1.0, [0])
    assert not only.selection.slots
    assert within_budget(model, 1e-6, [0]) == []
