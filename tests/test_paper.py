"""The paper's tables as experiments: each row composes, builds, and costs what its file and its table say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from stts_lightning import assembly
from stts_lightning.analysis.paper import FIGURE_3, TABLES, Row, figure_curves, measured, published_curves
from stts_lightning.configuration import conf_dir  # Which also teaches Hydra the paper's notation.

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "conf/experiment/paper").glob("*.yaml"))
SHOWN = {**{f"Table {number}": table for number, table in TABLES.items()}, "Figure 3": FIGURE_3}
ROWS = [(name, row) for name, table in SHOWN.items() for row in table.rows if row.experiment]


def composed(name: str) -> DictConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return compose("train", [f"experiment={name}"])


def test_every_row_of_ours_has_its_experiment() -> None:
    named = {row.experiment for _, row in ROWS}
    assert named == {f"paper/{file.stem}" for file in FILES}
    assert {number: len(table.rows) for number, table in TABLES.items()} == {1: 16, 2: 13, 3: 12, 4: 7, 5: 4, 6: 5, 7: 4, 8: 4}


@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_an_experiment_is_what_its_header_says(file: Path) -> None:
    text = file.read_text()
    name = f"paper/{file.stem}"
    cfg = composed(name)
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cost = assembly.experiment_cost(name)
    found = re.search(r"Here: ([\d.]+) GFLOPs a view, ([\d.]+) TFLOPs a test of (\d) clips? x (\d) crops?\.", text)
    assert found, text
    assert float(found[1]) == pytest.approx(cost.gflops, abs=0.006)
    assert (cfg.clip.test_views, cfg.clip.test_crops) == (int(found[3]), int(found[4]))
    assert float(found[2]) == pytest.approx(cost.gflops * cost.views / 1000, abs=0.0006)
    assert f"train experiment={name} pretrained=" in text
    hours = re.search(r"# (\d+) GPU-hours of arithmetic at 50 TFLOP/s: (\d+) epochs of ([\d,]+) videos x (\d) clip", text)
    if hours:
        assert (cfg.trainer.max_epochs, cfg.clip.train_transform.copies) == (int(hours[2]), int(hours[4]))
        clips = int(hours[2]) * int(hours[3].replace(",", "")) * int(hours[4])
        assert int(hours[1]) == pytest.approx(clips * 6 * cost.gflops * 1e9 / 50e12 / 3600, abs=0.51)
    else:
        assert cfg.trainer.max_epochs == 0
        assert "nothing is trained" in text
    assembly.build_optim(cfg)
    for shown, row in ROWS:
        if row.experiment == name:
            kind, _, number = shown.partition(" ")
            assert re.search(rf"{kind}s?[\d, ]* {number}\b", text), "its tables and figures are named"
            assert all(f"{value}" in text for value in (row.top1, row.cost) if value), "and what they say"


@pytest.mark.parametrize(("shown", "row"), ROWS, ids=lambda v: v.experiment.split("/")[1] if isinstance(v, Row) else str(v))
def test_a_row_is_the_configuration_that_it_names(shown: str, row: Row) -> None:
    cfg = composed(str(row.experiment))
    assert cfg.dataset.name == SHOWN[shown].data
    notes = dict(row.notes)
    if "sigma" in notes and notes["sigma"] != "-":
        assert cfg.selection.sigma == float(notes["sigma"])
    expected = {"Rand.": "random", "Atten.": "attention", "GS": "gumbel", "STTS": "learned", "unpruned": "learned"}
    if "method" in notes:
        assert cfg.selection.selector == expected[notes["method"]]
    if "anchor" in notes:
        kinds = {("Rand.", "no"): "random_tokens", ("Rand.", "yes"): "random", ("STTS", "no"): "tokens"}
        kind = kinds.get((row.label, notes["anchor"]), "anchor_features" if notes["score"] == "anchors" else "learned")
        assert cfg.selection.selector == kind
    # T0,4:0.9,0.7 in a label is two slots.
    slots = {
        f"{axis.lower()}{block}": float(ratio)
        for axis, blocks, ratios in re.findall(r"([TS])([\d,]+):([\d.,]+)", row.label)
        for block, ratio in zip(blocks.split(","), ratios.split(","), strict=True)
    }
    if slots:
        assert {name: slot.ratio for name, slot in cfg.selection.slots.items()} == slots


@pytest.mark.reference
def test_official_costs_are_the_reference_s(shared: Path) -> None:
    text = "".join((shared / "reference" / name).read_text() for name in ("mvit.md", "video_swin.md"))
    for _, row in ROWS:
        if row.official and not str(row.experiment).startswith(("paper/mvit_b16_t0_0.5", "paper/mvit_b16_s0_0.5")):
            assert f"{row.official:.2f}" in text, row
    table = {row[0]: row for row in json.loads((shared / "golden/mvit/flops_table.json").read_text())}
    ours = {row.experiment: row.official for _, row in ROWS}
    assert ours["paper/mvit_b16_t0_0.5"] == pytest.approx(table["T0 .5"][2], abs=0.006)
    assert ours["paper/mvit_b16_s0_0.5"] == pytest.approx(table["S0 .5"][6], abs=0.006)


def test_figure_3_has_its_published_points_and_a_random_row_for_each_selection() -> None:
    methods = {how: {row.label for row in FIGURE_3.rows if ("method", how) in row.notes} for how in ("STTS", "Rand.")}
    assert methods["STTS"] == methods["Rand."] and len(methods["STTS"]) == 5
    curves = published_curves()
    assert curves["unpruned"] == [(70.5, 78.4)] and len(curves["STTS"]) == 5
    assert dict(curves["STTS"])[12.1] - dict(curves["Rand."])[12.1] == pytest.approx(5.7)


def test_our_accuracies_are_told_apart_by_data_and_model() -> None:
    def result(experiment: str, top1: float | None, data: str, backbone: str = "mvit_b16") -> dict[str, Any]:
        accuracy = {} if top1 is None else {"top1": top1}
        cost = 0.06 if backbone == "mvit_tiny" else 38.3
        return {"experiment": experiment, "dataset": {"name": data}, "backbone": backbone, "gflops_per_view": cost, **accuracy}

    results = [
        result("a", 0.70, "kinetics400"),
        result("a", 0.72, "kinetics400"),
        result("a", 0.9, "demo", "mvit_tiny"),
        result("b", 0.1, "kinetics400"),
        result("a", None, "kinetics400"),
        {"top1": 1.0},
    ]
    assert [str(found) for found in measured(results, "a", "mvit_b16")] == [
        "71.0 (kinetics400, 2 runs)",
        "90.0 (demo, mvit_tiny)",
    ]
    assert measured(results, "c", "mvit_b16") == []
    small = "paper/mvit_b16_t0_0.6_s4_0.9"
    drawn = figure_curves([result(small, 0.9, "demo", "mvit_tiny"), result(small, 0.7, "kinetics400")])
    published = {f"{method} (paper)" for method in published_curves()}
    assert drawn.keys() - published == {"STTS (demo, mvit_tiny)", "STTS (kinetics400)"}
    assert drawn["STTS (demo, mvit_tiny)"] == [(0.06, 90)], "a run lies at its own cost, not at that of the paper's model"


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES, ids=lambda f: f.stem)
def test_every_experiment_runs_forward_at_224_px(file: Path) -> None:
    cfg = composed(f"paper/{file.stem}")
    torch.manual_seed(0)
    model = assembly.build_untrained(cfg, 10).eval()
    frames, height, width = model.backbone.clip_size
    assert (height, width) == (224, 224)
    with torch.inference_mode():
        logits, kept = model(torch.randn(1, 3, frames, height, width), return_selection=True)
    assert torch.isfinite(logits).all()
    assert set(kept) == set(cfg.selection.slots)
