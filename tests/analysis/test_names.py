"""Names of files, folders, classes and data sets as file systems allow them: nothing is lost, and nothing taken for markup."""

import csv
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stts_lightning.analysis import charts
from stts_lightning.analysis.page import latex, markdown, write_report
from stts_lightning.analysis.results import printable, read_result, write_result
from stts_lightning.analysis.runs import find_runs
from stts_lightning.data.manifest import Entry
from stts_lightning.data.windows import Window, WindowBatch
from stts_lightning.prepare_data import show
from stts_lightning.report import compare
from stts_lightning.training.partial import PartialResults, read_records
from stts_lightning.training.predicting import Predictor, overlay_names

LATIN = os.fsdecode(b"caf\xe9")
ODD = ["[x]", "[bold]", "a,b", "a|b", "_c_", "d;e", "$f$", "50%&#{~^\\", LATIN]

RESULT: dict[str, Any] = {
    "top1": 0.5, "backbone": "mvit_tiny", "selection": "t0_0.5", "slots": {"t0": "4 of 8 frames"}, "scorer": "paper",
    "estimator": "monte_carlo, 500 samples", "sigma": 0.1, "gflops_per_view": 1.0, "views": 5, "clip": [16, 48, 48], "seed": 0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run in a folder of each odd name, of a data set of that name, with a setting of that name."""
    for name in ODD:
        run = tmp_path / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(json.dumps({"head": name}))
        write_result(run / "result.json", {**RESULT, "dataset": {"name": "one"}})
    other = tmp_path / "runs" / "of an odd data set"
    other.mkdir()
    write_result(other / "result.json", {**RESULT, "dataset": {"name": f"[y] {LATIN} $z$"}})
    return tmp_path / "runs"


def test_reports_hold_odd_names_whole(folder: Path) -> None:
    page = write_report(find_runs([folder]), folder, [f"{LATIN}: no result"])
    html = page.read_text(encoding="utf-8")
    for name in ("[x]", "[bold]", "a,b", "a|b", "_c_", "caf\\udce9"):
        assert f"head={name}" in html and f"/{name}</code>" in html, name
    with (folder / "report" / "one.csv").open(newline="", encoding="utf-8") as file:
        assert {line["head"] for line in csv.DictReader(file)} == {printable(name) for name in ODD}
    lines = (folder / "report" / "one.md").read_text(encoding="utf-8").splitlines()
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, "as many cells in every line"
    tex = (folder / "report" / "one.tex").read_text(encoding="utf-8")
    assert r"\$f\$" in tex and "\n[" not in tex and r"50\%\&\#\{\textasciitilde{}\textasciicircum{}\textbackslash{}" in tex
    assert len(list((folder / "report").glob("*.csv"))) == 2


def test_the_printed_report_shows_brackets(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    compare([folder], folder)
    out = capsys.readouterr().out
    assert "head=[x]" in out and "head=[bold]" in out and "[y] caf\\udce9" in out
    out.encode()


def test_data_sets_whose_names_make_one_file_name_keep_their_tables(tmp_path: Path) -> None:
    for number, name in enumerate(("a b", "a-b", "a/b")):
        (tmp_path / str(number)).mkdir()
        write_result(tmp_path / str(number) / "result.json", {**RESULT, "dataset": {"name": name}})
    html = write_report(find_runs([tmp_path]), tmp_path).read_text()
    assert len(list((tmp_path / "report").glob("*.csv"))) == 3
    anchors = re.findall(r'<details id="([^"]+)"', html)
    assert len(set(anchors)) == 3


def test_markdown_and_latex_escape_what_they_take_for_markup() -> None:
    row = {"name": "[a](b) *c* _d_ t0_0.5 `e` <f>", "GFLOPs a view": 1.0, "Pareto": ""}
    text = markdown([row])
    assert r"\[a\](b) \*c\* \_d\_ t0_0.5 \`e\` \<f>" in text
    table = latex([{"name": "[x]", "top-1, %": 50.0, "Pareto": ""}], "a_b [c]")
    assert "{[}x] & 50" in table


def test_results_with_names_that_are_no_utf_8_are_read_back(tmp_path: Path) -> None:
    write_result(tmp_path / "result.json", {"undecodable_files": {LATIN: 1}})
    assert read_result(tmp_path) == {"undecodable_files": {LATIN: 1}}
    assert printable(LATIN) == "caf\\udce9" and printable("日本 [x]") == "日本 [x]"


@pytest.mark.parametrize("name", ["$a$", LATIN, "[b]", "_c"])
def test_figures_show_odd_names(name: str) -> None:
    with charts.style():
        assert printable(name) in charts.svg(charts.confusion(np.eye(2, dtype=np.int64), [name, "d"], name))


def test_overlays_of_equal_stems_are_files_each() -> None:
    videos = [Path(name) for name in ("x/a.mp4", "y/a.mp4", "a_1.mp4", "z/a.avi", "u/x/a.mov", "b.mp4", "x_a_0.mp4")]
    names = overlay_names(videos)
    # With their folder, which is often their class; with a number where that is the same as well.
    assert names == ["x_a_0_", "y_a", "a_1", "z_a", "x_a_4", "b", "x_a_0"]
    assert overlay_names([Path("A.mp4"), Path("a.mp4")])[1] != "a", "some file systems take them for one"


def test_predictions_of_odd_names_are_written_and_read_back(tmp_path: Path) -> None:
    videos = [Path(f"{LATIN}.mp4"), Path("[x].mp4")]
    predictor = Predictor(tmp_path, videos, ["[red]", LATIN], 2, 0, True)
    trainer: Any = SimpleNamespace(
        world_size=1, global_rank=0, is_global_zero=True, strategy=SimpleNamespace(barrier=lambda _: None)
    )
    module: Any = SimpleNamespace(model=SimpleNamespace(slots=SimpleNamespace(sizes={})))
    predictor.partial = PartialResults(tmp_path / "partial", "")
    predictor.partial.open()
    predictor.on_predict_start(trainer, module)
    windows = tuple(Window(number, 0, 1, 0.0, 1.0, None, None, "") for number in range(2))
    predictor.on_predict_batch_end(trainer, module, (torch.zeros(2, 1, 2), []), WindowBatch(windows, None), 0)
    predictor.on_predict_end(trainer, module)
    found = read_records(predictor.partial)
    assert [found[number]["video"] for number in "01"] == [str(video) for video in videos]
    assert {one["class"] for one in found["0"]["top"]} == {"[red]", LATIN}


def test_prepare_data_prints_names_as_they_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stts_lightning.prepare_data.manifest_hash", lambda _: "abc")
    entries = [Entry(f"/{name}.mp4", "broken", warning="[red]odd[/red]") for name in ("[x]", LATIN)]
    monkeypatch.setenv("COLUMNS", "250")
    show({"[val]": entries}, tmp_path / "[bold].csv")
    out = capsys.readouterr().out
    for text in ("[x].mp4 [red]odd[/red]", "caf\\udce9.mp4", "[val]", "[bold].csv"):
        assert text in out
    out.encode()
