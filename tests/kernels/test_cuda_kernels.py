"""Kernels of a GPU: their numbers by Triton's interpreter, their code by its compiler, and both on a GPU where there is one."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from stts_lightning import create_model
from stts_lightning.backbones import mvit, video_swin
from stts_lightning.kernels import Kernels, comparison, cuda_kernels, in_use

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")

BLOCKS: dict[str, Callable[[], Any]] = {
    "mvit, stage of two heads, pooled queries": lambda: mvit.Block(16, 32, 2, (3, 5, 4), (1, 2, 2), (1, 4, 4), 0.3, 1e-6),
    "mvit, queries are not pooled, width no power of 2": lambda: mvit.Block(
        24, 24, 1, (4, 6, 6), (1, 1, 1), (1, 8, 8), 0.0, 1e-5
    ),
    "mvit, three heads, no stride": lambda: mvit.Block(24, 24, 3, (2, 3, 4), (1, 1, 1), (1, 1, 1), 0.0, 1e-5),
    "swin, whole windows": lambda: swin((4, 8, 8), (4, 4, 4), False, "balanced"),
    "swin, shifted": lambda: swin((4, 8, 8), (2, 4, 4), True, "balanced"),
    "swin, sides that are no multiples": lambda: swin((5, 9, 7), (2, 4, 4), True, "balanced"),
    "swin, more than a block of queries": lambda: swin((6, 7, 14), (3, 7, 7), True, "balanced"),
    "swin, official policy without padding": lambda: swin((4, 8, 8), (2, 4, 4), True, "official"),
}


def swin(size: tuple[int, int, int], limit: tuple[int, int, int], shifted: bool, policy: str) -> video_swin.Block:
    return video_swin.Block(16, 2, limit, video_swin.WindowPlan(size, limit, shifted, policy), 0.2)


def built(name: str) -> Any:
    torch.manual_seed(0)
    block = BLOCKS[name]()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def outputs(run: Callable[[Tensor], Any], block: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input, gradients of all weights."""
    block.zero_grad()
    torch.manual_seed(1)  # Of drop path.
    leaf = x.clone().requires_grad_()
    out = run(leaf)
    out = out[0] if isinstance(out, tuple) else out
    (out * torch.linspace(-1, 1, out.shape[-1], device=x.device)).sum().backward()
    assert leaf.grad is not None
    return [out.detach(), leaf.grad, *(parameter.grad for parameter in block.parameters() if parameter.grad is not None)]


def clips(block: Any, batch: int, device: str = "cpu") -> Tensor:
    size = block.attn.size if isinstance(block, mvit.Block) else block.attn.plan.size
    width = block.norm1.weight.numel()
    torch.manual_seed(2)
    shape = (batch, 1 + size[0] * size[1] * size[2], width) if isinstance(block, mvit.Block) else (batch, *size, width)
    return torch.randn(shape, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("name", BLOCKS)
def test_kernel_matches_block_in_the_interpreter(name: str, training: bool) -> None:
    block = built(name).train(training)
    kernel, x = cuda_kernels()[type(block)], clips(block, 2)
    plain, found = (outputs(run, block, x) for run in (block, lambda x: kernel(block, x)))
    largest = max(float(value.abs().max()) for value in plain)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * largest)
    with torch.no_grad():  # The way that saves nothing for a backward pass.
        torch.manual_seed(1)
        out = kernel(block, x)
        torch.testing.assert_close(out[0] if isinstance(out, tuple) else out, plain[0], rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("name", [name for name in BLOCKS if "two heads" in name or "swin, shifted" in name])
def test_half_precision_and_no_clips_in_the_interpreter(name: str) -> None:
    # numpy has no bfloat16; float16 goes the same way.
    block = built(name).eval()
    kernel = cuda_kernels()[type(block)]
    found, plain = comparison.differences(kernel, block, torch.device("cpu"), torch.float16)
    assert found <= 2 * plain + 2e-3
    empty = kernel(block, clips(block, 0))
    assert (empty[0] if isinstance(empty, tuple) else empty).shape[0] == 0


def test_the_first_use_tells_a_wrong_kernel(caplog: pytest.LogCaptureFixture) -> None:
    block, device = built("mvit, three heads, no stride"), torch.device("cpu")

    def slightly_wrong(module: Any, x: Tensor) -> Any:
        out, weights = module(x)
        return out * torch.linspace(0.5, 1.5, out.shape[1]).view(1, -1, 1), weights

    def broken(module: Any, x: Tensor) -> Any:
        raise RuntimeError("no such instruction\nin line 7")

    assert comparison.agrees(lambda module, x: module(x), block, device, torch.float32)
    assert not comparison.agrees(slightly_wrong, block, device, torch.float32)
    assert "not used, the block runs as it is written: its results are off by" in caplog.text
    assert not comparison.agrees(broken, block, device, torch.float32)
    assert "RuntimeError: no such instruction" in caplog.text
    said = len(caplog.records)
    assert not comparison.agrees(broken, block, device, torch.float32)
    assert len(caplog.records) == said, "found out once"
    assert all(parameter.grad is None for parameter in block.parameters())


def test_which_blocks_run_by_kernels_on_a_gpu() -> None:
    model = create_model("mvit_tiny", None, 3).eval()
    kernels = Kernels(model.backbone)
    official = video_swin.Block(16, 2, (2, 4, 4), video_swin.WindowPlan((5, 9, 7), (2, 4, 4), True, "official"), 0.0)
    shifted = swin((4, 8, 8), (2, 4, 4), True, "balanced").eval()
    with FakeTensorMode(allow_non_fake_inputs=True):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.empty(1, 5, 16, device="cuda", dtype=dtype)
            half = dtype == torch.bfloat16
            assert kernels.find(model.backbone.blocks[0], x) is not model.backbone.blocks[0]
            assert (kernels.find(shifted, x) is not shifted) == half
            assert kernels.find(official, x) is official
            assert kernels.find(nn.Linear(2, 2), x).__class__ is nn.Linear
    model.backbone.blocks[0].register_forward_hook(lambda *_: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(1, 5, 16, device="cuda")
        assert kernels.find(model.backbone.blocks[0], x) is model.backbone.blocks[0]
    assert in_use(model.backbone, "cuda", "bf16-mixed") == in_use(model.backbone, "cuda", "32-true") == "cuda, Triton"
    swin_model = create_model("video_swin_tiny", None, 3)
    assert in_use(swin_model.backbone, "cuda", "32-true") == "none"
    assert in_use(swin_model.backbone, "cuda", "bf16-mixed", compiled=True) == "cuda, Triton"


SPILLED = {("3.6.0", "window, forward", "sm_100"): 32}
"""Bytes, by the version of Triton; none by that of the pinned torch."""
RESOURCES = Path(__file__).resolve().parents[2] / "scripts" / "kernel_resources.py"


def test_kernels_compile_for_gpus_of_three_generations_without_spills() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(
        [sys.executable, RESOURCES, "--json"], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["target"] for row in rows} == {"sm_80", "sm_90", "sm_100"}
    assert len(rows) == 3 * 8
    for row in rows:
        assert row["spills"] == SPILLED.get((version("triton"), row["kernel"], row["target"]), 0), row
        assert row["registers"] <= 255, row


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "selection"), [("mvit_b16", "t0_0.6_s4_0.9"), ("video_swin_b", "t0_0.6_s2_0.7")])
def test_every_block_of_the_large_models_agrees_on_the_gpu(name: str, selection: str, dtype: torch.dtype) -> None:
    device = torch.device("cuda")
    backbone = create_model(name, selection, 400).to(device).backbone
    table = cuda_kernels()
    stages = getattr(backbone, "stages", None)
    blocks = backbone.blocks if stages is None else [block for stage in stages for block in stage.blocks]
    for block in blocks:
        found, plain = comparison.differences(table[type(block)], block, device, dtype)
        assert found <= 2 * plain + comparison.TOLERANCE[dtype], (found, plain)
        assert dtype != torch.float32 or found < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("name", "selection"), [("mvit_tiny", "t0_0.5_s2_0.6"), ("video_swin_tiny", "t2_0.6")])
def test_compiled_models_use_the_kernels_and_agree_on_the_gpu(name: str, selection: str, training: bool) -> None:
    torch.compiler.reset()
    model = create_model(name, selection, 7).cuda().train(training)
    plain = create_model(name, selection, 7, kernels="none").cuda().train(training)
    plain.load_state_dict(model.state_dict())
    clip = torch.randint(0, 256, (2, 3, *model.backbone.clip_size), dtype=torch.uint8, device="cuda")
    results = []
    for one in (torch.compile(model, fullgraph=True), model, plain):
        model.slots.seed_noise([3, 4])
        plain.slots.seed_noise([3, 4])
        with torch.set_grad_enabled(training), torch.autocast("cuda", torch.bfloat16):
            results.append(one(clip).float())
    assert all(comparison._KNOWN.values())
    for found in results[:2]:
        assert float((found - results[2]).norm() / results[2].norm()) < 0.05
