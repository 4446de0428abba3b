"""Numbers of a configuration are checked when it is read."""

from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from stts_lightning import run_config
from stts_lightning.configuration import conf_dir
from stts_lightning.containers import leaves
from stts_lightning.ranges import RangeError, check_ranges, range_of

CONF = Path(__file__).parents[1] / "conf"
COMMANDS = ("train", "evaluate", "predict", "export", "flops", "benchmark", "prepare_data")


def composed(command: str, *overrides: str) -> dict:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return OmegaConf.to_container(compose(command, list(overrides)), resolve=False)  # type: ignore[return-value]


def numbers(content: object) -> list[str]:
    return [key for key, value in leaves(content) if isinstance(value, int | float) and not isinstance(value, bool)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_number_of_a_command_has_a_range(command: str) -> None:
    undeclared = [key for key in numbers(composed(command)) if range_of(key) is None and key != "precision.0"]
    assert not undeclared


@pytest.mark.parametrize("file", sorted(CONF.glob("recipe/*.yaml")) + sorted(CONF.glob("backbone/*.yaml")), ids=lambda f: f.stem)
def test_every_number_of_an_option_has_a_range(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    content = content if "_global_" in file.read_text() else {file.parent.name: content}
    content.pop("defaults", None)
    assert not [key for key in numbers(content) if range_of(key) is None]


REFUSED = [
    ("optim.lr", "nan"),
    ("optim.lr", "inf"),
    ("optim.lr", "-0.001"),
    ("optim.lr", "fast"),
    ("optim.weight_decay", "-1"),
    ("optim.betas", "[0.9,1.0]"),
    ("optim.betas", "[-0.1,0.999]"),
    ("optim.final_lr", "2"),
    ("optim.parts.backbone.lr_scale", "-1"),
    ("optim.parts.backbone.warmup_from", "1.5"),
    ("label_smoothing", "1"),
    ("label_smoothing", "-0.1"),
    ("label_smoothing", "nan"),
    ("selection.sigma", "nan"),
    ("selection.sigma", "-0.1"),
    ("selection.sigma", "inf"),
    ("selection.samples", "1"),
    ("selection.samples", "2.5"),
    ("callbacks.sigma.sigma", "-1"),
    ("trainer.accumulate_grad_batches", "0"),
    ("trainer.max_epochs", "-1"),
    ("trainer.max_epochs", "1.5"),
    ("trainer.max_steps", "-2"),
    ("trainer.limit_train_batches", "0"),
    ("trainer.limit_val_batches", "0.0"),
    ("trainer.limit_test_batches", "-1"),
    ("trainer.gradient_clip_val", "-1"),
    ("trainer.log_every_n_steps", "0"),
    ("trainer.devices", "0"),
    ("trainer.num_nodes", "0"),
    ("clip.train_transform.scale", "[0.5,1.5]"),
    ("clip.train_transform.scale", "[0,1]"),
    ("clip.train_transform.scale", "[0.9,0.5]"),
    ("clip.train_transform.ratio", "[-1,1]"),
    ("clip.train_transform.flip", "1.1"),
    ("clip.stride", "0"),
    ("clip.stride", "2.5"),
    ("clip.test_views", "0"),
    ("clip.test_crops", "2"),
    ("clip.decode_timeout", "0"),
    ("loader.batch_size", "0"),
    ("loader.batch_size", "true"),
    ("loader.num_workers", "-1"),
    ("loader.timeout", "nan"),
    ("backbone.drop_path", "1"),
    ("backbone.dropout", "-0.1"),
    ("augment.mixup", "-0.8"),
    ("augment.erasing", "1.1"),
    ("seed", "-1"),
    ("seed", "1.5"),
    ("callbacks.last.every_minutes", "0"),
    ("callbacks.panels.clips", "0"),
]


@pytest.mark.parametrize(("key", "value"), REFUSED)
def test_numbers_out_of_range_are_refused_by_key_and_value(key: str, value: str) -> None:
    # recipe=official has all parts of the optimiser's settings.
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("train", [f"++{key}={value}", "recipe=paper", "run_dir=x", "experiment_name=null"])
    shown = key.replace(".", r"\.")
    with pytest.raises(RangeError, match=rf"^{shown}.*: (must be|must lie|the first must)"):
        run_config.check_numbers(cfg)


@pytest.mark.parametrize(
    "override",
    ["optim.lr=0", "trainer.max_steps=-1", "trainer.devices=auto", "trainer.devices=-1", "trainer.limit_val_batches=0.5",
     "clip.short_side=crop", "clip.test_crops=3", "trainer.gradient_clip_val=null", "trainer.max_epochs=0",
     "++optim.parts.head.lr_cap=inf", "clip.decode_timeout=null", "++selection.slots.t0.keep=4"],
)  # fmt: skip
def test_numbers_at_the_edge_are_taken(override: str) -> None:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        run_config.check_numbers(compose("train", [override, "run_dir=x", "experiment_name=null"]))


@pytest.mark.parametrize("content", [{"every": [1]}, {"optim": {"lr": [0.1]}}, {"seed": {"a": 1}}], ids=str)
def test_lists_are_no_numbers(content: dict) -> None:
    with pytest.raises(RangeError, match="must "):
        check_ranges(content)


def test_other_numbers_must_be_finite() -> None:
    check_ranges({"callbacks": {"mine": {"x": 3.0, "y": None, "z": "nan"}}})
    with pytest.raises(RangeError, match=r"callbacks\.mine\.x=nan: must be a finite number"):
        check_ranges({"callbacks": {"mine": {"x": float("nan")}}})
