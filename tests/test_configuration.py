"""Every combination of the shipped options composes and builds, or is refused in one line."""

import itertools
import random
import re
from pathlib import Path

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from lightning.fabric.utilities.exceptions import MisconfigurationException

from stts_lightning import assembly, console, run_config, run_folders  # noqa: F401 (the latter's resolvers)
from stts_lightning.configuration import conf_dir
from stts_lightning.errors import UserError
from stts_lightning.selection.spec import PAPER_SELECTIONS, SelectionSpec

CONF = Path(conf_dir())
GROUPS = ("backbone", "selection", "dataset", "recipe", "trainer", "logger")
GIVEN = {
    "folder": ["dataset.root=data"],
    "list": ["dataset.train=a.csv", "dataset.val=b.csv"],
    "kinetics400": ["dataset.root=data"],
    "ssv2": ["dataset.root=data"],
    "demo": [],
}
"""What has to be said of a data set."""


def options(group: str) -> list[str]:
    return list(PAPER_SELECTIONS) if group == "selection" else sorted(file.stem for file in (CONF / group).glob("*.yaml"))


COMBINATIONS = list(itertools.product(*map(options, GROUPS)))


def check(combination: tuple[str, ...]) -> str:
    """Compose, and build what needs neither data nor weights; returns what was refused."""
    return build([f"{group}={option}" for group, option in zip(GROUPS, combination, strict=True)], combination[2])


def build(overrides: list[str], dataset: str) -> str:
    """Compose, and build what needs neither data nor weights; returns what was refused."""
    cfg = compose("train", [*overrides, *GIVEN[dataset], "run_dir=x"])
    try:
        with console.as_user_errors():
            run_config.to_container(cfg.optim)
            assembly.build_optim(cfg)
            assembly.build_loader(cfg)
            with torch.device("meta"):
                model = assembly.build_body(cfg)
            assembly.build_data(cfg, model.backbone.clip_size)
            assembly.fit_head(model, 10)
            assembly.build_module(cfg, model)
    except (UserError, MisconfigurationException) as error:
        line = str(error)
        assert line and "\n" not in line.strip(), line
        return line
    return ""


@pytest.fixture(autouse=True)
def hydra_is_set_up():  # type: ignore[no-untyped-def]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("dataset", options("dataset"))
@pytest.mark.parametrize("backbone", options("backbone"))
def test_clips_follow_the_backbone_on_every_data_set(backbone: str, dataset: str) -> None:
    """No group breaks another's default: with the default selection and recipe each pair builds."""
    assert build([f"backbone={backbone}", f"dataset={dataset}"], dataset) == ""


@pytest.mark.parametrize("group", GROUPS)
def test_no_option_says_pixels(group: str) -> None:
    """So that another size is enough: `backbone.size` moves all that is cut out of videos."""
    for option in options(group) if group in ("backbone", "dataset", "recipe") else ():
        clip = compose("train", [f"{group}={option}", *GIVEN.get(option, [])]).clip
        assert clip.short_side in (None, "crop") and clip.test_short_side in (None, "crop"), option
    assert build(["backbone=mvit_tiny", "backbone.size=112"], "demo") == ""


def test_published_checkpoints_see_the_frames_they_were_tested_on() -> None:
    """Those of MViT the release's span of time, those of VideoSwin upstream's; a data set of its own kind says otherwise."""
    for door in ("train", "evaluate", "predict"):
        for backbone, sampling in (("mvit_b16", "slowfast"), ("video_swin_b", "parts"), ("video_swin_b_ssv2", "segments")):
            for dataset in (["dataset=kinetics400"], ["dataset=folder"]) if door != "predict" else ([],):
                assert compose(door, [f"backbone={backbone}", *dataset]).clip.sampling == sampling
    assert compose("train", ["backbone=mvit_b16", "dataset=ssv2"]).clip.sampling == "segments"
    assert compose("train", ["backbone=mvit_b16", "dataset=demo"]).clip.sampling == "spread"


@pytest.mark.parametrize(
    ("group", "option"), [(group, option) for group in GROUPS if group != "selection" for option in options(group)]
)
def test_each_option_beside_the_defaults(group: str, option: str) -> None:
    assert build([f"{group}={option}"], option if group == "dataset" else "demo") == ""


def test_some_combinations_of_all_groups() -> None:
    """What is refused is a slot before a block that a small backbone does not have, and selectors alone where there are none."""
    rng = random.Random(0)
    refused = {line for combination in rng.sample(COMBINATIONS, 40) if (line := check(combination))}
    assert all("no block" in line or "nothing would learn" in line for line in refused), refused


@pytest.mark.parametrize("text", ["t0_0.75", "t2_0.4_s6_0.5", "s3_1", "none", *PAPER_SELECTIONS])
def test_selection_takes_any_notation(text: str) -> None:
    for door in ("train", "evaluate", "predict", "flops", "export") if text == "t0_0.75" else ("train",):
        cfg = compose(door, [f"selection={text}", "selection.sigma=0.3"])
        assert SelectionSpec.of(run_config.to_container(cfg.selection)) == SelectionSpec(SelectionSpec.of(text).slots, sigma=0.3)
    if text != "t2_0.4_s6_0.5":
        return
    slot = SelectionSpec.of(text).slots[0].name
    cfg = compose("train", [f"selection={text}", f"selection.slots.{slot}.ratio=0.9", "recipe=official"])
    assert cfg.selection.slots[slot].ratio == 0.9 and cfg.selection.scorer == "official"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("t0_1.5", "selection.slots.t0.ratio=1.5: must lie in (0, 1]"),
        ("t0_0.5_t0_0.6", "selection.slots: t0 named twice"),
        ("t0_0.5_", "Could not find 'selection/t0_0.5_'"),
        ("x0_0.5", "Could not find 'selection/x0_0.5'"),
        ("T0_0.5", "t0_0.6_s4_0.9"),  # It lists what there is.
    ],
)
def test_impossible_notation_is_refused(text: str, message: str) -> None:
    with pytest.raises(HydraException, match=re.escape(message)):
        compose("train", [f"selection={text}"])


@pytest.mark.slow
def test_all_pairs_of_options() -> None:
    """Each two options of different groups together, with the rest at random: what options do to each other, they do in pairs."""
    rng = random.Random(0)
    left = {
        (a, x, b, y)
        for a, b in itertools.combinations(range(len(GROUPS)), 2)
        for x in options(GROUPS[a])
        for y in options(GROUPS[b])
    }
    tried, refused = 0, set()
    while left:
        a, x, b, y = next(iter(left))
        chosen = [rng.choice(options(group)) for group in GROUPS]
        chosen[a], chosen[b] = x, y
        if line := check(tuple(chosen)):
            refused.add(line)
        tried += 1
        left -= {(i, chosen[i], j, chosen[j]) for i, j in itertools.combinations(range(len(GROUPS)), 2)}
    print(f"{tried} combinations, {len(refused)} kinds of refusal: {sorted(refused)}")


@pytest.mark.parametrize("command", ["benchmark", "evaluate", "export", "flops", "predict", "prepare_data", "report"])
def test_help_names_the_groups_that_a_command_has(command: str) -> None:
    defaults = yaml.safe_load((CONF / f"{command}.yaml").read_text())["defaults"]
    keys = [key for entry in defaults if isinstance(entry, dict) for key in entry]
    groups = sorted(key for key in keys if not key.startswith(("override ", "optional ")) and key != "paths")
    footer = yaml.safe_load((CONF / "hydra" / "help" / f"{command}.yaml").read_text())["footer"]
    said = re.findall(r"Groups: (.*); ", footer)
    assert said == ([", ".join(groups)] if groups else [])


@pytest.mark.parametrize("command", ["train", "evaluate", "predict"])
def test_kernels_can_be_turned_off(command: str) -> None:
    for choice, there in (("auto", True), ("none", False)):
        cfg = compose(command, ["backbone=mvit_tiny", "selection=t0_0.5", f"kernels={choice}"])
        model = assembly.build_untrained(cfg, 5)
        assert (model.backbone.kernels is not None) is there


def test_a_compiled_model_uses_no_kernels_and_says_so() -> None:
    cfg = compose("train", ["backbone=mvit_tiny", "selection=t0_0.5"])
    for how in (False, True):
        cfg.compile = how
        assert assembly.build_module(cfg, assembly.build_untrained(cfg, 5)).compiled is how
