"""Writing in the background: training goes on, one write at a time, and no error is lost."""

import threading

import pytest
from memory_source import MemorySource, random_rows, small_config
from test_loop import assert_same_run

from hrmtext.artifacts import RunFolder
from hrmtext.errors import StorageError
from hrmtext.train import checkpoint as checkpoint_module
from hrmtext.train import train_on
from hrmtext.train.writer import Writer


def fail():
    raise StorageError("the disk is full")


def test_a_write_goes_on_beside_and_a_second_one_waits_for_it():
    writer, may_end, order = Writer(True), threading.Event(), []

    def write():
        may_end.wait(10)
        order.append("first")

    writer.submit(write)
    assert not order
    threading.Timer(0.05, may_end.set).start()
    writer.submit(lambda: order.append("second"))
    writer.wait()
    assert order == ["first", "second"]


@pytest.mark.parametrize("how", ["submit", "wait"])
def test_an_error_surfaces_once(how):
    writer = Writer(True)
    writer.submit(fail)
    with pytest.raises(StorageError, match="the disk is full"):
        writer.submit(lambda: None) if how == "submit" else writer.wait()
    writer.wait()
    writer.submit(fail)
    writer.close()


def test_an_error_surfaces_at_the_next_check():
    writer = Writer(True)
    writer.submit(fail)
    writer._thread.join()
    with pytest.raises(StorageError):
        writer.check()
    with pytest.raises(StorageError):
        Writer(False).submit(fail)


def test_a_run_that_writes_in_the_background_is_the_same_run(tmp_path, monkeypatch):
    source = MemorySource(random_rows(60), heldout=random_rows(20, seed=5))
    threads = set()
    original = checkpoint_module.write_tensors

    def write(path, tensors):
        threads.add(threading.current_thread().name)
        original(path, tensors)

    monkeypatch.setattr(checkpoint_module, "write_tensors", write)
    for name, background in (("plain", False), ("background", True)):
        config = small_config(checkpoint_async=background, max_steps=11)
        train_on(config, source, run_folder=tmp_path / name, progress="none")
    assert threads == {"MainThread", "hrmtext-checkpoint"}
    assert_same_run_but_for_the_key(tmp_path)


def assert_same_run_but_for_the_key(folder):
    import json

    for name in ("plain", "background"):
        path = RunFolder(folder / name).latest() / "training.json"
        record = json.loads(path.read_text())
        record["config"].pop("checkpoint_async")
        path.write_text(json.dumps(record))
        (path.parent / "COMPLETE.json").write_text(
            json.dumps({"files": {"training.json": path.stat().st_size}})
        )
    assert_same_run(folder / "plain", folder / "background")


def test_an_error_of_a_background_write_ends_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_module, "write_tensors", lambda *_: fail())
    source = MemorySource(random_rows(60))
    with pytest.raises(StorageError, match="the disk is full"):
        train_on(
            small_config(checkpoint_async=True), source, run_folder=tmp_path / "run",
            progress="none",
        )  # fmt: skip
    assert not [*RunFolder(tmp_path / "run").checkpoints_folder.iterdir()]
