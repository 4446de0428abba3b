"""A misspelt key or option gets one line that names the nearest, before anything is made."""

from pathlib import Path

import pytest

from stts_lightning import command_line
from stts_lightning.overrides import for_hydra


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trainer.max_epoch=3"], "trainer.max_epoch: no such key; did you mean trainer.max_epochs?"),
        (["epochs=3"], "epochs: no such key; did you mean trainer.max_epochs?"),
        (["lr=3"], "lr: no such key; did you mean optim.lr?"),
        (["test=flase"], "test=flase: allowed are true, false"),
        (["callbacks.sigma.decay=flase"], "callbacks.sigma.decay=flase: allowed are true, false"),
        (["max_epochs=3"], "max_epochs: no such key; did you mean trainer.max_epochs?"),
        (["selction=t0_0.5"], "selction: no such key; did you mean selection?"),
        (["dataset=list", "dataset.trian=x"], "dataset.trian: no such key; did you mean dataset.train?"),
        (["trainer.zzz=1"], "trainer.zzz: no such key; trainer has "),
        (["recipe=papr"], "recipe=papr: no such option (did you mean paper?); allowed are finetune, "),
        (["backbone=mvit"], "backbone=mvit: no such option (did you mean mvit_b16 or mvit_tiny or mvit_v2_b or "),
        (["selection=abc"], "selection=abc: no such option; allowed are slots in the paper's notation"),
        (["selection=t0_05"], "selection.slots.t0.ratio=5.0: must lie in (0, 1]; did you mean 0.5, as in t0_0.5?"),
        (["-m", "selection.sigma=0.1,0.2", "optim.lrr=1,2"], "optim.lrr: no such key; did you mean optim.lr?"),
        (["-m", "selection=t0_0.5,t0_x"], "selection=t0_x: no such option"),
        (["-m", "selection.sigma=0.1,-1"], "selection.sigma=-1: must be 0 or more"),
        (["-m", "loader.batch_size=1,2,0"], "loader.batch_size=0: must be 1 or more"),
        (["clip.train_transform.scale=[0.9,0.1]"], "clip.train_transform.scale=[0.9,0.1]: the first must not be above"),
        (["max_epochs", "dataset=demo"], "max_epochs: options are written key=value; did you mean trainer.max_epochs=...?"),
        (["selection=t0_0.5,t0_0.6"], "selection=t0_0.5,t0_0.6: several values; with -m each is a run of its own\n"),
        (
            ["selection=[t0_0.5,t0_0.6]"],
            "selection=[t0_0.5,t0_0.6]: takes one option; selection=t0_0.5,t0_0.6 with -m makes a run",
        ),
        ([""], "'': options are written key=value ("),
        (["--hlp"], "--hlp: options are written key=value; did you mean --help?"),
        (["--batch-size", "4"], "--batch-size: options are written key=value; did you mean loader.batch_size=...?"),
        (
            ["--trainer.max_epochs=4"],
            "--trainer.max_epochs=4: options are written key=value; did you mean trainer.max_epochs=...?",
        ),
        (
            ["selection.sigma=0.1,0.2"],
            "selection.sigma=0.1,0.2: several values; with -m each is a run of its own; selection.sigma=[0.1,0.2] is one value",
        ),
    ],
)
def test_what_is_misspelt_is_named_with_the_nearest(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        command_line.check("train", for_hydra(arguments))
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "argument", "meant"),
    [
        ("predict", "runs/a", "; did you mean run=runs/a?"),
        ("train", "runs/a", "; did you mean resume=runs/a?"),
        ("evaluate", "best.ckpt", "; did you mean checkpoint=best.ckpt?"),
        ("train", "best.ckpt", "; did you mean pretrained=best.ckpt?"),
        ("predict", "clip.mp4", "; did you mean videos=clip.mp4?"),
        ("train", "videos", "; did you mean dataset.root=videos?"),
        ("predict", "runs/b", " (`stts predict --help`"),
    ],
)
def test_a_path_gets_the_key_that_takes_it(
    command: str, argument: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/a", "videos"):
        Path(folder).mkdir(parents=True)
    for file in ("runs/a/config.yaml", "best.ckpt", "clip.mp4"):
        Path(file).touch()
    with pytest.raises(SystemExit):
        command_line.check(command, [argument])
    assert f"error: {argument}: options are written key=value{meant}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("train", ["optim.parts.backbone.frozen=true", "selection.slots.t3.ratio=0.5", "+trainer.detect_anomaly=true"]),
        ("train", ["-m", "selection=t0_0.5,none", "selection.sigma=interval(0.1,0.5)", "hparams_search=ratios"]),
        ("train", ["compile=default", "clip.decoder=pyav", "test=false", "loader.num_workers=auto"]),
        ("train", ["hydra.run.dir=runs/x", "~logger", "optim.betas=[0.9,0.98]"]),
        ("train", ["--help", "no.such.key=1"]),
        ("train", ["logger=[csv,wandb]"]),
        ("train", ["--cfg", "job", "dataset=demo"]),
        ("evaluate", ["run=runs/x", "++backbone.drop_path=0.1", "which=best"]),
        ("report", ["-m", "paper_table=range(1,9)"]),
    ],
)
def test_what_is_right_passes(command: str, arguments: list[str]) -> None:
    command_line.check(command, for_hydra(arguments))


def test_nothing_is_left_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        command_line.check("train", ["trainer.max_epoch=3"])
    assert not list(tmp_path.iterdir())
