"""Imports only go down: the table of floors, kept true."""

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parents[1] / "src" / "stts_lightning"

# What each room may import from the package, besides itself.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "containers": set(),
    "trusted": {"containers", "errors"},
    "ranges": {"containers", "errors"},
    "selection": {"errors"},
    "progress": set(),
    "data": {"errors", "files", "progress"},
    "backbones": {"errors", "selection"},
    "kernels": {"backbones", "selection"},
    "classifier": {"errors", "run_folders", "trusted", "kernels", "backbones", "selection", "data"},
    "run_folders": {"errors", "files"},
    "analysis": {
        "containers", "errors", "files", "progress", "configuration", "run_folders", "classifier", "kernels", "backbones",
        "selection", "data",
    },
    # What a run costs and what a test found is analysis' to say; it knows nothing of training.
    "training": {
        "errors", "files", "run_folders", "classifier", "kernels", "backbones", "selection", "data", "analysis", "progress",
    },
    "overrides": {"run_folders"},
    "configuration": {"selection"},
    "doctor": set(),
    "run_config": {"containers", "errors", "files", "ranges", "run_folders", "trusted", "backbones", "selection"},
    "command_line": {"configuration", "containers", "ranges", "run_folders"},
    "console": {"errors", "run_config", "run_folders"},
    "sweeps": {"errors", "analysis", "overrides", "run_folders"},
    "__main__": set(),
    "assembly": {"run_config", "classifier", "backbones", "selection", "data", "training", "analysis"},
}  # fmt: skip
DOORS = {"train", "evaluate", "predict", "flops", "benchmark", "report", "export", "prepare_data"}
BANNED_NAMES = {"utils", "helpers", "common", "core", "misc", "components"}


def imported_rooms(file: Path) -> set[str]:
    rooms = set()
    for node in ast.walk(ast.parse(file.read_text())):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            module = node.module or ""
            names = [f"{module}.{a.name}" for a in node.names] if module == "stts_lightning" else [module]
        rooms |= {name.split(".")[1] for name in names if name.startswith("stts_lightning.")}
    return rooms


def room_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", sorted(SOURCE.rglob("*.py")), ids=lambda f: str(f.relative_to(SOURCE)))
def test_imports_go_down(file: Path) -> None:
    room = room_of(file)
    if room == "__init__":
        return
    imported = imported_rooms(file) - {room, "__init__"}
    assert not imported & DOORS, "nobody imports a front door"
    if room not in DOORS:
        assert imported <= ALLOWED[room], f"{room} must not import {imported - ALLOWED[room]}"


def test_lower_floors_know_no_lightning_and_no_hydra() -> None:
    for room, banned in {
        "kernels": {"lightning", "hydra", "omegaconf"},
        "selection": {"lightning", "hydra", "omegaconf", "timm"},
        "backbones": {"lightning", "hydra", "omegaconf"},
        "analysis": {"lightning", "hydra", "omegaconf"},
        "training": {"hydra", "omegaconf"},
        "data": {"hydra", "omegaconf"},
    }.items():
        for file in (SOURCE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                assert not {n.split(".")[0] for n in names} & banned, f"{file} imports one of {banned}"


def test_models_know_nothing_of_devices_hooks_and_tracing() -> None:
    """Speed is the business of kernels: a model, a selector and a count of cost are the same everywhere."""
    everywhere = ("is_tracing", "is_compiling", "_hooks", "data_ptr", "._version", "mkldnn", "add_(x", "is_grad_enabled")
    for room, banned in {
        "backbones": (*everywhere[:-1], "device.type"),
        "selection": (*everywhere, "device.type"),
        "analysis": ("is_tracing", "is_compiling", "_hooks", "data_ptr"),
    }.items():
        for file in (SOURCE / room).rglob("*.py"):
            assert not [word for word in banned if word in file.read_text()], file


def test_rooms_are_named_for_what_they_hold() -> None:
    assert not {part for f in SOURCE.rglob("*") for part in (f.stem,)} & BANNED_NAMES
