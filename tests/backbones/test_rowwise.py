"""Layers by pieces on a CPU say the same as plain ones, and let others hook in."""

import pytest
import torch
from torch import Tensor, nn

from stts_lightning import create_model
from stts_lightning.backbones import rowwise
from stts_lightning.backbones.rowwise import Linear, Perceptron, perceive


def layers(frozen: bool) -> tuple[nn.LayerNorm, Perceptron]:
    torch.manual_seed(0)
    norm, mlp = nn.LayerNorm(6), Perceptron(6, 24, 5)
    for parameter in (*norm.parameters(), *mlp.parameters()):
        nn.init.normal_(parameter)
    if frozen:
        norm.weight.requires_grad_(False)
        mlp.fc1.weight.requires_grad_(False)
        mlp.fc2.bias.requires_grad_(False)
    return norm, mlp


@pytest.mark.parametrize("frozen", [False, True])
def test_the_perceptrons_own_backward_pass(monkeypatch: pytest.MonkeyPatch, frozen: bool) -> None:
    monkeypatch.setattr(rowwise, "PIECE", 7)  # Several pieces, the last one smaller.
    norm, mlp = layers(frozen)
    found = []
    for plain in (False, True):
        x = torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        weights = [p for p in (*norm.parameters(), *mlp.parameters()) if p.requires_grad]
        if plain:
            hidden = nn.functional.gelu(nn.functional.linear(norm(x), mlp.fc1.weight, mlp.fc1.bias))
            out = nn.functional.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
        else:
            out = perceive(norm, mlp, x)
            assert "Perceive" in type(out.grad_fn).__name__
        found.append([out, *torch.autograd.grad(out.square().sum(), (x, *weights))])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_what_hooks_in_is_called_and_may_change_the_result() -> None:
    norm, mlp = layers(False)
    seen: list[Tensor] = []
    x = torch.randn(1, 4, 6)
    mlp.fc1.register_forward_hook(lambda _, __, out: seen.append(out))
    out = perceive(norm, mlp, x)
    assert len(seen) == 1 and seen[0].shape == (1, 4, 24)
    mlp.fc2.register_forward_hook(lambda _, __, out: 0 * out)
    changed = perceive(norm, mlp, x)
    assert not changed.any() and out.any()


def test_an_adapter_in_the_place_of_a_projection_is_used() -> None:
    class Adapter(nn.Module):
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer, self.calls = layer, 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.layer(x)

    model = create_model("mvit_tiny", None, 7).eval()
    clip = torch.randn(1, 3, *model.backbone.clip_size)
    with torch.no_grad():
        expected = model(clip)
        block = model.backbone.blocks[1]
        block.attn.qkv, block.mlp.fc1 = Adapter(block.attn.qkv), Adapter(block.mlp.fc1)
        torch.testing.assert_close(model(clip), expected, atol=1e-5, rtol=1e-4)
    assert block.attn.qkv.calls and block.mlp.fc1.calls


def test_a_linear_layer_learns_alike() -> None:
    layer = Linear(6, 4)
    x = torch.randn(3, 5, 6, requires_grad=True)
    ours = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight, layer.bias))
    theirs = torch.autograd.grad(nn.functional.linear(x, layer.weight, layer.bias).square().sum(), (x, layer.weight, layer.bias))
    torch.testing.assert_close(ours, theirs)
