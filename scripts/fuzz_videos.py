"""Damage videos in many ways and read each as a loader would: `python scripts/fuzz_videos.py FOLDER --mutants 2000`.

Every video of the folder, and the first again as MPEG-TS, is damaged by bit flips, by cutting it off, or both, as a seed says.
Reading one gives frames, or one error that names the file, within the time and the memory that are allowed; or the decoder
hangs or dies, which costs the process that decodes and nothing else. Files that a decoder hangs on or dies of are kept.
"""

import argparse
import json
import resource
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stts_lightning.data.annotations import VIDEO_SUFFIXES
from stts_lightning.data.decode import DecodeError
from stts_lightning.data.isolation import DecoderProcess


def remux(source: Path, target: Path) -> None:
    """The same packets as MPEG-TS: the container that decord hangs on."""
    import av

    with av.open(str(source)) as reading, av.open(str(target), "w", format="mpegts") as writing:
        stream = reading.streams.video[0]
        copy = writing.add_stream_from_template(stream)
        for packet in reading.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                writing.mux(packet)


def damaged(content: bytes, rng: np.random.Generator) -> tuple[str, bytes]:
    """What was done to a file, and the file."""
    data = np.frombuffer(content, np.uint8).copy()
    kind = ("flips", "head flips", "cut", "cut and flips")[rng.integers(4)]
    if "cut" in kind and len(data) > 1:
        data = data[: rng.integers(1, len(data))]
    if "flips" in kind and len(data):
        # Half of the time where the container's tables are: those lead decoders further astray than pixels do.
        area = min(len(data), 4096) if kind.startswith("head") else len(data)
        places = rng.integers(area, size=int(2 ** rng.uniform(0, 9)))
        data[places] ^= (1 << rng.integers(8, size=len(places))).astype(np.uint8)
    return kind, data.tobytes()


def mutants(sources: list[Path], count: int, seed: int) -> Iterator[tuple[str, str, bytes]]:
    """Name, kind of damage and content of each."""
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        source = sources[number % len(sources)]
        kind, content = damaged(source.read_bytes(), rng)
        yield f"{number:05d}_{source.stem}{source.suffix}", kind, content


def read(process: DecoderProcess, path: Path, decoder: str, frames: int) -> str:
    """Read as a loader does; returns what came of it."""
    try:
        with process.open(path, decoder) as reader:
            indices = np.linspace(0, len(reader) - 1, frames).round().astype(np.int64)
            pixels = reader.frames(indices)
            assert pixels.shape[0] == frames and pixels.shape[3] == 3 and pixels.dtype == np.uint8
            return "frames"
    except DecodeError as error:
        assert str(path) in str(error), f"the error does not name the file: {error}"
        if path not in process.lost:
            return "refused"
        return "hangs" if "hangs" in str(error) else "dies"


def fuzz(folder: Path, work: Path, count: int, seed: int, decode_timeout: float, decoder: str) -> dict[str, Any]:
    """Read that many mutants; returns the counts."""
    work.mkdir(parents=True, exist_ok=True)
    sources = sorted(file for file in folder.rglob("*") if file.suffix.lower() in VIDEO_SUFFIXES)
    remuxed = work / "remuxed.ts"
    whole = next(file for file in sources if file.suffix == ".mp4")
    remux(whole, remuxed)
    process, outcomes, slowest = DecoderProcess(decode_timeout), Counter[str](), 0.0
    for name, kind, content in mutants([*sources, remuxed], count, seed):
        path = work / name
        path.write_bytes(content)
        start = time.monotonic()
        outcome = read(process, path, decoder, 8)
        slowest = max(slowest, time.monotonic() - start)
        outcomes[outcome] += 1
        outcomes[f"{kind}: {outcome}"] += 1
        if outcome in ("frames", "refused"):
            path.unlink()
    process.close()
    memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {
        "mutants": count, "files": len(sources) + 1, "decoder": decoder, **dict(sorted(outcomes.items())),
        "slowest_seconds": round(slowest, 1), "largest_process_mib": round(memory),
        "kept": sorted(path.name for path in process.lost),
    }  # fmt: skip


def main() -> None:
    """Fuzz and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--work", type=Path, default=Path("fuzz"), help="where mutants are written, and kept if they are bad")
    parser.add_argument("--mutants", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--decode-timeout", type=float, default=10.0)
    parser.add_argument("--decoder", default="decord")
    a = parser.parse_args()
    print(json.dumps(fuzz(a.folder, a.work, a.mutants, a.seed, a.decode_timeout, a.decoder), indent=1))


if __name__ == "__main__":
    main()
