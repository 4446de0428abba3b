import pytest
import torch

from stts_lightning.selection.noise import Noise

CPU = torch.device("cpu")


def test_a_clips_noise_is_the_same_in_any_batch() -> None:
    for draw in ("normal", "uniform"):
        whole = getattr(Noise.of([5, 6, 7]), draw)((6, 40, 3), CPU)
        for i, seed in enumerate((5, 6, 7)):
            assert torch.equal(getattr(Noise.of([seed]), draw)((2, 40, 3), CPU), whole[2 * i : 2 * i + 2])
        assert not torch.equal(whole[:2], whole[2:4])
        assert not torch.equal(getattr(Noise.of([5, 6, 7], salt=1), draw)((6, 40, 3), CPU), whole)


def test_noise_is_standard() -> None:
    normal, uniform = (getattr(Noise.of(range(50)), name)((50, 4000), CPU) for name in ("normal", "uniform"))
    assert abs(float(normal.mean())) < 0.01 and abs(float(normal.std()) - 1) < 0.01
    assert float(uniform.min()) >= 0 and float(uniform.max()) < 1 and abs(float(uniform.mean()) - 0.5) < 0.01
    rows = torch.corrcoef(normal)
    assert float((rows - torch.eye(50)).abs().max()) < 0.08, "neighbouring seeds give unrelated noise"


def test_without_seeds_torchs_generator_draws() -> None:
    torch.manual_seed(3)
    first = Noise().normal((2, 5), CPU)
    torch.manual_seed(3)
    assert torch.equal(first, Noise().normal((2, 5), CPU))
    with pytest.raises(ValueError, match="noise for 5 rows from the seeds of 2 clips"):
        Noise.of([1, 2]).normal((5, 3), CPU)
