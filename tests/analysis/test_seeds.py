"""Which runs are seeds of one row: those whose whole configurations differ in the seed alone, paths aside."""

import copy
import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from stts_lightning.analysis.page import named, rows, write_report
from stts_lightning.analysis.points import Point, notes, points, ratio_curves, sigma_curves
from stts_lightning.analysis.runs import find_runs, left_out

CONFIG: dict[str, Any] = {
    "run_dir": "", "experiment_name": "demo", "resume": None, "pretrained": None, "head": "keep", "seed": 0, "compile": False,
    "augment": {"mixup": 0.0}, "loader": {"batch_size": 8, "num_workers": 2},
    "clip": {"stride": 2, "train_transform": {"scale": [0.7, 1.0]}}, "backbone": {"name": "mvit_tiny", "frames": 16},
    "selection": {"sigma": 0.1, "scorer": "paper", "slots": {"t0": {"ratio": 0.5}}},
    "dataset": {"root": "/data/k400", "train": "/data/k400/train.csv", "val": "/data/k400/val.csv"},
    "trainer": {"precision": "32-true", "gradient_clip_val": None, "max_epochs": 2, "default_root_dir": ""},
    "callbacks": {"sigma": {"sigma": 0.1, "decay": True}, "last": {"folder": ""}, "progress": {"every_minutes": 5}},
    "optim": {"lr": 0.001}, "logger": {"csv": {"save_dir": ""}}, "paths": {"runs": "runs", "data": "data"},
}  # fmt: skip
RESULT: dict[str, Any] = {
    "top1": 0.5, "backbone": "mvit_tiny", "backbone_choices": {}, "weights": "random", "selection": "t0_0.5",
    "slots": {"t0": "4 of 8 frames"}, "scorer": "paper", "estimator": "monte_carlo, 500 samples", "sigma": 0.1,
    "gflops_per_view": 1.0, "views": 5, "clip": [16, 48, 48], "tokens_kept": 0.5, "steps": 10, "batch_size": 8,
    "dataset": {"name": "k400", "train_hash": "aaaa", "val_hash": "bbbb"}, "precision": "32-true", "clips_per_second": 9.0,
}  # fmt: skip


def configured(folder: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """A whole configuration with some values, by full key, changed; paths as those of a run in this folder."""
    config = copy.deepcopy(CONFIG)
    own = {"run_dir": "", "trainer.default_root_dir": "", "callbacks.last.folder": "/checkpoints", "logger.csv.save_dir": ""}
    for key, value in {**{key: f"{folder}{below}" for key, below in own.items()}, **changes}.items():
        *groups, name = key.split(".")
        node = config
        for group in groups:
            node = node[group]
        if value is ...:
            del node[name]
        else:
            node[name] = value
    return config


def write(folder: Path, config: dict[str, Any] | None = None, seed: int = 0, **result: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    facts = {**RESULT, "seed": seed, **result}
    facts["dataset"] = {**RESULT["dataset"], **result.get("dataset", {})}
    (folder / "config.yaml").write_text(yaml.safe_dump(configured(folder, {"seed": seed, **(config or {})})))
    (folder / "result.json").write_text(json.dumps(facts))
    return folder


def found(folder: Path) -> list[Point]:
    return points(find_runs([folder]))


def table(folder: Path) -> dict[str, dict[str, Any]]:
    group = found(folder)
    names = named(group)
    assert len(set(names)) == len(names)
    return dict(zip(names, rows(group, names), strict=True))


# What a configuration changes, what its result says of it, and the column that shows it.
DIFFERENCES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "precision": ({"trainer.precision": "bf16-mixed"}, {"precision": "bf16-mixed"}, "trainer.precision"),
    "pretraining": ({"pretrained": "/w/k400.pyth"}, {"weights": "/w/k400.pyth (mvit layout, 3 weights loaded)"}, "pretrained"),
    "training list": ({"dataset.train": "/data/ten.csv"}, {"dataset": {"train_hash": "cccc"}}, "dataset.train_hash"),
    "test list": ({"dataset.val": "/data/ten.csv"}, {"dataset": {"val_hash": "cccc"}}, "dataset.val_hash"),
    "gradient clipping": ({"trainer.gradient_clip_val": 1.0}, {}, "trainer.gradient_clip_val"),
    "accumulation": ({"trainer.accumulate_grad_batches": 2}, {}, "trainer.accumulate_grad_batches"),
    "batch size": ({"loader.batch_size": 16}, {"batch_size": 16}, "loader.batch_size"),
    "a nested list": ({"clip.train_transform.scale": [0.08, 1.0]}, {}, "clip.train_transform.scale"),
    "a key of the user's own": ({"dataset.own": "x"}, {}, "dataset.own"),
    "steps": ({}, {"steps": 20}, "steps"),
    "clip": ({}, {"clip": [8, 48, 48]}, "clip"),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("difference", DIFFERENCES)
def test_runs_that_differ_in_more_than_the_seed_are_separate_rows(tmp_path: Path, difference: str, seed: int) -> None:
    config, result, column = DIFFERENCES[difference]
    write(tmp_path / "a")
    write(tmp_path / "b", config, seed, top1=0.9, **result)
    shown = table(tmp_path)
    assert [row["seeds"] for row in shown.values()] == [1, 1]
    assert len({row[column] for row in shown.values()}) == 2, "what differs is a column"
    write_report(find_runs([tmp_path]), tmp_path)
    if difference == "test list":  # No comparison at all: a table of its own for each.
        assert len(list((tmp_path / "report").glob("k400-test-list-*.csv"))) == 2
        return
    with (tmp_path / "report" / "k400.csv").open(newline="") as file:
        assert len({line[column] for line in csv.DictReader(file)}) == 2
    shown_key = column.replace("_", r"\_")
    assert shown_key in (tmp_path / "report" / "k400.tex").read_text()
    assert f">{column}</button>" in (tmp_path / "report.html").read_text()
    assert f"| {column} |" in (tmp_path / "report" / "k400.md").read_text()


def test_runs_that_differ_in_the_seed_alone_are_one_row_wherever_they_lie(tmp_path: Path) -> None:
    write(tmp_path / "a", top1=0.6)
    moved = {"dataset.root": "/mnt/k400", "dataset.train": "/mnt/k400/train.csv", "dataset.val": "/mnt/k400/val.csv"}
    places = {"paths.data": "/mnt", "experiment_name": "other", "resume": "/old", "pretrained": None, "loader.num_workers": 9}
    write(tmp_path / "deep" / "b", {**moved, **places, "callbacks.progress": None}, seed=1, top1=0.7)
    ((name, row),) = table(tmp_path).items()
    assert (name, row["top-1, %"], row["deviation"], row["seeds"]) == ("t0_0.5", 65.0, 7.07, 2)
    assert not [key for key in row if "." in key and key != "name"], "what does not vary is no column"


def test_the_same_weights_in_another_folder_are_the_same_configuration(tmp_path: Path) -> None:
    for seed, place in enumerate(("/a", "/b")):
        weights = {"weights": f"{place}/k400.pyth (mvit layout, 3 weights loaded)"}
        write(tmp_path / f"{seed}", {"pretrained": f"{place}/k400.pyth"}, seed, **weights)
    assert [row["seeds"] for row in table(tmp_path).values()] == [2]
    # The file of a run is called as those of all runs: its folder counts.
    write(tmp_path / "c", {"pretrained": "/runs/one/checkpoints/last.ckpt"}, 2)
    write(tmp_path / "d", {"pretrained": "/runs/two/checkpoints/last.ckpt"}, 3)
    assert {row["pretrained"] for row in table(tmp_path).values()} >= {"one/last.ckpt", "two/last.ckpt"}


def test_a_key_that_an_older_version_lacks_counts_as_its_default(tmp_path: Path) -> None:
    write(tmp_path / "today", {"activation_checkpointing": False})
    write(tmp_path / "older", {"trainer.gradient_clip_val": ...}, seed=1)
    assert [row["seeds"] for row in table(tmp_path).values()] == [2]
    write(tmp_path / "other", {"activation_checkpointing": True}, seed=2)
    assert sorted(row["seeds"] for row in table(tmp_path).values()) == [1, 2]


def test_runs_without_a_readable_configuration_are_rows_of_their_own(tmp_path: Path) -> None:
    for seed in (0, 1):
        (write(tmp_path / f"none{seed}", seed=seed) / "config.yaml").unlink()
        (write(tmp_path / f"broken{seed}", seed=seed) / "config.yaml").write_text("a: [")
        write(tmp_path / f"whole{seed}", seed=seed)
    shown = table(tmp_path)
    assert sorted(row["seeds"] for row in shown.values()) == [1, 1, 1, 1, 2]
    assert "optim.lr" not in next(iter(shown.values())), "what one row does not know is no difference"


def test_a_copied_run_counts_once_and_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", top1=0.6)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    (point,) = found(tmp_path)
    assert (point.seeds, point.top1, point.spread()) == (1, 0.6, None)
    (note,) = notes([point])
    assert "same result" in note and str(tmp_path / "a") in note and str(tmp_path / "b") in note
    assert note in write_report(find_runs([tmp_path]), tmp_path).read_text()


def test_a_repeated_seed_with_another_result_counts_as_the_mean_of_both_and_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a", top1=0.6)
    write(tmp_path / "b", top1=0.7)
    write(tmp_path / "c", top1=0.75, seed=1)
    (point,) = found(tmp_path)
    assert point.seeds == 2 and point.top1 == pytest.approx(0.7)
    assert point.spread() == pytest.approx(0.0707, abs=1e-4)
    (note,) = notes([point])
    assert all(text in note for text in (str(tmp_path / "a"), "60.00 %", str(tmp_path / "b"), "70.00 %", "seed 0"))


def test_names_tell_rows_apart_by_the_settings_that_vary(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", {"trainer.precision": "bf16-mixed"}, precision="bf16-mixed")
    write(tmp_path / "c", {"trainer.precision": "bf16-mixed", "optim.lr": 0.1}, precision="bf16-mixed")
    assert set(table(tmp_path)) == {
        "t0_0.5 trainer.precision=32-true",
        "t0_0.5 trainer.precision=bf16-mixed optim.lr=0.001",
        "t0_0.5 trainer.precision=bf16-mixed optim.lr=0.1",
    }


def test_long_values_are_shortened_where_they_can_still_be_told_apart(tmp_path: Path) -> None:
    for number, digit in enumerate("xy"):
        write(tmp_path / f"{number}", {"dataset.own": f"{'long ' * 20}{digit}{' long' * 20}", "head": f"{digit}{'a' * 90}"})
    shown = table(tmp_path)
    heads = {row["head"] for row in shown.values()}
    assert len(heads) == 2 and all(len(head) < 40 for head in heads)
    assert len({row["dataset.own"] for row in shown.values()}) == 2, "a value is shortened only where it can still be told"


def test_curves_join_runs_of_one_configuration_alone(tmp_path: Path) -> None:
    for precision in ("32-true", "bf16-mixed"):
        for sigma in (0.1, 0.2):
            config = {"selection.sigma": sigma, "callbacks.sigma.sigma": sigma, "trainer.precision": precision}
            write(tmp_path / f"{precision}{sigma}", config, sigma=sigma, precision=precision)
        slots = {"selection.slots": {"t0": {"ratio": 0.25}}, "trainer.precision": precision}
        write(tmp_path / f"{precision} ratio", slots, precision=precision, selection="t0_0.25", slots={"t0": "2 of 8 frames"})
    group = found(tmp_path)
    for lines, places in ((sigma_curves(group), [0.1, 0.2]), (ratio_curves(group)["t0"], [0.25, 0.5])):
        assert len(lines) == 2
        for name, curve in lines.items():
            assert [x for x, _ in curve] == places
            assert len({dict(point.settings)["trainer.precision"] for _, point in curve}) == 1
            assert re.search(r"trainer.precision=(32-true|bf16-mixed)", name)


def evaluation(folder: Path, overrides: list[str] | None = None, **result: Any) -> None:
    """The test of a run: it knows nothing of the training."""
    facts = {**RESULT, "seed": 0, **result}
    facts["dataset"] = {"name": "k400", "val_hash": "bbbb", **result.get("dataset", {})}
    del facts["steps"]
    (folder / ".hydra").mkdir(parents=True)
    (folder / "evaluation.json").write_text(json.dumps(facts))
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(overrides or []))
    (folder / ".hydra" / "config.yaml").write_text("run_dir: x\n")


def test_a_test_that_repeats_the_runs_own_is_no_row_and_another_question_is(tmp_path: Path) -> None:
    run = write(tmp_path / "run")
    checkpoint = {"checkpoint": str(run / "checkpoints/last.ckpt"), "weights": f"{run}/checkpoints/last.ckpt (ours, 3 loaded)"}
    evaluation(run / "evaluation", [f"run={run}", "trainer.accelerator=cpu"], **checkpoint)
    assert len(table(tmp_path)) == 1
    shutil.copytree(run, tmp_path / "elsewhere" / "copy")
    assert not notes(found(tmp_path / "elsewhere")), "the test of a copied run is still its own"
    shutil.rmtree(tmp_path / "elsewhere")
    evaluation(tmp_path / "more views", [f"run={run}", "clip.test_crops=3"], **checkpoint, views=15)
    best = {key: value.replace("last", "best") for key, value in checkpoint.items()}
    evaluation(tmp_path / "best", [f"run={run}", "which=best"], **best)
    evaluation(tmp_path / "bf16", [f"run={run}", "trainer.precision=bf16-mixed"], **checkpoint, precision="bf16-mixed")
    shown = table(tmp_path)
    assert len(shown) == 4
    assert {row["evaluate.checkpoint"] for row in shown.values()} == {"", "best"}
    assert {row["evaluate.precision"] for row in shown.values()} == {"", "bf16-mixed"}
    assert "trainer.precision" not in next(iter(shown.values()))


def test_tests_of_untested_runs_are_seeds_where_their_runs_are(tmp_path: Path) -> None:
    for seed, clipping in ((0, None), (1, None), (2, 1.0)):
        run = write(tmp_path / f"{seed}", {"trainer.gradient_clip_val": clipping}, seed)
        result = json.loads((run / "result.json").read_text())
        del result["top1"]
        (run / "result.json").write_text(json.dumps(result))
        evaluation(run / "evaluation", [f"run={run}"], seed=seed, checkpoint=str(run / "checkpoints/last.ckpt"))
    assert sorted(row["seeds"] for row in table(tmp_path).values()) == [1, 2]
    assert not left_out([tmp_path])


def test_tests_of_checkpoints_without_a_configuration_are_rows_each(tmp_path: Path) -> None:
    for name in ("one", "two"):
        evaluation(tmp_path / name, checkpoint=f"/w/{name}.pyth", weights=f"/w/{name}.pyth (mvit layout, 3 weights loaded)")
    assert {row["pretrained"] for row in table(tmp_path).values()} == {"one.pyth", "two.pyth"}


def test_runs_that_are_not_below_are_named(tmp_path: Path) -> None:
    write(tmp_path / "whole")
    (write(tmp_path / "running") / "result.json").unlink()
    (tmp_path / "running" / "wandb" / "files").mkdir(parents=True)
    (tmp_path / "running" / "wandb" / "files" / "config.yaml").write_text("a: 1")
    (tmp_path / "began").mkdir()
    (tmp_path / "began" / "job.json").write_text("{}")
    contents = {
        "cut": b'{"top1": 0.',
        "binary": b"\xff\xfe\x00",
        "list": b"[1]",
        "short": b'{"top1": 0.5, "dataset": {"name": "k400"}}',
        "nan": json.dumps({**RESULT, "top1": float("nan")}).encode(),
        "text": json.dumps({**RESULT, "top1": "high"}).encode(),
        "untested": json.dumps({key: value for key, value in RESULT.items() if key != "top1"}).encode(),
    }
    for name, content in contents.items():
        (write(tmp_path / name) / "result.json").write_bytes(content)
    lines = left_out([tmp_path])
    assert sorted(Path(line.partition(": ")[0]).name for line in lines) == sorted(["running", "began", *contents])
    assert all("\n" not in line for line in lines)
    runs = find_runs([tmp_path])
    assert [run.folder.name for run in runs] == ["whole"]
    html = write_report(runs, tmp_path, lines).read_text()
    assert all(str(tmp_path / name) in html for name in ("running", "began", *contents))
