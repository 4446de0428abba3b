"""scripts/study.py: what it would run is what the training command takes, and no two runs share a folder."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from stts_lightning import assembly, run_config
from stts_lightning.analysis.evaluation import Predictions
from stts_lightning.configuration import conf_dir

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
plan = pytest.importorskip("study_plan", reason="scripts/ is part of the checkout")
results = pytest.importorskip("study_results")


@pytest.mark.parametrize("backbone", [None, "vit_tiny", "mvit_v2_tiny"])
def test_every_row_is_a_run_of_its_own_that_can_be_built(backbone: str | None) -> None:
    sets = plan.data_sets(["own=somewhere"], backbone=backbone)
    if backbone:
        sets = {"own": sets["own"]}
    found = [row for name, data in sets.items() for row in plan.rows(name, data, small=False)]
    assert len({row.folder(Path("root"), 0) for row in found}) == len(found)
    once = {(row.method.label, plan.axes(row.kept) if row.kept != "none" else ""): row for row in found}
    assert all(row.kept == "none" or plan.axes(row.kept) in row.method.axes for row in found)
    assert len(once) > (10 if backbone else 30)
    assert any(row.kept == plan.REDUCED for row in found) == (backbone == "vit_tiny")
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for row in once.values():
            made = plan.job(Path("root"), row, sets[row.data], 3)
            overrides = [given for given in made.overrides if not given.startswith(("pretrained=", "distill."))]
            cfg = compose("train", [*plan.COMMON, *overrides, "run_dir=.", "experiment_name=null"])
            run_config.check_numbers(cfg)
            assert cfg.seed == 3 and cfg.trainer.max_epochs == sets[row.data].epochs
            model = assembly.build_body(cfg)
            assert (row.kept == "none") == model.slots.empty
            assert cfg.backbone.name == (backbone or "mvit_tiny")


def test_the_small_study_has_the_rows_that_the_others_are_compared_with() -> None:
    for name, data in plan.data_sets(()).items():
        small = {row.method.label for row in plan.rows(name, data, small=True)}
        against = {*plan.RANDOM_CHOICES[:2], plan.FIXED_CHOICES[0], plan.FIXED_CHOICES[2], "oracle"}
        assert {*against, "recipe=learn_selection"} < small
        assert (plan.FIXED_CHOICES[1] in small) == ("t" in plan.axes(data.budgets[-1])), "the middle is a choice of frames"
        everything = {row.folder(Path(), 0) for row in plan.rows(name, data, small=False)}
        assert {row.folder(Path(), 0) for row in plan.rows(name, data, small=True)} < everything


def test_copies_of_one_source_count_as_one_video(tmp_path: Path) -> None:
    for number in range(6):
        (tmp_path / f"{number}.mp4").touch()
        (tmp_path / f"{number}.json").write_text(json.dumps({"embedding": {"source": f"{'ba'[number // 3]}.mp4"}}))
    (tmp_path / "val.csv").write_text("path,label\n" + "".join(f"{number}.mp4,{number // 3}\n" for number in range(6)))
    (tmp_path / "test").mkdir()
    logits = np.eye(2, dtype=np.float32)[[0, 0, 1, 1, 1, 1]][:, None]
    order = np.array([5, 4, 3, 2, 1, 0])
    found = Predictions(logits[order], np.array([0, 0, 0, 1, 1, 1])[order], order, np.ones(6, bool))
    found.save(tmp_path / "test" / "predictions.npz")
    assert results.right(tmp_path).tolist() == [1, 1, 0, 1, 1, 1]
    assert results.right(tmp_path, tmp_path / "val.csv").tolist() == pytest.approx([1, 2 / 3])


def test_videos_of_one_name_in_two_folders_and_videos_that_were_not_embedded_are_apart(tmp_path: Path) -> None:
    listed = ["walk/1_0.mp4", "walk/1_1.mp4", "run/1_0.mp4", "own.mp4"]
    for number, path in enumerate(listed):
        file = tmp_path / path
        file.parent.mkdir(exist_ok=True)
        file.touch()
        truth = {"embedding": {"source": "1.mp4"}} if number < 3 else {}
        file.with_suffix(".json").write_text(json.dumps(truth))
    (tmp_path / "val.csv").write_text("path,label\n" + "".join(f"{path},0\n" for path in listed))
    assert len(set(results.sources(tmp_path / "val.csv"))) == 3


def made(seed: int, method: str, right: list[float], **changed: Any) -> "results.Run":
    """A finished run of demo_both."""
    found, top1, videos = {"t0": 0.5, "s0": 0.25}, float(np.mean(right)), f"{len(right)} videos"
    run = results.Run("demo_both", "t0_0.5_s0_0.25", method, seed, 0.06, top1, found, right, videos)
    return replace(run, **changed)


def test_tables_are_of_runs_that_are_paired_by_seed() -> None:
    runs = [made(0, "random", [0, 0, 1, 0] * 25), made(0, "oracle", [1, 1, 1, 1] * 25), made(1, "oracle", [1, 0, 0, 1] * 25)]
    lines = results.tables(runs).splitlines()
    oracle = next(line for line in lines if line.startswith("| oracle |")).split(" | ")
    # Both seeds count for the accuracy, the one that random has as well for the difference.
    assert oracle[2].startswith("75.0 (") and oracle[3] == "100.0, 50.0" and oracle[4] == "50, 25"
    low, high = map(float, oracle[5].replace("+", "").split(" to "))
    assert 60 < low < 75 < high < 90
    assert "demo_when" not in "".join(lines) and results.tables([]) == ""


def test_a_choice_is_compared_with_the_better_of_two() -> None:
    runs = [made(seed, "oracle", [1.0] * 50) for seed in (0, 1)]
    for label, shares in (("random", (0, 1)), ("random segment, one window", (1, 1)), ("fixed (uniform, centre)", (1,))):
        runs += [made(seed, label, [float(share), 0.0] * 25) for seed, share in enumerate(shares)]
    lines = {line.split(" | ")[0][2:]: line.split(" | ") for line in results.tables(runs).splitlines() if " | " in line}
    # The better random choice is half wrong; of fixed choices there is one, with one seed.
    assert all(cell.startswith("+3") for cell in lines["oracle"][5:])
    assert [cell.strip(" |") for cell in lines["random"][5:]] == ["", ""]
    assert lines["fixed (uniform, centre)"][5] != "" and lines["fixed (uniform, centre)"][6].strip(" |") == ""
    found = [results.better(runs, "demo_both", "t0_0.5_s0_0.25", plan.RANDOM_CHOICES, seeds) for seeds in ({0, 1}, {7})]
    assert found[0].mean([0, 1]) == 50.0 and found[1].runs


def test_a_row_with_more_seeds_is_compared_with_before_a_better_one() -> None:
    runs = [made(seed, results.RECIPE, [1.0] * 50) for seed in (0, 1)]
    runs += [made(seed, plan.FIXED_CHOICES[0], [0.0] * 50) for seed in (0, 1)]
    runs += [made(1, plan.FIXED_CHOICES[1], [1.0, 0.0] * 25)]
    fixed = [results.better(runs, "demo_both", "t0_0.5_s0_0.25", plan.FIXED_CHOICES, seeds) for seeds in ({0, 1}, {1})]
    assert [one.mean({1}) for one in fixed] == [0.0, 50.0]
    line = next(line for line in results.summary(runs).splitlines() if "demo_both" in line)
    assert "+100.0 (" in line


def test_the_summary_averages_videos_of_one_source_over_their_data_sets() -> None:
    labels = (results.RECIPE, "random", plan.FIXED_CHOICES[0], "oracle")
    # ut_a and ut_b are made of the same four videos.
    right = {"ut_a": ([1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]), "ut_b": ([1, 0, 0, 0],) * 4, "wei": ([1, 1],) * 4}
    runs = [
        made(0, label, [float(value) for value in of], data=data, kept="t0_0.5")
        for data, rows in right.items()
        for label, of in zip(labels, rows, strict=True)
    ]
    runs += [made(0, label, [0.0] * 4, data="ut_a", kept="t1_0.5_s0_0.5") for label in labels]  # Not before block 0.
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.summary(runs).splitlines()]
    head, by_name = lines[0], {line[0]: line for line in lines[2:]}
    assert list(by_name) == ["ut_a", "ut_b", "wei", "all real videos"] and all(len(line) == len(head) for line in lines)
    cell = dict(zip(head, by_name["ut_a"], strict=True))
    assert (cell["random"], cell["fixed"], cell["oracle"], cell["recipe, each seed"]) == ("0.0", "25.0", "100.0", "50.0")
    assert cell["unpruned"] == "" and cell["recipe - fixed"].startswith("+25.0 (")
    # Four sources of ut, of which two gain half a point in the mean of both sets, and two of wei, which gain nothing.
    assert dict(zip(head, by_name["all real videos"], strict=True))["recipe - random"].startswith(
        f"+{100 * (0.5 + 0.5) / 6:.1f} ("
    )


def test_the_summary_has_a_line_for_all_folds_of_a_data_set() -> None:
    labels = (results.RECIPE, "random", plan.FIXED_CHOICES[0], "oracle")
    right = {"wei": ([1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]), "wei_fold2": ([1], [1], [0], [1]), "weights": ([1],) * 4}
    runs = [
        made(0, label, [float(value) for value in of], data=data, videos=f"those of {data}")
        for data, rows in right.items()
        for label, of in zip(labels, rows, strict=True)
    ]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in results.summary(runs).splitlines()]
    assert [line[0] for line in lines[2:]] == ["wei", "wei_fold2", "wei, 2 folds", "weights", "all real videos"]
    folds = dict(zip(lines[0], lines[4], strict=True))
    # Over four videos, three of them in the first fold.
    assert (folds["unpruned"], folds["oracle"], folds["random"], folds["fixed"]) == ("", "75.0", "25.0", "25.0")
    assert folds["recipe, each seed"] == "75.0"
    assert folds["recipe - random"].startswith("+50.0 (") and folds["oracle - recipe"].startswith("+0.0 (")


def test_the_chart_has_a_line_for_each_setting_of_the_recipe() -> None:
    chart = pytest.importorskip("study_chart")
    labels = (results.RECIPE, "random", plan.FIXED_CHOICES[0], "oracle")
    runs = [made(seed, label, [1.0, 0.0]) for label in (*labels, "recipe, start=small") for seed in (0, 1)]
    runs += [made(0, label, [1.0, 1.0], data="wei") for label in labels]
    runs += [made(0, label, [1.0, 1.0], data="without") for label in ("recipe, start=small", *labels[1:])]
    runs += [made(0, results.RECIPE, [1.0, 1.0], data="alone")]  # Nothing to compare it with.
    figure = chart.chart(results.settings(runs))
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_yticklabels()] == [
        "demo_both, t0_0.5_s0_0.25 (2 seeds)",
        "wei, t0_0.5_s0_0.25 (1 seed)",
    ]
    places = {(float(x), float(y)) for mark in axes.lines if mark.get_marker() != "None" for x, y in mark.get_xydata()}
    assert {place for place in places if place[0] == place[0]} == {(50.0, 0.0), (100.0, 1.0)}, "the unpruned model is not there"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(chart.MARKS)


def test_a_seed_comes_from_one_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was stored stays until the seed is run here: runs of two places do not start from the same model."""
    stored = [made(0, "random", [1.0]), made(1, "random", [1.0]), made(0, "random", [1.0], data="other")]
    monkeypatch.setattr(results, "RUNS", tmp_path / "runs.jsonl")
    results.RUNS.write_text("".join(json.dumps(asdict(run)) + "\n" for run in stored))
    sets = {"demo_both": plan.data_sets(())["demo_both"]}
    assert results.collect(tmp_path, sets, range(2)) == sorted(stored, key=lambda run: run.key)

    row = plan.Row("demo_both", "t0_0.5_s0_0.25", plan.METHODS[0])
    folder = row.folder(tmp_path, 1)
    (folder / "test").mkdir(parents=True)
    logits = np.eye(2, dtype=np.float32)[[0, 1]][:, None]
    Predictions(logits, np.array([0, 0]), np.array([0, 1]), np.ones(2, bool)).save(folder / "test" / "predictions.npz")
    result = {
        "top1": 0.5, "gflops_per_view": 0.06, "slots": {"t0": {}}, "last/selection/t0/found": 0.25,
        "calibration_error": 0.125, "dataset": {"val_hash": "1 videos"},
    }  # fmt: skip
    monkeypatch.setattr(results, "read_result", lambda _: result)
    assert not any(run.method == "oracle" for run in results.collect(tmp_path, sets, range(2)))  # Not finished.
    (folder / "result.json").touch()
    found = results.collect(tmp_path, sets, range(2))
    assert [run.key for run in found] == sorted([stored[0].key, stored[2].key, ("demo_both", row.kept, "oracle", 1)])
    assert next(run for run in found if run.method == "oracle").right == [1, 0]

    # Unless they do start from the same one.
    first = plan.plain_folder(tmp_path, "demo_both", 1)
    first.mkdir()
    (folder / "test").rename(first / "test")
    (first / "result.json").touch()
    (folder / "result.json").unlink()
    for right, error, stays in (([1.0, 0.0], None, True), ([1.0, 0.0], 0.1, False), ([1.0, 1.0], None, False)):
        unpruned = made(1, results.PLAIN, right, kept="none", videos="1 videos", calibration=error)
        results.RUNS.write_text("".join(json.dumps(asdict(run)) + "\n" for run in (*stored, unpruned)))
        found = results.collect(tmp_path, sets, range(2))
        assert (stored[1] in found) == stays and [run.right for run in found if run.method == results.PLAIN] == [[1.0, 0.0]]

    # Other test videos.
    result["dataset"] = {"val_hash": "2 videos"}
    assert {run.data for run in results.collect(tmp_path, sets, range(2)) if run.videos != "2 videos"} == {"other"}
    assert all(run.videos != "2 videos" for run in results.collect(tmp_path, sets, range(2), without={first}))


def test_a_run_that_was_configured_otherwise_is_noticed(tmp_path: Path) -> None:
    """As the recipe changes between versions, and a finished folder with its name would count as the new one."""
    data = plan.data_sets(())["demo_both"]
    one = plan.job(tmp_path, plan.Row("demo_both", "t0_0.5_s0_0.25", plan.Method("recipe", recipe="learn_selection")), data, 0)
    one.folder.mkdir(parents=True)
    assert plan.changed(one) == "it has no config.yaml"
    cfg = plan.composed(one)
    OmegaConf.save(cfg, one.folder / "config.yaml", resolve=True)
    assert plan.changed(one) == ""
    cfg.optim.parts.backbone.lr_scale, cfg.run_dir, cfg.seed = 0.1, "/elsewhere", 1
    OmegaConf.save(cfg, one.folder / "config.yaml", resolve=True)
    assert plan.changed(one) == "optim.parts.backbone.lr_scale: 0.1, now 0.4"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--only demo_bth", "no data set is called demo_bth"),
        ("--data somewhere", "give a name and a folder"),
        ("--data own=nowhere", "nowhere has no train.csv"),
        ("--budgets half", "give slots and ratios"),
        ("--seeds 0", "1 or more"),
        ("--rows nothing", "no row is called nothing"),
    ],
)
def test_what_cannot_be_run_is_refused(
    given: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    study = pytest.importorskip("study")
    monkeypatch.setattr(sys, "argv", ["study.py", "runs", *given.split()])
    with pytest.raises(SystemExit):
        study.parsed()
    assert said in capsys.readouterr().err


def test_a_probe_sees_what_the_description_of_a_frame_holds() -> None:
    """Something bright and something dark beside it: nothing in the mean of the frame, much in its maximum."""
    probe = pytest.importorskip("probe_selection")
    generator = torch.Generator().manual_seed(0)

    def drawn(clips: int) -> tuple[torch.Tensor, torch.Tensor]:
        grid = torch.randn(clips, 8, 4, 4, 6, generator=generator)
        truth = torch.full((clips, 8, 4), torch.nan)
        rows, frames = torch.arange(clips), torch.randint(8, (clips,), generator=generator)
        grid[rows, frames, 0, 0, 0] += 6
        grid[rows, frames, 0, 1, 0] -= 6
        truth[rows, frames] = torch.tensor([0.0, 0.0, 0.5, 0.25])
        return grid, truth

    train, test = {0: drawn(200)}, {0: drawn(100)}
    paper, official, deviation = (probe.probed(train, test, 0, scorer, "t") for scorer in ("paper", "official", "deviation"))
    assert min(official[0], deviation[0]) > 0.95 > 0.65 > paper[0]
    assert min(official[1], deviation[1]) > 0.9 > 0.7 > paper[1], "half of the frames hold the action"
    inputs, labels = probe.candidates(test[0], "paper", "s")
    assert inputs.shape == (100, 16, 6) and labels.sum(1).tolist() == [2] * 100
