from itertools import chain

import numpy as np
import pytest
import torch

from stts_lightning.data import resumable_sampler
from stts_lightning.data.annotations import Video, VideoList
from stts_lightning.data.dataset import ClipDataset, ClipSpec, collate
from stts_lightning.data.demo import DemoSpec, render
from stts_lightning.data.encode import write_mp4
from stts_lightning.data.resumable_sampler import EpochOrder, LoaderError, Pick, TrainLoader
from stts_lightning.data.transforms import TrainTransform


def batches(of: EpochOrder, monkeypatch: pytest.MonkeyPatch, rank: int, processes: int) -> list[list[Pick]]:
    monkeypatch.setattr(resumable_sampler.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(resumable_sampler.dist, "get_rank", lambda: rank)
    monkeypatch.setattr(resumable_sampler.dist, "get_world_size", lambda: processes)
    return list(of)


def test_the_global_batches_are_the_same_for_any_number_of_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = batches(EpochOrder(50, 8, 3), monkeypatch, 0, 1)
    assert len(one) == 6 and len({pick.video for batch in one for pick in batch}) == 48, "each video once, whole batches"
    for processes in (2, 4, 8):
        shares = [batches(EpochOrder(50, 8, 3), monkeypatch, rank, processes) for rank in range(processes)]
        assert [[pick for share in shares for pick in share[step]] for step in range(6)] == one


def test_epochs_and_seeds_differ_and_draws_are_each_ones_own() -> None:
    first, second, other = EpochOrder(100, 10, 0), EpochOrder(100, 10, 0), EpochOrder(100, 10, 1)
    second.set_epoch(1)
    lists = [list(chain.from_iterable(of)) for of in (first, second, other)]
    assert len({tuple(pick.video for pick in picks) for picks in lists}) == 3
    assert len({pick.draw for picks in lists for pick in picks}) == 300
    assert list(first) == list(EpochOrder(100, 10, 0))


def test_a_list_shorter_than_a_batch_is_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(EpochOrder(5, 8, 0)) == 1
    shares = [batches(EpochOrder(5, 8, 0), monkeypatch, rank, 2) for rank in range(2)]
    assert [len(share[0]) for share in shares] == [2, 2], "processes have as many each"


class Numbers(torch.utils.data.Dataset[int]):
    def __getitem__(self, pick: Pick) -> int:
        return pick.video


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_goes_on_in_the_middle_of_an_epoch(workers: int) -> None:
    def loader() -> TrainLoader:
        return TrainLoader(Numbers(), EpochOrder(20, 4, 0), num_workers=workers)

    whole = [batch.tolist() for batch in loader()]
    broken = loader()
    seen = []
    for batch in broken:
        seen.append(batch.tolist())
        if len(seen) == 2:
            break  # Workers have fetched more than was handed out.
    state = broken.state_dict()
    assert (state["epoch"], state["done"]) == (0, 2)
    rest = loader()
    rest.load_state_dict(state)
    rest.order.set_epoch(0)
    assert seen + [batch.tolist() for batch in rest] == whole
    assert rest.state_dict()["epoch"] == 1 and rest.state_dict()["done"] == 0
    rest.order.set_epoch(1)
    assert len(list(rest)) == 5


def test_the_middle_of_an_epoch_does_not_fit_other_batches() -> None:
    loader = TrainLoader(Numbers(), EpochOrder(20, 4, 0))
    state = {"epoch": 3, "done": 1, "batch_size": 8, "videos": 20, "seed": 0}
    with pytest.raises(LoaderError, match="resume: loader.batch_size was 8 and is 4; the run stands in the middle of an epoch"):
        loader.load_state_dict(state)
    loader.load_state_dict({**state, "done": 0})
    assert loader.order.epoch == 3


def test_clips_follow_from_their_draw_alone(tmp_path) -> None:  # type: ignore[no-untyped-def]
    write_mp4(tmp_path / "a.mp4", render(DemoSpec(), "train", 0, 0)[0])
    videos = VideoList((Video(tmp_path / "a.mp4", 0),), ("a",))
    dataset = ClipDataset(videos, ClipSpec(4, 2), TrainTransform(32, randaugment="rand-m7-n4-mstd0.5-inc1"), train=True)
    state = torch.get_rng_state()
    one, two, other = dataset[Pick(0, 11)], dataset[Pick(0, 11)], dataset[Pick(0, 12)]
    assert torch.equal(state, torch.get_rng_state()), "and leave the generator as it was"
    assert torch.equal(one.clip, two.clip) and not torch.equal(one.clip, other.clip)
    assert collate([one, other]).draws == (11, 12)


def test_balanced_epochs_draw_all_classes_equally_often_and_resume() -> None:
    labels = np.array([0] * 900 + [1] * 90 + [2] * 10)

    def order() -> EpochOrder:
        return EpochOrder(1000, 10, 5, labels)

    drawn = np.bincount(labels[[pick.video for batch in order() for pick in batch]])
    assert drawn.sum() == 1000 and (np.abs(drawn - 333) < 60).all()
    whole, rest = list(order()), order()
    rest.done = 40
    assert list(rest) == whole[40:]


def test_balance_may_not_change_within_an_epoch() -> None:
    loader = TrainLoader(Numbers(), EpochOrder(20, 4, 0))
    state = {**loader.state_dict(), "done": 2}
    with pytest.raises(LoaderError, match="loader.balanced was False and is True"):
        TrainLoader(Numbers(), EpochOrder(20, 4, 0, np.zeros(20, np.int64))).load_state_dict(state)
