"""scripts/study.py: what it would run is what the training command takes, and no two runs share a folder."""

import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from stts_lightning import assembly, run_config
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
