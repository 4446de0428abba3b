"""From Python: a run's folder or a published file, a video, and the names of its classes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from torchvision.models.video import swin3d_t
from training.test_commands import command, door

import stts_lightning
from stts_lightning import create_model, list_models, load_model
from stts_lightning.backbones.checkpoints import CheckpointError, save_weights
from stts_lightning.configuration import conf_dir
from stts_lightning.data.clips import ClipRule
from stts_lightning.data.demo import DemoSpec, make_demo
from stts_lightning.run_folders import RunError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    command(folder, "trainer.max_epochs=1", "hydra.run.dir=runs/run", "callbacks.panels=null", "clip.test_views=2")
    return folder


def test_a_run_is_loaded_from_its_folder_and_predicts_as_the_command_does(place: Path) -> None:
    run = place / "runs" / "run"
    model = load_model(run)
    names = (run / "classes.txt").read_text().splitlines()
    assert list(model.classes) == names and len(names) == 8
    assert model.clips.views == 2, "as the run was tested"
    best = load_model(run, "best")
    assert best.weights.startswith(str(run / "checkpoints/best.ckpt"))
    video = next((place / "data" / "demo_when" / "val").glob("*/*.mp4"))
    found = model.predict(video, top=3)
    assert len(found) == 3 and [one.name for one in found] == [names[one.label] for one in found]
    assert found[0].probability >= found[1].probability > 0
    # The same clips as in the run's test, whatever the mode that the model is in.
    clips = stts_lightning.read_clips(video, model.backbone.clip_size, **vars(model.clips))
    with torch.inference_mode():
        chances = model.eval()(clips).softmax(-1).mean(0)
    assert found[0].probability == pytest.approx(float(chances.max()), rel=1e-5) and len(clips) == 2
    assert model.train().predict(video) == model.eval().predict(video) and not model.training
    assert len(model.predict(video, top=99)) == 8


def test_a_moved_checkpoint_and_a_converted_file_know_their_classes(place: Path, tmp_path: Path) -> None:
    source = place / "runs/run/checkpoints/last.ckpt"
    moved = tmp_path / "moved.ckpt"
    moved.write_bytes(source.read_bytes())
    names = load_model(source).classes
    assert load_model(moved).classes == names
    model = load_model(moved)
    save_weights(model, {**model.recipe, "classes": list(model.classes)}, tmp_path / "file.safetensors")
    assert load_model(tmp_path / "file.safetensors").classes == names
    assert load_model(moved, classes=list("abcdefgh")).classes == tuple("abcdefgh")
    with pytest.raises(ValueError, match="2 names for 8 classes"):
        model.classes = ["a", "b"]
    model.reset_classifier(3)
    assert model.classes == ("0", "1", "2")


@pytest.mark.parametrize(("count", "first"), [(400, "abseiling"), (12, "0")])
def test_a_published_file_of_400_classes_has_the_names_of_kinetics(tmp_path: Path, count: int, first: str) -> None:
    torch.save(swin3d_t(num_classes=count).state_dict(), tmp_path / "swin3d_t.pth")
    assert create_model("video_swin_t", pretrained=tmp_path / "swin3d_t.pth").classes[0] == first
    assert create_model("video_swin_t", num_classes=7, pretrained=tmp_path / "swin3d_t.pth", head="reset").classes[0] == "0"
    assert create_model("mvit_tiny").classes[:2] == ("0", "1"), "400 of anything"


@pytest.mark.parametrize("name", [name for name in list_models() if not name.endswith("tiny")])
def test_each_backbone_reads_clips_as_its_option_does(name: str) -> None:
    """From Python the clips of published weights are those that `evaluate backbone=NAME` takes."""
    with initialize_config_dir(version_base="1.3", config_dir=conf_dir()):
        clip = compose("evaluate", [f"backbone={name}", "dataset=kinetics400", "checkpoint=x"]).clip
    with torch.device("meta"):
        model = create_model(name, None, 0)
    assert model.clips == ClipRule.of(clip)


def test_costs_and_speed_of_a_run(place: Path) -> None:
    door("flops", place, "run=runs/run", "json=cost.json")
    cost, result = (json.loads((place / file).read_text()) for file in ("cost.json", "runs/run/result.json"))
    assert cost["gflops"] == pytest.approx(result["gflops_per_view"], abs=1e-4)
    assert cost["parameters"] == result["parameters"] and cost["backbone"] == "mvit_tiny"
    done = door("benchmark", place, "run=runs/run", "seconds=0", "rounds=2", "json=speed.json")
    rows = {row["model"]: row for row in json.loads((place / "speed.json").read_text())["rows"]}
    assert set(rows) == {"unpruned:runs/run", "run:runs/run"}
    assert rows["run:runs/run"]["over_unpruned"] > 0, done.stdout
    assert rows["run:runs/run"]["gflops"] < rows["unpruned:runs/run"]["gflops"]
    missing = door("benchmark", place, "run=runs/nothing", check=False)
    assert missing.returncode == 2 and "error: checkpoint runs/nothing" in missing.stderr


def test_list_models_names_what_create_model_takes() -> None:
    assert {"mvit_b16", "video_swin_b", "vit_b", "mvit_v2_s"} <= set(list_models())


def test_what_a_model_cannot_do_is_said(place: Path, tmp_path: Path) -> None:
    model, video = create_model("mvit_tiny"), next((place / "data" / "demo_when" / "val").glob("*/*.mp4"))
    for given, said in (
        ({"views": 0}, "views=0: allowed are 1 or more"),
        ({"top": 0}, "top=0: must be 1 or more"),
        ({"crops": 2}, "crops=2: allowed are 1, 3"),
        ({"sampling": "dense"}, "sampling=dense: allowed are .*segments"),
        ({"view": 3}, "view: no such argument; there are views, crops, stride"),
    ):
        with pytest.raises(ValueError, match=said):
            model.predict(video, **given)
    with pytest.raises(ValueError, match="has no head"):
        create_model("mvit_tiny", num_classes=0).predict(video)
    with pytest.raises(RunError, match=r"runs: has no checkpoints; runs in it: .*runs/run"):
        load_model(place / "runs")
    with pytest.raises(RunError, match="run: has no checkpoint 'bets'; there is best and last"):
        load_model(place / "runs" / "run", "bets")
    with pytest.raises(RunError, match="there is no .*last.ckpt; give the folder of a run"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_classes": -1}, "num_classes=-1: must be a whole number, 0 for no head"),
        ({"num_classes": "5"}, "num_classes='5': must be a whole number"),
        ({"size": 0}, "backbone: frames=16 must be a multiple of 2, size=0 of 4, both above 0"),
        ({"frames": -2}, "backbone: frames=-2 must be a multiple of 2"),
        ({"selecton": "t0_0.5"}, "backbone mvit_tiny: .*unexpected keyword argument 'selecton'"),
    ],
)
def test_what_no_model_can_be_is_said(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        create_model("mvit_tiny", **asked)


@pytest.mark.parametrize("shape", [(3, 16, 64, 64), (1, 16, 3, 64, 64), (1, 3, 8, 64, 64)])
def test_clips_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = create_model("mvit_tiny", size=64)
    with pytest.raises(ValueError, match=re.escape(f"clips of shape {shape}: this backbone takes (B, 3, 16, 64, 64)")):
        model(torch.zeros(shape))


def test_a_slot_that_keeps_everything_is_named(caplog: pytest.LogCaptureFixture) -> None:
    create_model("mvit_tiny", "t0_0.5_s4_0.9")
    assert caplog.messages == ["selection s4 (4x4 of 4x4, 1 anchors) keeps everything: its grid is too small for this ratio"]
    caplog.clear()
    create_model("mvit_tiny", "t0_0.5_s4_1.0")
    assert not caplog.messages


def test_selectors_that_nobody_asked_for_are_named(tmp_path: Path) -> None:
    torch.save(create_model("mvit_tiny", "t0_0.5_s0_0.5").state_dict(), tmp_path / "file.pth")
    with pytest.raises(CheckpointError, match=r"it has selectors of s0, t0: give their ratios too, as in selection=s0_0.6"):
        create_model("mvit_tiny", pretrained=tmp_path / "file.pth")


def test_a_video_that_does_not_decode_is_named(tmp_path: Path) -> None:
    make_demo(tmp_path / "demo", DemoSpec(train=1, val=1))
    (tmp_path / "rotten.mp4").write_text("rotten")
    from stts_lightning.data.decode import DecodeError

    with pytest.raises(DecodeError, match="rotten.mp4"):
        create_model("mvit_tiny", None, 8).predict(tmp_path / "rotten.mp4")
