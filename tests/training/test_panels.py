"""A selector that has collapsed is named; one that looks at its clips is not."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stts_lightning.classifier import create_model
from stts_lightning.selection.selector import Selection
from stts_lightning.training.module import ClassificationModule
from stts_lightning.training.optim import OptimSpec
from stts_lightning.training.panels import SelectionPanels, score_entropy


def test_entropy_of_scores() -> None:
    assert torch.allclose(score_entropy(torch.ones(2, 3, 8)), torch.ones(2, 3))
    assert float(score_entropy(torch.tensor([0.0, 0, 1, 0]))) == pytest.approx(0, abs=1e-5)
    assert float(score_entropy(torch.tensor([0.0, 0.5, 0.5, 0]))) == pytest.approx(0.5, abs=1e-5)


def validate(
    choices: list[list[int]], selection: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[SelectionPanels, dict[str, float]]:
    """A validation in which each video of a row was chosen so."""
    model = create_model("mvit_tiny", {"slots": {"t0": {"keep": 2, "selector": selection}}}, 5, size=64)
    module = ClassificationModule(model, OptimSpec(lr=1, weight_decay=0, epochs=1), 5)
    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log_dict", lambda values, **_: logged.update(values))
    trainer: Any = SimpleNamespace(
        sanity_checking=False, is_global_zero=True, current_epoch=1, max_epochs=9, world_size=1, loggers=[]
    )
    panels = SelectionPanels("unused", every_n_epochs=5)
    for _ in range(2):
        for first, chosen in enumerate(choices):
            count = len(chosen) // 2
            record = Selection("t0", torch.tensor(chosen).view(count, 2), None, torch.rand(count, 8), None)
            videos = torch.arange(count) + 100 * first
            # The action is in grid frame 1, of all videos but the last.
            truth = torch.full((count, 1, 16, 4), torch.nan)
            truth[:-1, :, 2:4] = torch.tensor([0.0, 0.0, 1.0, 1.0])
            batch = SimpleNamespace(video=videos, valid=torch.ones(count, dtype=torch.bool), truth=truth)
            panels.on_validation_batch_end(trainer, module, {"t0": record}, batch, first)
        panels.on_validation_epoch_end(trainer, module)
    return panels, logged


def test_collapsed_selector_is_reported(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, logged = validate([[1, 2] * 10, [1, 2] * 10], "learned", monkeypatch)
    assert "selector t0 has collapsed: it keeps [1, 2] of 20 of 20 validation clips" in caplog.text
    assert logged["selection/t0/choices"] == 1 / 20 and logged["selection/t0/changed"] == 0


def test_no_alarm_without_cause(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        _, logged = validate([[1, 2, 3, 4, 1, 5, 2, 6] * 5], "learned", monkeypatch)
        # A fixed choice is what a uniform selector is for; and nine clips may agree by chance.
        validate([[1, 2] * 20], "uniform", monkeypatch)
        validate([[1, 2] * 9], "learned", monkeypatch)
    assert "collapsed" not in caplog.text
    assert logged["selection/t0/choices"] == 4 / 20
    assert logged["selection/t0/found"] == 10 / 19, "every other clip keeps frame 1"
