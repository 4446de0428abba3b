"""scripts/study.py: what it would run is what the training command takes, and no two runs share a folder."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir

from stts_lightning import assembly, run_config
from stts_lightning.analysis.evaluation import Predictions
from stts_lightning.configuration import conf_dir

SCRIPTS = Path(__file__).parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))
study = pytest.importorskip("study", reason="scripts/ is part of the checkout")


def test_every_row_is_a_run_of_its_own_that_can_be_built() -> None:
    sets = study.data_sets(["own=somewhere"])
    found = [row for name, data in sets.items() for row in study.rows(name, data, small=False)]
    assert len({row.folder(Path("root"), 0) for row in found}) == len(found)
    once = {(row.method.label, study.axes(row.kept) if row.kept != "none" else ""): row for row in found}
    assert len(once) > 30
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for row in once.values():
            made = study.job(Path("root"), row, sets[row.data], 3)
            overrides = [given for given in made.overrides if not given.startswith(("pretrained=", "distill."))]
            cfg = compose("train", [*study.COMMON, *overrides, "run_dir=.", "experiment_name=null"])
            run_config.check_numbers(cfg)
            assert cfg.seed == 3 and cfg.trainer.max_epochs == sets[row.data].epochs
            model = assembly.build_body(cfg)
            assert (row.kept == "none") != bool(model.slots.at_block)


def test_the_small_study_has_the_rows_that_the_others_are_compared_with() -> None:
    for name, data in study.data_sets(()).items():
        small = {row.method.label for row in study.rows(name, data, small=True)}
        assert {study.RANDOM, study.FIXED_CHOICE, "oracle", "recipe=learn_selection"} < small
        everything = {row.folder(Path(), 0) for row in study.rows(name, data, small=False)}
        assert {row.folder(Path(), 0) for row in study.rows(name, data, small=True)} < everything


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
    assert study.right(tmp_path).tolist() == [1, 1, 0, 1, 1, 1]
    assert study.right(tmp_path, tmp_path / "val.csv").tolist() == pytest.approx([1, 2 / 3])


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
    assert probe.area(train, test, 0, "official", "t") > 0.95 > 0.65 > probe.area(train, test, 0, "paper", "t")
    inputs, labels = probe.candidates(test[0], "paper", "s")
    assert inputs.shape == (100, 16, 6) and labels.sum(1).tolist() == [2] * 100
