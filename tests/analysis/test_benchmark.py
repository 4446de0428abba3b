"""The benchmark: what it measures is what it says, and its command."""

import dataclasses
import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from torch import Tensor, nn
from warm import LONGEST, python_m

from stts_lightning import benchmark, report
from stts_lightning.analysis import benchmarks, paper
from stts_lightning.analysis.benchmarks import Plan, flaw, forward, training
from stts_lightning.analysis.entrants import Entrant, entrant
from stts_lightning.analysis.speed import Timing, Work, device_timer, float32_products, graph_memory, in_turns, peak_memory
from stts_lightning.configuration import conf_dir
from stts_lightning.data.encode import write_mp4
from stts_lightning.selection.noise import Noise

ROOT = Path(__file__).resolve().parents[2]

CPU = torch.device("cpu")


def test_timings_are_interleaved() -> None:
    calls: list[str] = []

    def work(name: str, seconds: float) -> None:
        calls.append(name)
        time.sleep(seconds)

    found = in_turns({"a": lambda: work("a", 0.03), "b": lambda: work("b", 0.06)}, CPU, seconds=0, rounds=4, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a", "a", "b", "b", "a"]
    assert found["a"].rounds == found["b"].rounds == 4
    assert found["a"].median > 0.03 and found["b"].median > 0.06
    assert Timing.of([1.0, 2.0, 3.0, 4.0]) == Timing(2.5, 1.75, 3.25, 4)


def test_time_of_the_device_is_told_beside_the_wall_clock() -> None:
    launching: list[float] = []

    def on_device(work: Work, seconds: float) -> float:
        launching.append(seconds)
        work()
        return 0.004

    def work() -> None:
        time.sleep(0.02)

    timing = in_turns({"a": work}, CPU, seconds=0, rounds=3, on_device=on_device)["a"]
    assert len(launching) == 3 and min(launching) >= 0.02
    assert timing.device == Timing(0.004, 0.004, 0.004, 3) and timing.bound_by == "host"
    assert dataclasses.replace(timing, median=0.0041).bound_by == "device"
    assert Timing.of([1.0, 2.0]).bound_by is None and device_timer(CPU) is None


def test_tf32_is_switched_for_a_while() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with float32_products(tf32=True):
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("high", True)
        with float32_products(tf32=False):
            assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == ("highest", False)
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_memory_of_graphs_is_that_of_private_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    pools = [(0, (0, 0), 8), (0, (0, 1), 4), (0, (2, 0), 2), (1, (0, 1), 1)]
    segments = [{"device": device, "segment_pool_id": pool, "total_size": size} for device, pool, size in pools]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert graph_memory(torch.device("cuda", 0)) == 6 and graph_memory(CPU) == 0


class Fake(nn.Module):
    """A model that needs too much memory from a batch on, and is wrong, or not finite, in autocast."""

    def __init__(self, most: int = 99, off: float = 0.0) -> None:
        super().__init__()
        self.most, self.off = most, off
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, clip: Tensor) -> Tensor:
        if len(clip) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        out = clip.flatten(1)[:, :8] * self.scale
        return out * (1 + self.off) if torch.is_autocast_enabled("cpu") else out


def plan(*batches: int, precisions: tuple[str, ...] = ("32",)) -> Plan:
    return Plan(CPU, batches, precisions, ("false",), 0, 2)


def fake(name: str, **how: float) -> Entrant:
    return Entrant(name, Fake(**how), (2, 4, 4), 1.0, name, True)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def small_products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    def matmul(device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Work], float]:
        a = torch.randn(64, 64, dtype=torch.float32).to(dtype)
        return {"matmul": lambda: a @ a}, 2.0 * 64**3

    monkeypatch.setattr(benchmarks, "matmul", matmul)


@pytest.mark.parametrize("measure", [forward, training])
def test_what_needs_too_much_memory_costs_its_own_row(measure: Any) -> None:
    rows = list(measure([fake("small", most=1), fake("large")], plan(1, 2)))
    assert [(row["model"], row["batch"], row.get("remark")) for row in rows] == [
        ("small", 1, None), ("large", 1, None), ("small", 2, "out of memory"), ("large", 2, None),
    ]  # fmt: skip
    assert "ms" not in rows[2] and rows[3]["ms"] > 0 and rows[3]["times_the_first"] is None


def test_other_errors_are_said_in_the_row() -> None:
    class Broken(Fake):
        def forward(self, clip: Tensor) -> Tensor:
            raise RuntimeError("no kernel\nfor this")

    (row, _) = forward([dataclasses.replace(fake("a"), model=Broken()), fake("b")], plan(1))
    assert row["remark"] == "RuntimeError: no kernel"


@pytest.mark.parametrize(
    ("off", "remark"), [(0.01, None), (0.2, "outputs differ by 20%"), (float("nan"), "outputs are not finite")]
)
def test_outputs_too_far_from_float32_are_flagged(off: float, remark: str | None) -> None:
    exact, rounded = forward([fake("a", off=off)], plan(2, precisions=("32", "bf16")))
    assert exact["output_difference"] == 0 and exact["remark"] is None
    assert rounded["remark"] == remark and (remark == "outputs are not finite") == ("output_difference" not in rounded)
    assert flaw(torch.tensor(float("inf")), None) == {"remark": "outputs are not finite"}
    json.loads(json.dumps([exact, rounded]), parse_constant=pytest.fail)


def test_precisions_are_what_they_are_called() -> None:
    one = entrant("mvit_tiny:t0_0.5", CPU)
    before = {name: value.clone() for name, value in one.model.state_dict().items()}
    rows = list(forward([one], plan(1, precisions=("32", "bf16", "bf16-true"))))
    assert [row["tf32"] for row in rows] == ["off"] * 3 and rows[1]["kernels"] == rows[2]["kernels"] == "none"
    assert rows[0]["output_difference"] < 1e-5 < rows[1]["output_difference"] < 0.05
    assert 1e-3 < rows[2]["output_difference"] < 0.05 and rows[0]["remark"] is None
    assert all(torch.equal(value, before[name]) for name, value in one.model.state_dict().items()), "a copy was cast"
    assert benchmarks.PRECISIONS["tf32"].tf32 and not benchmarks.PRECISIONS["bf16"].tf32


def test_training_steps_see_whole_numbers_and_new_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    one = entrant("mvit_tiny:t0_0.5", CPU)
    seen: list[torch.dtype] = []
    seeds: list[Any] = []
    one.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    monkeypatch.setattr(one.model.slots, "seed_noise", lambda given: seeds.append(given))
    (row,) = training([one], plan(2))
    assert set(seen) == {torch.uint8} and seeds[:2] == [[0, 1], [2, 3]] and all(isinstance(s, int) for s in seeds[0])
    assert row["selectors_time"] > 0 and row.get("remark") is None and "output_difference" not in row
    assert Noise.of(seeds[0]).seeds is not None


def test_device_times_make_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarks, "device_timer", lambda device: lambda work, launching: 1e-9)
    rows = list(forward([fake("a")], plan(1)))
    assert rows[0]["bound_by"] == "host" and rows[0]["device_ms"] == pytest.approx(1e-6)
    same, lines = benchmark.table(rows, "models")
    assert lines[0]["bound by"] == "host" and "device, ms" in lines[0] and "remark" not in lines[0]
    assert same == "batch: 1, precision: 32, TF32: off, compiled: false, kernels: none"


def test_rows_are_in_the_files_before_the_next_is_measured(tmp_path: Path) -> None:
    files = str(tmp_path / "f.json"), str(tmp_path / "f.csv")

    def measured() -> Iterator[dict[str, Any]]:
        for number in range(3):
            yield {"model": "a", "batch": number, "ms": 1.0, **({"ms_low": 1.0, "ms_high": 1.0} if number else {})}
            content = json.loads((tmp_path / "f.json").read_text())
            assert [row["batch"] for row in content["rows"]] == list(range(number + 1)) and not content["complete"]
            assert len((tmp_path / "f.csv").read_text().splitlines()) == number + 2
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        benchmark.record(measured(), "models", {"what": "forward"}, *files)
    content = json.loads((tmp_path / "f.json").read_text())
    assert len(content["rows"]) == 3 and content["what"] == "forward" and not content["complete"]
    benchmark.record(iter(content["rows"]), "models", {}, *files)
    assert json.loads((tmp_path / "f.json").read_text())["complete"]


@pytest.fixture
def tiny_table7(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paper, "model_of", lambda row: str(row.experiment).replace("paper/mvit_b16", "mvit_tiny:").replace(
        ":_", ":").replace("_s4_0.9", "_s2_0.9").rstrip(":"))  # fmt: skip


def test_table_7_of_the_paper_beside_ours(tiny_table7: None, tmp_path: Path) -> None:
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        cfg = compose("benchmark", ["what=table7", "device=cpu", "seconds=0", "rounds=2"])
        benchmark.check(cfg)
        rows = list(benchmark.measured(cfg))
        assert [row["model"] for row in rows] == [
            "mvit_tiny", "mvit_tiny:t0_0.9_s2_0.9", "mvit_tiny:t0_0.8_s2_0.9", "mvit_tiny:t0_0.6_s2_0.9"
        ]  # fmt: skip
        last = rows[-1]
        assert last["views"] == 5 and last["videos_per_second"] == pytest.approx(last["clips_per_second"] / 5)
        assert last["paper_over_unpruned"] == pytest.approx(129.7 / 79.3) and last["paper_videos_per_second"] == 129.7
        rows.append(
            {**{key: last[key] for key in ("model", "precision", "compile", "views")}, "batch": 64, "remark": "out of memory"}
        )
        facts = {"what": "table7", "device": "a card", "torch": "2.0"}
        benchmark.write(rows, facts, str(tmp_path / "t.json"), None)
        title, lines = report.paper_table(7, [tmp_path], tmp_path / "t.json")
        assert title.endswith("; ours: a card, torch 2.0, 5 views a video")
        assert lines[-1]["videos/s"] == "129.7" and lines[-1]["x unpruned, paper"] == "1.64"
        assert lines[-1]["videos/s, ours: batch 1, 32"] == f"{last['videos_per_second']:.1f}"
        assert lines[0]["x unpruned, ours: batch 1, 32"] == "1.00"
        assert lines[-1]["videos/s, ours: batch 64, 32"] == "out of memory" and lines[0]["videos/s, ours: batch 64, 32"] == ""
        title, lines = report.paper_table(7, [tmp_path], tmp_path / "none.json")
        assert title.endswith("benchmark what=table7") and lines[1]["x unpruned, paper"] == "1.22"
        (tmp_path / "t.json").write_text("{")
        with pytest.raises(ValueError, match="is not what benchmark what=table7 wrote"):
            report.paper_table(7, [tmp_path], tmp_path / "t.json")


def test_models_of_table_7_are_those_of_the_benchmark() -> None:
    assert [paper.model_of(row) for row in paper.TABLES[7].rows] == [
        "mvit_b16", "mvit_b16:t0_0.9_s4_0.9", "mvit_b16:t0_0.8_s4_0.9", "mvit_b16:t0_0.6_s4_0.9"
    ]  # fmt: skip


def test_a_page_is_filled_between_its_markers(tmp_path: Path) -> None:
    facts = {"what": "forward", "device": "a card", "torch": "2.0", "command": "python -m x batch=[1]", "complete": False}
    row = {"model": "mvit_b16", "batch": 1, "precision": "bf16", "compile": "false", "ms": 1.0, "ms_low": 1.0, "ms_high": 1.5}
    rows = [row, {**row, "model": "plain:mvit_b16", "ms": None, "remark": "out of memory"}]
    benchmark.write(rows, facts, str(tmp_path / "out" / "2_mvit.json"), None)
    benchmark.write([], facts, str(tmp_path / "out" / "3_swin.json"), None)
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- benchmark_gpu: begin -->\nold\n<!-- benchmark_gpu: end -->\nafter\n")
    for _ in range(2):  # Again: the same.
        script = str(ROOT / "scripts" / "performance_page.py")
        done = python_m(script, [str(tmp_path / "out"), str(page)], tmp_path, dict(os.environ))
        assert done.returncode == 0, done.stderr
        text = page.read_text()
        assert text.startswith("before\n<!--") and text.endswith("-->\nafter\n") and "old" not in text
        assert "### Forward: mvit_b16\n\na card, torch 2.0; batch: 1, precision: bf16, compiled: false. **Stopped" in text
        assert "    python -m x batch=[1]" in text and "out of memory" in text and text.count("###") == 1
    page.write_text("no markers")
    done = python_m(script, [str(tmp_path / "out"), str(page)], tmp_path, dict(os.environ))
    assert done.returncode == 1 and "lacks the lines" in done.stderr


def test_steps_of_the_gpu_script_go_on_when_one_fails(tmp_path: Path) -> None:
    """With a python that fails at the third step and hangs at the fourth."""
    stub = tmp_path / "python"
    stub.write_text(
        '#!/bin/sh\necho "$@" >> calls\ncase "$*" in *3_video*) echo broken; exit 3;; *4_train*) exec sleep 60;; esac\n'
    )
    stub.chmod(0o755)
    script = (ROOT / "scripts" / "benchmark_gpu.sh").read_text().replace(" 60 what=training", " 1 what=training")
    (tmp_path / "benchmark_gpu.sh").write_text(script)
    done = subprocess.run(
        ["bash", "benchmark_gpu.sh", "out"], cwd=tmp_path, env={**os.environ, "PYTHON": str(stub)},
        capture_output=True, text=True, timeout=LONGEST,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert done.returncode == 1 and len(lines) == 8, done.stdout + done.stderr
    assert "3_video_swin: 0 s of 100, status 3: broken" in lines[2] and "status 124" in lines[3]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert "what=table7" in calls[0] and "what=operator" in calls[5] and "selection.reducer=tome" in calls[6]
    assert "performance_page.py out docs/performance.md" in calls[7]
    # What it asks for is what there is.
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for call in calls[:7]:
            arguments = [word for word in call.split()[2:] if not word.startswith("device=")]
            benchmark.check(compose("benchmark", arguments))
    limits = [int(line.split(" of ")[1].split()[0].rstrip(",")) for line in lines[:7]]
    assert sum(limits) + 59 <= 600


def test_peak_memory_is_what_is_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):  # One after the other.
            torch.zeros(2**20).add_(1)
        held = [torch.zeros(2**20) for _ in range(2)]
        del held

    assert peak_memory(work, CPU) == pytest.approx(2 * 4 * 2**20, rel=0.01)


def door(tmp: Path, *arguments: str, check: bool = True) -> str:
    done = python_m("stts_lightning.benchmark", list(arguments), tmp, {**os.environ, "COLUMNS": "160"})
    assert (done.returncode == 0) == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_benchmark_rows_of_models_training_and_operator(tmp_path: Path) -> None:
    models = "models=[mvit_tiny,mvit_tiny:t0_0.5_s2_0.6,plain:mvit_tiny:t0_0.5_s2_0.6]"
    quick = ["seconds=0", "rounds=2", "device=cpu"]
    out = door(tmp_path, models, *quick, "batch=[2]", "json=f.json", "csv=f.csv", "plot=f.png")
    content = json.loads((tmp_path / "f.json").read_text())
    unpruned, ours, plain = content["rows"]
    assert "mvit_tiny:t0_0.5_s2_0.6" in out and content["device"].endswith("threads") and content["complete"]
    assert content["command"].startswith("python -m stts_lightning.benchmark 'models=[mvit_tiny,")
    assert ours["over_unpruned"] == pytest.approx(unpruned["ms"] / ours["ms"]) and plain["over_unpruned"] is None
    assert ours["of_ideal"] == pytest.approx(ours["over_unpruned"] * ours["gflops"] / unpruned["gflops"])
    assert unpruned["share_of_peak"] == pytest.approx(
        2e9 * unpruned["gflops"] * unpruned["clips_per_second"] / (1e12 * unpruned["peak_tflops"])
    )
    assert plain["memory_mib"] > 0 and ours["memory_mib"] > 0
    assert (tmp_path / "f.png").stat().st_size > 10_000 and len((tmp_path / "f.csv").read_text().splitlines()) == 4
    out = door(tmp_path, "what=training", "models=[mvit_tiny:t0_0.5]", *quick, "json=t.json")
    (row,) = json.loads((tmp_path / "t.json").read_text())["rows"]
    assert 0 < row["selectors_time"] < 1
    out = door(tmp_path, "what=operator", "models=[mvit_tiny:t0_0.5]", *quick, "json=o.json")
    assert {r["estimator"] for r in json.loads((tmp_path / "o.json").read_text())["rows"]} == {
        "monte_carlo", "exact", "official", "one-hot"
    }  # fmt: skip


def test_benchmark_loading_reports_rate_per_core(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    write_mp4(tmp_path / "videos" / "a.mp4", (np.full((80, 96, 3), 3 * i, np.uint8) for i in range(60)))
    base = ["what=loader", "seconds=0", "rounds=2", "size=64", "frames=8"]
    door(tmp_path, *base, "videos=videos", "device_clips_per_second=100", "json=l.json")
    rows = json.loads((tmp_path / "l.json").read_text())["rows"]
    assert [row["decoder"] for row in rows] == ["decord", "pyav"]
    assert rows[0]["cores"] == pytest.approx(100 / rows[0]["clips_per_second_per_core"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["what=all"], "error: what=all: allowed are forward, training, operator, loader, launches, table7"),
        (["precision=[8]"], "error: precision=8: allowed are 32, tf32, bf16, 16, bf16-true"),
        (["precision=[tf32]"], "error: precision=tf32: device cpu has no TF32"),
        (["what=training", "precision=[bf16-true]"], "error: precision=bf16-true: holds the weights in bfloat16"),
        (["models=[mvit_b61]"], "error: backbone 'mvit_b61' is unknown"),
        (["models=['torchvision:resnet']"], "error: torchvision:resnet: allowed are mvit_v1_b"),
        (["what=loader"], "error: videos: must be given"),
        (["rounds=1"], "error: rounds=1: must be 2 or more"),
    ],
)
def test_impossible_benchmarks_are_refused_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    out = door(tmp_path, *arguments, "device=cpu", check=False)
    assert said in out and "Traceback" not in out
