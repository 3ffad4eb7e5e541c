"""The loop: interrupted and resumed equals uninterrupted, bit for bit, whatever stopped it."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from interrupted_run import make_source, train_until
from memory_source import MemorySource, random_rows, small_config
from processes import ended, start

from hrmtext.artifacts import RunFolder, load_model, read_tensors
from hrmtext.artifacts.opening import open_stored
from hrmtext.errors import CheckpointError, ConfigError, NonFiniteError, StorageError
from hrmtext.runtime.io import MARKER, explain_storage_errors
from hrmtext.train import checkpoint as checkpoint_module
from hrmtext.train import train_on
from hrmtext.train.metrics import read_metrics

NUM_STEPS = 16


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole") / "run"
    result = train_on(small_config(), make_source(), run_folder=folder, progress="none")
    torch.set_num_threads(before)
    return result


def interrupted(folder, how, at):
    """Train until it is interrupted; returns the exit status and the error output."""
    log = folder.with_name("log")
    statuses = ended([start(train_until, how, at, str(folder), log=log)])
    return statuses[0], log.read_text()


def without_timing(path):
    return [{k: v for k, v in r.items() if k != "timing"} for r in read_metrics(path)]


def assert_same_weights(first, second):
    """Same tensors in the last checkpoints, bit for bit."""
    one, two = RunFolder(first), RunFolder(second)
    assert one.latest().name == two.latest().name
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        a, b = read_tensors(one.latest() / name), read_tensors(two.latest() / name)
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            assert torch.equal(tensor, b[key]), f"{name}: {key}"


def assert_same_run(first, second):
    """Same checkpoints' tensors, same counters, same log."""
    assert_same_weights(first, second)
    one, two = RunFolder(first), RunFolder(second)
    records = [json.loads((r.latest() / "training.json").read_text()) for r in (one, two)]
    for record in records:
        del record["elapsed_s"]
    assert records[0] == records[1]
    assert without_timing(one.metrics_file) == without_timing(two.metrics_file)


@pytest.mark.parametrize(
    ("how", "at"),
    [("SIGKILL", 3), ("SIGKILL", 9), ("write", 1), ("write", 2)],
    ids=["before-any-checkpoint", "between-checkpoints", "writing-the-first", "writing-the-second"],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, whole, how, at):
    folder = tmp_path / "run"
    code, output = interrupted(folder, how, at)
    assert code == -signal.SIGKILL, output
    leftovers = [p for p in RunFolder(folder).checkpoints_folder.iterdir() if p.name[0] == "."]
    assert bool(leftovers) == (how == "write")
    result = train_on(small_config(), make_source(), run_folder=folder, progress="none")
    assert result.step == NUM_STEPS
    assert_same_run(whole.run_folder, folder)
    names = {p.name for p in RunFolder(folder).checkpoints_folder.iterdir()}
    assert names == {"step_0000015", "step_0000016"}


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_polite_signal_saves_says_so_and_the_run_goes_on_exactly(tmp_path, whole, name):
    folder = tmp_path / "run"
    code, output = interrupted(folder, name, 7)
    assert code == 3
    assert f"TrainingInterrupted: {name}: stopped after step 7 of 16" in output
    assert RunFolder(folder).latest().name == "step_0000007"
    assert "<svg" in RunFolder(folder).report_file.read_text()
    train_on(small_config(), make_source(), run_folder=folder, resume="must", progress="none")
    assert_same_run(whole.run_folder, folder)


def test_the_log_has_every_interval_once_in_order(whole):
    records = read_metrics(RunFolder(whole.run_folder).metrics_file)
    assert [r["step"] for r in records if r["kind"] == "train"] == list(range(2, 17, 2))
    assert [r["step"] for r in records if r["kind"] == "validation"] == [5, 10, 15, 16]
    last = [r for r in records if r["kind"] == "train"][-1]
    assert last["tokens"] == whole.tokens
    assert last["bp_steps"] == 5
    assert records[0]["bp_steps"] == 2


def test_a_finished_run_stays_finished(tmp_path, whole):
    before = (RunFolder(whole.run_folder).metrics_file).read_text()
    again = train_on(small_config(), make_source(), run_folder=whole.run_folder, progress="none")
    assert (again.step, again.checkpoint) == (whole.step, whole.checkpoint)
    assert RunFolder(whole.run_folder).metrics_file.read_text() == before


def test_the_checkpoint_is_a_model_that_predicts_what_validation_says(whole):
    from hrmtext.train.validate import validate

    source = make_source()
    batches = source.validation(small_config())
    for which, expected in (("raw", whole.validation.raw), ("ema", whole.validation.ema)):
        model = load_model(whole.checkpoint, which)
        found = validate(model, batches, device=torch.device("cpu"), dtype=torch.float32)
        assert found == expected


def test_a_checkpoint_without_marker_is_passed_over(tmp_path, whole):
    folder = tmp_path / "run"
    interrupted(folder, "SIGKILL", 12)
    (RunFolder(folder).checkpoint_path(10) / MARKER).unlink()
    train_on(small_config(), make_source(), run_folder=folder, progress="none")
    assert_same_run(whole.run_folder, folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 1e-3}, r"lr: 0.003 in the checkpoint, 0.001 now"),
        ({"model": {"preset": "test", "L_cycles": 2}}, r"model.L_cycles: 3 .*, 2 now"),
        ({"epochs": 3}, r"total_steps: 16 .*, 24 now"),
        ({"seed": 1}, r"seed: 0 .*, 1 now"),
        ({"precision": "bf16"}, r"precision: fp32 .*, bf16 now"),
    ],
)
def test_resuming_with_what_would_change_the_run_is_refused(whole, change, message):
    with pytest.raises(CheckpointError, match=message):
        run = whole.run_folder
        train_on(small_config(**change), make_source(), run_folder=run, progress="none")


def test_other_data_is_refused_and_harmless_keys_are_not(whole):
    other = MemorySource(random_rows(60, seed=9), heldout=())
    with pytest.raises(CheckpointError, match="data_fingerprint"):
        train_on(small_config(), other, run_folder=whole.run_folder, progress="none")
    config = small_config(log_every=1, keep_last=7, checkpoint_every=3)
    again = train_on(config, make_source(), run_folder=whole.run_folder, progress="none")
    assert again.step == NUM_STEPS


def test_a_run_folder_is_never_started_over(whole, tmp_path):
    with pytest.raises(CheckpointError, match="holds a run already"):
        train_on(small_config(), make_source(), run_folder=whole.run_folder, resume="never")
    with pytest.raises(CheckpointError, match="not a run folder"):
        train_on(small_config(), make_source(), run_folder=tmp_path / "new", resume="must")
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(StorageError, match="other files"):
        train_on(small_config(), make_source(), run_folder=tmp_path)


def test_a_full_disk_at_a_checkpoint_keeps_the_earlier_one(tmp_path, whole, monkeypatch):
    folder = tmp_path / "run"
    original = checkpoint_module.write_tensors
    calls = 0

    def write(path, tensors):
        nonlocal calls
        calls += 1
        if calls == 2:
            with explain_storage_errors(path), full.open("wb") as stream:
                stream.write(b"0" * 100_000)
        original(path, tensors)

    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full on this machine")
    monkeypatch.setattr(checkpoint_module, "write_tensors", write)
    with pytest.raises(StorageError, match="the disk is full"):
        train_on(small_config(), make_source(), run_folder=folder, progress="none")
    assert [p.name for p in RunFolder(folder).checkpoints_folder.iterdir()] == ["step_0000005"]
    monkeypatch.setattr(checkpoint_module, "write_tensors", original)
    train_on(small_config(), make_source(), run_folder=folder, progress="none")
    assert_same_run(whole.run_folder, folder)


def test_a_real_full_disk_keeps_every_earlier_checkpoint(tmp_path, whole):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a small tmpfs")
    try:
        config = small_config(keep_last=9)
        with pytest.raises(StorageError, match="the disk is full"):
            train_on(config, make_source(), run_folder=disk / "run", progress="none")
        run = RunFolder(disk / "run")
        assert [p.name for p in run.checkpoints()] == ["step_0000005", "step_0000010"]
        assert len(list(run.checkpoints_folder.iterdir())) == 2
        subprocess.run(["mount", "-o", "remount,size=9m", str(disk)], check=True)
        train_on(small_config(), make_source(), run_folder=disk / "run", progress="none")
        assert_same_run(whole.run_folder, disk / "run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_non_finite_gradient_stops_the_run_at_its_last_checkpoint(tmp_path, monkeypatch):
    from hrmtext.train.step import TrainStep

    original = TrainStep.accumulate

    def accumulate(self, batch, depth):
        sums = original(self, batch, depth)
        if batch.epoch == 1:
            self.compute.master.lm_head.weight.grad[0, 0] = float("inf")
        return sums

    monkeypatch.setattr(TrainStep, "accumulate", accumulate)
    with pytest.raises(NonFiniteError, match=r"first in lm_head.weight.*batch 0 of epoch 1"):
        train_on(small_config(), make_source(), run_folder=tmp_path / "run", progress="none")
    assert RunFolder(tmp_path / "run").latest().name == "step_0000005"


def test_the_time_budget_stops_with_a_checkpoint_and_more_time_goes_on(tmp_path, whole):
    folder = tmp_path / "run"
    short = small_config(max_minutes=1e-6)
    result = train_on(short, make_source(), run_folder=folder, progress="none")
    assert result.stopped_by == "max_minutes"
    assert result.step < NUM_STEPS == result.total_steps
    assert RunFolder(folder).latest() == result.checkpoint
    result = train_on(small_config(), make_source(), run_folder=folder, progress="none")
    assert (result.stopped_by, result.step) == ("end", NUM_STEPS)
    for key, tensor in read_tensors(whole.checkpoint / "model.safetensors").items():
        assert torch.equal(tensor, read_tensors(result.checkpoint / "model.safetensors")[key])


def test_checkpoints_by_time_change_nothing_that_is_computed(tmp_path, whole, monkeypatch):
    now = [0.0]

    def later():
        now[0] += 1.0  # so a step takes seconds, by this clock
        return now[0]

    monkeypatch.setattr("hrmtext.train.loop.time.perf_counter", later)
    config = small_config(checkpoint_minutes=0.2, keep_last=99)
    folder = tmp_path / "run"
    train_on(config, make_source(), run_folder=folder, progress="none")
    steps = {RunFolder.step_of(path) for path in RunFolder(folder).checkpoints()}
    assert {5, 10, 15, 16} < steps < set(range(1, 17)), steps
    monkeypatch.undo()
    assert_same_weights(whole.run_folder, folder)
    with pytest.raises(ConfigError, match="checkpoint_minutes is 0"):
        small_config(checkpoint_minutes=0)


def test_the_best_checkpoint_is_kept_and_loads_by_name(tmp_path, monkeypatch):
    from hrmtext.train import validate as validation

    original, losses = validation.validate, iter((9.0, 9.0, 4.0, 4.0, 5.0, 5.0, 6.0, 6.0))
    monkeypatch.setattr(
        validation, "validate", lambda *a, **k: {**original(*a, **k), "loss": next(losses)}
    )
    folder = tmp_path / "run"
    train_on(small_config(keep_last=1), make_source(), run_folder=folder, progress="none")
    run = RunFolder(folder)
    assert [run.step_of(path) for path in run.checkpoints()] == [10, 16]
    assert run.losses() == {run.checkpoint_path(10): 4.0, run.checkpoint_path(16): 6.0}
    assert "best, step 10" in run.report_file.read_text()
    for name, step in (("best", 10), ("last", 16)):
        taken = open_stored(folder / name)
        assert taken.folder == run.checkpoint_path(step)
    assert open_stored(folder).folder == run.checkpoint_path(16)
    with pytest.raises(CheckpointError, match="no such folder"):
        open_stored(folder / "worst")


def test_data_that_does_not_fit_the_model_is_refused(tmp_path):
    source = MemorySource(random_rows(8, vocab_size=200), vocab_size=200)
    with pytest.raises(ConfigError, match=r"200 tokens, but model.vocab_size is 64"):
        train_on(small_config(), source, run_folder=tmp_path / "run")
    config = small_config(model={"preset": "test", "max_seq_len": 8})
    with pytest.raises(ConfigError, match="rows of up to 16 tokens"):
        train_on(config, make_source(), run_folder=tmp_path / "run")
    with pytest.raises(ConfigError, match="a bin holds 8"):
        train_on(small_config(bin_tokens=8), make_source(), run_folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_bf16_training_follows_fp32(tmp_path):
    losses = {}
    for precision in ("fp32", "bf16"):
        config = small_config(
            precision=precision, epochs=6, log_every=8, checkpoint_every=99, validate_every=0
        )
        folder = tmp_path / precision
        train_on(config, make_source(), run_folder=folder, progress="none")
        records = read_metrics(RunFolder(folder).metrics_file)
        losses[precision] = [r["loss"] for r in records if r["kind"] == "train"]
    assert losses["fp32"][-1] < 0.7 * losses["fp32"][0]
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


def test_an_average_too_slow_for_the_run_is_warned_of(tmp_path, caplog):
    config = small_config(ema_decay=0.999, max_steps=2)
    train_on(config, make_source(), run_folder=tmp_path / "slow", progress="none")
    assert "ema_decay=0.999 is slow for 2 steps" in caplog.text
    caplog.clear()
    config = small_config(ema_decay=0.1, max_steps=2)
    train_on(config, make_source(), run_folder=tmp_path / "fast", progress="none")
    assert "ema_decay" not in caplog.text
