"""What is wrong with a command line, answered in one line before anything is loaded. Light: nothing here imports torch.

Hydra would hint to add an unknown key with `+`, which only fails later, answer an unknown option or flag with a page, and
meet a wrong value of a sweep when the jobs before it have run.
"""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import ConfigCompositionException, HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stts_lightning.configuration import GROUP, conf_dir
from stts_lightning.containers import leaves
from stts_lightning.ranges import RangeError, check_ranges
from stts_lightning.run_folders import CONFIG

ANOTHER_CONFIGURATION = ("-h", "--help", "--hydra-help", "--version", "--info", "-i", "-cd", "-cn", "-cp", "--config-")
"""Flags under which a command composes nothing, or another configuration than its own."""
USUAL = {
    "epochs": "trainer.max_epochs", "lr": "optim.lr", "learning_rate": "optim.lr", "run": "resume", "gpus": "trainer.devices",
    "devices": "trainer.devices", "workers": "loader.num_workers", "weights": "pretrained", "checkpoint": "pretrained",
}  # fmt: skip
"""What other programs call keys that are called otherwise here."""
FLAGS = (
    "--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run", "--multirun", "--shell-completion",
    "--config-path", "--config-name", "--config-dir", "--experimental-rerun", "--info",
)  # fmt: skip
"""Hydra's."""
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--experimental-rerun")
"""Flags that a word follows."""
OPEN = ("trainer", "callbacks", "logger", "backbone")
"""Sections that take keys which the configuration does not name."""
WORDS_TOO = ("compile",)
"""Keys that are true, false, or a word."""
WEIGHTS = (".ckpt", ".pt", ".pth", ".pyth", ".bin", ".safetensors")
"""Suffixes of checkpoints."""
MERGED = ("logger", "callbacks")
"""Groups of which several options make sense together."""
VALUES = 50
"""How many values of a sweep are tried."""


def check(command: str, arguments: Sequence[str]) -> None:
    """Refuse what a command cannot use: a flag, key or option that it does not have, a word or number out of what is allowed.

    Args:
        command: name of its file in `conf/`.
        arguments: of the command line.

    Raises:
        SystemExit: after a line that names what was found and what is nearest.
    """
    if any(argument.startswith(ANOTHER_CONFIGURATION) for argument in arguments):
        return
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        found = _wrong(command, arguments)
    if found:
        print(f"error: {found}", file=sys.stderr)
        raise SystemExit(2)


def _wrong(command: str, arguments: Sequence[str]) -> str:
    """What is wrong with a command line, in one line; empty for nothing, and for what Hydra says well."""
    given = [argument for argument in arguments if argument.startswith("~") or ("=" in argument and argument[0] != "-")]
    if found := _no_option(command, arguments) or _several(arguments) or _no_list(given):
        return found
    for overrides in _jobs(given):
        try:
            cfg = compose(command, overrides)
            found = _no_boolean(command, overrides, cfg) or _no_number(overrides, cfg)
        except (HydraException, OmegaConfBaseException) as error:
            return _said(command, overrides, error)
        if found:
            return found
    return ""


def _jobs(arguments: Sequence[str]) -> Iterator[list[str]]:
    """Overrides as single values: of the first job of a sweep, and with each other value in its place."""
    parser = OverridesParser.create()
    values: list[list[str]] = []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException:  # Hydra says what it is.
            return
        found = [argument]
        if override.is_sweep_override():
            found = list(islice(_values(override), VALUES))
        if found:
            values.append(found)
    first = [one[0] for one in values]
    yield first
    for at, one in enumerate(values):
        yield from ([*first[:at], other, *first[at + 1 :]] for other in one[1:])


def _values(override: Override) -> Iterator[str]:
    with suppress(Exception):  # An interval of a search has no list of values.
        for value in override.sweep_string_iterator():
            yield f"{override.get_key_element()}={value}"


def _no_option(command: str, arguments: Sequence[str]) -> str:
    """What is wrong with a word that is no `key=value`, and no flag of Hydra's. Empty for nothing."""
    for before, argument in zip(["", *arguments], arguments, strict=False):
        flag = argument.startswith("--") and not any(known.startswith(argument.partition("=")[0]) for known in FLAGS)
        bare = "=" not in argument and not argument.startswith(("-", "~")) and before not in WITH_VALUE
        if not flag and not bare:
            continue
        content: Any = OmegaConf.to_container(compose(command))
        meant = _meant(argument, flag, _keys(content))
        hint = f"; did you mean {meant[0]}?" if meant else ""
        return f"{argument or repr(argument)}: options are written key=value{hint} (`stts {command} --help` lists all)"
    return ""


def _meant(argument: str, flag: bool, known: Sequence[str]) -> list[str]:
    """What a word that is no `key=value` was to be: a flag of Hydra's, what lies at a path, or a key. Empty for nothing known."""
    name = argument.partition("=")[0]
    if flag and (flags := get_close_matches(name, FLAGS, n=1, cutoff=0.75)):
        return flags
    if argument and not flag and Path(argument).exists():
        return [f"{key}={argument}" for key in _taking(Path(argument), known)]
    if "/" in argument:
        return []
    key = name.lstrip("-").replace("-", "_")
    return [f"{found}=..." for found in ([key] if key in known else _alike(key, known))]


def _taking(path: Path, known: Sequence[str]) -> list[str]:
    """The key that takes what lies there: a run's folder, weights, or videos."""
    if (path / CONFIG).is_file():
        keys = ("run", "resume")
    elif path.suffix in WEIGHTS:
        keys = ("checkpoint", "pretrained")
    else:
        keys = ("videos", "dataset.root") if path.is_dir() else ("videos",)
    return [key for key in keys if key in known][:1]


def _several(arguments: Sequence[str]) -> str:
    """What is wrong with an option of several values that no sweep was asked for. Empty for nothing."""
    if any(argument in ("-m", "--multirun") or argument.startswith("hydra.mode=") for argument in arguments):
        return ""
    parser = OverridesParser.create()
    for argument in arguments:
        with suppress(HydraException):
            if parser.parse_override(argument).is_sweep_override():
                key, _, value = argument.lstrip("+").partition("=")
                as_list = "" if _is_group(key) else f"; {key}=[{value}] is one value, a list"
                return f"{argument}: several values; with -m each is a run of its own{as_list}"
    return ""


def _is_group(key: str) -> bool:
    """Whether a key chooses one of the files of a folder in `conf/`."""
    return (Path(conf_dir()) / key).is_dir()


def _no_list(overrides: Sequence[str]) -> str:
    """What is wrong with a list of options where one is taken: Hydra would merge them, and the last would win."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if value.startswith("[") and _is_group(key) and key not in MERGED:
            return f"{override}: takes one option; {key}={value.strip('[]')} with -m makes a run of each"
    return ""


def _no_number(overrides: Sequence[str], cfg: DictConfig) -> str:
    """What is wrong with a number among the overrides. Empty for nothing."""
    keys = [override.lstrip("+").partition("=")[0] for override in overrides]
    values: dict[str, Any] = {}
    for key in keys:
        with suppress(OmegaConfBaseException):  # What it refers to is known later.
            value = OmegaConf.select(cfg, key)
            values[key] = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    try:
        check_ranges(values)
    except RangeError as error:
        return str(error)
    return ""


def _no_boolean(command: str, overrides: Sequence[str], cfg: DictConfig) -> str:
    """What is wrong with a word where true or false is wanted: Python would take any word for true. Empty for nothing."""
    for override in overrides:
        key, _, value = override.lstrip("+").partition("=")
        if not re.fullmatch("[A-Za-z_]+", value) or not isinstance(OmegaConf.select(cfg, key), str) or key in WORDS_TOO:
            continue
        others = [other for other in overrides if other != override]
        with suppress(HydraException, OmegaConfBaseException):
            if isinstance(OmegaConf.select(compose(command, others), key), bool):
                return f"{key}={value}: allowed are true, false"
    return ""


def _said(command: str, overrides: Sequence[str], error: Exception) -> str:
    """What is wrong, in one line; empty for what Hydra says well."""
    text = str(error)
    if text.startswith("error: "):
        return text.removeprefix("error: ").splitlines()[0]
    if isinstance(error, MissingConfigException) and error.options:
        group, _, name = (error.missing_cfg_file or "").removesuffix(".yaml").rpartition("/")
        options = sorted(error.options)
        listed = "slots in the paper's notation, as t0_0.6_s4_0.9, or none" if group == GROUP else ", ".join(options)
        return f"{group}={name}: no such option{_nearest(name, options)}; allowed are {listed}"
    if isinstance(error, ConfigCompositionException) and text.startswith("Could not override '"):
        key = text.split("'")[1]
        return _unknown_key(command, overrides, key)
    return ""


def _nearest(name: str, known: Sequence[str]) -> str:
    begun = [one for one in known if name and one.startswith(name)]
    found = begun or get_close_matches(name, known, n=1, cutoff=0.6)
    return f" (did you mean {' or '.join(found)}?)" if found else ""


def _unknown_key(command: str, overrides: Sequence[str], key: str) -> str:
    """An unknown key, and the nearest one of the configuration without the values that are set in it."""
    groups = [override for override in overrides if "." not in override.partition("=")[0]]
    groups = [override for override in groups if override.partition("=")[0].lstrip("+~") != key]
    try:
        content: Any = OmegaConf.to_container(compose(command, groups))
    except (HydraException, OmegaConfBaseException):
        content = OmegaConf.to_container(compose(command))
    known = _keys(content)
    place = key.split(".")[:-1]
    if found := _alike(key, known):
        hint = f"; did you mean {found[0]}?"
    else:
        inside = [full for full in known if full.startswith(".".join(place) + ".")] if place else []
        hint = f"; {'.'.join(place)} has {', '.join(one.rpartition('.')[2] for one in inside)}" if inside else ""
    adds = f"; +{key}=... adds one" if place and place[0] in OPEN and not found else ""
    return f"{key}: no such key{hint} (`stts {command} --help` lists all{adds})"


def _alike(key: str, known: Sequence[str]) -> list[str]:
    """The key that was meant: what other programs call so, one that is spelt nearly so, or of nearly that name elsewhere."""
    usual = USUAL.get(key)
    if usual is not None and usual in known:
        return [usual]
    as_deep = [full for full in known if full.count(".") == key.count(".")]
    if beside := get_close_matches(key, as_deep, n=1, cutoff=0.75):
        return beside
    same_name = {full.rpartition(".")[2]: full for full in sorted(known, reverse=True)}
    return [same_name[found] for found in get_close_matches(key.rpartition(".")[2], list(same_name), n=1, cutoff=0.75)]


def _keys(content: dict[str, Any]) -> list[str]:
    """Full keys of a configuration: of its values and of its groups."""
    found = {key for key, _ in leaves(content, lists=False)}
    return sorted(found | {key.rpartition(".")[0] for key in found if "." in key})
