"""A user's own folder of videos, from published weights: what is held out, how fast a new head learns, when a run ends."""

import csv
import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from training.test_commands import command, door

from stts_lightning import create_model
from stts_lightning.backbones.checkpoints import save_weights
from stts_lightning.data.annotations import AnnotationError, Video, VideoList, held_out
from stts_lightning.data.demo import DemoSpec, make_demo
from stts_lightning.data.sources import FolderSource, ListSource
from stts_lightning.errors import UserError
from stts_lightning.run_config import ConfigError
from stts_lightning.training.callbacks import EarlyStop, check_monitors
from stts_lightning.training.metrics import Loss
from stts_lightning.training.optim import OptimSpec, PartSpec, reach

SMALL = ["backbone=mvit_tiny", "selection=t0_0.5", "clip=default", "clip.stride=2", "clip.short_side=crop", "clip.test_views=1",
         "callbacks.progress=null", "callbacks.panels=null", "trainer.accelerator=cpu", "loader.num_workers=0",
         "clip.decoder=pyav", "clip.decode_timeout=null"]  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `own/train/<class>/`, no `val`, and the weights of a model for other classes."""
    folder = tmp_path_factory.mktemp("own_videos")
    make_demo(folder / "demo", DemoSpec(train=5, val=1))
    (folder / "own").mkdir()
    (folder / "demo" / "train").rename(folder / "own" / "train")
    model = create_model("mvit_tiny", None, 400)
    save_weights(model, model.recipe, folder / "published.safetensors")
    return folder


def listed(*counts: int) -> VideoList:
    videos = [Video(Path(f"{label}_{number}.mp4"), label) for label, count in enumerate(counts) for number in range(count)]
    return VideoList(videos, tuple(f"class{label}" for label in range(len(counts))))


def test_of_each_class_the_same_share_is_held_out() -> None:
    train, val = held_out(listed(10, 40, 2), 0.2, 0, "x")
    assert [int((val.labels == label).sum()) for label in range(3)] == [2, 8, 1]
    paths = [{video.path for video in part.videos} for part in (train, val)]
    assert not paths[0] & paths[1] and len(paths[0] | paths[1]) == 52
    again, other = held_out(listed(10, 40, 2), 0.2, 0, "x")[1], held_out(listed(10, 40, 2), 0.2, 1, "x")[1]
    assert list(again.videos) == list(val.videos) != list(other.videos)
    with pytest.raises(AnnotationError, match=r"x: class 'class1' has 1 video; dataset.val_fraction=0.2 needs 2 or more"):
        held_out(listed(10, 1), 0.2, 0, "x")


def test_a_source_says_what_is_missing_and_what_there_is_twice(place: Path, tmp_path: Path) -> None:
    with pytest.raises(
        AnnotationError, match=r"own/val: does not exist; dataset.val_fraction=0.2 holds out a fifth of .*own/train"
    ):
        FolderSource(str(place / "own")).videos("val")
    assert FolderSource(str(place / "own")).splits() == ["train"]
    assert FolderSource(str(place / "own"), val_fraction=0.2).splits() == ["train", "val"]
    assert ListSource(None, "val.csv", test="test.csv").splits() == ["val", "test"]
    with pytest.raises(
        AnnotationError, match=r"demo/train: does not exist; videos are .* in .*demo/train/<class>/; dataset.val_f"
    ):
        FolderSource(str(place / "demo")).videos("train")
    (tmp_path / "val").mkdir()
    with pytest.raises(AnnotationError, match=r"dataset.val_fraction=0.2: there is a folder .*val; give one of them"):
        FolderSource(str(tmp_path), val_fraction=0.2)
    for given in ({"val": None}, {"val": "val.csv", "val_fraction": 0.2}):
        with pytest.raises(AnnotationError, match="dataset.val: give a list; or null, and dataset.val_fraction=0.2"):
            ListSource("train.csv", **given)


def test_class_folders_may_lie_in_the_root_itself(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = FolderSource(str(place / "own" / "train"), val_fraction=0.2)
    assert (len(source.videos("train")), len(source.videos("val"))) == (32, 8)
    caplog.clear()
    for name in ("nothing", "more nothing"):
        (place / "own" / "train" / name).mkdir()
    FolderSource(str(place / "own" / "train"), val_fraction=0.2).videos("train")
    assert f"data folder {place}/own/train: no videos in these folders: 'more nothing', 'nothing'" in caplog.messages
    for name in ("nothing", "more nothing"):
        (place / "own" / "train" / name).rmdir()


def test_a_folder_without_val_trains_and_writes_its_split_down(place: Path) -> None:
    own = [
        *SMALL,
        "dataset=folder",
        f"dataset.root={place / 'own'}",
        "dataset.val_fraction=0.2",
        "pretrained=published.safetensors",
    ]
    run = place / "runs" / "own"
    done = command(place, *own, "head=reset", "recipe=own_videos", "trainer.max_epochs=1", "loader.batch_size=2",
                   "hydra.run.dir=runs/own", base=[])  # fmt: skip
    lists = {split: list(csv.DictReader((run / "split" / f"{split}.csv").read_text().splitlines())) for split in ("train", "val")}
    assert (len(lists["train"]), len(lists["val"])) == (32, 8)
    assert {row["label"] for row in lists["val"]} == set((run / "classes.txt").read_text().split())
    result = json.loads((run / "result.json").read_text())
    assert result["videos"] == 8 and result["dataset"]["tested"] == "val" and result["stopped_early"] == ""
    assert "by which `best` is chosen (no dataset.test)" in " ".join(done.stdout.replace("│", " ").split())
    assert "rates" in done.stdout and "selectors 0.001, backbone 0.0001, head 0.001" in done.stdout
    assert "hardly learns" not in done.stdout + done.stderr
    assert 0 < result["last/val/loss"] < 5
    # The lists are a data set themselves; a test of its own is tested instead.
    as_lists = ["dataset=list", "dataset.train=runs/own/split/train.csv", "dataset.val=runs/own/split/val.csv"]
    (place / "one.csv").write_text("path,label\n" + f"{lists['val'][0]['path']},{lists['val'][0]['label']}\n")
    done = command(place, *SMALL, *as_lists, "dataset.test=one.csv", "pretrained=published.safetensors", "head=reset",
                   "trainer.max_epochs=1", "hydra.run.dir=runs/lists", base=[])  # fmt: skip
    result = json.loads((place / "runs/lists/result.json").read_text())
    assert result["videos"] == 1 and result["dataset"]["tested"] == "test"
    assert result["dataset"]["train_videos"] == 32 and result["dataset"]["val_videos"] == 8
    told = " ".join(done.stdout.replace("│", " ").split())
    assert "head=reset: the new head hardly learns" in told and "recipe=own_videos" in told, "the paper's rate for it is 1e-6"
    # `evaluate` finds the same videos again.
    door("evaluate", place, f"run={run}", "trainer.accelerator=cpu", "callbacks.progress=null")
    assert json.loads((run / "evaluation" / "evaluation.json").read_text())["videos"] == 8


def test_how_far_a_weight_gets_is_what_adamw_moves_it() -> None:
    spec = OptimSpec(
        lr=1e-2, weight_decay=0.0, epochs=4, parts={"head": PartSpec(warmup_epochs=1), "backbone": PartSpec(frozen=True)}
    )
    assert reach(spec, "head", 100) == pytest.approx(1e-2 * (12.5 + 37.5), rel=1e-2), "half of the warm-up, half of the cosine"
    assert reach(spec, "backbone", 100) == 0


def test_a_run_that_gets_no_better_ends_and_says_why(place: Path) -> None:
    own = [
        *SMALL,
        "dataset=folder",
        f"dataset.root={place / 'own'}",
        "dataset.val_fraction=0.2",
        "recipe=scratch",
        "optim.lr=0.0",
    ]
    stop = [
        "callbacks.early_stopping.patience=2",
        "callbacks.early_stopping.monitor=val/loss",
        "callbacks.early_stopping.mode=min",
    ]
    done = command(place, *own, *stop, "selection=none", "trainer.max_epochs=9", "hydra.run.dir=runs/stopped", base=[])
    result = json.loads((place / "runs/stopped/result.json").read_text())
    assert result["steps"] == 3 * 2 and "top1" in result, "one epoch sets the mark, two do not pass it; then it is tested"
    assert result["stopped_early"].startswith("val/loss has not been better than ")
    assert "stops after epoch 3 of 9: val/loss has not been better" in done.stdout
    # Broken off in its test, it goes on with the test, not with the training.
    (place / "runs/stopped/result.json").unlink()
    done = command(place, "resume=runs/stopped", base=[])
    again = json.loads((place / "runs/stopped/result.json").read_text())
    assert (again["steps"], again["stopped_early"]) == (result["steps"], result["stopped_early"])


@pytest.mark.parametrize("key", ["best", "early_stopping"])
def test_a_monitor_that_nothing_measures_is_refused_at_the_start(place: Path, key: str) -> None:
    own = [*SMALL, "dataset=folder", f"dataset.root={place / 'own'}", "dataset.val_fraction=0.2"]
    done = command(place, *own, f"callbacks.{key}.monitor=val/accuracy", "hydra.run.dir=runs/refused", base=[], check=False)
    names = "val/top1, val/top5, val/loss, val/mean_class_accuracy"
    assert done.returncode == 2
    assert f"error: callbacks.{key}.monitor=val/accuracy: is not measured; allowed are {names}" in done.stderr


def test_the_loss_of_a_validation_is_the_mean_over_clips() -> None:
    metric, generator = Loss(), torch.Generator().manual_seed(0)
    logits, labels = torch.randn(7, 4, generator=generator), torch.randint(4, (7,), generator=generator)
    valid = torch.tensor([True] * 6 + [False])
    for part in (slice(0, 4), slice(4, 7)):
        metric.update(logits[part], labels[part], valid[part])
    torch.testing.assert_close(metric.compute(), cross_entropy(logits[:6], labels[:6]))


def test_wandb_needs_no_experiment(place: Path) -> None:
    own = [*SMALL, "dataset=folder", f"dataset.root={place / 'own'}", "dataset.val_fraction=0.2", "logger=wandb", "debug=fast"]
    command(place, *own, "hydra.run.dir=runs/wandb", base=[])
    assert list((place / "runs/wandb").glob("wandb/offline-run-*"))


def test_parts_are_frozen_without_a_plus_and_misspelt_settings_are_named(place: Path) -> None:
    own = [*SMALL, "dataset=folder", f"dataset.root={place / 'own'}", "dataset.val_fraction=0.2", "debug=fast"]
    done = command(place, *own, "optim.parts.backbone.frozen=true", "hydra.run.dir=runs/frozen", base=[])
    assert "backbone frozen, head" in done.stdout
    done = command(place, *own, "optim.parts.backbone.frosen=true", "hydra.run.dir=runs/frosen", base=[], check=False)
    assert "error: optim.parts.backbone.frosen: no such key; allowed are lr_scale, lr_cap" in done.stderr
    assert not (place / "runs/frosen").exists(), "what was refused leaves no folder"


def test_an_error_of_many_lines_is_told_whole() -> None:
    from stts_lightning.console import what_is_wrong

    error = ConfigError(
        "1 validation error for Settings\nrun_tags.1\n  Input should be a valid string\n    For further information"
    )
    assert what_is_wrong(error) == "1 validation error for Settings; run_tags.1; Input should be a valid string"
    lines = [
        "Caught X in worker 0.",
        "Original Traceback (most recent call last):",
        "  File",
        "stts_lightning.errors.UserError: it is rotten",
    ]
    traceback = "\n".join(lines)
    assert what_is_wrong(UserError(traceback)) == "it is rotten"


def test_stopping_is_off_unless_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    stop, trainer = EarlyStop(), SimpleNamespace(training=True, should_stop=False, callbacks=[EarlyStop(monitor="x")])
    with caplog.at_level(logging.INFO):
        stop.on_validation_end(trainer, SimpleNamespace())  # type: ignore[arg-type]
    assert not trainer.should_stop and not caplog.records
    with pytest.raises(UserError, match=r"early_stopping.monitor=x: is not measured; allowed are val/top1"):
        trainers: Any = trainer
        check_monitors(trainers, ["val/top1"])
