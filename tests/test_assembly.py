"""What is built from a configuration and a data set together."""

from pathlib import Path

import numpy as np
import pytest
import torch

from stts_lightning import create_model, load_model
from stts_lightning.assembly import class_weights
from stts_lightning.backbones import BackboneError
from stts_lightning.errors import UserError
from stts_lightning.run_config import ConfigError
from stts_lightning.training.optim import OptimSpec, PartSpec, build_optimizer
from stts_lightning.trusted import TrustError, check_stored


def test_balanced_class_weights_are_the_inverse_of_the_counts() -> None:
    labels = np.array([0] * 6 + [1] * 3 + [2])
    weights = class_weights("balanced", labels, 3)
    assert weights == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert np.mean(np.array(weights)[labels]) == pytest.approx(1)
    assert class_weights(None, labels, 3) is None
    assert class_weights([1, 2, 3], labels, 3) == [1.0, 2.0, 3.0]


def test_impossible_class_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="class_weights=inverse: allowed are null, balanced, or a list"):
        class_weights("inverse", np.array([0, 1]), 2)
    with pytest.raises(ConfigError, match="class_weights=balanced: class 1 has no training video"):
        class_weights("balanced", np.array([0, 0, 2]), 3)


def optimizer(lr: float, decay: float = 0.05, total: int = 10, **parts: PartSpec):  # noqa: ANN201
    model = create_model("mvit_tiny", "t0_0.5", 3)
    return build_optimizer(model, OptimSpec(lr=lr, weight_decay=decay, epochs=2, betas=(0.9, 0.95), parts=parts), total)


def test_loaded_optimisers_keep_the_settings_of_the_configuration() -> None:
    first, schedule = optimizer(0.01)
    for _ in range(4):
        first.step()
        schedule.step()
    again, other = optimizer(0.03, 0.1, total=20)
    again.load_state_dict(first.state_dict())
    other.load_state_dict(schedule.state_dict())
    fresh, expected = optimizer(0.03, 0.1, total=20)
    for _ in range(4):
        fresh.step()
        expected.step()
    keys = ("name", "lr", "initial_lr", "weight_decay", "betas")
    assert [[g[k] for k in keys] for g in again.param_groups] == [[g[k] for k in keys] for g in fresh.param_groups]
    assert other.last_epoch == 4 and other.get_last_lr() == expected.get_last_lr()


def test_schedules_of_earlier_versions_are_read() -> None:
    _, schedule = optimizer(0.01)
    schedule.load_state_dict({"last_epoch": 5, "base_lrs": [1.0], "_step_count": 6, "lr_lambdas": [None]})
    assert schedule.last_epoch == 5 and schedule.base_lrs[0] == 0.01


def test_other_groups_than_the_checkpoints_are_refused() -> None:
    first, _ = optimizer(0.01)
    other, _ = optimizer(0.01, head=PartSpec(decay_all=True))
    with pytest.raises(UserError, match="cannot change within a run"):
        other.load_state_dict(first.state_dict())


def test_a_backbone_by_its_dotted_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "their_net.py").write_text(
        "from stts_lightning.backbones.vit import ViT\n"
        "def small(**kwargs):\n"
        "    return ViT(size=32, patch=8, dim=32, depth=2, heads=2, **kwargs)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    model = create_model("their_net.small", "t0_0.5", 3).eval()
    assert model(torch.zeros(1, 3, 16, 32, 32)).shape == (1, 3)
    file = tmp_path / "model.ckpt"
    torch.save({"state_dict": model.state_dict(), "model": dict(model.recipe)}, file)
    with pytest.raises(TrustError, match=r"backbone=their_net.small"):
        load_model(file)
    again = load_model(file, trust=True).eval()
    clip = torch.randn(1, 3, 16, 32, 32)
    assert torch.equal(again(clip), model(clip))
    for path in ("their_net.large", "no_such_package.net"):
        with pytest.raises(BackboneError, match=f"{path}.*no such factory"):
            create_model(path)


def test_stored_configurations_do_not_import_what_they_name() -> None:
    for content in ({"backbone": {"name": "antigravity.net"}}, {"selection": {"reducer": "antigravity.Reducer"}}):
        with pytest.raises(TrustError, match="antigravity"):
            check_stored(content, "run")
        check_stored(content, "run", also=content)
