"""torch.compile takes every model whole: no graph breaks, and no new graph when sigma, seeds or clips change."""

from typing import Any

import pytest
import torch

from stts_lightning import create_model
from stts_lightning.selection.reducers import REDUCERS

SMALL = {
    "video_swin_b": {"frames": 16, "size": 64, "dim": 16, "depths": (2, 2, 1), "heads": (1, 1, 2)},
    "mvit_tiny": {"depth": 5},
    "mvit_v2_tiny": {"depth": 5},
    "vit_tiny": {"depth": 5},
}
SELECTIONS: dict[str, Any] = {
    "none": None,
    "learned": "t0_0.6_s4_0.9",
    "official": {"slots": {"t0": 0.6, "s4": 0.9}, "scorer": "official", "estimator": "official"},
    "exact": {"slots": {"t0": 0.6}, "estimator": "exact"},
    "random": {"slots": {"t0": 0.5, "s2": 0.6}, "selector": "random"},
    "tokens": {"slots": {"s0": 0.5}, "selector": "tokens"},
}
CASES = [(name, kind) for name in ("mvit_tiny", "video_swin_b") for kind in SELECTIONS]
CASES += [(name, kind) for name in ("mvit_v2_tiny", "vit_tiny") for kind in ("none", "learned")]
CASES += [("vit_tiny", "attention"), ("vit_tiny", "tokens")]
CASES += [("vit_tiny", f"reducer-{kind}") for kind in REDUCERS]
SELECTIONS |= {f"reducer-{kind}": {"slots": {"r0": 0.7}, "reducer": kind} for kind in REDUCERS}


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize(("name", "kind"), [*CASES, ("mvit_tiny", "attention"), ("mvit_tiny", "gumbel")])
def test_a_model_is_one_graph(name: str, kind: str, training: bool) -> None:
    selection = SELECTIONS.get(kind, {"slots": {"t4": 0.5}, "selector": kind})
    torch.compiler.reset()
    model = create_model(name, selection, 7, **SMALL[name]).train(training)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            torch.manual_seed(step)
            clip = torch.randint(0, 256, (2, 3, *model.backbone.clip_size), dtype=torch.uint8)
            model.slots.seed_noise([step, step + 9])
            model.slots.sigma.fill_(0.1 * (2 - step))
            with torch.set_grad_enabled(training):
                found, state = compiled(clip), torch.get_rng_state()
                torch.set_rng_state(state)
                expected = model(clip)
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
            if training:
                found.square().sum().backward()
                assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
