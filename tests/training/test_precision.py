"""Weights held in half precision: the same classes, constants as they were; not for training."""

import pytest
import torch

from stts_lightning import create_model


@pytest.mark.parametrize(
    ("backbone", "selection"),
    [("mvit_tiny", "t0_0.5_s2_0.6"), ("video_swin_tiny", "t2_0.6"), ("mvit_tiny", {"slots": {"t0": 0.5}, "selector": "uniform"})],
)
def test_cast_weights_keeps_constants_and_agrees(backbone: str, selection: str) -> None:
    torch.manual_seed(0)
    model = create_model(backbone, selection, 5).eval()
    clip = torch.randint(0, 256, (2, 3, *model.backbone.clip_size), dtype=torch.uint8)
    with torch.no_grad():
        expected = model(clip)
        buffers = {name: (buffer.dtype, buffer.clone()) for name, buffer in model.named_buffers()}
        assert model.cast_weights(torch.bfloat16) is model
        found = model(clip)
        as_floats = model(model.normalize(clip))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, as_floats)
    assert float((found.float() - expected).norm() / expected.norm()) < 0.05
