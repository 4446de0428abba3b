"""Kernels give what the plain blocks give, and stand aside where a block is not plain."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from stts_lightning import create_model
from stts_lightning.backbones import BackboneError, mvit, video_swin
from stts_lightning.classifier import VideoClassifier
from stts_lightning.kernels import CPU, Kernels, in_use, kernels_for, prepacked_weights, unmodified
from stts_lightning.kernels.cpu import attention, linear
from stts_lightning.kernels.cpu.depthwise import depthwise

EVERYWHERE = {
    "mvit stage of two heads, pooled queries": lambda: mvit.Block(16, 32, 2, (3, 7, 6), (1, 2, 2), (1, 4, 4), 0.3, 1e-6),
    "mvit, no pooled queries": lambda: mvit.Block(16, 16, 1, (4, 6, 6), (1, 1, 1), (1, 8, 8), 0.0, 1e-5),
    "mvit, more tokens than a chunk": lambda: mvit.Block(8, 8, 1, (4, 24, 25), (1, 1, 1), (1, 8, 8), 0.0, 1e-6),
    "swin, whole windows": lambda: swin((4, 8, 8), (4, 4, 4), False, "balanced"),
    "swin, shifted": lambda: swin((4, 8, 8), (2, 4, 4), True, "balanced"),
    "swin, shifted, sides that are no multiples": lambda: swin((5, 9, 7), (2, 4, 4), True, "balanced"),
    "swin, shifted, padding that is seen": lambda: swin((5, 9, 7), (2, 4, 4), True, "official"),
    "swin, more tokens than a chunk": lambda: swin((8, 20, 20), (8, 4, 4), True, "balanced"),
}


def swin(size: tuple[int, int, int], limit: tuple[int, int, int], shifted: bool, policy: str) -> video_swin.Block:
    return video_swin.Block(16, 2, limit, video_swin.WindowPlan(size, limit, shifted, policy), 0.2)


def block_and_input(make: Callable[[], nn.Module], batch: int) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    block: Any = make()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    size = block.attn.size if isinstance(block, mvit.Block) else block.attn.plan.size
    width = block.norm1.weight.numel()
    if isinstance(block, mvit.Block):
        return block, torch.randn(batch, 1 + size[0] * size[1] * size[2], width)
    return block, torch.randn(batch, *size, width)


def first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.parametrize("own_attention", [False, True])
@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", EVERYWHERE)
def test_kernel_matches_block(
    name: str, training: bool, batch: int, own_attention: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both kinds of attention, whatever the processor.
    monkeypatch.setattr(attention, "mkl_lags", lambda: own_attention)
    monkeypatch.setattr(attention, "LARGE", 0)
    monkeypatch.setattr(attention, "CHUNK_WEIGHTS", 300)
    block, x = block_and_input(EVERYWHERE[name], batch)
    block.train(training)
    results = []
    for run in (block, lambda x: CPU[type(block)](block, x)):
        block.zero_grad()
        torch.manual_seed(1)  # Of drop path.
        if not training:
            with torch.inference_mode():
                results.append([first(run(x))])
            continue
        leaf = x.clone().requires_grad_()
        out = first(run(leaf))
        (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        # The library's attention of no rows at all has no gradient.
        leaves = (leaf, *block.parameters())
        grads = [torch.zeros_like(one) if one.grad is None and not batch else one.grad for one in leaves]
        results.append([out.detach(), *grads])
    assert [value.shape for value in results[0]] == [value.shape for value in results[1]]
    # Some gradients are sums that cancel: what counts is the largest of all.
    largest = max([float(value.detach().abs().max()) for value in results[0] if value.numel()], default=0.0)
    for plain, kernel in zip(*results, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=2e-6 * largest)


def test_attention_weights_of_the_class_token_are_the_same() -> None:
    block, x = block_and_input(EVERYWHERE["mvit stage of two heads, pooled queries"], 2)
    block.eval()
    with torch.no_grad():
        torch.testing.assert_close(CPU[mvit.Block](block, x, True)[1], block(x, True)[1])


@pytest.mark.parametrize("training", [False, True])
def test_the_last_block_of_mvit_computes_its_class_token_alone(training: bool) -> None:
    model = create_model("mvit_tiny", "t0_0.5", 5).train(training)
    kernels = model.backbone.kernels
    assert isinstance(kernels, Kernels)
    last, x = model.backbone.blocks[-1], torch.randn(2, 1 + 4 * 4 * 4, 128)
    with torch.set_grad_enabled(training):
        out, _ = kernels.find(last, x)(x)
        assert out.shape == (2, 1, 128)
        torch.testing.assert_close(out[:, 0], last(x)[0][:, 0], rtol=1e-4, atol=1e-5)
        assert first(kernels.find(model.backbone.blocks[-2], x)(x)).shape == x.shape


@pytest.mark.parametrize(("backbone", "selection"), [("mvit_tiny", "t0_0.5_s2_0.6"), ("video_swin_tiny", "t2_0.6")])
def test_models_with_and_without_kernels_agree(backbone: str, selection: str) -> None:
    model = create_model(backbone, selection, 5)
    plain = copy.deepcopy(model)
    plain.backbone.kernels = None
    clip = torch.randn(2, 3, *model.backbone.clip_size)
    for one in (model, plain):
        one.slots.seed_noise([1, 2])
        one.train()(clip).square().sum().backward()
        one.eval()
    with torch.no_grad():
        torch.testing.assert_close(model(clip), plain(clip), rtol=1e-4, atol=1e-5)
    largest = max(float(parameter.grad.abs().max()) for parameter in plain.parameters() if parameter.grad is not None)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-5 * largest, msg=name)


def used(model: VideoClassifier, x: Tensor, number: int = 0) -> bool:
    block = model.backbone.blocks[number]
    assert model.backbone.kernels is not None
    return model.backbone.kernels.find(block, x) is not block


X = torch.randn(1, 1 + 8 * 16 * 16, 32)


def modify(block: Any, how: str) -> None:
    if how == "an adapter in a layer's place":
        block.mlp.fc1 = nn.Sequential(block.mlp.fc1)
    elif how == "a subclass of a layer":
        block.attn.qkv.__class__ = type("Mine", (nn.Linear,), {})
    elif how == "a hook":
        block.attn.pool_k.norm.register_forward_hook(lambda *_: None)
    elif how == "a hook before":
        block.norm1.register_forward_pre_hook(lambda *_: None)
    elif how == "a hook of gradients":
        block.mlp.register_full_backward_hook(lambda *_: None)
    elif how == "dropout":
        block.mlp.drop1.p = 0.1
    elif how == "another GELU":
        block.mlp.act = nn.GELU("tanh")
    elif how == "another forward":
        block.attn.forward = block.attn.forward
    else:
        weight_norm(block.mlp.fc2)


@pytest.mark.parametrize(
    "how",
    [
        "an adapter in a layer's place", "a subclass of a layer", "a hook", "a hook before", "a hook of gradients",
        "another forward", "dropout", "another GELU", "a parametrization",
    ],
)  # fmt: skip
def test_a_modified_block_runs_as_it_is_written(how: str) -> None:
    model = create_model("mvit_tiny", None, 5)
    assert used(model, X) and unmodified(model.backbone.blocks[0])
    modify(model.backbone.blocks[0], how)
    assert not used(model, X)
    assert used(model, X, number=4), "the others are as they were"


def test_a_global_hook_sees_every_module() -> None:
    model = create_model("mvit_tiny", None, 5)
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not used(model, X)
    finally:
        handle.remove()


def test_no_kernel_off_the_cpu_or_in_other_precision() -> None:
    model = create_model("mvit_tiny", None, 5)
    assert used(model, X)
    assert not used(model, X.to("meta")) and not used(model, X.double()) and not used(model, X.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not used(model, X)
    assert create_model("mvit_tiny", None, 5, kernels="none").backbone.kernels is None
    with pytest.raises(BackboneError, match="kernels=some: allowed are auto, none"):
        kernels_for(model.backbone, "some")
    assert in_use(model.backbone, "cpu").startswith("cpu, ")
    assert in_use(model.backbone, "cpu", "bf16-mixed") == "none"


def test_function_transforms_run_the_plain_model() -> None:
    model = create_model("mvit_tiny", None, 5, frames=8, size=32).eval()
    clip, weights = torch.randn(1, 3, *model.backbone.clip_size), dict(model.named_parameters())

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, clip).square().sum()

    found = torch.func.grad(loss)(weights)
    loss(weights).backward()
    torch.testing.assert_close(found["head.weight"], model.head.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_copy_of_a_model_has_its_own_last_block() -> None:
    model = create_model("mvit_tiny", None, 5).eval()
    twin = copy.deepcopy(model)
    assert isinstance(twin.backbone.kernels, Kernels) and isinstance(model.backbone.kernels, Kernels)
    assert twin.backbone.kernels._last is twin.backbone.blocks[-1]
    assert model.backbone.kernels._last is model.backbone.blocks[-1]


def test_prepacked_weights_are_refreshed_after_an_update() -> None:
    model = create_model("mvit_tiny", "t0_0.5", 5).eval()
    clip = torch.randn(1, 3, *model.backbone.clip_size)
    with prepacked_weights(), torch.no_grad():
        before = model(clip)
        torch.testing.assert_close(before, model(clip))
        for parameter in model.backbone.blocks.parameters():
            parameter.mul_(1.1)
        after = model(clip)
        model.backbone.kernels = None
        torch.testing.assert_close(after, model(clip), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before, after)


def test_prepacked_weights_of_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode(), prepacked_weights():
        model = create_model("mvit_tiny", None, 5).eval()
        assert model(torch.zeros(1, 3, *model.backbone.clip_size)).shape == (1, 5)


def test_a_model_derived_from_mvit_gets_all_tokens_of_its_last_block() -> None:
    class Mean(mvit.MViT):
        pass

    backbone = Mean(frames=8, size=32, dim=16, depth=3, stages=(1,), kv_stride=2)
    backbone.kernels = kernels_for(backbone, "auto")
    assert backbone.kernels is not None
    x = torch.randn(1, 1 + 4 * 4 * 4, 32)
    assert first(backbone.kernels.find(backbone.blocks[-1], x)(x)).shape == x.shape


def test_choice_of_kernels_depends_on_the_processor_only() -> None:
    """The same in each process: asked of the processor, never measured."""
    assert attention.mkl_lags() is attention.mkl_lags.__wrapped__()
    if torch.backends.cpu.get_cpu_capability() != "AVX512":
        assert not attention.mkl_lags()


@pytest.mark.parametrize("stride", [(1, 1, 1), (1, 2, 2), (2, 2, 2), (1, 4, 4), (1, 8, 8)])
@pytest.mark.parametrize("size", [(4, 8, 8), (1, 1, 1), (3, 5, 7), (2, 9, 8)])
def test_depthwise_matches_reference(size: tuple[int, int, int], stride: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 1, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 6, *size, dtype=torch.float64).contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    expected = F.conv3d(x, weight, None, stride, padding=1, groups=6)
    grad_output = torch.randn_like(expected)
    ours = depthwise(x, weight, stride)
    torch.testing.assert_close(ours, expected)
    for found, wanted in zip(
        torch.autograd.grad(ours, (x, weight), grad_output), torch.autograd.grad(expected, (x, weight), grad_output), strict=True
    ):
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_matches_reference_on_strided_rows(bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 40, bias)
    x = torch.randn(3, 24, 5).transpose(1, 2).requires_grad_()
    weights = list(layer.parameters())
    grad_output = torch.randn(3, 40, 5).transpose(1, 2)
    ours, expected = linear.linear(x, layer), layer(x)
    torch.testing.assert_close(ours, expected)
    for found, wanted in zip(
        torch.autograd.grad(ours, [x, *weights], grad_output),
        torch.autograd.grad(expected, [x, *weights], grad_output),
        strict=True,
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
