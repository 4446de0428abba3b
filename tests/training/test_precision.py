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
    clip = torch.randint(0, 256, (8, 3, *model.backbone.clip_size), dtype=torch.uint8)
    with torch.no_grad():
        expected, chosen = model(clip, return_selection=True)
        buffers = {name: (buffer.dtype, buffer.clone()) for name, buffer in model.named_buffers()}
        assert model.cast_weights(torch.bfloat16) is model
        found, chosen_then = model(clip, return_selection=True)
        as_floats = model(model.normalize(clip))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    for name, buffer in model.named_buffers():
        assert buffer.dtype == buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, as_floats)
    # Clips are noise and scorers new, so some scores are nearly equal; which of those is the higher depends on the processor.
    same = torch.stack([(chosen[slot].indices == chosen_then[slot].indices).flatten(1).all(1) for slot in chosen]).all(0)
    assert int(same.sum()) >= 5
    assert float((found.float() - expected)[same].norm() / expected[same].norm()) < 0.05
