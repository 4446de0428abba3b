"""Whole runs of a tiny model on clips in memory: what stops them, what a resumed one repeats, how classes are weighed."""

import csv
import logging
import math
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, Dataset

from stts_lightning import create_model
from stts_lightning.analysis.evaluation import Predictions, score
from stts_lightning.data.annotations import Video, VideoList
from stts_lightning.data.dataset import Batch, Failure, collate
from stts_lightning.data.resumable_sampler import EpochOrder, Pick, TrainLoader
from stts_lightning.errors import UserError
from stts_lightning.run_folders import EXIT_REQUEUE
from stts_lightning.selection.reducer import Tokens
from stts_lightning.training import callbacks
from stts_lightning.training import module as training_module
from stts_lightning.training.callbacks import FailureLog, RatioAnnealing, SigmaAnnealing
from stts_lightning.training.chance import LEAST, ChanceWatch
from stts_lightning.training.distillation import Teacher
from stts_lightning.training.metrics import MeanClassAccuracy
from stts_lightning.training.module import ClassificationModule, TrainingError
from stts_lightning.training.optim import OptimSpec
from stts_lightning.training.preemption import ASKING, BestCheckpoint, LastCheckpoint
from stts_lightning.training.step_figures import HostCopy
from stts_lightning.training.testing import run_test

BATCHES, ACCUMULATED = 7, 3
"""Of an epoch, and of a step; the last step of an epoch has one batch alone."""


class Clips(Dataset[Batch]):
    """Clips drawn from their video's number; those of some videos hold NaN."""

    def __init__(self, videos: VideoList, odd: Sequence[int] = ()) -> None:
        self.videos, self.odd = videos, odd

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, item: int | Pick) -> Batch:
        number, draws = (item.video, (item.draw,)) if isinstance(item, Pick) else (item, ())
        clip = torch.randn(1, 3, 4, 32, 32, generator=torch.Generator().manual_seed(number))
        if number in self.odd:
            clip[0, 0, 0, 0, 0] = math.nan
        label = torch.tensor(self.videos.videos[number].label)
        return Batch(clip, label, torch.tensor(number), torch.tensor(True), (), draws)


def listed(split: str, count: int, classes: int) -> VideoList:
    videos = [Video(Path(f"{split}{number}.mp4"), number % classes) for number in range(count)]
    return VideoList(videos, tuple(f"c{number}" for number in range(classes)))


class Data(pl.LightningDataModule):
    """Two videos a batch, an epoch that goes on where a checkpoint left it, and a validation of six videos."""

    def __init__(self, classes: int = 4, odd: Sequence[int] = (), odd_in_training: Sequence[int] = ()) -> None:
        super().__init__()
        self.splits = {"train": listed("train", 2 * BATCHES, classes), "val": listed("val", 6, classes)}
        self.tested, self.classes = self.splits["val"], self.splits["val"].classes
        self.odd, self.odd_in_training = odd, odd_in_training
        self.resumed: dict[str, Any] = {}

    def train_dataloader(self) -> TrainLoader:
        clips = Clips(self.splits["train"], self.odd_in_training)
        self.loader = TrainLoader(clips, EpochOrder(len(clips), 2, seed=0), collate_fn=collate)
        if self.resumed:
            self.loader.load_state_dict(self.resumed)
        return self.loader

    def val_dataloader(self) -> DataLoader[Batch]:
        return DataLoader(Clips(self.splits["val"], self.odd), batch_size=2, collate_fn=collate)

    test_dataloader = val_dataloader

    def state_dict(self) -> dict[str, Any]:
        return self.loader.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.resumed = state_dict


class SignalAt(pl.Callback):
    """Asks the run to end while its n-th batch is trained on."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.current_epoch * BATCHES + batch_idx == self.at:
            os.kill(os.getpid(), signal.SIGTERM)


class SpoilAfter(pl.Callback):
    """Makes the update of one step NaN."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step:
            pl_module.model.head.bias.data.fill_(math.nan)


@pytest.fixture(autouse=True)
def signals_given_back() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def module(classes: int = 4, **options: Any) -> ClassificationModule:
    torch.manual_seed(0)
    model = create_model("mvit_tiny", "t0_0.5", classes, frames=4, size=32, depth=3, dropout=0.1)
    return ClassificationModule(model, OptimSpec(lr=1e-2, weight_decay=0.05, epochs=2), classes, **options)


def trainer(*used: pl.Callback, **options: Any) -> pl.Trainer:
    values = {"accelerator": "cpu", "devices": 1, "max_epochs": 2, "logger": False, "num_sanity_val_steps": 0, **options}
    values |= {"enable_progress_bar": False, "enable_model_summary": False, "use_distributed_sampler": False}
    values.setdefault("enable_checkpointing", any(isinstance(callback, pl.callbacks.Checkpoint) for callback in used))
    return pl.Trainer(callbacks=list(used), **values)


def run(folder: Path, *used: pl.Callback, resume: bool = False, **options: Any) -> ClassificationModule:
    trained, last = module(), LastCheckpoint(str(folder), every_minutes=None, every_n_steps=1)
    built = trainer(SigmaAnnealing(0.5), last, *used, accumulate_grad_batches=ACCUMULATED, limit_val_batches=0, **options)
    built.fit(trained, Data(), ckpt_path=folder / "last.ckpt" if resume else None, weights_only=True)
    return trained


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> ClassificationModule:
    return run(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("at", [0, 1, 2, 4, 6, 8])
def test_asked_to_end_within_an_accumulation_it_ends_after_the_step_and_goes_on_bit_for_bit(
    tmp_path: Path, whole: ClassificationModule, at: int
) -> None:
    with pytest.raises(SystemExit) as ended:
        run(tmp_path, SignalAt(at))
    assert ended.value.code == EXIT_REQUEUE
    epoch, batch = divmod(at, BATCHES)
    steps = math.ceil(BATCHES / ACCUMULATED)
    content = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert content["global_step"] == epoch * steps + batch // ACCUMULATED + 1
    resumed = run(tmp_path, resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_checkpoint_every_step_is_written_once_a_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[int, int]] = []

    def note(self: pl.Trainer, *_: Any, **__: Any) -> None:
        written.append((self.global_step, self.fit_loop.epoch_loop.batch_progress.current.ready))

    monkeypatch.setattr(pl.Trainer, "save_checkpoint", note)
    run(tmp_path, max_epochs=1)
    assert written == [(1, 3), (2, 6), (3, 7)]


class Arrived(pl.Callback):
    """Notes how many tokens come out of a reducer in each training step."""

    def __init__(self) -> None:
        self.out: list[int] = []

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        def note(_: Any, __: Any, output: Any) -> None:
            if pl_module.training:
                self.out.append(output[0].x.shape[1])

        assert isinstance(pl_module, ClassificationModule)
        pl_module.model.slots.reducers["r1"].register_forward_hook(note)


def test_a_ratio_falls_by_a_cosine_and_a_test_keeps_the_last_one() -> None:
    torch.manual_seed(0)
    selection = {"slots": {"r1": 0.5}, "reducer": "evit"}
    model = create_model("vit_tiny", selection, 4, frames=4, size=32, depth=3)
    trained, seen = ClassificationModule(model, OptimSpec(lr=1e-3, weight_decay=0.05, epochs=2), 4), Arrived()
    trainer(RatioAnnealing(0.5), seen, limit_val_batches=0).fit(trained, Data())
    steps, tokens = 2 * BATCHES, 2 * 4 * 4
    shares = [0.5 + 0.5 * (1 + math.cos(math.pi * min(step / (0.5 * steps), 1))) / 2 for step in range(steps)]
    assert seen.out == [min(math.ceil(share * tokens) + 1, tokens) for share in shares]
    assert seen.out[0] == tokens and seen.out[-1] == tokens // 2 + 1, "half, and the fused token"
    # What is tested keeps its ratio, even where the training broke off before.
    model.slots.keep_more(1.0)
    with torch.inference_mode():
        _, kept = model.eval()(torch.zeros(1, 3, 4, 32, 32, dtype=torch.uint8), return_selection=True)
    assert int((kept["r1"].where >= 0).sum()) == tokens // 2


def test_behind_a_ratio_that_falls_no_number_is_fixed() -> None:
    slots = {"r1": {"ratio": 0.5, "selector": "evit"}, "r2": {"ratio": 0.5, "selector": "random"}}
    model = create_model("vit_tiny", {"slots": slots}, 4, frames=4, size=32, depth=3)
    trained = ClassificationModule(model, OptimSpec(lr=1e-3, weight_decay=0.05, epochs=2), 4)
    with pytest.raises(UserError, match="more tokens would reach r2 than it was built for"):
        trainer(RatioAnnealing(0.5), limit_val_batches=0).fit(trained, Data())
    both = create_model("vit_tiny", {"slots": {"r1": 0.5, "r2": 0.5}, "reducer": "evit"}, 4, frames=4, size=32, depth=3)
    trained = ClassificationModule(both, OptimSpec(lr=1e-3, weight_decay=0.05, epochs=2), 4)
    trainer(RatioAnnealing(1.0), limit_val_batches=0, max_steps=4).fit(trained, Data())


def test_a_ratio_that_nothing_follows_is_refused() -> None:
    with pytest.raises(UserError, match=r"callbacks.ratio.until=0.5: no reducer of this model falls to its ratio"):
        trainer(RatioAnnealing(0.5), limit_val_batches=0).fit(module(), Data())
    trainer(RatioAnnealing(0.0), limit_val_batches=0, max_steps=1).fit(module(), Data())


def test_a_fine_tuned_model_that_answers_all_videos_alike_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    trained, data = module(), Data()
    data.splits["val"] = listed("val", LEAST, 4)
    trained.model.fresh, trained.model.new_head = frozenset(), False  # As if a checkpoint had given all weights.
    with torch.no_grad():
        trained.model.head.weight.zero_()
        trained.model.head.bias.copy_(torch.tensor([1.0, 0, 0, 0]))
    trained.optim = OptimSpec(lr=1e-9, weight_decay=0.0, epochs=2)
    with caplog.at_level(logging.WARNING, "stts_lightning"):
        trainer(ChanceWatch()).fit(trained, data)
    (line,) = [record.getMessage() for record in caplog.records if "same answer" in record.getMessage()]
    assert "val/top1 is 26.0%, and 26.0% for the same answer to every video" in line and "selectors may drop" in line


@pytest.mark.parametrize(
    ("top1", "labels", "known", "batches", "told"),
    [
        (0.33, [0] * 25 + [1, 2, 3] * 25, True, 1.0, True),  # 0.25, and two standard deviations of 0.0433.
        (0.34, [0] * 25 + [1, 2, 3] * 25, True, 1.0, False),
        (0.25, [0] * 25 + [1, 2, 3] * 25, False, 1.0, False),  # A new head begins there.
        (0.25, [0] * 25 + [1, 2, 3] * 25, True, 1, False),  # One batch says nothing of all videos.
        (0.25, [0, 1, 2, 3] * 12, True, 1.0, False),  # Neither do so few.
        (1.00, [0] * 100, True, 1.0, False),  # Of one class nothing can be better.
    ],
)
def test_what_can_be_told_from_one_answer_for_all(
    top1: float, labels: list[int], known: bool, batches: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    trained = module()
    trained.model.fresh, trained.model.new_head = frozenset(), not known
    validated: Any = SimpleNamespace(
        limit_val_batches=batches, sanity_checking=False, is_global_zero=True, callback_metrics={"val/top1": torch.tensor(top1)},
        datamodule=SimpleNamespace(splits={"val": SimpleNamespace(labels=np.array(labels))}),
    )  # fmt: skip
    ChanceWatch().on_validation_end(validated, trained)
    assert ("same answer" in caplog.text) is told


def test_sigma_of_a_run_that_is_done_is_the_last_one(tmp_path: Path, whole: ClassificationModule) -> None:
    assert float(whole.model.slots.sigma) == 0
    run(tmp_path)
    assert float(module().model.slots.sigma) > 0
    assert float(run(tmp_path, resume=True).model.slots.sigma) == 0, "nothing was left to do"


def test_a_checkpoint_holds_the_undecodable_files_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    failures, built, checkpoint = FailureLog(), SimpleNamespace(world_size=2), {"callbacks": {}}
    failed = [Failure(name, f"{name}: cannot be decoded") for name in ("a.mp4", "b.mp4")]
    failures.on_train_batch_end(built, None, None, SimpleNamespace(failures=failed[:1], notes=()), 0)  # type: ignore[arg-type]
    assert not failures.counts, "not every step is waited for the other process"
    monkeypatch.setattr(callbacks, "gathered", lambda _, own: [own, (failed, [])])
    failures.on_save_checkpoint(built, module(), checkpoint)  # type: ignore[arg-type]
    assert checkpoint["callbacks"][failures.state_key] == {"counts": {"a.mp4": 2, "b.mp4": 1}}


@pytest.mark.filterwarnings("ignore:.*exists and is not empty.*")
def test_a_moved_folder_keeps_the_best_score(tmp_path: Path) -> None:
    def go(folder: Path, epochs: int, resume: Path | None = None) -> BestCheckpoint:
        best = BestCheckpoint(dirpath=folder, filename="best", monitor="val/mean_class_accuracy", mode="max",
                              auto_insert_metric_name=False, enable_version_counter=False)  # fmt: skip
        built = trainer(best, LastCheckpoint(str(folder)), max_epochs=epochs)
        built.fit(module(), Data(), ckpt_path=resume, weights_only=True)
        return best

    first = go(tmp_path / "old", 1)
    assert first.best_model_score is not None and first.best_model_path == str(tmp_path / "old" / "best.ckpt")
    (tmp_path / "old").rename(tmp_path / "new")
    for folder in ("new", "copy"):
        if folder == "copy":
            (tmp_path / "copy").mkdir()
            for file in (tmp_path / "new").iterdir():
                (tmp_path / "copy" / file.name).write_bytes(file.read_bytes())
        moved = go(tmp_path / folder, 1, tmp_path / folder / "last.ckpt")
        assert moved.best_model_score == first.best_model_score
        assert moved.best_model_path == moved.kth_best_model_path == str(tmp_path / folder / "best.ckpt")
        assert moved.best_k_models == {moved.best_model_path: moved.best_model_score}


def test_a_loss_that_is_no_number_in_the_last_step_stops_before_the_weights() -> None:
    data, trained = Data(odd_in_training=range(2 * BATCHES)), module()
    before = {name: value.clone() for name, value in trained.named_parameters()}
    with pytest.raises(TrainingError, match=r"training loss is nan at step 0, of the videos train\d+.mp4, train\d+.mp4$"):
        trainer(max_epochs=1, limit_train_batches=1).fit(trained, data)
    assert all(torch.equal(value, before[name]) for name, value in trained.named_parameters())


class ReadsLater(HostCopy):
    """A copy that a GPU may not have made yet."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__(tensor)
        self.late, self._arrived = True, SimpleNamespace(synchronize=lambda: None)


class Weights(pl.Callback):
    """Keeps the weights before each batch."""

    def __init__(self) -> None:
        self.before: list[dict[str, Tensor]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.before.append({name: value.detach().clone() for name, value in pl_module.model.named_parameters()})


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("accumulated", [1, ACCUMULATED])
def test_a_bad_step_reaches_no_weights_however_late_it_is_known(
    monkeypatch: pytest.MonkeyPatch, late: bool, accumulated: int
) -> None:
    if late:
        monkeypatch.setattr(training_module, "HostCopy", ReadsLater)
    order = np.random.default_rng((0, 0)).permutation(2 * BATCHES)
    bad = int(order[2 * 3])  # Of the fourth batch.
    trained, weights = module(), Weights()
    step = 3 // accumulated
    with pytest.raises(TrainingError, match=rf"training loss is nan at step {step}, of the videos .*\btrain{bad}.mp4"):
        trainer(weights, max_epochs=1, accumulate_grad_batches=accumulated).fit(trained, Data(odd_in_training=[bad]))
    seen = min((step + 1 + late) * accumulated, BATCHES)
    assert len(weights.before) == seen, "it is known at the end of the step, or of the one after it"
    kept = weights.before[step * accumulated]
    for name, value in trained.model.named_parameters():
        assert torch.equal(value, kept[name]), name


def test_gradients_that_are_no_numbers_stop_a_run_whose_loss_is_one() -> None:
    trained = module()
    trained.model.head.register_full_backward_hook(lambda *_: (torch.full((2, trained.model.backbone.out_dim), math.inf),))
    told = r"gradients are NaN or infinite at step 0, where the training loss is 1.\d+, of the videos train\d+.mp4, train\d+.mp4$"
    with pytest.raises(TrainingError, match=told):
        trainer(max_epochs=1).fit(trained, Data())


@pytest.mark.parametrize("late", [False, True])
def test_a_bad_step_is_in_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: bool) -> None:
    if late:
        monkeypatch.setattr(training_module, "HostCopy", ReadsLater)
    bad = int(np.random.default_rng((0, 0)).permutation(2 * BATCHES)[2 * 3])
    with pytest.raises(TrainingError, match="at step 3"):
        trainer(LastCheckpoint(str(tmp_path), every_n_steps=1), max_epochs=1).fit(module(), Data(odd_in_training=[bad]))
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3


def test_a_checkpoint_knows_nothing_of_the_figures_of_a_step() -> None:
    assert not [name for name in module().state_dict() if "figures" in name]
    assert not module().load_state_dict(module().state_dict()).missing_keys


def test_steps_that_are_logged_are_the_same_in_a_resumed_run(tmp_path: Path) -> None:
    rows = {}
    for name in ("whole", "broken"):
        last = tmp_path / name / "checkpoints"
        for part, callback in enumerate([SignalAt(3), None] if name == "broken" else [None]):
            used = [SigmaAnnealing(0.5), LastCheckpoint(str(last)), *([callback] if callback else [])]
            logger = pl.loggers.CSVLogger(tmp_path / name, "log", part)
            built = trainer(*used, max_epochs=1, logger=logger, log_every_n_steps=2, limit_val_batches=0)
            resumed = last / "last.ckpt" if part else None
            with pytest.raises(SystemExit) if callback else nullcontext():
                built.fit(module(), Data(), ckpt_path=resumed, weights_only=True)
        files = sorted((tmp_path / name / "log").glob("*/metrics.csv"))
        read = [row for file in files for row in csv.DictReader(file.read_text().splitlines()) if row["train/loss"]]
        rows[name] = [(row["step"], row["train/loss"], row["train/top1"], row["sigma"]) for row in read]
    assert [row[0] for row in rows["whole"]] == ["1", "3", "5"]
    assert rows["broken"] == rows["whole"]


@pytest.mark.parametrize(("validated", "saved"), [(True, False), (False, True), (False, False)])
def test_a_last_update_that_is_no_number_is_no_normal_end(tmp_path: Path, validated: bool, saved: bool) -> None:
    last = [LastCheckpoint(str(tmp_path), every_n_steps=1)] if saved else []
    built = trainer(SpoilAfter(BATCHES), *last, max_epochs=1, limit_val_batches=None if validated else 0)
    with pytest.raises(TrainingError, match=f"weights are NaN or infinite after step {BATCHES}: head.bias$"):
        built.fit(module(), Data())
    if saved:
        content = torch.load(tmp_path / "last.ckpt", weights_only=True)
        assert content["global_step"] == BATCHES - 1, "the last checkpoint is the one before"


def test_logits_that_are_no_numbers_end_a_validation_and_a_test_with_the_names_of_the_videos(tmp_path: Path) -> None:
    data: Any = Data(odd=[1, 4])
    told = r"logits are NaN or infinite, of the videos val1.mp4, val4.mp4$"
    with pytest.raises(TrainingError, match=told):
        trainer(max_epochs=1, limit_train_batches=1).fit(module(), data)
    with pytest.raises(TrainingError, match=told):
        run_test(trainer(), module(), data, tmp_path)
    assert not list(tmp_path.iterdir()), "nothing that could be taken for a result"


def test_an_error_names_only_the_first_of_many_videos() -> None:
    data = Data(odd=range(30))
    data.tested = data.splits["val"] = listed("val", 30, 4)
    with pytest.raises(TrainingError, match=r"val9.mp4, and 20 more$"):
        trainer().test(module(), data, verbose=False)


def test_kept_predictions_that_are_no_numbers_have_no_score() -> None:
    logits = np.zeros((3, 1, 4), np.float32)
    logits[1:] = np.nan
    found = Predictions(logits, np.zeros(3, np.int64), np.arange(3), np.array([True, True, False]))
    with pytest.raises(ValueError, match="logits of 1 videos are NaN or infinite; the first is number 1"):
        score(found)


WEIGHTS = (0.5, 1.0, 2.0, 4.0)


def loss_of(trained: ClassificationModule, logits: Tensor, target: Tensor) -> Tensor:
    trained.trainer = trainer()
    return trained._loss(logits, target)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_loss_weighs_classes_as_torch_does(weights: Sequence[float] | None, smoothing: float) -> None:
    trained = module(label_smoothing=smoothing, class_weights=weights)
    logits, label = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 3, 3])
    weight = torch.tensor(weights) if weights else None
    mixed = 0.3 * one_hot(label, 4).float() + 0.7 * one_hot(label.flip(0), 4).float()
    for target in (label, mixed):
        expected = cross_entropy(logits, target, weight=weight, label_smoothing=smoothing)
        torch.testing.assert_close(loss_of(trained, logits, target), expected)
    if weight is not None:
        by_hand = -(logits.log_softmax(-1) * mixed * weight).sum() / 6
        torch.testing.assert_close(loss_of(module(class_weights=weights), logits, mixed), by_hand)
    assert not any("weights" in name for name in trained.state_dict()), "weights are no part of a checkpoint"


def test_weighted_losses_of_two_processes_have_the_mean_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = module(class_weights=WEIGHTS)
    trained.trainer = trainer()
    logits, label = torch.randn(6, 4), torch.tensor([0, 1, 1, 2, 3, 3])
    weight = torch.tensor(WEIGHTS)
    parts = []
    for share in (slice(0, 3), slice(3, 6)):
        mean = (weight[label[:3]].sum() + weight[label[3:]].sum()) / 2
        monkeypatch.setattr(training_module, "mean_of_all", lambda *_, mean=mean: mean)
        parts.append(trained._loss(logits[share], label[share]))
    torch.testing.assert_close(sum(parts) / 2, cross_entropy(logits, label, weight))


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1.0] * 3, "class_weights: 3 values; the data set has 4 classes"), ([1, 0, 1, 1], "class_weights: 0 is not allowed"),
     ([1, math.nan, 1, 1], "class_weights: nan is not allowed")],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(weights: Sequence[float], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        module(class_weights=weights)


def test_mean_class_accuracy_is_of_the_classes_that_occur() -> None:
    metric = MeanClassAccuracy(4)
    guesses = torch.eye(4)[[0, 3, 1, 1]]  # Class 3 is guessed, and does not occur.
    metric.update(guesses, torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.bool))
    assert float(metric.compute()) == pytest.approx(0.75)


def test_validation_logs_mean_class_accuracy_apart_from_top5() -> None:
    """The counts of both are equal after a first batch that is all right."""
    trained = module(6)
    metrics = trained.val_metrics
    valid = torch.ones(2, dtype=torch.bool)
    metrics.update(torch.eye(6)[[0, 1]], torch.tensor([0, 1]), valid)
    metrics.update(torch.eye(6)[[1, 1]], torch.tensor([0, 0]), valid)
    metrics.update(torch.eye(6)[[2, 2]], torch.tensor([2, 2]), ~valid)
    found = {name: float(value) for name, value in metrics.compute().items() if name != "val/loss"}
    assert found == pytest.approx({"val/top1": 0.5, "val/top5": 1.0, "val/mean_class_accuracy": (1 / 3 + 1) / 2})
    assert list(found)[0] == "val/top1"


def test_one_class_is_refused_and_two_are_enough(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data set has 1 class; a classifier needs 2 or more"):
        module(1)
    data, trained = Data(classes=2), module(2)
    built = trainer(max_epochs=1)
    built.fit(trained, data)
    assert {name for name in built.callback_metrics if name.startswith("val/")} == {
        "val/top1",
        "val/loss",
        "val/mean_class_accuracy",
    }
    predictions = run_test(built, trained, data, tmp_path)  # type: ignore[arg-type]
    assert predictions is not None
    found = score(predictions)
    assert "top5" not in found and 0 <= found["top1"] <= 1 and 0 <= found["calibration_error"] <= 1


def test_dynamic_vits_loss_on_tokens_is_that_of_the_tokens_that_are_kept() -> None:
    torch.manual_seed(0)
    teaching = create_model("vit_tiny", None, 4)
    learning = create_model("vit_tiny", {"slots": {"r2": 0.5}, "reducer": "dynamic_vit"}, 4)
    teacher, clip = Teacher(teaching, weight=0.0, tokens=0.5), torch.randn(2, 3, 16, 64, 64)
    teacher.teach(learning)
    learning.train().slots.seed_noise([1, 2])
    logits = learning(clip)
    final = learning.slots.take_final()
    learning.slots.leave_final(final)
    loss = teacher.loss(clip, logits, learning)
    with torch.no_grad():
        x = teaching.backbone.patch_embed(clip).flatten(2).transpose(1, 2) + teaching.backbone.pos_embed
        for block in teaching.backbone.blocks:
            x = block(x, Tokens(x), None, None, False)[0].x
        theirs = teaching.backbone.norm(x)
    kept = [(row, column) for row, column in (final.sizes > 0.5).nonzero().tolist()]
    assert 0 < len(kept) < 2 * 512, "some are dropped"
    expected = sum(float((final.x[place].detach() - theirs[place]).square().mean()) for place in kept) / len(kept)
    assert float(loss.detach()) == pytest.approx(0.5 * expected, rel=1e-4)
    loss.backward()
    assert all(parameter.grad is None for parameter in teaching.parameters())
    assert float(learning.backbone.blocks[0].mlp.fc1.weight.grad.abs().max()) > 0
    with pytest.raises(
        UserError, match=r"distill.tokens=0.5: compares final tokens one by one; it needs the reducer dynamic_vit"
    ):
        teacher.teach(create_model("vit_tiny", {"slots": {"r2": 0.5}, "reducer": "topk"}, 4))


def test_a_teacher_adds_the_divergence_from_its_predictions_and_is_no_part_of_the_model(tmp_path: Path) -> None:
    teaching, clip = module().model, torch.randn(2, 3, 4, 32, 32)
    teacher = Teacher(teaching, weight=0.5, temperature=2.0)
    own = torch.randn(2, 4, requires_grad=True)
    p, q = ((logits / 2).softmax(-1) for logits in (teaching(clip), own))
    expected = 0.5 * 4 * (p * (p / q).log()).sum(-1).mean()
    assert teacher.loss(clip, own).item() == pytest.approx(expected.item(), rel=1e-4)
    trained = module(teacher=teacher)
    assert list(trained.state_dict()) == list(module().state_dict())
    before = {name: value.clone() for name, value in teaching.state_dict().items()}
    trainer(max_epochs=1).fit(trained, Data())
    assert all(torch.equal(value, before[name]) for name, value in teaching.state_dict().items())
    assert not teaching.training
    alone = module()
    trainer(max_epochs=1).fit(alone, Data())
    assert not torch.equal(alone.model.head.weight, trained.model.head.weight), "it is learned from"
