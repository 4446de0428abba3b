import hashlib
import os
import subprocess
from pathlib import Path

import torch
from warm import python_m

from stts_lightning import create_model, load_model

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "convert_checkpoint.py"


def convert(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return python_m(str(SCRIPT), list(arguments), folder, dict(os.environ))


def test_a_torchvision_file_becomes_safetensors_with_a_card(tmp_path: Path) -> None:
    from torchvision.models.video.swin_transformer import SwinTransformer3d

    sizes = {"depths": (2, 2), "heads": (1, 2), "window": (4, 4, 4)}
    torch.manual_seed(0)
    theirs = SwinTransformer3d([2, 4, 4], 16, [2, 2], [1, 2], [4, 4, 4], num_classes=9).eval()
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    arguments = '{"dim": 16, "depths": [2, 2], "heads": [1, 2], "window": [4, 4, 4], "frames": 8, "size": 32}'
    names = ["theirs.pth", "ours.safetensors", "--backbone", "video_swin_tiny"]
    done = convert(tmp_path, *names, "--arguments", arguments, "--licence", "CC0")
    assert done.returncode == 0, done.stderr
    model = load_model(tmp_path / "ours.safetensors").eval()
    assert sizes.items() <= {k: tuple(v) if isinstance(v, list) else v for k, v in model.recipe.items()}.items()
    clip = torch.randn(2, 3, 8, 32, 32)
    with torch.inference_mode():
        torch.testing.assert_close(model(clip), theirs(clip), atol=1e-5, rtol=1e-4)
    card = (tmp_path / "ours.md").read_text()
    for file in ("theirs.pth", "ours.safetensors"):
        assert hashlib.sha256((tmp_path / file).read_bytes()).hexdigest() in card
    assert "torchvision swin3d layout" in card
    assert "| licence | CC0 |" in card


def test_refusals_are_one_line(tmp_path: Path) -> None:
    torch.save(create_model("mvit_tiny", num_classes=3).state_dict(), tmp_path / "bare.pt")
    for arguments, message in (
        (["none.pt", "o.safetensors"], "error: checkpoint none.pt: no such file"),
        (["bare.pt", "o.safetensors"], "error: checkpoint bare.pt: does not say which model it holds; name it with --backbone"),
        (["bare.pt", "o.safetensors", "--backbone", "mvit_b61"], "error: backbone 'mvit_b61' is unknown"),
    ):
        done = convert(tmp_path, *arguments)
        assert done.returncode == 1
        assert done.stderr.strip().splitlines()[-1].startswith(message), done.stderr
