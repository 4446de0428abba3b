"""Layers by pieces on a CPU say the same as plain ones, and let others hook in."""

import pytest
import torch
from timm.layers.drop import DropPath
from torch import Tensor, nn
from torch.nn import functional

from stts_lightning import create_model
from stts_lightning.layers import products, rowwise
from stts_lightning.layers.linear import Linear
from stts_lightning.layers.products import constant_weights
from stts_lightning.layers.rowwise import Look, Perceptron, perceive, project


def layers(frozen: bool) -> tuple[nn.LayerNorm, Perceptron, Linear]:
    torch.manual_seed(0)
    norm, mlp, past = nn.LayerNorm(6), Perceptron(6, 24, 5), Linear(6, 5)
    for parameter in (*norm.parameters(), *mlp.parameters(), *past.parameters()):
        nn.init.normal_(parameter)
    if frozen:
        norm.weight.requires_grad_(False)
        mlp.fc1.weight.requires_grad_(False)
        mlp.fc2.bias.requires_grad_(False)
    return norm, mlp, past


def gradients(out: Tensor, *of: Tensor) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    return [out, *torch.autograd.grad((out.square() * weight).sum(), [p for p in of if p.requires_grad])]


def drawn() -> Tensor:
    return torch.randn(2, 9, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)


@pytest.mark.parametrize("dropped", [0.0, 0.5])
@pytest.mark.parametrize("widened", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_perceptrons_own_backward_pass(monkeypatch: pytest.MonkeyPatch, frozen: bool, widened: bool, dropped: float) -> None:
    monkeypatch.setattr(rowwise, "PIECE", 7)  # Several pieces, the last one smaller.
    norm, mlp, past = layers(frozen)
    drop_path, kept = DropPath(dropped), torch.tensor([0.0, 2.0]).view(2, 1, 1) if dropped else torch.ones(2, 1, 1)
    if not widened:
        mlp, past = Perceptron(6, 24, 6), None
    of = (*norm.parameters(), *mlp.parameters(), *(past.parameters() if past else ()))
    x = drawn()
    torch.manual_seed(next(s for s in range(99) if not dropped or draws(s, drop_path).equal(kept)))
    out = perceive(norm, mlp, x, drop_path, past)
    assert "Perceive" in type(out.grad_fn).__name__
    ours = gradients(out, x, *of)
    hidden = functional.gelu(functional.linear(norm(x), mlp.fc1.weight, mlp.fc1.bias))
    beside = functional.linear(norm(x), past.weight, past.bias) if past else x
    plain = beside + kept * functional.linear(hidden, mlp.fc2.weight, mlp.fc2.bias)
    torch.testing.assert_close(ours, gradients(plain, x, *of), atol=1e-4, rtol=1e-4)


def draws(seed: int, drop_path: DropPath) -> Tensor:
    torch.manual_seed(seed)
    return drop_path(torch.ones(2, 1, 1))


LOOKS = {
    "all": [(None, (4, 3, 5))],
    "some": [(None, (4,)), (torch.tensor([5, 0, 8]), (3, 5))],
    "one": [(torch.tensor([0]), (4,)), (None, (3, 5))],
    "turned": [(torch.randperm(9, generator=torch.Generator().manual_seed(0)), (12,))],
}


@pytest.mark.parametrize("looks", LOOKS.values(), ids=LOOKS)
@pytest.mark.parametrize("frozen", [False, True])
def test_the_projections_own_backward_pass(monkeypatch: pytest.MonkeyPatch, frozen: bool, looks: list[Look]) -> None:
    monkeypatch.setattr(rowwise, "PIECE", 7)
    norm, *_ = layers(frozen)
    layer = Linear(6, 12)
    layer.bias.requires_grad_(not frozen)
    x, of = drawn(), (*norm.parameters(), *layer.parameters())
    out = project(norm, layer, x, looks)
    assert all("Project" in type(one.grad_fn).__name__ for one in out)
    widths = [width for _, wanted in looks for width in wanted]
    parts = functional.linear(norm(x), layer.weight, layer.bias).split(widths, -1)
    places = [places for places, wanted in looks for _ in wanted]
    plain = [part if where is None else part[:, where] for part, where in zip(parts, places, strict=True)]
    torch.testing.assert_close(out, plain)
    ours, theirs = (gradients(torch.cat([t.flatten() for t in tensors]), x, *of) for tensors in (out, plain))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    with torch.no_grad():  # And in evaluation, and with a hook.
        torch.testing.assert_close(project(norm, layer, x, looks), plain)
        seen: list[int] = []
        layer.register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(project(norm, layer, x, looks), plain)
        assert seen


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
def test_weights_that_are_laid_out_say_the_same_until_they_may_change(name: str, precision: torch.dtype) -> None:
    model = create_model(name, "t0_0.5_s1_0.8", 7).eval()
    clip = torch.randn(2, 3, *model.backbone.clip_size)

    def logits() -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            return model(clip).float()

    expected = logits()
    for _ in range(2):  # What was laid out before does not outlast its scope.
        with constant_weights():
            with constant_weights():
                torch.testing.assert_close(logits(), expected)
            # The inner one left it to the outer one. A processor without AVX-512 takes bf16 the plain way, and lays out nothing.
            assert bool(products._laid_out.get()) == (precision in products._EVALUATED)
            torch.testing.assert_close(logits(), expected)
        assert products._laid_out.get() is None
        for parameter in model.parameters():
            parameter.data.mul_(1.5)  # Behind autograd's back.
        before, expected = expected, logits()
        assert (before - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
def test_new_weights_are_noticed_while_they_should_be_constant_and_training_does_not_care(name: str) -> None:
    model = create_model(name, None, 7).eval()
    other = create_model(name, None, 7).eval()
    for module in other.modules():
        if hasattr(module, "relative_position_bias_table"):
            nn.init.normal_(module.relative_position_bias_table)  # Else it is too small to show.
    clip = torch.randn(1, 3, *model.backbone.clip_size)
    with torch.no_grad():
        expected = other(clip)
    with constant_weights():
        with torch.no_grad():
            model(clip)
            model.load_state_dict(other.state_dict())
            torch.testing.assert_close(model(clip), expected)
        kept = dict(products._laid_out.get() or {})
        model(clip).sum().backward()
        assert (products._laid_out.get() or {}).keys() == kept.keys()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        inside = model(clip)
    torch.testing.assert_close(inside, model(clip))


def test_what_comes_out_in_bf16_does_not_depend_on_the_number_of_tokens() -> None:
    norm, mlp, past = layers(False)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        few, many = (perceive(norm, mlp, torch.randn(1, n, 6), DropPath(), past).dtype for n in (5, 5000))
    assert few == many
    if torch.bfloat16 in products._EVALUATED:
        assert few == torch.float32


def test_what_hooks_in_is_called_and_may_change_the_result() -> None:
    norm, mlp, past = layers(False)
    seen: list[Tensor] = []
    x = torch.randn(1, 4, 6)
    mlp.fc1.register_forward_hook(lambda _, __, out: seen.append(out))
    out = perceive(norm, mlp, x, DropPath(), past)
    assert len(seen) == 1 and seen[0].shape == (1, 4, 24)
    mlp.fc2.register_forward_hook(lambda _, __, out: 0 * out)
    changed = perceive(norm, mlp, x, DropPath(), past)
    torch.testing.assert_close(changed, past(norm(x)))
    assert not changed.equal(out)


class Adapter(nn.Module):
    """Stands in the place of a layer; may mix tokens."""

    def __init__(self, layer: nn.Module, mixed: float = 0.0) -> None:
        super().__init__()
        self.layer, self.mixed, self.calls = layer, mixed, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        out = self.layer(x)
        return out + self.mixed * out.mean(1, keepdim=True)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("place", ["attn.qkv", "attn.proj", "mlp", "mlp.fc1", "norm1", "norm2"])
@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
def test_an_adapter_in_the_place_of_a_layer_is_used(name: str, place: str, grad: bool) -> None:
    model = create_model(name, None, 7).eval()
    clip = torch.randn(2, 3, *model.backbone.clip_size)
    with torch.set_grad_enabled(grad):
        expected = model(clip)
        block = [m for m in model.modules() if hasattr(m, "norm1")][-1]
        adapter = Adapter(block.get_submodule(place))
        block.set_submodule(place, adapter)
        torch.testing.assert_close(model(clip), expected, atol=1e-5, rtol=1e-4)
    assert adapter.calls


def test_an_adapter_that_mixes_tokens_of_the_last_block_sees_all_of_them() -> None:
    model = create_model("mvit_tiny", None, 7).eval()
    clip = torch.randn(1, 3, *model.backbone.clip_size)
    block = model.backbone.blocks[-1]
    for place in ("mlp.fc2", "attn.proj"):
        block.set_submodule(place, Adapter(block.get_submodule(place), mixed=1.0))
        with torch.no_grad():
            found = model(clip)
            handle = block.register_forward_hook(lambda *_: None)  # With it, all tokens are worked out.
            torch.testing.assert_close(found, model(clip), atol=1e-5, rtol=1e-4)
            handle.remove()


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
def test_a_hook_on_a_norm_sees_the_tokens_as_they_lie_and_may_change_them(name: str, train: bool) -> None:
    model = create_model(name, None, 7).train(train)
    clip = torch.randn(2, 3, *model.backbone.clip_size)
    norm = [m for m in model.modules() if hasattr(m, "norm1")][0].norm1
    seen: list[torch.Size] = []
    norm.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    with torch.set_grad_enabled(train):
        expected = model(clip)
        t, h, w = model.backbone.block_sizes[0]
        assert seen == [(2, t * h * w + name.startswith("mvit"), norm.weight.numel())]
        shift = torch.randn(1, *seen[0][1:])
        norm.register_forward_hook(lambda _, __, out: out + shift)
        assert (model(clip) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
def test_what_a_hook_holds_stays_as_it_was_in_evaluation(name: str) -> None:
    """Sums and perceptrons overwrite what is nobody else's."""
    model = create_model(name, "t0_0.5_s1_0.8", 7).eval()
    clip = torch.randn(2, 3, *model.backbone.clip_size)
    held: list[tuple[str, Tensor, Tensor]] = []

    def hold(where: str, *values: object) -> None:
        held.extend((where, value, value.clone()) for value in values if isinstance(value, Tensor))

    with torch.no_grad():
        expected = model(clip)
        for where, module in model.named_modules():
            handle = module.register_forward_hook(lambda _, before, out, where=where: hold(where, *before, out))
            torch.testing.assert_close(model(clip), expected, atol=1e-5, rtol=1e-4)
            handle.remove()
    assert len(held) > 50
    assert [where for where, value, then in held if not value.equal(then)] == []


def test_a_linear_layer_learns_alike() -> None:
    layer = Linear(6, 4)
    x = torch.randn(3, 5, 6, requires_grad=True)
    ours = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight, layer.bias))
    theirs = torch.autograd.grad(functional.linear(x, layer.weight, layer.bias).square().sum(), (x, layer.weight, layer.bias))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("selection", [None, "t0_0.5_s2_0.8"])
def test_a_hook_on_the_last_block_sees_all_tokens_and_changes_no_result(selection: str | None) -> None:
    model = create_model("mvit_tiny", selection, 7).train()
    clip = torch.randn(2, 3, *model.backbone.clip_size)
    seen: list[torch.Size] = []

    def step() -> list[Tensor]:
        model.slots.seed_noise([0, 1])
        logits = model(clip)
        return [logits, *torch.autograd.grad(logits.square().sum(), list(model.parameters()))]

    alone = step()
    model.backbone.blocks[-1].mlp.register_forward_hook(lambda _, __, out: seen.append(out.shape))
    torch.testing.assert_close(step(), alone, atol=1e-4, rtol=1e-4)
    assert seen[0][1] > 1


def test_gradients_of_a_linear_layer_have_gradients() -> None:
    layer, x = Linear(6, 4), torch.randn(5, 6, requires_grad=True)

    def curvature(out: Tensor) -> list[Tensor]:
        (slope,) = torch.autograd.grad(out.pow(3).sum(), x, create_graph=True)
        return list(torch.autograd.grad(slope.square().sum(), (x, layer.weight)))

    torch.testing.assert_close(curvature(layer(x)), curvature(functional.linear(x, layer.weight, layer.bias)))
    weights = dict(layer.named_parameters())
    found = torch.func.grad(lambda w: torch.func.functional_call(layer, w, x).square().sum())(weights)
    wanted = torch.autograd.grad(layer(x).square().sum(), tuple(weights.values()))
    torch.testing.assert_close(tuple(found.values()), wanted)


def test_a_stem_in_the_place_of_the_convolution_keeps_what_it_returns() -> None:
    model = create_model("mvit_tiny", None, 7).eval()
    clip = torch.randn(1, 3, *model.backbone.clip_size)
    held: list[Tensor] = []
    conv = model.backbone.patch_embed
    model.backbone.patch_embed = nn.Sequential(conv)
    conv.register_forward_hook(lambda _, __, out: held.extend((out, out.clone())))
    with torch.no_grad():
        model(clip)
    assert held[0].equal(held[1])


@pytest.mark.parametrize("name", ["mvit_tiny", "video_swin_tiny"])
def test_a_function_in_the_place_of_attention_keeps_what_it_returns(name: str) -> None:
    model = create_model(name, None, 7).eval()
    clip = torch.randn(1, 3, *model.backbone.clip_size)
    attn = next(m for m in model.modules() if hasattr(m, "norm1")).attn
    plain, held = attn.forward, []

    def forward(*args: object) -> object:
        found = plain(*args)
        out = found[0] if isinstance(found, tuple) else found
        held.extend((out, out.clone()))
        return found

    attn.forward = forward
    with torch.no_grad():
        model(clip)
    assert held[0].equal(held[1])
