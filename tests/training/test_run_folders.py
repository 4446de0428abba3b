"""Run folders: moved, shared, taken by another run, sent by somebody; and commands that are ended and go on."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from filelock import FileLock
from warm import LONGEST, python_m

from stts_lightning import create_model, load_model
from stts_lightning.run_folders import LOCK, exit_status, run_stamp
from stts_lightning.trusted import ALLOWED, TrustError, check_stored, named_classes

CONF = Path(__file__).parents[2] / "conf"
FAST = [
    "experiment=demo", "pretrained=null", "dataset.train=4", "dataset.val=2", "loader.batch_size=8", "loader.num_workers=0",
    "callbacks.progress=null", "trainer.accelerator=cpu",
]  # fmt: skip
SMALL = ["selection=t0_0.5", "trainer.max_epochs=1", "test=false"]


def door(name: str, place: Path, *arguments: str, check: bool = True) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "160"}
    done = python_m(f"stts_lightning.{name}", list(arguments), place, environment)
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def command(
    place: Path, *overrides: str, check: bool = True, base: list[str] | None = None
) -> "subprocess.CompletedProcess[str]":
    return door("train", place, *(FAST if base is None else base), *overrides, check=check)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders")
    command(folder, *SMALL, "hydra.run.dir=runs/one")
    return folder


@pytest.fixture
def copy(place: Path, request: pytest.FixtureRequest) -> Path:
    target = place / "runs" / f"copy_{abs(hash(request.node.name)) % 10**8}"
    shutil.copytree(place / "runs/one", target)
    return target


def state(run: Path) -> dict:
    return torch.load(run / "checkpoints/last.ckpt", weights_only=True)


def test_a_stored_configuration_holds_no_path_of_its_folder(place: Path) -> None:
    text = (place / "runs/one/config.yaml").read_text()
    assert "${run_dir}/checkpoints" in text
    assert str(place / "runs") not in text and "trust" not in yaml.safe_load(text)


def test_a_copied_run_resumes_in_its_own_folder(place: Path, copy: Path) -> None:
    before = (place / "runs/one/checkpoints/last.ckpt").read_bytes()
    command(place, f"resume={copy}", "trainer.max_epochs=2", base=[])
    assert (place / "runs/one/checkpoints/last.ckpt").read_bytes() == before
    assert (state(place / "runs/one")["epoch"], state(copy)["epoch"]) == (0, 1)


def test_absolute_paths_of_earlier_versions_follow_the_folder(place: Path, copy: Path) -> None:
    old = str(place / "runs/one")
    text = (copy / "config.yaml").read_text().replace("${run_dir}", old) + f"run_dir: {old}\n"
    (copy / "config.yaml").write_text(text)
    before = (place / "runs/one/checkpoints/last.ckpt").read_bytes()
    command(place, f"resume={copy}", "trainer.max_epochs=2", base=[])
    assert (place / "runs/one/checkpoints/last.ckpt").read_bytes() == before
    assert state(copy)["epoch"] == 1


def test_options_of_the_optimiser_are_applied_on_resume_with_what_follows_from_them(place: Path, copy: Path) -> None:
    command(place, f"resume={copy}", "trainer.max_epochs=3", "optim.lr=0.0005", "callbacks.last.every_n_steps=1", base=[])
    cfg = yaml.safe_load((copy / "config.yaml").read_text())
    assert (cfg["trainer"]["max_epochs"], cfg["optim"]["epochs"], cfg["optim"]["lr"]) == (3, 3, 0.0005)
    groups = state(copy)["optimizer_states"][0]["param_groups"]
    assert {group["initial_lr"] for group in groups} == {0.0005}


def test_options_of_a_resume_last_and_later_ones_win(place: Path, copy: Path) -> None:
    for overrides, expected in ((["trainer.max_epochs=2", "logger=none"], 2), ([], 2), (["trainer.max_epochs=1"], 1)):
        command(place, f"resume={copy}", *overrides, base=[])
        cfg = yaml.safe_load((copy / "config.yaml").read_text())
        assert (cfg["trainer"]["max_epochs"], cfg["optim"]["epochs"], cfg["logger"]) == (expected, expected, {})


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("selection.slots.t0.ratio=0.9", r"selection.slots.t0.ratio was 0.5 and would be 0.9; a run keeps its model"),
        ("backbone.frames=8", r"backbone.frames was 16 and would be 8; a run keeps its model"),
        ("optim.lr=nan", r"optim.lr=nan: must be 0 or more"),
        ("dataset.val=3", r"the val list was .*, and is .*; a resumed run keeps its lists"),
    ],
)
def test_what_a_resumed_run_cannot_change_is_refused(place: Path, copy: Path, override: str, message: str) -> None:
    stored = (copy / "config.yaml").read_text()
    done = command(place, f"resume={copy}", override, "trainer.max_epochs=2", base=[], check=False)
    assert done.returncode == 2 and len(done.stderr.strip().splitlines()) == 1
    assert re.search(message, done.stderr), done.stderr
    assert (copy / "config.yaml").read_text() == stored
    assert json.loads((copy / "job.json").read_text())["resumed_with"] == [], "an override that was refused is asked again"


def test_a_key_that_is_newer_than_the_run_may_be_spelled_out_at_its_default_alone(place: Path, copy: Path) -> None:
    """As in a run of a recipe that has `frames=segment` now, and did not when the run was begun."""
    cfg = yaml.safe_load((copy / "config.yaml").read_text())
    for key in ("frames", "first_frame"):
        del cfg["selection"][key]
    (copy / "config.yaml").write_text(yaml.safe_dump(cfg, sort_keys=False))
    job = json.loads((copy / "job.json").read_text())
    (copy / "job.json").write_text(json.dumps({**job, "overrides": [*job["overrides"], "selection.frames=segment"]}))
    command(place, f"resume={copy}", "selection.frames=each", "trainer.max_epochs=2", base=[])
    assert state(copy)["epoch"] == 1
    done = command(place, f"resume={copy}", "selection.first_frame=next", base=[], check=False)
    assert done.returncode == 2
    assert "selection.first_frame was own and would be next; a run keeps its model" in done.stderr


def test_renamed_classes_are_refused_on_resume_and_in_a_test(place: Path, copy: Path) -> None:
    names = (copy / "classes.txt").read_text().split()
    (copy / "classes.txt").write_text("\n".join(["other", *names[1:]]) + "\n")
    for done in (
        command(place, f"resume={copy}", "trainer.max_epochs=2", base=[], check=False),
        door("evaluate", place, f"run={copy}", "trainer.accelerator=cpu", check=False),
    ):
        assert done.returncode == 2
        assert f"class 0 is '{names[0]}' in the data set, and was 'other' when" in done.stderr


def test_two_processes_cannot_share_a_folder(place: Path, copy: Path) -> None:
    with FileLock(copy / LOCK):
        for arguments in ([f"resume={copy}"], [*SMALL, f"hydra.run.dir={copy}"]):
            done = command(place, *arguments, base=[] if "resume" in arguments[0] else None, check=False)
            assert done.returncode == 2
            assert "in use by" in done.stderr and "two runs cannot share a folder" in done.stderr
    assert (copy / "checkpoints/last.ckpt").read_bytes() == (place / "runs/one/checkpoints/last.ckpt").read_bytes()


def test_runs_of_one_second_have_folders_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "RANK"):
        monkeypatch.delenv(name, raising=False)
    assert len({run_stamp() for _ in range(50)}) == 50


def test_what_another_run_left_in_a_folder_is_kept_apart(place: Path) -> None:
    folder = place / "runs/taken"
    command(place, *SMALL, "test=true", f"hydra.run.dir={folder}")
    result = (folder / "result.json").read_text()
    started = command(place, *SMALL, "seed=1", "trainer.max_epochs=0", f"hydra.run.dir={folder}")
    assert "held another run; what it left is in earlier_1" in started.stdout
    assert (folder / "earlier_1/result.json").read_text() == result
    assert (folder / "earlier_1/checkpoints/last.ckpt").is_file()
    assert json.loads((folder / "job.json").read_text())["overrides"][-1].startswith("trainer.max_epochs=0")


EVIL = [
    ("torch.load", {"f": "x.pt", "weights_only": False}),
    ("stts_lightning.load_model", {"path": "x.pt", "trust": True}),
    ("joblib.load", {"filename": "x"}),
    ("numpy.load", {"file": "x.npy", "allow_pickle": True}),
    ("sympy.sympify", {"a": "1"}),
    ("os.system", {"command": "true"}),
    ("my_package.MySource", {}),
]


@pytest.mark.parametrize(("target", "arguments"), EVIL)
@pytest.mark.parametrize("key", ["dataset", "callbacks.x", "logger.x", "trainer.plugins.0", "optim.x"])
def test_a_stored_configuration_builds_allowed_classes_alone(target: str, arguments: dict, key: str) -> None:
    node: object = {"_target_": target, **arguments}
    for name in reversed(key.split(".")):
        node = [node] if name == "0" else {name: node}
    assert isinstance(node, dict)
    with pytest.raises(TrustError, match=rf"run: {key}._target_={target} is not a class .* trust=true"):
        check_stored(node, "run")
    check_stored(node, "run", also=node)  # The user typed it.


def test_every_class_that_the_shipped_options_name_is_allowed() -> None:
    named: set[str] = set()
    for file in CONF.rglob("*.yaml"):
        named |= set(named_classes(yaml.safe_load(file.read_text()) or {}).values())
    # Of sweeps, which no run stores.
    assert {name for name in named if not name.startswith("hydra")} <= ALLOWED


def test_a_run_folder_that_somebody_sent_runs_no_code(place: Path, copy: Path) -> None:
    (place / "evil.py").write_text("from pathlib import Path\nPath('was_run').touch()\nclass Source: pass\n")
    cfg = yaml.safe_load((copy / "config.yaml").read_text())
    cfg["dataset"] = {"_target_": "evil.Source"}
    cfg["trust"] = True
    (copy / "config.yaml").write_text(yaml.safe_dump(cfg))
    for name, arguments in (("evaluate", [f"run={copy}", "trainer.accelerator=cpu"]), ("train", [f"resume={copy}"])):
        done = door(name, place, *arguments, check=False)
        assert done.returncode == 2 and "dataset._target_=evil.Source is not a class" in done.stderr
    assert not (place / "was_run").exists()


TRICKS = [
    {"callbacks": {"x": "${oc.create:{_target_: evil.Source}}"}},
    {"dataset": "${oc.create:{_target_: evil.Source}}"},
    {"selection": {"slots": {"t0": "${oc.create:{selector: evil.Source, ratio: 0.5}}"}}},
    {"selection": {"slots": {"t0": {"ratio": 0.5, "selector": "${evil}"}}}, "evil": "evil.Source"},
    {"dataset": {"_target_": "stts_lightning.data.datamodule.FolderSource", "root": "${oc.env:HOME}"}},
    {"dataset": {"_target_": "stts_lightning.data.datamodule.FolderSource", "_partial_": True, "root": "x"}},
    {"trainer": {"plugins": ["${run_dir}/${evil}"]}, "evil": "x"},
]


@pytest.mark.parametrize("trick", TRICKS, ids=str)
def test_references_in_a_stored_configuration_are_refused(place: Path, trick: dict) -> None:
    with pytest.raises(TrustError, match="refers to another value|is not allowed|is not a class"):
        check_stored(trick, "run")


def test_overrides_that_a_run_folder_notes_run_no_code(place: Path, copy: Path) -> None:
    (place / "evil.py").write_text("from pathlib import Path\nPath('was_run').touch()\nclass Source: pass\n")
    job = json.loads((copy / "job.json").read_text())
    value = "${oc.select:evil${trainer.max_epochs},lightning.pytorch.callbacks.Timer}"
    job["overrides"] += [f'+callbacks.x={{_target_:"{value}"}}', "+evil2=evil.Source"]
    (copy / "job.json").write_text(json.dumps(job))
    done = command(place, f"resume={copy}", "trainer.max_epochs=2", base=[], check=False)
    assert done.returncode == 2 and "callbacks.x._target_=evil.Source is not a class" in done.stderr
    assert not (place / "was_run").exists()


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("config.yaml", "", "lacks backbone, selection"),
        ("config.yaml", "a: [", "cannot be read"),
        ("config.yaml", "- 1", "is no configuration of a run"),
        ("job.json", "{", "job.json: cannot be read"),
    ],
)
def test_broken_run_folders_are_one_line(place: Path, copy: Path, file: str, text: str, message: str) -> None:
    (copy / file).write_text(text)
    done = command(place, f"resume={copy}", "trainer.max_epochs=2", base=[], check=False)
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.strip().splitlines()) == 1


def test_run_folders_may_have_any_name(place: Path) -> None:
    for name in ("it's (1), a=b", "[x] 日本"):
        shutil.copytree(place / "runs/one", place / name, dirs_exist_ok=True)
        done = door("evaluate", place, f"run={name}", "trainer.accelerator=cpu", "loader.num_workers=0")
        assert (place / name / "evaluation/evaluation.json").is_file(), done.stdout


def test_a_resumed_run_keeps_its_keys(place: Path, copy: Path) -> None:
    done = command(place, f"resume={copy}", "~callbacks.last", base=[], check=False)
    assert done.returncode == 2 and "a resumed run keeps its keys; set one to null instead" in done.stderr


def test_a_recipe_in_a_checkpoint_imports_no_selector_of_its_own(tmp_path: Path) -> None:
    model = create_model("mvit_tiny", "t0_0.5", 3)
    recipe = {**model.recipe, "selection": {"slots": {"t0": {"ratio": 0.5, "selector": "antigravity.Selector"}}}}
    torch.save({"state_dict": model.state_dict(), "model": recipe}, tmp_path / "sent.ckpt")
    sys.modules.pop("antigravity", None)
    with pytest.raises(TrustError, match=r"selection.slots.t0.selector=antigravity.Selector"):
        load_model(tmp_path / "sent.ckpt")
    assert "antigravity" not in sys.modules


def ended(name: str, place: Path, arguments: list[str], piece: Path, number: int) -> str:
    """Start a command, ask it to end as soon as it has written a piece, and return what it said."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(place), *sys.path])}
    code = f"{HURRY}\nrunpy.run_module('stts_lightning.{name}', run_name='__main__', alter_sys=True)"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not list(piece.glob("*.npz")) + list(piece.glob("*.json")):
        time.sleep(0.01)
    process.send_signal(number)
    output, _ = process.communicate(timeout=LONGEST)
    assert process.returncode == exit_status(number), output
    return output


# Each batch is written at once, and takes long enough to be met.
HURRY = """
import runpy, sys, time
from stts_lightning.training import predicting, testing
for kind in (testing._Collect, predicting.Predictor):
    kind.every_seconds = 0.0
finished = predicting.Predictor._finish
predicting.Predictor._finish = lambda self, window: (time.sleep(0.2), finished(self, window))[1]
collected = testing._Collect.on_test_batch_end
testing._Collect.on_test_batch_end = lambda self, *a, **k: (time.sleep(0.2), collected(self, *a, **k))[1]
sys.argv[0] = "x"
"""


def test_a_test_that_is_ended_goes_on_and_gives_the_same(place: Path, copy: Path) -> None:
    test = [f"run={copy}", "trainer.accelerator=cpu", "loader.batch_size=1", "loader.num_workers=0", "callbacks.progress=null"]
    folder = copy / "evaluation"
    output = ended("evaluate", place, test, folder / "partial", signal.SIGINT)
    assert f"the same command with hydra.run.dir={folder} goes on" in output and not (folder / "evaluation.json").exists()
    done = door("evaluate", place, *test)
    assert "of 16 videos were tested before; the test goes on" in done.stdout
    whole = door("evaluate", place, *test, "hydra.run.dir=runs/whole")
    assert "tested before" not in whole.stdout
    one, two = (json.loads((f / "evaluation.json").read_text()) for f in (folder, place / "runs/whole"))
    keys = ("top1", "top5", "mean_class_accuracy", "calibration_error", "top1_interval", "videos")
    assert [one[key] for key in keys] == [two[key] for key in keys]
    assert not (folder / "partial").exists()


PREDICTED = ["videos=data/demo_when/val", "trainer.accelerator=cpu", "loader.batch_size=1", "loader.num_workers=0"]


def test_a_prediction_that_is_ended_goes_on_and_gives_the_same(place: Path, copy: Path) -> None:
    predict = [f"run={copy}", *PREDICTED]
    folder = copy / "predictions"
    ended("predict", place, predict, folder / "partial", signal.SIGUSR1)
    assert not (folder / "predictions.json").exists()
    done = door("predict", place, *predict)
    assert re.search(r"[1-9]\d* of \d+ videos were predicted before; it goes on", done.stdout)
    door("predict", place, *predict, "hydra.run.dir=runs/predicted")
    one, two = (json.loads((f / "predictions.json").read_text()) for f in (folder, place / "runs/predicted"))
    assert one == two and len(one) == len(list((place / "data/demo_when/val").rglob("*.mp4")))


def test_pieces_of_another_question_are_left_aside(place: Path, copy: Path) -> None:
    predict = [f"run={copy}", *PREDICTED]
    ended("predict", place, predict, copy / "predictions/partial", signal.SIGINT)
    done = door("predict", place, *predict, "top=3")
    assert "predicted before" not in done.stdout
    assert len(json.loads((copy / "predictions/predictions.json").read_text())[0]["top"]) == 3
