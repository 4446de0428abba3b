"""What a command line becomes before Hydra reads it. Light: nothing here imports torch."""

import glob
import hashlib
import os
import re
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from stts_lightning.run_folders import folder_name


def _value(arguments: Sequence[str], key: str) -> str:
    """What a command line gives for a key, as Hydra reads it; empty if nothing, or if Hydra cannot read it."""
    argument = next((a for a in arguments if a.startswith(f"{key}=")), "")
    with suppress(HydraException, OmegaConfBaseException):
        if argument:
            return str(OmegaConf.create({"value": OverridesParser.create().parse_override(argument).value()}).value or "")
    return ""


def _has_folder(arguments: Sequence[str]) -> bool:
    return any(a.startswith("hydra.run.dir=") for a in arguments)


def _with(arguments: Sequence[str], *more: str) -> list[str]:
    """Arguments with overrides more, beside those that are there: Hydra's parser wants all of them in one place."""
    at = next((n for n, a in enumerate(arguments) if "=" in a and not a.startswith("-")), len(arguments))
    return [*arguments[:at], *more, *arguments[at:]]


_PLAIN = re.compile(r"[\w./:@%+*?-]+", re.ASCII)


def for_hydra(arguments: list[str]) -> list[str]:
    """Arguments as Hydra reads them: names of existing files in quotes, and slots added to selections that lack them.

    Raises:
        SystemExit: with a line that says how to quote, for another value that Hydra cannot read.
    """
    parser = OverridesParser.create()
    arguments = [_quoted(argument, parser) for argument in arguments]
    # A slot is not a key of every selection, nor a setting of a part one of every recipe. What builds them judges the rest.
    open_ended = ("selection.slots.", "optim.parts.")
    return [f"++{argument}" if argument.startswith(open_ended) else argument for argument in arguments]


def _quoted(argument: str, parser: OverridesParser) -> str:
    key, equals, value = argument.partition("=")
    if not equals or argument.startswith("-") or not value or _PLAIN.fullmatch(value) or value[0] in "'\"":
        return argument
    # Square brackets are a list of values as well: they are no pattern here.
    if os.path.exists(value) or (re.search(r"[*?]", value) and glob.glob(value)):
        return f"{key}={_in_quotes(value)}"
    try:
        parser.parse_override(argument)
    except HydraException as error:
        print(
            f"error: {argument}: Hydra cannot read this value; put quotes around it, inside those of the shell: "
            f'"{key}={_in_quotes(value)}"',
            file=sys.stderr,
        )
        raise SystemExit(2) from error
    return argument


def _in_quotes(value: str) -> str:
    """A value as Hydra reads it back: a backslash before a quote, and one before an interpolation, are escapes there."""
    quote = '"' if "'" in value and '"' not in value else "'"
    text = re.sub(rf"(\\*){quote}", lambda found: 2 * found[1] + "\\" + quote, value).replace("${", "\\${")
    return quote + re.sub(r"\\+$", lambda found: 2 * found[0], text) + quote


def in_run_folder(arguments: list[str]) -> list[str]:
    """Arguments with Hydra's output folder set to the run that `resume=` names, so that a resumed run makes no second one."""
    arguments = for_hydra(arguments)
    run = _value(arguments, "resume")
    if not run or not Path(run).is_dir() or _has_folder(arguments):
        return arguments
    return _with(arguments, f"hydra.run.dir={_in_quotes(run)}", "hydra.output_subdir=null")


_SAME_ANSWER = (
    "run=", "checkpoint=", "predictions=", "views=", "missing=", "trust=", "loader.", "callbacks.", "logger", "trainer", "paths.",
    "hydra", "-",
)  # fmt: skip
"""Overrides of a test that say where it runs, or ask something else of the same logits."""


def for_run(arguments: list[str], subfolder: str | None = None, by_question: bool = False) -> list[str]:
    """Arguments of a command that uses a run or a checkpoint.

    A value of the model or its data may belong to an option that only the run or the file knows of: it is added by force
    and judged when that is read. The output goes to a folder in the run that `run=` names, if the command has one; with
    `by_question`, another question than the run's own test has a folder of its own, called after it.
    """
    arguments = for_hydra(arguments)
    run = _value(arguments, "run")
    if not run and not _value(arguments, "checkpoint") and subfolder is None:
        return arguments
    known_later = ("backbone.", "selection.", "dataset.")
    arguments = [f"++{a}" if a.startswith(known_later) else a for a in arguments]
    if subfolder is None or not run or not Path(run).is_dir() or _has_folder(arguments):
        return arguments
    asked = sorted(a.lstrip("+") for a in arguments if "=" in a and not a.lstrip("+").startswith(_SAME_ANSWER))
    name = f"{subfolder}_{folder_name(','.join(asked))}" if by_question and asked else subfolder
    return _with(arguments, f"hydra.run.dir={_in_quotes(f'{run}/{name}')}")


def for_sweep(arguments: list[str]) -> list[str]:
    """Arguments of a sweep with a folder that follows from them: the same command again goes on where it broke off.

    How jobs are launched has no part in the name. A job's folder is called by what is swept alone. A search of
    `hparams_search=` is a sweep without `-m`.
    """
    flags = ("-m", "--multirun")
    kept = [a for a in arguments if a not in flags]
    swept = len(kept) < len(arguments) or any(a.startswith("hparams_search=") for a in kept)
    # A job of a search says hydra.mode=RUN: it is no search of its own.
    if not swept or any(a.startswith("hydra.mode=") for a in kept):
        return arguments
    folder = []
    if not any(a.startswith("hydra.sweep.dir=") for a in kept):
        lasting = sorted(a for a in kept if not a.startswith(("hydra.launcher", "hydra/launcher")))
        name = hashlib.sha256("\n".join(lasting).encode()).hexdigest()[:8]
        folder = [f"hydra.sweep.dir=${{paths.runs}}/sweep_{name}"]
    return ["-m", *_with(kept, *folder, *_names_of_jobs(kept))]


def _names_of_jobs(arguments: Sequence[str]) -> list[str]:
    """What leaves the overrides that all jobs share out of the jobs' names."""
    parser = OverridesParser.create()
    fixed: list[str] = []
    for argument in arguments:
        try:
            parsed = parser.parse_override(argument)
        except HydraException:  # Hydra will say what is wrong with it; or it is an option's value.
            continue
        if not parsed.is_sweep_override() and parsed.key_or_group:
            fixed.append(parsed.key_or_group)
    return [f"hydra.job.config.override_dirname.exclude_keys=[{','.join(fixed)}]"] if fixed else []
