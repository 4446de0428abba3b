"""Which of several random starts new selectors begin with."""

import os
import re
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from warm import run_command

from stts_lightning import create_model
from stts_lightning.backbones.checkpoints import save_weights
from stts_lightning.classifier import VideoClassifier
from stts_lightning.data.annotations import VideoList, read_folder
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.data.dataset import Batch
from stts_lightning.data.demo import DemoSpec, make_demo
from stts_lightning.data.sources import FolderSource
from stts_lightning.data.workers import LoaderOptions
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.optim import OptimSpec
from stts_lightning.training.starts import StartSearch

SLOTS = {"slots": {"t0": 0.5, "s0": 0.25}, "scorer": "official", "start": "small"}
SMALL = {"frames": 4, "size": 32, "depth": 3}


def batch(seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    clip = torch.randint(0, 256, (4, 1, 3, 4, 32, 32), dtype=torch.uint8, generator=generator)
    label = torch.randint(0, 5, (4,), generator=generator)
    return Batch(clip, label, torch.arange(4), torch.ones(4, dtype=torch.bool), (), tuple(range(seed, seed + 4)))


BATCHES = [batch(seed) for seed in (0, 4)]


def module_of(model: VideoClassifier) -> ClassificationModule:
    return ClassificationModule(model, OptimSpec(lr=0.1, weight_decay=0.0, epochs=1), 5)


def started(folder: Path, selection: Any = SLOTS, **options: Any) -> VideoClassifier:
    """A model with new selectors, and other weights from a file."""
    torch.manual_seed(3)
    plain = create_model("mvit_tiny", None, 5, **SMALL)
    with torch.no_grad():
        plain.head.weight.mul_(100)  # A new head's answers hardly differ.
    save_weights(plain, plain.recipe, folder / "plain.safetensors")
    return create_model("mvit_tiny", selection, options.pop("classes", 5), folder / "plain.safetensors", **SMALL, **options)


def search(model: VideoClassifier, draws: int = 8, step: int = 0) -> list[int]:
    """Returns for how many clips it asked."""
    asked: list[int] = []

    def first_batches(clips: int) -> list[Batch]:
        asked.append(clips)
        return BATCHES

    trainer: Any = SimpleNamespace(
        global_step=step, world_size=1, datamodule=SimpleNamespace(first_batches=first_batches),
        strategy=SimpleNamespace(batch_to_device=lambda batch: batch),
        precision_plugin=SimpleNamespace(forward_context=nullcontext),
    )  # fmt: skip
    StartSearch(draws, clips=8, seed=5).on_train_start(trainer, module_of(model))
    return asked


@torch.no_grad()
def loss(model: VideoClassifier) -> float:
    model.eval()
    return float(sum(cross_entropy(model(one.clip[:, 0]), one.label, reduction="sum") for one in BATCHES)) / 8


def test_the_start_with_the_lowest_loss_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model = started(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.train()
    model.dropout.eval()  # Whoever wants a part to stay as in evaluation.
    assert search(model) == [8]
    told = re.search(r"start (\d) of 8 is the best, with a loss of (\S+) \(the first: (\S+), the worst: (\S+)\)", caplog.text)
    assert told
    assert model.training and model.backbone.training and not model.dropout.training
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed and all(re.search(r"slots\.selectors\.[ts]0\.scorer\..*weight", name) for name in changed)

    kept, first, worst = (float(number) for number in told.groups()[1:])
    assert loss(model) == pytest.approx(kept, abs=0.006) and kept < min(first, worst)
    tried: list[float] = []
    for draws in range(1, 9):  # With fewer draws the best of them; with one, the first.
        other = started(tmp_path)
        search(other, draws)
        tried.append(loss(other))
    assert tried == sorted(tried, reverse=True) and tried[-1] == loss(model) < tried[0]
    assert tried[0] == pytest.approx(first, abs=0.006)
    for name, part in model.named_modules():
        if isinstance(part, torch.nn.Linear) and "scorer" in name:
            spread = before[f"{name}.weight"].square().mean().sqrt()
            assert 0.5 < float(part.weight.detach().square().mean().sqrt() / spread) < 2, "a small start stays small"


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"head": "reset"}, "its head is new"),
        ({"classes": 7, "head": "reset"}, "its head is new"),
        (None, "it starts with new weights"),
    ],
)
def test_a_model_that_knows_nothing_keeps_the_first(
    options: dict[str, Any] | None, why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    model = create_model("mvit_tiny", SLOTS, 5, **SMALL) if options is None else started(tmp_path, **options)
    before = model.state_dict()["backbone.slots.selectors.t0.scorer.score.0.weight"].clone()
    assert search(model) == []
    assert f"the model cannot tell 8 starts apart, as {why}; the first is kept" in caplog.text
    assert torch.equal(before, model.state_dict()["backbone.slots.selectors.t0.scorer.score.0.weight"])


def test_what_was_learned_or_has_nothing_to_learn_is_left_alone(tmp_path: Path) -> None:
    learned = started(tmp_path)
    save_weights(learned, learned.recipe, tmp_path / "learned.safetensors")
    known = create_model("mvit_tiny", SLOTS, 5, tmp_path / "learned.safetensors", **SMALL)
    more = create_model(
        "mvit_tiny", {**SLOTS, "slots": {**SLOTS["slots"], "s1": 0.25}}, 5, tmp_path / "learned.safetensors", **SMALL
    )
    fixed = started(tmp_path, {**SLOTS, "selector": "centre"})
    resumed = started(tmp_path)
    for model, step, asked in ((known, 0, []), (fixed, 0, []), (resumed, 1, []), (more, 0, [8])):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        assert search(model, step=step) == asked
        changed = {name.split(".")[3] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == ({"s1"} if asked else set())


def test_the_training_begins_where_it_would_have(tmp_path: Path) -> None:
    make_demo(tmp_path / "own", DemoSpec(train=3, val=1))
    data = VideoDataModule(FolderSource(str(tmp_path / "own")), (4, 32, 32), 4, 1, LoaderOptions(6, 0), seed=2)
    data.setup("fit")
    assert isinstance(data.splits["train"], VideoList) and len(read_folder(tmp_path / "own/train")) == 24
    before = [one.video.tolist() for one in data.train_dataloader()]
    loader = data.train_dataloader()
    looked_at = [one.video.tolist() for one in data.first_batches(13)]
    assert looked_at == before[:3], "whole batches, of 13 clips or more"
    assert data.state_dict()["done"] == 0
    assert [one.video.tolist() for one in loader] == before
    assert [len(list(data.first_batches(clips))) for clips in (1, 6, 1000)] == [1, 1, 4]


def test_two_processes_choose_what_one_does(tmp_path: Path) -> None:
    torch.manual_seed(4)
    plain = create_model("mvit_tiny", None, 8, size=48)
    with torch.no_grad():
        plain.head.weight.mul_(100)
    save_weights(plain, plain.recipe, tmp_path / "plain.safetensors")
    line = [
        sys.executable, "-m", "stts_lightning.train", "experiment=demo", "backbone.size=48", "pretrained=plain.safetensors",
        "dataset.train=3", "dataset.val=1", "loader.batch_size=8", "loader.num_workers=1", "trainer.max_epochs=1",
        "callbacks.progress=null", "callbacks.panels=null", "recipe=finetune", "trainer.limit_train_batches=1",
        "trainer.log_every_n_steps=1", "callbacks.starts.draws=6", "callbacks.starts.clips=16",
    ]  # fmt: skip
    two = ["trainer=ddp", "trainer.devices=2", "trainer.precision=32-true"]
    told: list[str] = []
    for name, trainer in (("one", []), ("two", two)):
        done = run_command(
            [*line, *trainer, "trainer.accelerator=cpu", f"hydra.run.dir=runs/{name}"],
            tmp_path,
            {**os.environ, "OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found = re.findall(r"start \d of 6 is the best, with a loss of .*", (tmp_path / f"runs/{name}/train.log").read_text())
        assert len(found) == 1, "said once"
        told += found
    assert told[0] == told[1]
