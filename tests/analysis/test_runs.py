"""Run folders as a comparison: seeds together, the front, the page in a real browser."""

import csv
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from warm import LONGEST

from stts_lightning.analysis import charts
from stts_lightning.analysis.page import latex, lines_of, named, rows, write_report
from stts_lightning.analysis.points import pareto, points, ratio_curves, sigma_curves
from stts_lightning.analysis.runs import find_runs

CHROMIUM = next((found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None)


def write(folder: Path, config: str = "key: <script>alert(1)</script>\n", **changes: Any) -> None:
    result = {
        "top1": 0.5, "top5": 0.9, "backbone": "mvit_tiny", "backbone_choices": {}, "selection": "t0_0.5",
        "slots": {"t0": "4 of 8 frames"}, "scorer": "paper", "estimator": "monte_carlo, 500 samples", "sigma": 0.1,
        "gflops_per_view": 1.0, "gflops": 5.0, "views": 5, "clip": [16, 48, 48], "tokens_kept": 0.5, "seed": 0, "steps": 10,
        "batch_size": 8, "dataset": {"name": "demo", "val_hash": "a"}, "clips_per_second": 10.0, "measured_on": "a machine",
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps({**result, **changes}))
    (folder / "config.yaml").write_text(config)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for seed, top1 in enumerate((0.6, 0.7)):
        write(tmp_path / f"a{seed}", seed=seed, top1=top1)
    write(tmp_path / "sigma", sigma=0.2, top1=0.55)
    write(tmp_path / "ratio", selection="t0_0.25", slots={"t0": "2 of 8 frames"}, gflops_per_view=0.6, top1=0.66)
    write(tmp_path / "worse", selection="t0_0.75", slots={"t0": "6 of 8 frames"}, gflops_per_view=1.4, top1=0.61)
    write(tmp_path / "plain", selection="none", slots={}, gflops_per_view=2.0, top1=0.8)
    write(tmp_path / "other", dataset={"name": "other <b>/x</b>", "val_hash": "z"})
    write(tmp_path / "untested")
    broken = json.loads((tmp_path / "untested" / "result.json").read_text())
    del broken["top1"]
    (tmp_path / "untested" / "result.json").write_text(json.dumps(broken))
    (tmp_path / "a0" / "panels").mkdir()
    (tmp_path / "a0" / "metrics.csv").write_text(
        "epoch,step,sigma,train/loss,val/loss,val/top1,selection/t0/entropy\n0,1,0.1,2.1,,,\n0,2,0.05,1.9,2.0,0.3,0.9\n"
    )
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "a0" / "panels" / "epoch_001.png")
    return tmp_path


def test_seeds_are_one_point_and_the_front_is_right(folder: Path) -> None:
    group = [point for point in points(find_runs([folder])) if point.dataset == "demo"]
    names = named(group)
    assert sorted(names) == ["plain", "t0_0.25", "t0_0.5 sigma 0.1", "t0_0.5 sigma 0.2", "t0_0.75"]
    by_name = dict(zip(names, group, strict=True))
    assert by_name["t0_0.5 sigma 0.1"].top1 == pytest.approx(0.65)
    assert by_name["t0_0.5 sigma 0.1"].spread() == pytest.approx(0.0707, abs=1e-4)
    assert {names[number] for number in pareto(group)} == {"plain", "t0_0.25"}
    assert {names[number] for number in pareto(group, "clips_per_second")} == {"plain"}
    (curve,) = sigma_curves(group).values()
    assert [x for x, _ in curve] == [0.1, 0.2]
    ((_, curve),) = ratio_curves(group)["t0"].items()
    assert [x for x, _ in curve] == [0.25, 0.5, 0.75]


def test_the_front_compares_what_is_comparable_and_each_method_has_its_line(tmp_path: Path) -> None:
    write(tmp_path / "plain", selection="none", slots={}, gflops_per_view=2.0, top1=0.8)
    for number, (ratio, cost, learned, drawn) in enumerate(((0.25, 0.6, 0.7, 0.4), (0.5, 1.0, 0.75, 0.6))):
        keeps, kept = f"{2 + 2 * number} of 8 frames", {"selection": f"t0_{ratio}", "gflops_per_view": cost}
        write(tmp_path / f"l{number}", "a: 1", slots={"t0": keeps}, top1=learned, **kept)
        write(tmp_path / f"r{number}", "a: 2", slots={"t0": f"{keeps} (random)"}, top1=drawn, **kept)
    write(tmp_path / "oracle", "a: 3", selection="t0_0.25", slots={"t0": "2 of 8 frames (oracle)"}, gflops_per_view=0.6, top1=0.9)
    write(tmp_path / "one", "a: 4", selection="t0_0.3", slots={"t0": "2 of 8 frames"}, gflops_per_view=0.6, top1=0.65, views=1)
    mixed = {"t0": "4 of 8 frames (uniform)", "s1": "8x8 of 16x16, 9 anchors (centre)"}
    write(tmp_path / "mixed", "a: 5", selection="t0_0.5_s1_0.25", slots=mixed, gflops_per_view=0.9, top1=0.3)
    group = points(find_runs([tmp_path]))
    front = {(point.selection, point.method, point.views) for n, point in enumerate(group) if n in pareto(group)}
    assert front == {("none", "", 5), ("t0_0.25", "learned", 5), ("t0_0.5", "learned", 5), ("t0_0.3", "learned", 1)}
    assert {point.method for point in group} == {"", "learned", "random", "oracle", "uniform + centre"}
    names = named(group)
    figure = charts.accuracy_against(group, "gflops", names, lines_of(group), names, "a title")
    drawn = {str(line.get_label()): line for line in figure.axes[0].lines if not str(line.get_label()).startswith("_")}
    assert set(drawn) == {
        *(f"mvit_tiny, {how}, T0, 5 views" for how in ("learned", "random", "oracle")), "mvit_tiny, unpruned, 5 views",
        "mvit_tiny, uniform + centre, T0 S1, 5 views", "mvit_tiny, learned, T0, 1 view", "Pareto front",
    }  # fmt: skip
    assert drawn["mvit_tiny, learned, T0, 5 views"].get_xydata().tolist() == [[0.6, 70.0], [1.0, 75.0]]
    level = [line for line in figure.axes[0].lines if line.get_linestyle() == ":"]
    assert [float(line.get_ydata()[0]) for line in level] == [80.0], "the unpruned model's accuracy"


def test_learned_choices_that_differ_in_more_than_ratios_have_lines_of_their_own(tmp_path: Path) -> None:
    kept = [("t0_0.5", {"t0": "4 of 8 frames"}), ("t0_0.25", {"t0": "2 of 8 frames"})]
    for number, (selection, slots) in enumerate(kept):
        write(tmp_path / f"paper{number}", f"a: {number}", selection=selection, slots=slots)
        write(tmp_path / f"ways{number}", f"b: {number}", selection=selection, slots=slots, ways_to_learn="windows=clip")
    write(tmp_path / "space", "c: 1", selection="s0_0.5", slots={"s0": "11x11 of 16x16, 4 anchors"})
    write(tmp_path / "longer", "c: 2", steps=20)
    write(tmp_path / "plain", selection="none", slots={}, scorer="", estimator="")
    group = points(find_runs([tmp_path]))
    lines = lines_of(group)
    assert len(lines) == len(group) == 7
    assert sorted(set(lines)) == [
        "mvit_tiny, learned, S0, 10 steps", "mvit_tiny, learned, T0, 10 steps", "mvit_tiny, learned, T0, 20 steps",
        "mvit_tiny, learned, T0, windows=clip, 10 steps", "mvit_tiny, unpruned",
    ]  # fmt: skip
    assert all(lines.count(f"mvit_tiny, learned, T0, {more}10 steps") == 2 for more in ("", "windows=clip, "))


def test_runs_with_other_pretraining_or_lists_are_separate_points(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b", dataset={"name": "demo", "val_hash": "b"})
    write(tmp_path / "c", steps=20)
    write(tmp_path / "d", "optim: {lr: 0.1}")
    write(tmp_path / "e", "optim: {lr: 0.2}")
    write(tmp_path / "repeated", "optim: {lr: 0.2}")
    group = points(find_runs([tmp_path]))
    names = named(group)
    assert len(group) == len(set(names)) == 5
    assert [len(point.runs) for point in group] == [1] * 5, "the same seed once more is no other seed"
    assert {"t0_0.5 20 steps"} < set(names) and any("optim.lr=0.2" in name for name in names)
    assert find_runs([tmp_path, tmp_path / "a"]) == find_runs([tmp_path])


def test_settings_that_a_model_has_no_use_for_make_no_other_point(tmp_path: Path) -> None:
    unpruned = {"selection": "none", "slots": {}, "scorer": "", "estimator": ""}
    merged = {"selection": "r0_0.5", "slots": {"r0": "256 of 512 tokens (tome)"}}
    for number, reducer in enumerate(("tome", "random")):
        config = f"selection: {{reducer: {reducer}, sigma: 0.{number}}}"
        write(tmp_path / f"plain_{reducer}", config, **unpruned)
        write(tmp_path / f"frames_{reducer}", f"selection: {{reducer: {reducer}}}")
        write(tmp_path / f"merged_{reducer}", f"selection: {{reducer: {reducer}}}", **merged)
    group = points(find_runs([tmp_path]))
    assert sorted(point.selection for point in group) == ["none", "r0_0.5", "r0_0.5", "t0_0.5"]


def test_data_sets_of_one_name_and_other_tests_are_kept_apart(tmp_path: Path) -> None:
    write(tmp_path / "a", dataset={"name": "folder", "val_hash": "aaaaaaaaaa"})
    write(tmp_path / "b", dataset={"name": "folder", "val_hash": "bbbbbbbbbb"})
    write(tmp_path / "c", dataset={"name": "folder", "val_hash": "aaaaaaaaaa", "test_hash": "cccccccccc", "tested": "test"})
    write(tmp_path / "d", dataset={"name": "other", "val_hash": "aaaaaaaaaa"})
    names = [point.dataset for point in points(find_runs([tmp_path]))]
    assert names == ["folder (test list aaaaaaaa)", "folder (test list bbbbbbbb)", "folder (test list cccccccc)", "other"]


def test_names_do_not_cover_points_or_each_other(tmp_path: Path) -> None:
    for number in range(6):
        write(tmp_path / f"r{number}", f"a: {number}", selection=f"t0_0.{number + 2}", gflops_per_view=1 + 0.02 * number,
              top1=0.5 + 0.01 * number)  # fmt: skip
    group = points(find_runs([tmp_path]))
    names = named(group)
    figure = charts.accuracy_against(group, "gflops", names, lines_of(group), names, "a title")
    figure.canvas.draw()
    axes = figure.axes[0]
    boxes = [text.get_window_extent() for text in axes.texts]
    spots = [axes.transData.transform((point.gflops, 100 * point.top1)) for point in group]
    assert len(boxes) == 6
    assert not any(box.contains(*spot) for box in boxes for spot in spots)
    assert not any(one.overlaps(other) for n, one in enumerate(boxes) for other in boxes[:n])


def test_tables_in_markdown_and_latex(folder: Path) -> None:
    page = write_report(find_runs([folder]), folder, ["job_7: error: out of memory"])
    with (folder / "report" / "demo.csv").open(newline="") as file:
        table = {row["name"]: row for row in csv.DictReader(file)}
    assert table["t0_0.5 sigma 0.1"]["top-1, %"] == "65.0" and table["t0_0.5 sigma 0.1"]["seeds"] == "2.0"
    text = (folder / "report" / "demo.tex").read_text()
    assert "launches" not in text, "nobody measured them here"
    assert r"t0\_0.5 sigma 0.1 & 1 &" in text and r"\textbf{plain}" in text
    assert text.count("{") == text.count("}")
    assert "| plain | 2 | 80 |" in (folder / "report" / "demo.md").read_text()
    for name in ("gflops", "throughput", "sigma", "ratio_t0"):
        assert (folder / "report" / f"demo_{name}.png").stat().st_size > 5000
    html = page.read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert" in html and "<b>/x" not in html
    assert "job_7: error: out of memory" in html
    assert not re.search(r"""(src|href)=["'](https?:)?//""", html), "nothing is fetched"
    assert "data:image/jpeg;base64," in html


def test_what_a_test_measured_is_in_the_table_in_latex(tmp_path: Path) -> None:
    write(tmp_path / "a", latency_ms=8.5, clips_per_second_of_8=120.0, peak_megabytes=26.7, launches=91)
    group = points(find_runs([tmp_path]))
    text = latex(rows(group, named(group)), "a table")
    assert "ms of a clip & clips/s, 8 at a time & peak MB of 8 & launches" in text
    assert all(figure in text for figure in ("8.5", "120", "26.7", "91"))


def test_latex_escapes() -> None:
    from stts_lightning.analysis.points import Point
    from stts_lightning.analysis.runs import Run

    point = Point("d", "b", "t0_0.5", "T0: 4 of 8", "", 0.1, 1.0, 1, (), (Run(Path("r"), {"top1": 0.5}),))
    assert r"a\_b \& 50\%" in latex(rows([point], ["a_b & 50%"]), "x_y")


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    (folder / "plain" / "config.yaml").write_text("key: another\n")
    page = write_report(find_runs([folder]), folder)
    own = tmp_path_factory.mktemp("browser")
    # After the page's own script: sort by top-1 twice (falling), and follow a point of the figure.
    probe = """<script>
      const heads = [...document.querySelectorAll("th button")];
      const accuracy = heads.find(head => head.textContent.startsWith("top-1"));
      accuracy.click(); accuracy.click();
      const links = [...document.querySelectorAll("svg a")].map(a => a.getAttribute("xlink:href") || a.getAttribute("href"));
      location.hash = links[0].slice(1);
      const filter = document.querySelector(".tools input"), seen = () =>
        [...document.querySelector("tbody").rows].filter(row => !row.hidden).map(row => row.cells[0].textContent.trim());
      filter.value = "sigma t0_0.5"; filter.dispatchEvent(new Event("input"));
      const filtered = seen();
      filter.value = ""; filter.dispatchEvent(new Event("input"));
      const compare = document.querySelector(".compare"), before = compare.disabled;
      const boxes = [...document.querySelectorAll("tbody input")];
      boxes[0].click(); boxes[2].click(); compare.click();
      const beside = [...document.querySelectorAll(".beside article h4")].map(head => head.textContent);
      setTimeout(() => {
        document.title = JSON.stringify({
          order: [...document.querySelector("tbody").rows].map(row => row.cells[0].textContent.trim()),
          links: links.map(link => !!document.getElementById(link.slice(1))),
          open: [...document.querySelectorAll("details[open]")].map(card => "#" + card.id), first: links[0],
          filtered, all: seen().length, before, beside, marks: document.querySelectorAll(".beside mark").length,
          curves: document.querySelectorAll("details .history svg").length,
          wide: document.documentElement.scrollWidth, window: innerWidth,
          images: [...document.images].map(image => image.naturalWidth),
        });
      }, 500);
    </script></body>"""
    (own / "page.html").write_text(page.read_text().replace('loading="lazy"', "").replace("</body>", probe))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={own / 'profile'}"]
    command += ["--window-size=500,900", "--virtual-time-budget=3000", "--dump-dom", f"file://{own / 'page.html'}"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=LONGEST)
    title = re.search(r"<title>(.*?)</title>", done.stdout, re.S)
    assert title, done.stderr[-2000:]
    seen = json.loads(title[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert seen["order"] == ["plain", "t0_0.25", "t0_0.5 sigma 0.1", "t0_0.75", "t0_0.5 sigma 0.2"]
    assert seen["links"] and all(seen["links"]) and seen["open"] == [seen["first"]]
    assert seen["wide"] <= seen["window"] + 1, "the page is no wider than a phone; tables scroll by themselves"
    assert all(seen["images"])
    assert seen["filtered"] == ["t0_0.5 sigma 0.1", "t0_0.5 sigma 0.2"] and seen["all"] == 5
    assert seen["before"] and seen["beside"] == ["plain", "t0_0.5 sigma 0.1"] and seen["marks"] == 2
    assert seen["curves"] == 1
