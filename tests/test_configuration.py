"""Every combination of the shipped options composes and builds, or is refused in one line."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from stts_lightning import assembly, run_folders  # noqa: F401 (the latter's resolvers)
from stts_lightning.conf_dir import conf_dir

CONF = Path(conf_dir())
GROUPS = ("backbone", "selection", "dataset", "recipe", "trainer", "logger")


def options(group: str) -> list[str]:
    return sorted(file.stem for file in (CONF / group).glob("*.yaml") if file.stem != "operator")


COMBINATIONS = list(itertools.product(*map(options, GROUPS)))


def check(combination: tuple[str, ...]) -> str:
    """Compose, and build what needs neither data nor weights; returns what was refused."""
    overrides = [f"{group}={option}" for group, option in zip(GROUPS, combination, strict=True)]
    given = ["dataset.root=data", "dataset.train=a.csv", "dataset.val=b.csv"]
    known = {"folder": given[:1], "list": given[1:], "kinetics400": given[:1], "ssv2": given[:1], "demo": []}
    cfg = compose("train", [*overrides, *known[combination[2]], "run_dir=x"])
    try:
        with assembly.refusals():
            assembly.plain(cfg.optim)
            assembly.build_optim(cfg)
            assembly.build_loader(cfg)
            size = assembly.build_model_shape(cfg)
            assembly.build_data(cfg, size)
            with torch.device("meta"):
                assembly.build_module(cfg, assembly.build_untrained(cfg, 10))
    except assembly.USER_ERRORS as error:
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


def test_some_combinations_of_all_groups() -> None:
    rng = random.Random(0)
    refused = {line for combination in rng.sample(COMBINATIONS, 40) if (line := check(combination))}
    print(refused)


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
