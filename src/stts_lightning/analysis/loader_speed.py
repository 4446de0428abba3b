"""How fast one core makes clips of videos, by decoder."""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from stts_lightning.analysis.benchmarks import Row
from stts_lightning.data.decode import open_video
from stts_lightning.data.sampling import Spread
from stts_lightning.data.transforms import EvalTransform, TrainTransform


def loading(
    videos: Sequence[Path],
    decoders: Sequence[str],
    size: tuple[int, int, int],
    stride: int,
    seconds: float,
    rounds: int,
    copies: int = 1,
) -> Iterator[Row]:
    """Decode, resize and crop clips on one core, decoders in turns over the same clips; times are of the processor.

    Args:
        videos: files, all of which decode.
        decoders: names as in `clip.decoder`.
        size: frames, height and width of a clip.
        stride: frames from one of a clip's to the next.
        seconds: how long to go on, over all decoders.
        rounds: clips of each decoder at least.
        copies: differently cropped clips of each decoded one, as in training.
    """
    frames, *sides = size
    sampling, rng = Spread(frames, stride), np.random.default_rng(0)
    transforms = {
        "test": EvalTransform(sides),
        "train": TrainTransform(sides, copies=copies),
        "train_randaugment": TrainTransform(sides, randaugment="rand-m7-n4-mstd0.5-inc1", copies=copies),
    }
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in decoders}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    try:
        for number in itertools.count():
            if number >= rounds and time.perf_counter() - begun > seconds:
                break
            path, place = videos[number % len(videos)], int(rng.integers(2**31))
            for decoder in [*decoders[number % len(decoders) :], *decoders[: number % len(decoders)]]:
                start = time.process_time()
                with open_video(path, decoder) as reader:
                    clip = reader.frames(sampling.train(len(reader), np.random.default_rng(place), reader.rate))
                taken[decoder].setdefault("decode", []).append(time.process_time() - start)
                for name, transform in transforms.items():
                    start = time.process_time()
                    transform(torch.from_numpy(clip).permute(0, 3, 1, 2))
                    taken[decoder].setdefault(name, []).append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    for decoder, times in taken.items():
        middle = {name: statistics.median(values) for name, values in times.items()}
        yield {
            "decoder": decoder,
            "clips": len(times["decode"]),
            **{f"{name}_ms": 1e3 * value for name, value in middle.items()},
            "clips_per_second_per_core": copies / (middle["decode"] + middle["train"]),
            "clips_per_second_per_core_randaugment": copies / (middle["decode"] + middle["train_randaugment"]),
            "clips_per_second_per_core_test": 1 / (middle["decode"] + middle["test"]),
        }
