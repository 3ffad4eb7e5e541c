"""Two ranks over gloo train what one rank trains: same rows, same loss, same weights."""

import json

import pytest
import torch
from data_parallel_ranks import train_and_record
from processes import ended, said, start_ranks

from hrmtext.artifacts import RunFolder, read_tensors


def launch(run, num_ranks, stop_at=0):
    """Train on `num_ranks` processes; returns their exit codes and error output."""
    log = run.with_name(f"{run.name}-log{stop_at}")
    statuses = ended(start_ranks(num_ranks, train_and_record, str(run), stop_at, log=log))
    return statuses, [*said(log).values()]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for num_ranks in (1, 2):
        codes, errors = launch(folder / f"run{num_ranks}", num_ranks)
        assert codes == [0] * num_ranks, errors
    return folder


def served(runs, num_ranks):
    files = [runs / f"run{num_ranks}-rows-{rank}.json" for rank in range(num_ranks)]
    return [json.loads(file.read_text()) for file in files]


def test_two_ranks_read_the_rows_that_one_reads_and_share_them(runs):
    (one,), two = served(runs, 1), served(runs, 2)
    assert one["step"] == two[0]["step"] == two[1]["step"] == 12
    assert sorted(one["served"]) == sorted(two[0]["served"] + two[1]["served"])
    assert one["served"][:15] != sorted(one["served"][:15])
    assert all(len(rank["served"]) < len(one["served"]) for rank in two)


def test_weights_averages_and_moments_agree_within_rounding(runs):
    one, two = (RunFolder(runs / f"run{n}").latest() for n in (1, 2))
    assert one.name == two.name
    for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
        a, b = read_tensors(one / name), read_tensors(two / name)
        assert a.keys() == b.keys()
        for key, tensor in a.items():
            # fp32 gradients summed in another order; atan2 of tiny moments magnifies it.
            torch.testing.assert_close(b[key], tensor, rtol=1e-3, atol=2e-5, msg=f"{name} {key}")


def test_loss_accuracy_and_validation_agree_and_one_rank_writes(runs):
    from hrmtext.train.metrics import read_metrics

    one, two = (read_metrics(RunFolder(runs / f"run{n}").metrics_file) for n in (1, 2))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a["kind"], a["step"]) == (b["kind"], b["step"])
        if a["kind"] == "train":
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["gradient_norm"] == pytest.approx(a["gradient_norm"], rel=1e-3)
            for key in ("tokens", "supervised_tokens", "lr", "bp_steps", "epoch"):
                assert a[key] == b[key]
        else:
            for weights in ("raw", "ema"):
                assert b[weights]["rows"] == a[weights]["rows"] == 12
                assert b[weights]["loss"] == pytest.approx(a[weights]["loss"], rel=1e-4)


def test_a_signal_to_one_rank_stops_both_at_the_same_step_and_both_go_on(runs):
    run = runs / "stopped"
    codes, errors = launch(run, 2, stop_at=4)
    assert codes == [1, 1]
    for text in errors:
        assert "stopped after step 4 of 12" in text
    assert RunFolder(run).latest().name == "step_0000004"
    codes, errors = launch(run, 2)
    assert codes == [0, 0], errors
    whole = read_tensors(RunFolder(runs / "run2").latest() / "model.safetensors")
    for key, tensor in read_tensors(RunFolder(run).latest() / "model.safetensors").items():
        assert torch.equal(tensor, whole[key]), key
