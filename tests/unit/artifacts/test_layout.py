"""Run folders: only complete checkpoints count, retention, and nothing overwritten in silence."""

import json

import pytest
import torch

from hrmtext.artifacts import RunFolder, describe_versions
from hrmtext.errors import CheckpointError, StorageError
from hrmtext.runtime.io import MARKER, atomic_folder


def checkpoint(run, step, **marker):
    with atomic_folder(run.checkpoint_path(step), step=step, **marker) as folder:
        (folder / "weights").write_text(str(step))


@pytest.fixture
def run(tmp_path):
    run = RunFolder(tmp_path / "run")
    run.start("seed: 1\n", {"a": 1})
    return run


def test_a_started_run_holds_config_and_versions(run):
    assert run.exists
    assert run.config_file.read_text() == "seed: 1\n"
    assert json.loads(run.versions_file.read_text()) == {"a": 1}


def test_a_folder_with_a_run_or_foreign_files_is_never_started_over(run, tmp_path):
    with pytest.raises(StorageError, match="holds a run already"):
        run.start("seed: 2\n", {})
    assert run.config_file.read_text() == "seed: 1\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    with pytest.raises(StorageError, match="holds other files already"):
        RunFolder(tmp_path / "mine").start("", {})


def test_checkpoints_come_in_the_order_of_steps(run):
    for step in (30, 4, 12_345_678, 200):
        checkpoint(run, step)
    assert [run.step_of(path) for path in run.checkpoints()] == [4, 30, 200, 12_345_678]
    assert run.latest() == run.checkpoint_path(12_345_678)


def test_an_incomplete_checkpoint_does_not_count(run):
    checkpoint(run, 10)
    checkpoint(run, 20)
    (run.checkpoint_path(20) / MARKER).unlink()
    assert run.latest() == run.checkpoint_path(10)
    (run.checkpoint_path(10) / "weights").write_text("")
    with pytest.raises(
        CheckpointError, match=r"2 checkpoint folders .* none was written to its end"
    ):
        run.latest()


def test_a_missing_checkpoint_is_explained(run, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoints yet"):
        run.latest()
    with pytest.raises(CheckpointError, match="not a run folder"):
        RunFolder(tmp_path / "nowhere").latest()


def test_pruning_keeps_the_last_and_the_multiples(run):
    for step in range(10, 80, 10):
        checkpoint(run, step)
    removed = run.prune(keep_last=2, keep_every=30)
    assert [run.step_of(path) for path in removed] == [10, 20, 40, 50]
    assert [run.step_of(path) for path in run.checkpoints()] == [30, 60, 70]
    assert {path.name for path in run.checkpoints_folder.iterdir()} == {
        "step_0000030", "step_0000060", "step_0000070",
    }  # fmt: skip
    with pytest.raises(ValueError, match="at least 1"):
        run.prune(keep_last=0)


def test_the_best_is_the_lowest_validation_loss_and_pruning_can_keep_it(run):
    with pytest.raises(CheckpointError, match="no checkpoints yet"):
        run.best()
    checkpoint(run, 5)
    with pytest.raises(CheckpointError, match=r"none is best; take .*last"):
        run.best()
    for step, loss in ((10, 2.0), (20, 1.5), (30, 1.5), (50, 1.75)):
        checkpoint(run, step, validation_loss=loss)
    checkpoint(run, 40)
    assert run.best() == run.named("best") == run.checkpoint_path(20)
    assert run.latest() == run.named("last") == run.checkpoint_path(50)
    run.prune(keep_last=1, keep_best=True)
    assert [run.step_of(path) for path in run.checkpoints()] == [20, 50]
    run.prune(keep_last=1)
    assert run.best() == run.checkpoint_path(50)


def test_leftovers_of_a_killed_run_are_removed_and_nothing_else(run):
    checkpoint(run, 10)
    half = run.checkpoints_folder / ".step_0000020.0a1b2c3d.tmp"
    half.mkdir()
    (half / "model.safetensors").write_text("half")
    (run.path / ".config.yaml.deadbeef.tmp").write_text("half")
    (run.path / ".notes").write_text("mine")
    removed = run.remove_leftovers()
    assert {path.name for path in removed} == {half.name, ".config.yaml.deadbeef.tmp"}
    assert (run.path / ".notes").exists()
    assert run.latest() == run.checkpoint_path(10)


def test_versions_name_packages_device_and_data():
    facts = describe_versions(torch.device("cpu"), "abc")
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["data_fingerprint"] == "abc"
    assert facts["device"]["device"] == "cpu"
    json.dumps(facts)
