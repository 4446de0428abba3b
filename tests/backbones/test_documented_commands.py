"""Files of each layout of ViT and MViTv2, at full size, tested by the command that docs/checkpoints.md gives for them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torchvision
from backbones.test_mvit_v2 import slowfast_state
from backbones.test_vit_parity import official_shapes
from warm import python_m

from stts_lightning import create_model, read_clips
from stts_lightning.analysis.evaluation import Predictions
from stts_lightning.data.decode import write_mp4

pytestmark = pytest.mark.slow


def videomae(folder: Path, load_rule: Callable[[str], ModuleType]) -> Path:
    rule = load_rule("mvit")
    state = {key: torch.from_numpy(rule.fill(key, shape)) for key, shape in official_shapes("vit_s", 400).items()}
    torch.save({"module": state}, folder / "checkpoint.pth")
    return folder / "checkpoint.pth"


def hugging_face(folder: Path, load_rule: Callable[[str], ModuleType]) -> Path:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.VideoMAEConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=400)
    torch.manual_seed(0)
    transformers.VideoMAEForVideoClassification(config).save_pretrained(folder)
    return folder / "model.safetensors"


def slowfast(folder: Path, load_rule: Callable[[str], ModuleType]) -> Path:
    rule = load_rule("mvit")
    state = {key: torch.from_numpy(rule.fill(key, shape)) for key, shape in slowfast_state("mvit_v2_s").items()}
    torch.save({"model_state": state}, folder / "MViTv2_S_16x4_k400.pyth")
    return folder / "MViTv2_S_16x4_k400.pyth"


def of_torchvision(folder: Path, load_rule: Callable[[str], ModuleType]) -> Path:
    torch.manual_seed(0)
    torch.save(torchvision.models.video.mvit_v2_s().state_dict(), folder / "mvit_v2_s-ae3be167.pth")
    return folder / "mvit_v2_s-ae3be167.pth"


FILES = {
    "VideoMAE ViT": (videomae, "vit_s", 15, 56.95),
    "Hugging Face VideoMAE": (hugging_face, "vit_s", 15, 56.95),
    "SlowFast MViTv2": (slowfast, "mvit_v2_s", 5, 64.46),
    "torchvision mvit_v2_s": (of_torchvision, "mvit_v2_s", 5, 64.46),
}


@pytest.mark.parametrize("layout", FILES)
def test_documented_command(layout: str, load_rule: Callable[[str], ModuleType], tmp_path: Path) -> None:
    make, backbone, views, gflops = FILES[layout]
    file = make(tmp_path, load_rule)
    root = tmp_path / "kinetics400"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (90, 30, 40, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    write_mp4(root / "video.mp4", pixels)
    for label in range(400):
        (root / f"{label}.mp4").symlink_to("video.mp4")
    (root / "train.csv").write_text("".join(f"{label}.mp4 {label}\n" for label in range(400)))
    (root / "val.csv").write_text("video.mp4 7\n")
    done = python_m(
        "stts_lightning.evaluate",
        [
            f"checkpoint={file}", "dataset=kinetics400", f"backbone={backbone}", f"dataset.root={root}", "run_dir=out",
            "loader.num_workers=0",
        ],
        tmp_path, {**os.environ, "OMP_NUM_THREADS": "2"}, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert told["views"] == views and told["gflops_per_view"] == pytest.approx(gflops, abs=0.01)
    assert layout in told["weights"]
    logits = Predictions.load(tmp_path / "out" / "predictions.npz").logits[0]
    model = create_model(backbone, pretrained=file).eval()
    how = {"views": 5, "crops": 3, "sampling": "videomae", "short_side": "crop"} if views == 15 else {"views": 5}
    clips = read_clips(root / "video.mp4", model.backbone.clip_size, **how)
    with torch.inference_mode():
        found = torch.cat([model(clip[None]) for clip in clips])
    torch.testing.assert_close(torch.from_numpy(logits), found, atol=1e-4, rtol=1e-4)
