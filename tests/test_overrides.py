"""Names of files on the command line reach the command as they are, or the error says how to quote them."""

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from stts_lightning.overrides import for_hydra, in_run_folder

NAMES = [
    "drinking (31)",
    "a=b",
    "x,y",
    "[x]",
    "{x}",
    "视频",
    "видео",
    "it's",
    'say "hi"',
    "both ' and \"",
    "my clip",
    "a:b",
    "100%",
    "$HOME",
    "${oc.env:HOME}",
    "back\\slash",
    "ends\\",
    "it\\'s",
    "~home",
    "a;b",
    "a&b",
    "é",
    "-dash",
    "tab\there",
    "name.mp4",
    "null",
    "a#b",
    "@x",
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["videos", "dataset.root", "+x.y"])
def test_names_of_files_reach_hydra_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).touch()
    for value in (name, str(tmp_path / name)):
        (argument,) = for_hydra([f"{key}={value}"])
        override = OverridesParser.create().parse_override(argument)
        read = OmegaConf.create({"value": override.value()})
        if value == "null":  # Hydra's own word.
            assert read.value is None
        else:
            assert read.value == value


def test_other_arguments_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "-m",
        "--config-dir",
        "my dir",
        "a.b=[1,2]",
        "x=1,2,3",
        "y=range(1,4)",
        "z='quoted (1)'",
        "~key",
        "d={a: 1}",
        "e=",
    ]
    (tmp_path / "1").touch()
    (tmp_path / "a").touch()
    assert for_hydra(arguments) == arguments, "lists are no patterns of names"


@pytest.mark.parametrize("argument", ["videos=no such (1).mp4", "videos=nothing, [here", "x=a(b"])
def test_values_that_hydra_cannot_read_are_refused_and_quoted(argument: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        for_hydra([argument])
    key, _, value = argument.partition("=")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1
    assert f"\"{key}='{value}'\"" in error


def test_slots_are_added_where_a_selection_has_none() -> None:
    assert in_run_folder(["selection.slots.t0.keep=4", "seed=1"]) == ["++selection.slots.t0.keep=4", "seed=1"]
