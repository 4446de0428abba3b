"""Real commands on small data."""

import csv
import json
import os
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import pytest
import torch
from warm import python_m, run_command

from stts_lightning import create_model, load_model
from stts_lightning.backbones.checkpoints import save_weights
from stts_lightning.data.decode import open_video

FAST = [
    "experiment=demo",
    "pretrained=null",
    "dataset.train=4",
    "dataset.val=2",
    "loader.batch_size=8",
    "callbacks.progress=null",
    "trainer.accelerator=cpu",
]


def command(tmp: Path, *overrides: str, check: bool = True, base: list[str] | None = None) -> CompletedProcess[str]:
    return door("train", tmp, *(FAST if base is None else base), *overrides, check=check)


def door(name: str, tmp: Path, *arguments: str, check: bool = True) -> CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    if "trainer=ddp" in arguments or "logger=wandb" in arguments:  # These start, or end, with the interpreter.
        command = [sys.executable, "-m", f"stts_lightning.{name}", *arguments]
        done = run_command(command, tmp, environment)
    else:
        done = python_m(f"stts_lightning.{name}", list(arguments), tmp, environment)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def finished(place: Path) -> Path:
    base = [argument for argument in FAST if not argument.startswith("callbacks.progress")]
    done = command(place, "trainer.max_epochs=2", "hydra.run.dir=runs/full", "selection=t0_0.6_s4_0.9", base=base)
    # Not a terminal: a line an epoch, with all that a log is read for, here and in the run's folder.
    number = r"[-+.\de]+"
    for text in (done.stdout, (place / "runs/full/train.log").read_text()):
        for epoch in (1, 2):
            line = (
                rf"epoch {epoch} of 2, step {4 * epoch} of 8: loss {number}, val/top1 {number}%, val/top5 {number}%, "
                rf"val/loss {number}, val/mean_class_accuracy {number}%, "
                rf"lr {number} \(selectors\) {number} \(backbone\) {number} \(head\), sigma {number}, {number} clips/s, "
                r"\d+:\d\d:\d\d left"
            )
            assert len(re.findall(line, text)) == 1, text
    assert "font" not in done.stdout
    assert "T0: 5 of 8 frames; S4: 4x4 of 4x4" in done.stdout
    assert re.search(r"steps +│ 8 ", done.stdout)
    return place / "runs" / "full"


def test_result_json_holds_all_facts(finished: Path) -> None:
    result = json.loads((finished / "result.json").read_text())
    assert result["selection"] == "t0_0.6_s4_0.9"
    assert result["slots"] == {"t0": "5 of 8 frames", "s4": "4x4 of 4x4, 1 anchors"}
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert result["gflops_per_view"] > 0.01
    assert result["dataset"]["val_videos"] == 16
    assert result["steps"] == 8
    assert result["undecodable_files"] == {}
    assert result["kernels"].startswith("cpu, ")
    assert {"torch", "lightning", "python"} <= set(result["versions"])
    assert (finished / "config.yaml").is_file()


def test_checkpoint_holds_plain_containers_and_rebuilds_the_model(finished: Path) -> None:

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
    assert sorted(f.name for f in (finished / "test").iterdir()) == [
        "confusion.csv",
        "confusion.png",
        "per_class.csv",
        "predictions.npz",
    ]
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
    lines = (place / "data/demo_when/val.csv").read_text().splitlines()
    (place / "data/demo_when/eleven.csv").write_text("\n".join(lines[-11:]) + "\n")
    data = [
        "dataset=list",
        "dataset.train=null",
        "dataset.val=data/demo_when/eleven.csv",
        "dataset.classes=runs/full/classes.txt",
    ]
    found = []
    for name, trainer in (("one", []), ("two", ["trainer=ddp", "trainer.devices=2", "trainer.precision=32-true"])):
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
        (["run=runs/none"], "error: run runs/none: there is no "),
        (["run=runs/full", "checkpoint=alone.ckpt"], "error: run=runs/full and checkpoint=alone.ckpt: both name a model; give"),
        (["checkpoint=none.pt"], "error: checkpoint none.pt: no such file"),
        (["predictions=runs"], "error: predictions=runs: there is no predictions.npz in it"),
        (["checkpoint=alone.ckpt", "missing=maybe"], "error: missing='maybe': allowed are skip, wrong"),
        (["checkpoint=alone.ckpt", "views=[1]"], "error: views=[1]: allowed are numbers from 0 to 0"),
        (["run=runs/full", "selection.slots.t7.keep=8"], "error: selection.slots.t7: no block 7; this backbone has 0 to 5"),
    ):
        failed = door("evaluate", place, *arguments, *EVALUATE, check=False)
        assert failed.returncode == 2, failed.stdout + failed.stderr
        assert message in failed.stderr.strip().splitlines()[-1]


def test_predict_labels_any_videos_and_shows_what_was_kept(place: Path, finished: Path) -> None:
    folder = place / "unknown" / "deep"
    folder.mkdir(parents=True)
    for number, name in enumerate(("left", "up")):
        source = sorted((place / "data/demo_when/val" / name).glob("*.mp4"))[0]
        (folder / f"{number}.mp4").write_bytes(source.read_bytes())
    (folder / "2.mp4").write_text("no video")
    done = door("predict", place, "run=runs/full", "videos=unknown", "overlay=true", "trainer.accelerator=cpu", "every=0.5")
    assert "videos: 3, not decoded: 1; " in done.stdout
    found = json.loads((finished / "predictions" / "predictions.json").read_text())
    assert [Path(video["video"]).name for video in found] == ["0.mp4", "1.mp4", "2.mp4"]
    classes = (place / "data/demo_when/classes.txt").read_text().split()
    for number, video in enumerate(found[:2]):
        assert {one["class"] for one in video["top"]} <= set(classes)
        assert len(video["windows"]) > 1
        starts = [window["start"] for window in video["windows"]]
        assert starts == sorted(starts)
        mean = {c: sum(t["probability"] for w in video["windows"] for t in w["top"] if t["class"] == c) for c in classes}
        best = video["top"][0]
        assert best["probability"] <= mean[best["class"]] / len(starts) + 1e-5
        assert video["overlay"] == [f"overlays/{number}.png", f"overlays/{number}.mp4"]
        with open_video(finished / "predictions" / video["overlay"][1]) as reader:
            assert len(reader) == 16 * min(len(starts), 6)
    assert "cannot be decoded" in found[2]["error"] and "top" not in found[2]
    # Where nothing decodes, what was found before is kept, and the status says so.
    (place / "rotten.mp4").write_text("no video")
    before = (finished / "predictions" / "predictions.json").read_bytes()
    failed = door("predict", place, "run=runs/full", "videos=rotten.mp4", "trainer.accelerator=cpu", check=False)
    assert failed.returncode == 1 and "error: none of 1 videos could be decoded; nothing was written" in failed.stderr
    assert (finished / "predictions" / "predictions.json").read_bytes() == before
    wrong = door("predict", place, "run=runs/full", "videos=unknown", "which=bset", check=False)
    assert wrong.returncode == 2 and "error: run runs/full: has no checkpoint 'bset'; there is best and last" in wrong.stderr
    # The same under two processes, each video once.
    two = [
        "trainer=ddp",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "trainer.precision=32-true",
        "hydra.run.dir=runs/predicted",
    ]
    door("predict", place, "run=runs/full", "videos=[unknown/deep/1.mp4,'unknown/**/[0-2].mp4']", *two, "every=0.5")
    again = json.loads((place / "runs/predicted/predictions.json").read_text())
    assert [Path(video["video"]).name for video in again] == ["1.mp4", "0.mp4", "2.mp4"]
    for one, other in ((again[0], found[1]), (again[1], found[0])):
        assert [t["class"] for t in one["top"]] == [t["class"] for t in other["top"]]
        assert one["top"][0]["probability"] == pytest.approx(other["top"][0]["probability"], abs=1e-5)
    for arguments, message in (
        (["videos=nothing/*.mp4"], "error: videos=nothing/*.mp4: no video there"),
        (["videos=unknown", "every=-1"], "error: every=-1"),
        (["videos=unknown", "classes=data/demo_when/train.csv"], "error: classes=data/demo_when/train.csv: "),
    ):
        failed = door("predict", place, "run=runs/full", *arguments, "trainer.accelerator=cpu", check=False)
        assert failed.returncode == 2, failed.stdout + failed.stderr
        assert message in failed.stderr.strip().splitlines()[-1]


def test_selectors_are_followed_while_they_learn(finished: Path) -> None:
    assert sorted(file.name for file in (finished / "panels").iterdir()) == ["epoch_000.png", "epoch_001.png"]
    with (finished / "metrics.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    for name in ("t0/entropy", "t0/choices", "t0/softness", "s4/entropy", "gap"):
        values = [float(row[f"selection/{name}"]) for row in rows if row[f"selection/{name}"]]
        assert len(values) == 2 and all(0 <= value <= 1 for value in values), name
    assert len([row for row in rows if row["selection/t0/changed"]]) == 1
    result = json.loads((finished / "result.json").read_text())
    assert result["tokens_kept"] == pytest.approx(5 / 8) and result["clips_per_second"] > 0


def test_export_gives_programs_that_say_the_same(place: Path, finished: Path) -> None:
    pytest.importorskip("onnxruntime")
    done = door("export", place, "run=runs/full", "out=exported/m")
    assert done.stdout.count("logits differ by") == 2
    facts = json.loads((place / "exported" / "m.json").read_text())
    assert facts["input"] == ["batch", 3, 16, 64, 64] and len(facts["classes"]) == 8
    assert all(file["difference"] < 1e-3 and (place / file["file"]).is_file() for file in facts["files"])
    model = load_model(finished / "checkpoints" / "last.ckpt").eval()
    clip = torch.randint(0, 256, (5, 3, 16, 64, 64), dtype=torch.uint8)
    program = torch.export.load(place / "exported" / "m.pt2").module()
    with torch.no_grad():
        assert torch.allclose(program(clip), model(clip), atol=1e-5)
    failed = door("export", place, "run=runs/full", "formats=[tflite]", check=False)
    assert failed.stderr.strip().splitlines()[-1] == "error: formats=tflite: allowed are torch, onnx"


def wandb_records(file: Path) -> list[Any]:
    """Records of an offline run: LevelDB's log format, blocks of 32 KiB after a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole, records = file.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # Whole, or the last part.
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            records.append(record)
            whole = b""
    return records


def test_wandb_without_a_key_stays_offline_and_holds_what_dashboards_need(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.setenv("WANDB_RUN_GROUP", "sweep_x")
    command(place, "logger=wandb", "debug=fast", "hydra.run.dir=runs/wandb", "trainer.log_every_n_steps=1")
    run = place / "runs" / "wandb"
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)
    (about,) = {(r.run.run_id, r.run.run_group, r.run.job_type, tuple(r.run.tags)) for r in records if r.HasField("run")}
    assert about == ((run / "wandb_id.txt").read_text(), "sweep_x", "train", ("mvit_tiny", "demo"))
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    history: set[str] = set()
    for record in records:
        for item in [*record.config.update, *record.run.config.update]:
            config[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        for item in record.summary.update:
            summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
        # A picture is a dictionary, logged key by key.
        history |= {item.key or item.nested_key[0] for item in record.history.item}
    assert config["selection"]["slots"] == {"t0": {"ratio": 0.5}} and config["backbone"]["name"] == "mvit_tiny"
    result = json.loads((run / "result.json").read_text())
    for key in ("top1", "top5", "gflops", "gflops_per_view", "tokens_kept", "sigma", "parameters", "clips_per_second"):
        assert summary[key] == pytest.approx(result[key]), key
    assert summary["val_hash"] == result["dataset"]["val_hash"]
    assert {"sigma", "train/loss", "val/top1", "selection/t0/entropy", "selection/gap", "selection"} <= history
    assert list(file.parent.glob("files/media/images/selection_*.png"))


def test_undecodable_training_file_is_counted(place: Path, finished: Path) -> None:
    folder = place / "own"
    for split in ("train", "val"):
        for name in ("left", "right"):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for file in (place / "data" / "demo_when" / split / name).glob("*.mp4"):
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
        (["selction.sigma=0.1"], "error: selction.sigma: no such key; did you mean selection.sigma?"),
        (["selection.sigm=0.1"], "error: selection.sigm: no such key; did you mean selection.sigma?"),
        (["backbone=mvit_b61"], "error: backbone=mvit_b61: no such option (did you mean mvit_b16?); allowed are mvit_b16, "),
        (["selection.slots.t0.ratio=0"], "selection.slots.t0.ratio=0: must lie in (0, 1]"),
        (["selection.slots.t0.ratio=1.2"], "selection.slots.t0.ratio=1.2: must lie in (0, 1]"),
        (["+selection.slots.t99.ratio=0.5"], "selection.slots.t99: no block 99; this backbone has 0 to 5"),
        (["dataset=folder", "dataset.root=/no/such/folder"], "data folder /no/such/folder: does not exist"),
        (["dataset=folder"], "dataset.root: must be given, as in dataset.root=..."),
        (["pretrained=/no/such.pt"], "checkpoint /no/such.pt: no such file"),
        (["head=rest"], "head=rest: allowed are keep, reset"),
        (["resume=/no/such/run"], "resume=/no/such/run: there is no"),
        (["loader.batch_size=0"], "loader.batch_size=0: must be 1 or more"),
        (["backbone.size=50"], "backbone: frames=16 must be a multiple of 2, size=50 of 4"),
        (["clip.stride=0"], "clip.stride=0: must be 1 or more"),
        (["clip.decoder=cv2"], "clip.decoder='cv2': allowed are decord, pyav"),
        (["trainer.precision=17"], "Precision 17 is invalid. Allowed precision values: "),
        (["selection.scorer=best"], "selection.scorer='best': allowed are paper, context, official"),
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

    model = create_model("video_swin_t", "t0_0.5", 8, dim=8, depths=(1, 1), heads=(1, 1), frames=8, size=48)
    save_weights(model, model.recipe, place / "swin.safetensors")
    data = ["dataset=list", "dataset.train=null", "dataset.val=data/demo_when/val.csv", "dataset.classes=eight.txt"]
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


def test_flops_of_the_papers_selections_and_of_a_budget(tmp_path: Path) -> None:
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
    assert lines["T0:0.6 S4:0.9"]["top-1 %, ours"] == f"{100 * found['top1']:.1f} (demo_when, mvit_tiny)"
    assert lines["T0:0.6 S4:0.9"]["GFLOPs, paper"] == "38.1"
    assert lines["S0:0.6"]["GFLOPs, ours"].endswith("%)"), "a difference that needs explaining is marked"
    assert lines["T0:0.6"]["GFLOPs, ours"] == "41.29"
    assert lines["T0:0.6"]["top-1 %, ours"] == ""
    door("report", tmp_path, "paper_table=8", "markdown=tables.md")
    assert (tmp_path / "tables.md").read_text().count("### Table") == 2
    door("report", tmp_path, "paper_figure=3", "plot=three.png", "csv=three.csv")
    with (tmp_path / "three.csv").open() as file:
        drawn = [line for line in csv.DictReader(file) if line["configuration"] == "T0:0.6 S4:0.9"]
    assert [line["method"] for line in drawn] == ["STTS", "Rand."]
    assert drawn[0]["top-1 %, ours"] == lines["T0:0.6 S4:0.9"]["top-1 %, ours"] and drawn[1]["top-1 %, paper"] == "76.4"
    assert (tmp_path / "three.png").read_bytes().startswith(b"\x89PNG")
    failed = door("report", tmp_path, "paper_table=9", check=False)
    assert failed.stderr.strip().splitlines()[-1] == "error: paper_table=9: allowed are 1 to 8"
    done = door("report", tmp_path)
    assert "1 runs; runs/report.html" in done.stdout and (tmp_path / "runs/report/demo_when.csv").is_file()
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        (["runs=empty"], "error: runs=empty: no run below has a result with a top-1 yet"),
        (["runs=[runs,nowhere]"], "error: runs=nowhere: no such folder; give a folder of runs, or several as runs=[A,B]"),
    ):
        failed = door("report", tmp_path, *arguments, check=False)
        assert failed.stderr.strip().splitlines()[-1] == message


def test_one_command_tests_a_checkpoint_under_all_reducers(tmp_path: Path) -> None:
    model = create_model("vit_tiny", num_classes=8)
    save_weights(model, model.recipe, tmp_path / "vit.safetensors")
    data = ["dataset=demo", "dataset.val=1", "callbacks.progress=null", "trainer.accelerator=cpu"]
    sweep = ["-m", "checkpoint=vit.safetensors", "selection=none,r1_0.7", "selection.reducer=rlt,random", *data]
    done = door("evaluate", tmp_path, *sweep, "hydra.sweep.dir=many", check=False)
    assert done.returncode == 1
    assert "stands before block 0 (r0)" in done.stderr, "rlt reads the pixels of a whole clip"
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("not tested: ") and "selection=r1_0.7 ++selection.reducer=rlt" in last
    found = [json.loads(file.read_text()) for file in sorted((tmp_path / "many").glob("*/evaluation.json"))]
    kept = sorted("; ".join(result["slots"].values()) for result in found)
    assert kept == ["", "", "358 of 512 tokens (random)"]
    door("report", tmp_path, "runs=many", "out=compared")
    with (tmp_path / "compared/report/demo_when.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 2, "a reducer changes nothing of the unpruned model"


def test_recipe_none_tests_without_training(tmp_path: Path) -> None:
    chosen = ["selection=none", "+selection.slots.t1.ratio=0.5", "selection.selector=attention"]
    small = ["backbone=mvit_tiny", "dataset.train=2", "dataset.val=1", "callbacks.progress=null", "trainer.accelerator=cpu"]
    door("train", tmp_path, *small, *chosen, "recipe=none", "hydra.run.dir=runs/free")
    found = json.loads((tmp_path / "runs/free/result.json").read_text())
    assert (found["steps"], found["videos"]) == (0, 8)
    assert found["slots"] == {"t1": "4 of 8 frames (attention)"}
