"""What the documents show is run as it is written there."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from stts_lightning import create_model
from stts_lightning.backbones.layouts import LAYOUTS
from stts_lightning.backbones.registry import _FACTORIES
from stts_lightning.data.decode import write_mp4
from stts_lightning.selection.reducers import REDUCERS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.S | re.M)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name)
def test_python_of_a_page_runs_as_written(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("mvit_tiny", None, 3)
    checkpoint = tmp_path / "runs" / "RUN" / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True)
    torch.save({"state_dict": model.state_dict(), "model": dict(model.recipe)}, checkpoint)
    (checkpoint.parent.parent / "classes.txt").write_text("walk\nrun\nsit\n")
    write_mp4(tmp_path / "video.mp4", np.zeros((48, 72, 96, 3), np.uint8))
    monkeypatch.chdir(tmp_path)
    backbones, reducers, layouts = dict(_FACTORIES), dict(REDUCERS), list(LAYOUTS)
    try:
        for code in blocks(page):
            exec(compile(code, str(page), "exec"), {"__name__": "page"})
    finally:  # What a page registers is gone after it.
        for table, before in ((_FACTORIES, backbones), (REDUCERS, reducers)):
            table.clear()
            table.update(before)
        LAYOUTS[:] = layouts


def test_own_backbone_is_short() -> None:
    (code,) = (code for code in blocks(ROOT / "docs" / "extending.md") if "class Plain(Backbone)" in code)
    body = code[code.index("class Plain") : code.index("@register_backbone")]
    assert len([line for line in body.splitlines() if line.strip()]) < 25


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_pictures_are_there(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_command_of_the_documents_is_one_that_there_is() -> None:
    doors = {path.stem for path in (ROOT / "src" / "stts_lightning").glob("*.py") if "@hydra.main" in path.read_text()}
    used = {name for page in PAGES for name in re.findall(r"-m stts_lightning\.(\w+)", page.read_text())}
    assert used == doors, "each command has a page"
