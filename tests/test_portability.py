"""Windows and macOS lack what Linux has: nothing may need it to be imported, and training and testing go without it."""

import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stts_lightning.data import isolation
from stts_lightning.data.datamodule import VideoDataModule
from stts_lightning.data.decode import write_mp4
from stts_lightning.data.sources import ListSource
from stts_lightning.data.workers import LoaderOptions

# As on Windows: what is missing there is taken away before anything is imported.
WITHOUT = """
import os, signal, sys
for name in ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGALRM", "SIGKILL"):
    delattr(signal, name)
for name in ("resource", "fcntl"):
    sys.modules[name] = None
for name in ("nice", "fork", "getuid", "sched_getaffinity"):
    delattr(os, name)
"""

IMPORT_ALL = """
import importlib, pathlib, stts_lightning
root = pathlib.Path(stts_lightning.__file__).parent
files = sorted(file.relative_to(root.parent).with_suffix("") for file in root.rglob("*.py"))
for file in files:
    if file.name != "__main__":
        importlib.import_module(".".join(file.parts).removesuffix(".__init__"))
print(len(files))
"""

TRAIN = """
import signal
from hydra import compose, initialize_config_dir
from lightning.pytorch.trainer.connectors import signal_connector
from stts_lightning import assembly, run_folders
from stts_lightning.configuration import conf_dir
from stts_lightning.data import isolation
from stts_lightning.data.workers import begin_worker
isolation.HAS_ISOLATION = False
begin_worker(0, niceness=10)
with initialize_config_dir(conf_dir(), version_base="1.3"):
    cfg = compose("train", [
        "backbone=mvit_tiny", "selection=t0_0.5", "dataset=list", "dataset.train=train.csv", "dataset.val=train.csv",
        "recipe=scratch", "trainer=cpu", "trainer.max_epochs=1", "logger=none", "loader.batch_size=2", "loader.num_workers=0",
        "clip.test_views=1", "callbacks.progress=null", "callbacks.panels=null", "run_dir=run",
    ])
model = assembly.build_body(cfg)
data = assembly.build_data(cfg, model.backbone.clip_size)
data.setup()
assembly.fit_head(model, len(data.classes))
signal_connector._IS_WINDOWS = True  # Elsewhere Lightning itself needs what is missing.
signal.valid_signals = lambda: {signal.SIGTERM, signal.SIGINT}
trainer, module = assembly.build_trainer(cfg), assembly.build_module(cfg, model)
trainer.fit(module, data)
print("trained", trainer.global_step, isolation._OF_THIS_PROCESS)
"""


def python(code: str, folder: Path) -> str:
    # getpass takes the user's name from there, as on Windows.
    environment = {**os.environ, "LOGNAME": "me", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", WITHOUT + code], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_every_module_is_imported_without_what_other_systems_lack(tmp_path: Path) -> None:
    assert int(python(IMPORT_ALL, tmp_path).split()[0]) > 60


def test_training_goes_without_it_and_decodes_in_the_worker(tmp_path: Path) -> None:
    for number in (0, 1):
        write_mp4(tmp_path / f"{number}.mp4", (np.full((64, 64, 3), 8 * i, np.uint8) for i in range(16)))
    (tmp_path / "train.csv").write_text("0.mp4 0\n1.mp4 1\n")
    said = python(TRAIN, tmp_path)
    assert "trained 1 {}" in said, said
    assert said.count("clip.decode_timeout: has no effect on this system") == 1


def test_without_isolation_a_worker_decodes_itself_and_it_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    write_mp4(tmp_path / "a.mp4", (np.full((48, 64, 3), 8 * i, np.uint8) for i in range(4)))
    monkeypatch.setattr(isolation, "HAS_ISOLATION", False)
    monkeypatch.setattr(isolation, "_OF_THIS_PROCESS", {})
    isolation.can_isolate.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            with isolation.open_isolated(tmp_path / "a.mp4", "decord", 20) as reader:
                assert reader.frames(np.array([3])).shape == (1, 48, 64, 3)
    isolation.can_isolate.cache_clear()
    assert not isolation._OF_THIS_PROCESS
    assert caplog.text.count("clip.decode_timeout: has no effect on this system") == 1


def test_what_a_spawned_worker_gets_can_be_pickled(tmp_path: Path) -> None:
    """macOS and Windows start workers anew instead of forking them."""
    (tmp_path / "list.csv").write_text("a.mp4 0\nb.mp4 1\n")
    source = ListSource(str(tmp_path / "list.csv"), str(tmp_path / "list.csv"), check=False)
    policy = {"randaugment": "rand-m7-n4-mstd0.5-inc1"}
    data = VideoDataModule(source, (8, 32, 32), 4, 2, LoaderOptions(2, 1), train_transform=policy)
    data.setup()
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert pickle.loads(pickle.dumps((loader.dataset, loader.collate_fn, loader.worker_init_fn)))
