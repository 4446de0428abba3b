"""Real commands on small data."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FAST = [
    "experiment=demo",
    "pretrained=null",
    "dataset.train=4",
    "dataset.val=2",
    "loader.batch_size=8",
    "callbacks.progress=null",
    "trainer.accelerator=cpu",
]


def command(tmp: Path, *overrides: str, check: bool = True, base: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    return door("train", tmp, *(FAST if base is None else base), *overrides, check=check)


def door(name: str, tmp: Path, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    args = [sys.executable, "-m", f"stts_lightning.{name}", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "COLUMNS": "160"}
    done = subprocess.run(args, cwd=tmp, capture_output=True, text=True, timeout=300, env=environment)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    done = command(place, "trainer.max_epochs=2", "hydra.run.dir=runs/full", "selection=t0_0.6_s4_0.9")
    assert "T0: 5 of 8 frames; S4: 3x3 of 3x3" in done.stdout
    assert re.search(r"steps +│ 8 ", done.stdout)
    return place / "runs" / "full"


def test_result_says_everything(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["selection"] == "t0_0.6_s4_0.9"
    assert result["slots"] == {"t0": "5 of 8 frames", "s4": "3x3 of 3x3, 1 anchors"}
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert result["gflops_per_view"] > 0.01
    assert result["dataset"]["val_videos"] == 16
    assert result["steps"] == 8
    assert result["undecodable_files"] == {}
    assert {"torch", "lightning", "python"} <= set(result["versions"])
    assert (finished / "config.yaml").is_file()


def test_checkpoint_holds_plain_containers_and_rebuilds_the_model(finished: Path) -> None:
    from stts_lightning import create_model

    content = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    model = create_model(**content["model"], pretrained=finished / "checkpoints" / "last.ckpt")
    assert model.slots.describe()["t0"] == "5 of 8 frames"


EVALUATE = ["callbacks.progress=null", "trainer.accelerator=cpu"]


def test_evaluate_gives_what_the_run_gave_and_asks_again_without_a_pass(place: Path, finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    door("evaluate", place, "run=runs/full", *EVALUATE)
    again = json.loads((finished / "evaluation" / "evaluation.json").read_text())
    for key in ("top1", "top5", "mean_class_accuracy", "gflops_per_view", "slots", "videos", "top1_interval"):
        assert again[key] == result[key], key
    assert sorted(f.name for f in (finished / "test").iterdir()) == ["confusion.csv", "per_class.csv", "predictions.npz"]
    with (finished / "test" / "per_class.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert sum(int(row["right"]) for row in rows) / 16 == result["top1"]
    # Other views, and a slot that keeps more, on top of what the run says of itself.
    more = ["clip.test_views=3", "clip.test_crops=3", "selection.slots.t0.keep=8", "hydra.run.dir=runs/more"]
    door("evaluate", place, "run=runs/full", *EVALUATE, *more)
    asked = json.loads((place / "runs/more/evaluation.json").read_text())
    assert asked["slots"]["t0"] == "8 of 8 frames"
    assert asked["views"] == 9
    assert asked["gflops"] == pytest.approx(9 * asked["gflops_per_view"], rel=1e-3)
    door("evaluate", place, "predictions=runs/more", "views=[0,1]", "missing=wrong", "hydra.run.dir=runs/two")
    assert json.loads((place / "runs/two/evaluation.json").read_text())["views"] == 2


def test_two_processes_test_each_video_once(place: Path, finished: Path) -> None:
    """11 videos on 2 processes are 11, with the figures of one process."""
    lines = (place / "data/demo/val.csv").read_text().splitlines()
    (place / "data/demo/eleven.csv").write_text("\n".join(lines[-11:]) + "\n")
    data = ["dataset=list", "dataset.train=null", "dataset.val=data/demo/eleven.csv", "dataset.classes=classes.txt"]
    (place / "classes.txt").write_text("\n".join(f"c{i}" for i in range(8)))
    found = []
    for name, trainer in (("one", []), ("two", ["trainer=ddp", "trainer.devices=2"])):
        run = [f"hydra.run.dir=runs/{name}", "clip.short_side=72", "clip.stride=2", "clip.test_views=2"]
        door("evaluate", place, "run=runs/full", *data, *EVALUATE, *trainer, *run)
        found.append(json.loads((place / "runs" / name / "evaluation.json").read_text()))
    assert [f["videos"] for f in found] == [11, 11]
    for key in ("top1", "top5", "mean_class_accuracy", "top1_interval"):
        assert found[0][key] == found[1][key]
    assert found[0]["calibration_error"] == pytest.approx(found[1]["calibration_error"], abs=1e-5)
    assert sorted(f.name for f in (place / "runs/two").glob("*.npz")) == ["predictions.npz"]


def test_evaluate_a_file_by_itself(place: Path, finished: Path) -> None:
    """A checkpoint away from its run folder still says how its model is built, not what data it saw."""
    (place / "alone.ckpt").write_bytes((finished / "checkpoints" / "last.ckpt").read_bytes())
    data = ["dataset=demo", "dataset.train=4", "dataset.val=2"]
    door("evaluate", place, "checkpoint=alone.ckpt", *data, *EVALUATE, "hydra.run.dir=runs/alone")
    result, alone = (json.loads(f.read_text()) for f in (finished / "result.json", place / "runs/alone/evaluation.json"))
    assert {k: alone[k] for k in ("top1", "slots", "clip")} == {k: result[k] for k in ("top1", "slots", "clip")}
    for arguments, message in (
        ([], "error: give a model: run=FOLDER, or checkpoint=FILE"),
        (["run=runs/none"], "error: run=runs/none: there is no "),
        (["checkpoint=none.pt"], "error: checkpoint none.pt: no such file"),
        (["predictions=runs"], "error: predictions=runs: there is no predictions.npz in it"),
        (["checkpoint=alone.ckpt", "missing=maybe"], "error: missing='maybe': allowed are skip, wrong"),
        (["checkpoint=alone.ckpt", "views=[1]"], "error: views=[1]: allowed are numbers from 0 to 0"),
        (["run=runs/full", "selection.slots.t7.keep=8"], "error: selection.slots.t7: no block 7; this backbone has 0 to 5"),
    ):
        failed = door("evaluate", place, *arguments, *EVALUATE, check=False)
        assert failed.returncode == 2, failed.stdout + failed.stderr
        assert message in failed.stderr.strip().splitlines()[-1]


def losses(run: Path) -> dict[int, tuple[float, float]]:
    found = {}
    for file in sorted(run.glob("metrics*.csv")):
        with file.open() as lines:
            for row in csv.DictReader(lines):
                if row.get("train/loss"):
                    found[int(row["step"])] = (float(row["train/loss"]), float(row["sigma"]))
    return found


def test_killed_run_goes_on_where_it_was(place: Path) -> None:
    options = ["trainer.max_epochs=6", "trainer.log_every_n_steps=1", "loader.num_workers=0"]
    command(place, *options, "hydra.run.dir=runs/whole", "test=false")
    args = [sys.executable, "-m", "stts_lightning.train", *FAST, *options, "hydra.run.dir=runs/killed", "test=false"]
    process = subprocess.Popen(args, cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    checkpoint = place / "runs" / "killed" / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not checkpoint.is_file() and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = set((place / "runs").iterdir())
    done = command(place, "resume=runs/killed", base=[])
    assert set((place / "runs").iterdir()) == before, "a resumed run stays in its folder"
    result = json.loads((place / "runs" / "killed" / "result.json").read_text())
    assert result["steps"] == 24, done.stdout
    whole, killed = losses(place / "runs" / "whole"), losses(place / "runs" / "killed")
    assert max(whole) == max(killed) == 23
    for step in (19, 23):  # sigma is exact whatever the moment of the kill
        assert killed[step][1] == pytest.approx(whole[step][1], rel=1e-5) == pytest.approx(0.5 * (1 - step / 24), rel=1e-3)


def test_sweep_over_sigma_and_a_ratio(place: Path) -> None:
    swept = ["selection.sigma=0.05,0.1", "selection.slots.t0.ratio=0.25,0.5"]
    command(place, "debug=fast", "hydra.sweep.dir=runs/sweep", base=["-m", *FAST, *swept])
    results = [json.loads(f.read_text()) for f in (place / "runs" / "sweep").glob("*/result.json")]
    assert sorted((r["sigma"], r["slots"]["t0"]) for r in results) == [
        (0.05, "2 of 8 frames"),
        (0.05, "4 of 8 frames"),
        (0.1, "2 of 8 frames"),
        (0.1, "4 of 8 frames"),
    ]


def test_wandb_without_a_key_stays_offline(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(place))
    command(place, "logger=wandb", "debug=fast", "hydra.run.dir=runs/wandb")
    assert list((place / "runs" / "wandb" / "wandb").glob("offline-run-*"))
    assert (place / "runs" / "wandb" / "wandb_id.txt").read_text()


def test_undecodable_training_file_is_counted(place: Path) -> None:
    folder = place / "own"
    for split in ("train", "val"):
        for name in ("left", "right"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for file in (place / "data" / "demo" / split / name).glob("*.mp4"):
                (folder / split / name / file.name).write_bytes(file.read_bytes())
    (folder / "train" / "left" / "rotten.mp4").write_text("rotten")
    own = [
        "backbone=mvit_tiny",
        "selection=t0_0.5",
        "dataset=folder",
        f"dataset.root={folder}",
        "recipe=scratch",
        "callbacks.progress=null",
    ]
    done = command(place, *own, "loader.batch_size=4", "trainer.max_epochs=3", "hydra.run.dir=runs/own", base=[])
    result = json.loads((place / "runs" / "own" / "result.json").read_text())
    assert [Path(f).name for f in result["undecodable_files"]] == ["rotten.mp4"]
    assert (done.stdout + done.stderr).count("cannot decode") == 1
    # The same in evaluation is an error that names the file.
    (folder / "val" / "left" / "rotten.mp4").write_text("rotten")
    failed = command(place, *own, "loader.batch_size=4", "trainer.max_epochs=1", base=[], check=False)
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1].startswith("error: ")
    assert "rotten.mp4: cannot be decoded" in failed.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["selction.sigma=0.1"], "Key 'selction' is not in struct"),
        (["selection.sigm=0.1"], "Key 'sigm' is not in struct"),
        (["backbone=mvit_b61"], "Could not find 'backbone/mvit_b61'"),
        (["selection.slots.t0.ratio=0"], "selection.slots.t0.ratio=0: must lie in (0, 1]"),
        (["selection.slots.t0.ratio=1.2"], "selection.slots.t0.ratio=1.2: must lie in (0, 1]"),
        (["+selection.slots.t99.ratio=0.5"], "selection.slots.t99: no block 99; this backbone has 0 to 5"),
        (["dataset=folder", "dataset.root=/no/such/folder"], "data folder /no/such/folder/train: does not exist"),
        (["dataset=folder"], "dataset.root: must be given, as in dataset.root=..."),
        (["pretrained=/no/such.pt"], "checkpoint /no/such.pt: no such file"),
        (["resume=/no/such/run"], "resume=/no/such/run: there is no"),
        (["loader.batch_size=0"], "loader.batch_size=0: must be 1 or more"),
        (["backbone.size=50"], "backbone: frames=16 must be a multiple of 2, size=50 of 4"),
        (["clip.stride=0"], "clip.stride=0: must be 1 or more"),
        (["clip.decoder=cv2"], "clip.decoder='cv2': allowed are decord, pyav"),
        (["trainer.precision=17"], "Precision 17 is invalid. Allowed precision values: "),
        (["selection.scorer=best"], "selection.scorer='best': allowed are paper, official"),
        (["+optim.parts.bacbone={}"], "optim.parts.bacbone: unknown; the parts are selectors, backbone, head"),
    ],
)
def test_bad_input_gets_one_clear_error(tmp_path: Path, overrides: list[str], message: str) -> None:
    base = ["backbone=mvit_tiny", "selection=t0_0.5"] if "dataset=folder" in overrides else None
    done = command(tmp_path, *overrides, check=False, base=base)
    assert done.returncode != 0
    assert message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_list_with_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("nowhere.mp4 0\n")
    lists = ["dataset=list", "dataset.train=list.txt", "dataset.val=list.txt"]
    done = command(tmp_path, *lists, check=False, base=["backbone=mvit_tiny", "selection=none"])
    assert done.returncode == 2
    assert "1 of 1 listed videos do not exist, first " in done.stderr


def test_a_converted_swin_is_tested_by_name_alone(place: Path, finished: Path) -> None:
    from stts_lightning import create_model
    from stts_lightning.backbones.checkpoints import save_weights

    model = create_model("video_swin_t", "t0_0.5", 8, dim=8, depths=(1, 1), heads=(1, 1), frames=8, size=48)
    save_weights(model, model.recipe, place / "swin.safetensors")
    data = ["dataset=list", "dataset.train=null", "dataset.val=data/demo/val.csv", "dataset.classes=eight.txt"]
    (place / "eight.txt").write_text("\n".join(f"c{i}" for i in range(8)))
    some = ["+trainer.limit_test_batches=1", "loader.batch_size=4", "hydra.run.dir=runs/swin"]
    door("evaluate", place, "checkpoint=swin.safetensors", *data, *EVALUATE, *some)
    found = json.loads((place / "runs/swin/evaluation.json").read_text())
    assert (found["backbone"], found["views"], found["videos"]) == ("video_swin_t", 12, 4)


def test_flops_says_what_a_configuration_costs(tmp_path: Path) -> None:
    done = door("flops", tmp_path, "backbone=mvit_tiny", "selection=t0_0.5", "json=cost.json", "csv=costs.csv")
    found = json.loads((tmp_path / "cost.json").read_text())
    assert found["gflops"] == pytest.approx(sum(found["gflops_by_part"].values()))
    assert found["gflops_of_test"] == pytest.approx(5 * found["gflops"])
    assert found["tokens_of_blocks"][0] == [4, 16, 16]
    assert f"{found['parameters']:,}" in done.stdout
    door("flops", tmp_path, "-m", "backbone=mvit_tiny", "selection=none,s0_0.5", "csv=costs.csv")
    with (tmp_path / "costs.csv").open() as file:
        assert [row["selection"] for row in csv.DictReader(file)] == ["t0_0.5", "none", "s0_0.5"]
    failed = door("flops", tmp_path, "backbone=mvit_tiny", "selection=t0_0.5", "selection.slots.t0.ratio=2", check=False)
    assert failed.returncode == 2
    assert failed.stderr.strip().splitlines()[-1] == "error: selection.slots.t0.ratio=2: must lie in (0, 1]"


def test_flops_of_all_shipped_selections_and_of_a_budget(tmp_path: Path) -> None:
    done = door("flops", tmp_path, "backbone=mvit_tiny", "all=true", "json=all.json", "csv=all.csv")
    rows = {row["selection"]: row for row in json.loads((tmp_path / "all.json").read_text())}
    assert {"none", "t0_0.6_s4_0.9", "s0_0.5"} <= set(rows)
    assert rows["none"]["gflops"] == max(row["gflops"] for row in rows.values())
    assert re.search(r"left out t4_0.6.*no block 8; this backbone has 0 to 5", done.stdout.replace("\n", ""))
    assert len((tmp_path / "all.csv").read_text().splitlines()) == len(rows) + 1
    done = door("flops", tmp_path, "backbone=mvit_tiny", "budget=0.2", "json=some.json")
    first = json.loads((tmp_path / "some.json").read_text())[0]
    assert 0.15 < first["gflops"] <= 0.2
    said = done.stdout.split("The first is ")[1].split()
    assert said == first["overrides"]
    door("flops", tmp_path, "backbone=mvit_tiny", *said, "json=one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["gflops"] == pytest.approx(first["gflops"], rel=1e-9)
    failed = door("flops", tmp_path, "backbone=mvit_tiny", "budget=0.001", check=False)
    assert failed.stderr.strip().splitlines()[-1] == "error: budget=0.001: no selection before blocks [0, 4] costs so little"


def test_report_sets_our_runs_beside_the_paper(tmp_path: Path) -> None:
    small = ["backbone=mvit_tiny", "backbone.size=64", "dataset=demo", "dataset.train=4", "dataset.val=1", "loader.batch_size=4"]
    quick = ["trainer.max_steps=2", "callbacks.progress=null", "trainer.accelerator=cpu", "logger=none"]
    row = "paper/mvit_b16_t0_0.6_s4_0.9"
    door("train", tmp_path, f"experiment={row}", *small, *quick, "hydra.run.dir=runs/deep/below")
    found = json.loads((tmp_path / "runs/deep/below/result.json").read_text())
    assert found["experiment"] == row
    door("report", tmp_path, "paper_table=4", "csv=four.csv", "markdown=tables.md")
    with (tmp_path / "four.csv").open() as file:
        lines = {line["configuration"]: line for line in csv.DictReader(file)}
    assert len(lines) == 7
    assert lines["T0:0.6 S4:0.9"]["top-1, ours"] == f"{100 * found['top1']:.1f} (demo, mvit_tiny)"
    assert lines["T0:0.6 S4:0.9"]["GFLOPs, paper"] == "38.1"
    assert lines["S0:0.6"]["ours"].endswith("%)"), "a difference that needs explaining is marked"
    assert lines["T0:0.6"]["ours"] == "41.29"
    assert lines["T0:0.6"]["top-1, ours"] == ""
    door("report", tmp_path, "paper_table=8", "markdown=tables.md")
    assert (tmp_path / "tables.md").read_text().count("### Table") == 2
    failed = door("report", tmp_path, "paper_table=9", check=False)
    assert failed.stderr.strip().splitlines()[-1] == "error: paper_table=9: allowed are 1 to 8"
    failed = door("report", tmp_path, check=False)
    assert failed.stderr.strip().splitlines()[-1] == "error: paper_table: must be given, as in paper_table=..."


def test_a_model_is_tested_as_it_comes(tmp_path: Path) -> None:
    chosen = ["selection=none", "+selection.slots.t1.ratio=0.5", "selection.selector=attention"]
    small = ["backbone=mvit_tiny", "dataset.train=2", "dataset.val=1", "callbacks.progress=null", "trainer.accelerator=cpu"]
    door("train", tmp_path, *small, *chosen, "recipe=none", "hydra.run.dir=runs/free")
    found = json.loads((tmp_path / "runs/free/result.json").read_text())
    assert (found["steps"], found["videos"]) == (0, 8)
    assert found["slots"] == {"t1": "4 of 8 frames (attention)"}
