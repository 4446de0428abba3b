import json
import logging
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from stts_lightning import create_model, load_model
from stts_lightning.backbones import CheckpointError
from stts_lightning.backbones.checkpoints import save_weights

TINY = {"num_classes": 5, "size": 64}


def saved(model: torch.nn.Module, path: Path, **extra: torch.Tensor) -> Path:
    torch.save({**model.state_dict(), **extra}, path)
    return path


def test_own_checkpoint_round_trip(tmp_path: Path) -> None:
    model = create_model("mvit_tiny", "t0_0.5_s2_0.6", **TINY).eval()
    again = create_model("mvit_tiny", "t0_0.5_s2_0.6", pretrained=saved(model, tmp_path / "m.pt"), **TINY).eval()
    clip = torch.randn(1, 3, 16, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(clip), again(clip))


def test_new_selectors_may_be_missing_and_nothing_else(tmp_path: Path) -> None:
    plain = create_model("mvit_tiny", **TINY)
    path = saved(plain, tmp_path / "m.pt")
    create_model("mvit_tiny", "t0_0.5", pretrained=path, **TINY)
    state = plain.state_dict()
    del state["backbone.blocks.3.attn.qkv.weight"]
    torch.save(state, path)
    with pytest.raises(CheckpointError, match=r"1 missing \[backbone.blocks.3.attn.qkv.weight\]"):
        create_model("mvit_tiny", "t0_0.5", pretrained=path, **TINY)


def test_class_count_needs_head_reset(tmp_path: Path) -> None:
    path = saved(create_model("mvit_tiny", **TINY), tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"head.weight \(5, 128\) for \(9, 128\).*head=reset"):
        create_model("mvit_tiny", pretrained=path, num_classes=9, size=64)
    create_model("mvit_tiny", pretrained=path, num_classes=9, size=64, head="reset")


def test_scorer_is_recognised(tmp_path: Path) -> None:
    official = create_model("mvit_tiny", {"slots": {"t0": 0.5}, "scorer": "official"}, **TINY)
    model = create_model("mvit_tiny", "t0_0.5", pretrained=saved(official, tmp_path / "m.pt"), **TINY)
    assert model.slots.selection.scorer == "official"


def test_recipe_rebuilds_what_was_settled(tmp_path: Path) -> None:
    official = create_model("mvit_tiny", {"slots": {"t0": 0.5}, "scorer": "official"}, pool_norm_eps=1e-5, **TINY).eval()
    path = saved(official, tmp_path / "m.pt")
    model = create_model("mvit_tiny", {"slots": {"t0": {"keep": 4}}, "sigma": 0.3}, pretrained=path, pool_norm_eps=1e-5, **TINY)
    recipe = json.loads(json.dumps(model.recipe))
    assert recipe["selection"]["scorer"] == "official"
    again = create_model(**recipe, pretrained=path).eval()
    assert again.slots.selection == model.slots.selection
    clip = torch.randn(1, 3, 16, 64, 64)
    with torch.inference_mode():
        assert torch.equal(official(clip), again(clip))


def test_unreadable_checkpoints_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        create_model("mvit_tiny", pretrained=tmp_path / "none.pt")
    (tmp_path / "noise.pt").write_bytes(bytes(range(256)))
    with pytest.raises(CheckpointError, match="neither a torch nor a safetensors file"):
        create_model("mvit_tiny", pretrained=tmp_path / "noise.pt")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"its keys \(a\) belong to none of the known layouts"):
        create_model("mvit_tiny", pretrained=tmp_path / "other.pt")


def touch(path: str) -> None:
    Path(path).touch()


class Bomb:
    """A pickle that runs code where it is read."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, ...]:
        return touch, (str(self.trace),)


def test_a_pickle_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    model = create_model("mvit_tiny", **TINY)
    torch.save({"model_state": model.state_dict(), "cfg": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pyth")
    with pytest.raises(CheckpointError, match=r"bomb.pyth: holds a Python object \(.+\) besides weights.*trust=true reads it"):
        create_model("mvit_tiny", pretrained=tmp_path / "bomb.pyth", **TINY)
    assert not (tmp_path / "ran").exists()
    trusted = create_model("mvit_tiny", pretrained=tmp_path / "bomb.pyth", trust=True, **TINY)
    assert torch.equal(trusted.head.weight, model.head.weight)
    assert (tmp_path / "ran").exists(), "what trust means"


@pytest.mark.parametrize("kind", ["torch", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.98])
def test_truncated_files_are_named(tmp_path: Path, kind: str, share: float) -> None:
    model = create_model("mvit_tiny", **TINY)
    path = tmp_path / "weights"
    if kind == "torch":
        torch.save(model.state_dict(), path)
    else:
        save_weights(model, model.recipe, path)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(CheckpointError, match=f"checkpoint {path}: damaged or cut short"):
        create_model("mvit_tiny", pretrained=path, **TINY)


@pytest.mark.parametrize("name", ["weights.pyth", "weights.safetensors"])
@pytest.mark.parametrize(
    "text",
    ["version https://git-lfs.github.com/spec/v1\noid sha256:12\n", "<!DOCTYPE html>\n<html>", '{"a": 1}', "späte Grüße\n" * 40],
)
def test_text_is_no_damaged_checkpoint(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    begin = re.escape(repr(text.splitlines()[0]))
    with pytest.raises(CheckpointError, match=f"checkpoint .*{name}: is text, not weights; it begins with {begin}"):
        create_model("mvit_tiny", pretrained=tmp_path / name, **TINY)


def test_the_other_backbones_file_is_named(tmp_path: Path) -> None:
    from torchvision.models.video import swin3d_t

    torch.save(swin3d_t(num_classes=5).state_dict(), tmp_path / "swin.pth")
    with pytest.raises(CheckpointError, match=r"swin.pth \(torchvision swin3d layout\): holds a VideoSwin; the model is a MViT"):
        create_model("mvit_tiny", pretrained=tmp_path / "swin.pth", **TINY)
    own = create_model("video_swin_tiny", num_classes=5)
    torch.save({"state_dict": own.state_dict(), "model": dict(own.recipe)}, tmp_path / "own.ckpt")
    with pytest.raises(CheckpointError, match="does not fit the model: .*; it was made as video_swin_tiny"):
        create_model("mvit_tiny", pretrained=tmp_path / "own.ckpt", **TINY)


def test_safetensors_of_ours_says_how_it_is_built(tmp_path: Path) -> None:
    model = create_model("mvit_tiny", "t0_0.5_s2_0.6", **TINY).eval()
    save_weights(model, model.recipe, tmp_path / "m.safetensors", {"licence": "MIT"})
    again = load_model(tmp_path / "m.safetensors").eval()
    assert again.slots.selection == model.slots.selection
    clip = torch.randn(1, 3, 16, 64, 64)
    with torch.inference_mode():
        assert torch.equal(model(clip), again(clip))
    torch.save(model.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(CheckpointError, match="does not say how its model is built"):
        load_model(tmp_path / "bare.pt")


def test_what_the_first_file_settled_is_handed_on(tmp_path: Path) -> None:
    """A run tuned from an official file stays what it was when its own checkpoint is loaded without being told."""
    for name, choice, value in (("mvit_tiny", "pool_norm_eps", 1e-5), ("video_swin_tiny", "window_policy", "official")):
        model = create_model(name, "t0_0.5", 5, **{choice: value})
        torch.save({"state_dict": model.state_dict(), "model": dict(model.recipe)}, tmp_path / "own.ckpt")
        again = create_model(name, "t0_0.5", 5, pretrained=tmp_path / "own.ckpt")
        assert again.recipe[choice] == value
        assert create_model(name, "t0_0.5", 5, pretrained=tmp_path / "own.ckpt", **{choice: model.recipe[choice]})


def test_a_slot_more_than_the_file_has_is_new(tmp_path: Path) -> None:
    path = saved(create_model("mvit_tiny", "t0_0.5", **TINY), tmp_path / "m.pt")
    model = create_model("mvit_tiny", "t0_0.5_s2_0.6", pretrained=path, **TINY)
    assert "as initialised: selector s2" in model.weights
    with pytest.raises(CheckpointError, match=r"unexpected \[backbone.slots.selectors.t0"):
        create_model("mvit_tiny", "t2_0.5", pretrained=path, **TINY)


State = dict[str, torch.Tensor]


def prefixed(prefix: str) -> Callable[[torch.nn.Module], State]:
    return lambda model: {f"{prefix}{key}": value for key, value in model.state_dict().items()}


def averaged(model: torch.nn.Module) -> State:
    return AveragedModel(model).state_dict()


WRITTEN: dict[str, Callable[[torch.nn.Module], dict[str, object]]] = {
    "DataParallel": lambda model: torch.nn.DataParallel(model).state_dict(),
    "torch.compile": lambda model: torch.compile(model).state_dict(),
    "DDP of torch.compile": lambda model: torch.nn.DataParallel(torch.compile(model)).state_dict(),
    "AveragedModel": averaged,
    "AveragedModel of torch.compile": lambda model: averaged(torch.compile(model)),
    "DDP of AveragedModel": lambda model: torch.nn.DataParallel(AveragedModel(model)).state_dict(),
    "LightningModule with model": lambda model: {"state_dict": prefixed("model.")(model)},
    "LightningModule with net": lambda model: {"state_dict": prefixed("net.")(model)},
    "LightningModule with a compiled model": lambda model: {"state_dict": prefixed("model._orig_mod.")(model)},
    "model_state_dict": lambda model: {"epoch": 3, "model_state_dict": model.state_dict(), "loss": 0.5},
    "model_state_dict of DDP": lambda model: {"model_state_dict": torch.nn.DataParallel(model).state_dict()},
    "DeepSpeed": lambda model: {"module": model.state_dict(), "optimizer": None, "global_steps": 3},
    "network": lambda model: {"network": model.state_dict()},
    "weights": lambda model: {"weights": model.state_dict()},
    "an average alone": lambda model: {"state_dict_ema": prefixed("module.")(model)},
}


@pytest.mark.parametrize("written", list(WRITTEN))
@pytest.mark.parametrize("selection", [None, "t0_0.5_s2_0.6"])
def test_what_training_puts_around_the_weights_is_taken_off(written: str, selection: str | None, tmp_path: Path) -> None:
    model = create_model("mvit_tiny", selection, **TINY)
    torch.save(WRITTEN[written](model), tmp_path / "m.pt")
    again = create_model("mvit_tiny", selection, pretrained=tmp_path / "m.pt", **TINY)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def test_a_prefix_that_only_some_weights_carry_stays(tmp_path: Path) -> None:
    model = create_model("mvit_tiny", **TINY)
    torch.save({**prefixed("module.")(model), "other": torch.ones(1)}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match="belong to none of the known layouts"):
        create_model("mvit_tiny", pretrained=tmp_path / "m.pt", **TINY)
    torch.save({"state_dict": {**prefixed("model.")(model), "loss.scale": torch.ones(1)}}, tmp_path / "m.pt")
    with pytest.raises(CheckpointError, match=r"0 missing \[\], 1 unexpected \[loss.scale\]"):
        create_model("mvit_tiny", pretrained=tmp_path / "m.pt", **TINY)


@pytest.mark.parametrize("other", ["state_dict_ema", "model_ema", "model"])
def test_of_several_sets_the_plain_one_is_taken_and_the_others_are_named(
    other: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain, average = create_model("mvit_tiny", **TINY), create_model("mvit_tiny", **TINY)
    path = tmp_path / "m.pt"
    torch.save({other: average.state_dict(), "state_dict": plain.state_dict(), "epoch": torch.tensor(3)}, path)
    with caplog.at_level(logging.INFO, "stts_lightning"):
        again = create_model("mvit_tiny", pretrained=path, **TINY)
    assert torch.equal(again.head.weight, plain.head.weight)
    assert f"checkpoint {path}: takes the weights under state_dict; there are others under {other}" in caplog.text


def test_tensors_beside_an_unusual_wrapper_are_the_weights(tmp_path: Path) -> None:
    model, other = create_model("mvit_tiny", **TINY), create_model("mvit_tiny", **TINY)
    torch.save({**model.state_dict(), "weights": other.state_dict()}, tmp_path / "m.pt")
    again = create_model("mvit_tiny", pretrained=tmp_path / "m.pt", **TINY)
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_published_layouts_are_recognised_under_a_prefix(prefix: str, tmp_path: Path) -> None:
    from torchvision.models.video import swin3d_t

    theirs = swin3d_t(num_classes=5)
    torch.save({"model_state_dict": prefixed(prefix)(theirs)}, tmp_path / "m.pt")
    model = create_model("video_swin_t", pretrained=tmp_path / "m.pt", num_classes=5)
    assert "torchvision swin3d layout" in model.weights and torch.equal(model.head.weight, theirs.head.weight)
