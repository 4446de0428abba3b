"""The page of all keys is what its script writes today, and leaves none unexplained."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("configuration_page", ROOT / "scripts" / "configuration_page.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_key_has_a_meaning(script: ModuleType) -> None:
    assert script.unexplained() == []


def test_the_page_is_written_anew_when_the_configuration_changes(script: ModuleType) -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == script.page(), "run scripts/configuration_page.py"


def test_every_key_of_a_training_is_on_it(script: ModuleType) -> None:
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from stts_lightning.configuration import conf_dir
    from stts_lightning.containers import leaves

    text = (ROOT / "docs" / "configuration.md").read_text()
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        content = OmegaConf.to_container(compose("train", ["dataset=folder", "logger=wandb"]))
    for key, _ in leaves(content, lists=False):
        part = key.startswith(("optim.parts.", "selection.slots."))
        told = f"optim.parts.PART.{key.rpartition('.')[2]}" if key.startswith("optim.parts.") else key
        told = f"selection.slots.t0.{key.rpartition('.')[2]}" if key.startswith("selection.slots.") else told
        assert part or key.endswith("_target_") or f"| `{told}` |" in text, key
