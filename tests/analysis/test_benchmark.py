"""The benchmark: what it measures is what it says, and its command."""

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from warm import python_m

from stts_lightning.analysis.speed import Timing, in_turns, peak_memory
from stts_lightning.data.encode import write_mp4

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


def test_peak_memory_is_what_is_held_at_once() -> None:
    def work() -> None:
        for _ in range(3):  # One after the other.
            torch.zeros(2**20).add_(1)
        held = [torch.zeros(2**20) for _ in range(2)]
        del held

    assert peak_memory(work, CPU) == pytest.approx(2 * 4 * 2**20, rel=0.01)


def door(tmp: Path, *arguments: str, check: bool = True) -> str:
    done = python_m("stts_lightning.benchmark", list(arguments), tmp, {**os.environ, "COLUMNS": "160"}, timeout=300)
    assert (done.returncode == 0) == check, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_benchmark_rows_of_models_training_and_operator(tmp_path: Path) -> None:
    models = "models=[mvit_tiny,mvit_tiny:t0_0.5_s2_0.6,plain:mvit_tiny:t0_0.5_s2_0.6]"
    quick = ["seconds=0", "rounds=2", "device=cpu"]
    out = door(tmp_path, models, *quick, "batch=[2]", "json=f.json", "csv=f.csv", "plot=f.png")
    content = json.loads((tmp_path / "f.json").read_text())
    unpruned, ours, plain = content["rows"]
    assert "mvit_tiny:t0_0.5_s2_0.6" in out and content["device"].endswith("threads")
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
        (["what=all"], "error: what=all: allowed are forward, training, operator, loader"),
        (["precision=[8]"], "error: precision=8: allowed are 32, bf16, 16"),
        (["models=[mvit_b61]"], "error: backbone 'mvit_b61' is unknown"),
        (["models=['torchvision:resnet']"], "error: torchvision:resnet: allowed are mvit_v1_b"),
        (["what=loader"], "error: videos: must be given"),
        (["rounds=1"], "error: rounds=1: must be 2 or more"),
    ],
)
def test_impossible_benchmarks_are_refused_in_one_line(tmp_path: Path, arguments: list[str], said: str) -> None:
    out = door(tmp_path, *arguments, "device=cpu", check=False)
    assert said in out and "Traceback" not in out
