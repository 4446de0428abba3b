"""MViTv2 against torchvision's and the official logits, and its relative positions under token selection."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.video import mvit as torchvision_mvit

from stts_lightning import create_model
from stts_lightning.backbones.checkpoints import read_checkpoint
from stts_lightning.backbones.mvit import pooled
from stts_lightning.backbones.mvit_v2 import Places, RelativeAttention, rows_at
from stts_lightning.selection.selector import Selection
from stts_lightning.selection.spec import SelectionSpec


def noisy(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in which no bias is 0, no norm 1 and no table of positions small."""
    generator = torch.Generator().manual_seed(0)
    return {
        key: value + (0.5 if "rel_pos" in key else 0.1) * torch.randn(value.shape, generator=generator)
        for key, value in state.items()
    }


def slowfast_state(name: str) -> dict[str, torch.Size]:
    """Keys and shapes of a file of SlowFast."""
    renamed = [
        (r"^backbone\.", ""), (r"^patch_embed\.", "patch_embed.proj."), (r"attn\.pool_(.)\.conv\.", r"attn.pool_\1."),
        (r"attn\.pool_(.)\.norm\.", r"attn.norm_\1."), (r"^head\.", "head.projection."),
    ]  # fmt: skip
    with torch.device("meta"):
        ours = create_model(name, num_classes=400).state_dict()
    state = {}
    for key, value in ours.items():
        for pattern, theirs in renamed:
            key = re.sub(pattern, theirs, key)
        state[key] = value.shape
    return state


@pytest.mark.usefixtures("undrawn")
@pytest.mark.reference
def test_logits_match_the_official_model(shared: Path, load_rule: Callable[[str], ModuleType], tmp_path: Path) -> None:
    """First logits, and the largest, of facebookresearch/SlowFast@287ec00 with weights and clip by the golden rule."""
    rule = load_rule("mvit")
    state = {key: torch.from_numpy(rule.fill(key, shape)) for key, shape in slowfast_state("mvit_v2_s").items()}
    assert len(state) == 397
    torch.save({"model_state": state}, tmp_path / "MViTv2_S_16x4.pyth")
    model = create_model("mvit_v2_s", pretrained=tmp_path / "MViTv2_S_16x4.pyth").eval()
    with torch.inference_mode():
        logits = model(torch.from_numpy(rule.inp()[:1]))[0]
    torch.testing.assert_close(logits[:4], torch.tensor((-1.21511, 1.50637, 0.75508, -0.20869)), atol=1e-5, rtol=0)
    assert int(logits.argmax()) == 312


def torchvision_tiny() -> torch.nn.Module:
    """torchvision's model of the sizes of `mvit_v2_tiny`."""
    blocks, dim, heads, kv = [], 32, 1, 4
    for number in range(6):
        out, q_stride = (2 * dim, [1, 2, 2]) if number in (1, 3) else (dim, [1, 1, 1])
        if number in (1, 3):
            heads, kv = 2 * heads, kv // 2
        kernel = [3, 3, 3]
        blocks.append(torchvision_mvit.MSBlockConfig(heads, dim, out, kernel, kernel, q_stride, [1, kv, kv]))
        dim = out
    return torchvision_mvit.MViT(
        (64, 64), 16, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True, proj_after_attn=True,
        num_classes=7,
    )  # fmt: skip


@pytest.mark.parametrize("name", ["mvit_v2_tiny", "mvit_v2_s"])
def test_logits_match_torchvisions_model(name: str, tmp_path: Path) -> None:
    theirs = (torchvision_tiny() if name == "mvit_v2_tiny" else torchvision_mvit.mvit_v2_s()).eval()
    theirs.load_state_dict(noisy(theirs.state_dict()))
    torch.save(theirs.state_dict(), tmp_path / "file.pth")
    ours = create_model(name, pretrained=tmp_path / "file.pth").eval()
    assert ours.weights.count("torchvision mvit_v2_s layout")
    weights = ours.state_dict()
    for key, value in read_checkpoint(tmp_path / "file.pth").translated(SelectionSpec()).items():
        assert torch.equal(weights[key].flatten(), value.flatten()), "bit for bit"
    clip = torch.randn(1, 3, *ours.backbone.clip_size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, found = theirs(clip), ours(clip)
    assert float(wanted.std()) > 0.1
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


FULL = (6, 8, 8)
Attention = Callable[..., RelativeAttention]


@pytest.fixture(params=[((1, 1, 1), (1, 4, 4)), ((1, 2, 2), (1, 2, 2)), ((1, 2, 2), (1, 1, 1)), ((1, 1, 1), (1, 1, 1))])
def attention(request: pytest.FixtureRequest) -> Attention:
    """Attention with the same weights for any grid; pooling takes the token in the middle of its kernel alone."""

    def build(size: tuple[int, int, int] = FULL, displacements: str = "picture") -> RelativeAttention:
        torch.manual_seed(0)
        made = RelativeAttention(16, 16, 2, size, FULL, *request.param, displacements)
        made.load_state_dict(noisy(made.state_dict()))
        for pool in (made.pool_q, made.pool_k, made.pool_v):
            with torch.no_grad():
                middle = pool.conv.weight[..., 1:2, 1:2, 1:2].clone()
                pool.conv.weight.zero_()
                pool.conv.weight[..., 1:2, 1:2, 1:2] = middle
        return made.eval()

    return build


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, 1 + math.prod(FULL), 16, generator=torch.Generator().manual_seed(5))


def masked(made: RelativeAttention, x: Tensor, seen: Tensor) -> Tensor:
    """Attention of the unpruned grid that sees only some keys, `(B, T, k, k)` bool: `(B, 1 + N', C)`."""
    q, k, v = made.qkv(x).unflatten(-1, (3, made.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
    q, k, v = made.pool_q(q, FULL), made.pool_k(k, FULL), made.pool_v(v, FULL)
    bias = F.pad(made.bias(q, Places()), (1, 0, 1, 0))
    hidden = F.pad(~seen.flatten(1), (1, 0)).unsqueeze(1).unsqueeze(1)
    out = F.scaled_dot_product_attention(q, k, v, bias.masked_fill(hidden, -torch.inf))
    out = torch.cat((out[:, :, :1], out[:, :, 1:] + q[:, :, 1:]), dim=2)
    return made.proj(out.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_kept_frames_attend_as_if_the_others_were_hidden(attention: Attention) -> None:
    frames = torch.tensor([[0, 1, 4], [2, 3, 5]])
    x, whole, part = tokens(), attention(), attention((3, 8, 8))
    grid = x[:, 1:].unflatten(1, FULL)
    kept = torch.stack([one[numbers] for one, numbers in zip(grid, frames, strict=True)])
    found, _ = part(torch.cat((x[:, :1], kept.flatten(1, 3)), 1), Places(frames))
    _, *keys = pooled(FULL, whole.kv_stride)
    seen = torch.zeros(2, 6, *keys, dtype=torch.bool)
    seen[torch.arange(2)[:, None], frames] = True
    wanted = masked(whole, x, seen)
    rest = wanted[:, 1:].unflatten(1, pooled(FULL, whole.q_stride))
    rest = torch.stack([one[numbers] for one, numbers in zip(rest, frames, strict=True)])
    torch.testing.assert_close(found, torch.cat((wanted[:, :1], rest.flatten(1, 3)), 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_kept_windows_attend_as_if_the_rest_were_hidden(attention: Attention) -> None:
    """Windows of 4x4 at places that differ from frame to frame."""
    corners = 4 * torch.randint(0, 2, (2, 6, 2), generator=torch.Generator().manual_seed(3))
    x, whole, part = tokens(), attention(), attention((6, 4, 4))

    def cut(grid: Tensor, stride: int) -> Tensor:
        side = 4 // stride
        rows = [
            [frame[r : r + side, c : c + side] for frame, (r, c) in zip(clip, (places // stride).tolist(), strict=True)]
            for clip, places in zip(grid, corners, strict=True)
        ]
        return torch.stack([torch.stack(row) for row in rows])

    kept = cut(x[:, 1:].unflatten(1, FULL), 1)
    found, _ = part(torch.cat((x[:, :1], kept.flatten(1, 3)), 1), Places(None, corners.float()))
    stride = whole.kv_stride[1]
    seen = torch.zeros(2, 6, 8 // stride, 8 // stride, dtype=torch.bool)
    for clip in range(2):
        for frame in range(6):
            row, column = (corners[clip, frame] // stride).tolist()
            seen[clip, frame, row : row + 4 // stride, column : column + 4 // stride] = True
    wanted = masked(whole, x, seen)
    rest = cut(wanted[:, 1:].unflatten(1, pooled(FULL, whole.q_stride)), whole.q_stride[1])
    torch.testing.assert_close(found, torch.cat((wanted[:, :1], rest.flatten(1, 3)), 1), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_windows_at_one_place_need_no_policy(attention: Attention) -> None:
    x = tokens()[:, : 1 + 6 * 25]
    same = torch.tensor([[2.0, 1.0], [0.0, 3.0]])[:, None].expand(-1, 6, -1)
    picture, window = (attention((6, 5, 5), policy) for policy in ("picture", "window"))
    torch.testing.assert_close(picture(x, Places(None, same))[0], window(x, Places(None, same))[0], atol=1e-5, rtol=1e-5)
    other = same.clone()
    other[:, 3] += 1
    assert not torch.allclose(picture(x, Places(None, other))[0], window(x, Places(None, other))[0], atol=1e-3)


def test_between_two_rows_a_position_is_their_mean_and_ends_hold() -> None:
    table = torch.tensor([[0.0, 10.0, 30.0]])
    assert rows_at(table, torch.tensor([[0.5, 1.25, -3.0, 7.0, 2.0]])).tolist() == [[5.0, 15.0, 0.0, 30.0, 30.0]]


def test_places_follow_slots_and_pooling() -> None:
    frames = Selection("t0", torch.tensor([[1, 3, 6]]), None, torch.zeros(1, 8), None)
    window = Selection(
        "s0", torch.zeros(1, 3), torch.tensor([[[1, 2, 4, 4], [0, 0, 4, 4], [3, 1, 4, 4]]]), torch.zeros(1, 3, 9), None
    )
    later = Selection("t1", torch.tensor([[0, 2]]), None, torch.zeros(1, 3), None)
    places = Places().after(frames).after(window).after_pooling(2).after(later)
    assert places.frames is not None and places.corners is not None
    assert places.frames.tolist() == [[1, 6]] and places.corners.tolist() == [[[0.5, 1.0], [1.5, 0.5]]]


@pytest.mark.parametrize("displacements", ["picture", "window"])
def test_all_frames_kept_is_the_unpruned_model(displacements: str) -> None:
    arguments: dict[str, Any] = {"displacements": displacements}
    plain = create_model("mvit_v2_tiny", None, 7, **arguments).eval()
    plain.load_state_dict(noisy(plain.state_dict()))
    full = create_model("mvit_v2_tiny", "t0_1.0_s1_1.0_t3_1.0", 7, **arguments).eval()
    full.load_state_dict(plain.state_dict(), strict=False)
    clip = torch.randn(2, 3, 16, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        torch.testing.assert_close(full(clip), plain(clip), atol=1e-5, rtol=1e-5)
