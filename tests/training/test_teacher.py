"""Which model `distill.teacher` names."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import save_file

from stts_lightning import assembly, create_model
from stts_lightning.backbones.checkpoints import save_weights
from stts_lightning.classifier import VideoClassifier
from stts_lightning.configuration import conf_dir
from stts_lightning.run_config import ConfigError
from stts_lightning.training.distillation import Teacher

CLIP = torch.randint(0, 256, (2, 3, 16, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def written(folder: Path, selection: Any = None, classes: int = 4) -> tuple[Path, VideoClassifier]:
    torch.manual_seed(1)
    model = create_model("mvit_tiny", selection, classes).eval()
    save_weights(model, model.recipe, folder / "file.safetensors")
    return folder / "file.safetensors", model


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        given = ("backbone=mvit_tiny", "dataset=demo", "selection=t0_0.5_s0_0.5", "run_dir=.")
        return compose("train", [*given, *overrides])


def taught(cfg: DictConfig) -> Teacher | None:
    return assembly.build_teacher(cfg, assembly.build_model(cfg, 4))


@pytest.mark.parametrize("ours", [True, False])
def test_start_is_the_model_that_training_starts_from_without_its_selection(ours: bool, tmp_path: Path) -> None:
    file, model = written(tmp_path)
    if not ours:  # Nothing says how it is built.
        save_file(model.state_dict(), file)
    teacher = taught(configured(f"pretrained={file}", "distill.teacher=start", "distill.temperature=2.0"))
    assert teacher is not None and teacher.temperature == 2.0 and not teacher.model.training
    assert not teacher.model.slots.selectors
    with torch.no_grad():
        torch.testing.assert_close(teacher.model(CLIP), model(CLIP))


@pytest.mark.parametrize(
    ("selection", "overrides", "why"),
    [
        (None, ("pretrained=null",), "it starts with new weights"),
        (None, ("head=reset",), "its head is new"),
        ("t0_0.5", (), "pretrained is a pruned model"),
    ],
)
def test_a_start_that_knows_nothing_teaches_nothing(
    selection: str | None, overrides: tuple[str, ...], why: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file, _ = written(tmp_path, selection)
    assert taught(configured(f"pretrained={file}", "distill.teacher=start", *overrides)) is None
    assert f"distill.teacher=start: not distilled, as {why}" in caplog.text


@pytest.mark.parametrize("selector", ["learned", "random"])
def test_a_pruned_model_teaches_nobody(selector: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, _ = written(tmp_path, {"slots": {"t0": {"ratio": 0.5}}, "selector": selector})
    with pytest.raises(ConfigError, match=r"is a pruned model \(t0\); give an unpruned one"):
        taught(configured(f"distill.teacher={file}"))
    assert taught(configured(f"pretrained={file}", "distill.teacher=start")) is None
    assert "pretrained is a pruned model" in caplog.text


def test_a_file_teaches_the_same_classes_alone(tmp_path: Path) -> None:
    file, _ = written(tmp_path, classes=3)
    with pytest.raises(ConfigError, match=r"distill.teacher=.*is for 3 classes, this model for 4"):
        taught(configured(f"distill.teacher={file}"))
    assert taught(configured()) is None


def test_a_teacher_of_as_many_other_classes_is_refused(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    file, _ = written(tmp_path / "checkpoints")
    cfg = configured(f"distill.teacher={file}")
    learns = assembly.build_model(cfg, 4)
    learns.classes = ("Air drumming", "bowling", "hug", "kick")
    assert assembly.build_teacher(cfg, learns) is not None, "nothing says which classes the file is for"
    (tmp_path / "classes.txt").write_text("air_drumming\nbowling\nhug\nkick\n")
    assert assembly.build_teacher(cfg, learns) is not None, "the same names, written otherwise"
    (tmp_path / "classes.txt").write_text("air_drumming\nbowling\nkick\nhug\n")
    with pytest.raises(ConfigError, match="its class 2 is 'kick', this model's 'hug'"):
        assembly.build_teacher(cfg, learns)


def test_what_is_neither_a_file_nor_the_start_is_named() -> None:
    with pytest.raises(ConfigError, match="distill.teacher=strat: no such file; allowed are the checkpoint of a model"):
        taught(configured("distill.teacher=strat"))
    with pytest.raises(ConfigError, match="distill.teacher=1: no such file"):
        taught(configured("distill.teacher=1"))
