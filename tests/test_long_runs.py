"""What a long run holds on to: nothing that grows."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.data.sources import DemoSource
from stts_lightning.data.workers import LoaderOptions

pytestmark = pytest.mark.slow


def family(pid: int) -> list[int]:
    """A process and all below it."""
    children = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(child) for file in children for child in file.read_text().split()]
    return [pid, *(one for child in found for one in family(child))]


def private(pid: int) -> float:
    """MiB that a process has for itself."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0.0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def test_memory_of_workers_is_flat_over_twenty_thousand_clips(tmp_path: Path) -> None:
    source = DemoSource(str(tmp_path / "demo"), train=10, val=1)
    options = LoaderOptions(batch_size=16, num_workers=2)
    data = VideoDataModule(source, (4, 32, 32), stride=2, test_views=1, loader=options)
    data.prepare_data()
    data.setup()
    loader = data.train_dataloader()
    clips, memory, handles = 0, [], []
    for epoch in range(250):
        loader.order.set_epoch(epoch)
        for batch in loader:
            clips += len(batch.label)
        workers = family(os.getpid())[1:]
        memory.append(sum(private(pid) for pid in workers))
        handles.append(sum(len(list(Path(f"/proc/{pid}/fd").iterdir())) for pid in workers))
    assert clips == 20_000
    # After the first tenth, when all caches are filled.
    early, late = np.median(memory[25:50]), np.median(memory[-25:])
    print(f"{early:.0f} MiB after 2,000 clips, {late:.0f} MiB after 20,000; {handles[25]} and {handles[-1]} open files")
    assert late < 1.05 * early + 10
    assert handles[-1] == handles[25]


def test_file_handles_and_processes_are_flat_over_fifty_jobs(tmp_path: Path) -> None:
    fast = [
        "experiment=demo", "pretrained=null", "dataset.train=2", "dataset.val=1", "loader.batch_size=8", "loader.num_workers=0",
        "callbacks.progress=null", "trainer.accelerator=cpu", "debug=fast", "test=false", "callbacks.panels=null",
    ]  # fmt: skip
    command = [sys.executable, "-m", "stts_lightning.train", "-m", *fast, "seed=range(50)"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    sweep = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    seen: dict[int, list[tuple[int, int]]] = {}
    while sweep.poll() is None:
        jobs = len(list(tmp_path.glob("runs/*/*/result.json")))
        try:
            figures = (len(list(Path(f"/proc/{sweep.pid}/fd").iterdir())), len(family(sweep.pid)))
        except OSError:
            break
        seen.setdefault(jobs, []).append(figures)
        time.sleep(0.1)
    assert sweep.wait() == 0
    assert len(list(tmp_path.glob("runs/*/*/result.json"))) == 50
    files, processes = ([max(one[i] for one in seen[jobs]) for jobs in sorted(seen)[:50]] for i in (0, 1))
    print(f"open files {files[2]} in the third job, {files[-2]} in the last; processes {max(processes)} at most")
    assert files[-2] <= files[2] and max(processes[2:]) <= max(processes[:3])
