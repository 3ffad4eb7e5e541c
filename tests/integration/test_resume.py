"""A run on prepared data, killed at a random moment, ends as the uninterrupted one does."""

import json
import random
import signal
import time

import pytest
import torch
from processes import ended, start
from small_run import make_config, prepare_additions, train_quietly

from hrmtext.artifacts import RunFolder, load_model, read_tensors
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import CheckpointError, DataError
from hrmtext.train import FolderSource, train
from hrmtext.train.metrics import read_metrics


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_additions(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("whole") / "run"
    return train(make_config(), data_folder=data, run_folder=run, device="cpu", progress="none")


def records(run):
    return [
        {key: value for key, value in record.items() if key != "timing"}
        for record in read_metrics(RunFolder(run).metrics_file)
    ]


def test_kill_9_at_a_random_moment_changes_nothing(data, whole, tmp_path):
    run = tmp_path / "run"
    kills, moments = 0, random.Random(7)
    for _ in range(2):
        before = RunFolder(run).metrics_file.stat().st_size if kills else 0
        process = start(train_quietly, make_config(), str(data), str(run), log=tmp_path / "log")
        # From outside and at any moment: after the log has grown by a random amount.
        grow = moments.randrange(200, 3000)
        while process.exitcode is None:
            log = RunFolder(run).metrics_file
            if log.is_file() and log.stat().st_size > before + grow:
                process.kill()
                break
            time.sleep(0.002)
        (status,) = ended([process])
        assert status in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
        kills += status != 0
    assert kills, "the run was over before it could be killed: make it longer"
    result = train(make_config(), data_folder=data, run_folder=run, device="cpu", progress="none")
    assert result.step == whole.step > 40
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        a, b = (read_tensors(path / name) for path in (whole.checkpoint, result.checkpoint))
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            assert torch.equal(tensor, b[key]), f"{name}: {key}"
    assert records(whole.run_folder) == records(run)


def test_the_run_learns_and_its_folder_holds_all_it_promises(data, whole):
    run = RunFolder(whole.run_folder)
    losses = [r["loss"] for r in records(run.path) if r["kind"] == "train"]
    assert losses[-1] < 0.7 * losses[0]
    validation = whole.validation.ema
    assert validation["rows"] == 60
    assert validation["by_stratum"].keys() == {"add"}
    assert validation["by_condition"].keys() == {"direct"}
    assert len(validation["loss_by_cycle"]) == 2
    assert validation["loss_by_cycle"][-1] == pytest.approx(validation["loss"])
    assert any(run.tensorboard_folder.iterdir())
    assert "<svg" in run.report_file.read_text()
    versions = json.loads(run.versions_file.read_text())
    assert versions["data_fingerprint"] == FolderSource(data).fingerprint
    tokenizer = PromptTokenizer.load(whole.checkpoint)
    assert tokenizer.decode(tokenizer.encode_response("7+5")) == "7+5"
    assert load_model(whole.checkpoint).config.vocab_size == 287


def test_every_row_is_trained_on_once_an_epoch(data):
    source, config = FolderSource(data), make_config()
    num_steps = source.num_steps(config)
    rows = {0: [], 1: []}
    batches = iter(source.loader(config, 0, 1))
    for _ in range(num_steps):
        batch = next(batches)
        rows[batch.epoch] += [row for packed in batch.bins for row in packed.row_ids]
    for epoch, seen in rows.items():
        assert sorted(seen) == list(range(source.data.epoch(epoch).num_rows))


def test_a_folder_that_is_no_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="hrm-text data prepare"):
        train(make_config(), data_folder=tmp_path, run_folder=tmp_path / "run")


def test_another_batch_size_is_refused(data, whole):
    config = make_config(bin_tokens=128)
    with pytest.raises(CheckpointError, match="bin_tokens: 256 in the checkpoint, 128 now"):
        train(config, data_folder=data, run_folder=whole.run_folder, device="cpu")
