"""Trackers get the numbers of the log under its names; a missing package is a clear error."""

import sys

import pytest
from memory_source import MemorySource, random_rows, small_config

from hrmtext.artifacts import RunFolder
from hrmtext.errors import ConfigError
from hrmtext.train import train_on
from hrmtext.train.metrics import MetricsLog, read_metrics
from hrmtext.train.trackers import open_trackers, scalars

RECORD = {
    "kind": "validation", "step": 7, "ema": {"loss": 1.5, "loss_by_cycle": [2.0, 1.5]},
    "note": "text", "timing": {"elapsed_s": 3},
}  # fmt: skip


class Kept:
    """Keeps what it is given."""

    def __init__(self):
        self.rows, self.flushed, self.closed = [], 0, False

    def log(self, values, step):
        self.rows.append((step, dict(values)))

    def flush(self):
        self.flushed += 1

    def close(self):
        self.closed = True


def test_numbers_are_named_by_their_place_and_text_is_left_out():
    assert scalars(RECORD) == {
        "validation/ema/loss": 1.5,
        "validation/ema/loss_by_cycle_1": 2.0,
        "validation/ema/loss_by_cycle_2": 1.5,
        "validation/timing/elapsed_s": 3.0,
    }


def test_every_tracker_gets_every_record(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start("a: 1\n", {})
    trackers = Kept(), Kept()
    log = MetricsLog(run, resumed_step=0, trackers=trackers)
    log.write(RECORD)
    log.sync()
    log.close()
    for tracker in trackers:
        assert tracker.rows == [(7, scalars(RECORD))]
        assert tracker.flushed == 1
        assert tracker.closed


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_named_before_anything_is_trained(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    config = small_config(trackers=[name])
    with pytest.raises(ConfigError, match=rf"{name}.*pip install 'hrm-text\[track\]'"):
        open_trackers(RunFolder(tmp_path), config, resumed_step=0)
    with pytest.raises(ConfigError, match="trackers"):
        small_config(trackers=["mlflow"])


def test_wandb_offline_keeps_the_run_in_its_folder(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `track` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = tmp_path / "run"
    config = small_config(trackers=["wandb"], max_steps=2, validation_rows=0)
    train_on(config, MemorySource(random_rows(30)), run_folder=folder, progress="none")
    identity = (folder / "trackers.json").read_text()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    assert b"train/loss" in file.read_bytes()
    config = small_config(trackers=["wandb"], max_steps=2, validation_rows=0)
    train_on(config, MemorySource(random_rows(30)), run_folder=folder, progress="none")
    assert (folder / "trackers.json").read_text() == identity
    assert len(read_metrics(RunFolder(folder).metrics_file)) == 1


def test_trackio_keeps_the_run_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio", reason="the extra `track` is not installed")
    folder = tmp_path / "run"
    config = small_config(trackers=["trackio"], max_steps=2, validation_rows=0)
    train_on(config, MemorySource(random_rows(30)), run_folder=folder, progress="none")
    databases = list((tmp_path / "trackio").rglob("*.db"))
    assert databases
    assert any(b"train/loss" in file.read_bytes() for file in (tmp_path / "trackio").rglob("*.db*"))
