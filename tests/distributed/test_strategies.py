"""However a step is shared out, it is the same step: loss, rows, initial weights, checkpoints.

One case of each kind is tried by default; with HRM_TEXT_STRATEGIES=all in the environment all are.
"""

import json
import shutil
from itertools import chain

import pytest
import torch
from memory_source import small_config
from ranks import CURVES, EVERYTHING, RUNS, curve, launch, train_and_record

from hrmtext.artifacts import RunFolder, load_model, read_tensors
from hrmtext.artifacts.dcp import DcpFolder
from hrmtext.config.model import preset
from hrmtext.errors import ConfigError
from hrmtext.model.flops import count_parameters
from hrmtext.train.parallel import choose_layout

CASES = [*CURVES, *(("ddp, compiled", "fsdp, compiled") if EVERYTHING else ())]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("strategies")
    launch("two", folder, 2)
    for name in ("fsdp", "ddp"):  # as they stood half-way
        for ranks in (1, 3):
            shutil.copytree(folder / name, folder / f"{name}-on-{ranks}")
            run = RunFolder(folder / f"{name}-on-{ranks}")
            for path in run.checkpoints():
                if run.step_of(path) > 3:
                    shutil.rmtree(path)
    launch("three", folder, 3)
    return folder


def found(folder, task, ranks):
    return [json.loads((folder / f"{task}-{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def one():
    """One rank, a step being one bin."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    formats = {
        "fp64": (torch.float64, torch.float64),
        "fp32": (torch.float32, torch.float32),
        "bf16": (torch.bfloat16, torch.float32),
    }
    curves = {name: curve(*dtypes, 1) for name, dtypes in formats.items()}
    torch.set_num_threads(before)
    return curves


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_norm_are_those_of_one_rank(folder, one, case):
    for rank in found(folder, "two", 2):
        got = rank["curves"][case]
        assert got["losses"] == pytest.approx(one["fp64"]["losses"], rel=1e-9)
        assert got["norms"] == pytest.approx(one["fp64"]["norms"], rel=1e-7)
        # Without gradient at K = 2, the embedding is left alone, on every rank alike.
        assert got["moved"] == one["fp64"]["moved"]
        assert set(got["moved"].values()) == {3, 4}


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
@pytest.mark.parametrize("number_format", ["fp32", "bf16"])
def test_rounding_is_no_more_than_that_of_one_rank(folder, one, name, number_format):
    exact = torch.tensor(one["fp64"]["losses"], dtype=torch.float64)
    plain = torch.tensor(one[number_format]["losses"], dtype=torch.float64)
    budget = 4 * float((plain - exact).abs().max())
    losses = found(folder, "two", 2)[0]["curves"][f"{name}, {number_format}"]["losses"]
    assert float((torch.tensor(losses, dtype=torch.float64) - exact).abs().max()) <= budget


def test_initial_weights_are_those_of_one_device_and_cut_without_overlap(folder):
    total = count_parameters(preset("test")).stored
    for task, ranks in (("two", 2), ("three", 3)):
        shares = found(folder, task, ranks)
        for name in shares[0]["initial"]:
            held = [share["initial"][name] for share in shares]
            assert all(part["same"] for part in held), name
            copies = 2 if name in ("ddp", "hsdp 2x1") else 1
            assert sum(part["held"] for part in held) == copies * total


def test_every_form_reads_the_rows_that_one_rank_reads(folder, tmp_path):
    alone = train_and_record(tmp_path / "alone")
    assert len(alone) == 8
    ranks = found(folder, "two", 2)
    for name in RUNS:
        shares = [rank["rows"][name] for rank in ranks]
        assert {key: sorted(shares[0][key] + shares[1][key]) for key in shares[0]} == alone
        assert all(share[key] for share in shares for key in share)
    # Begun on two ranks, gone on with on one and on three: the same batches still.
    rest = {key: rows for key, rows in alone.items() if [*alone].index(key) >= 3}
    for name, parallel in (("fsdp", "auto"), ("ddp", "none")):
        assert train_and_record(folder / f"{name}-on-1", parallel=parallel) == rest
        shares = [rank["rows"][name] for rank in found(folder, "three", 3)]
        merged = {key: sorted(chain(*(share[key] for share in shares))) for key in shares[0]}
        assert merged == rest
    whole = read_tensors(RunFolder(tmp_path / "alone").latest() / "ema.safetensors")
    for run in (*RUNS, *(f"{name}-on-{n}" for name in ("ddp", "fsdp") for n in (1, 3))):
        path = RunFolder(folder / run.replace(" ", "-")).latest()
        assert path.name == "step_0000008"
        for key, tensor in read_tensors(path / "ema.safetensors").items():
            # fp32 gradients summed in another order; atan2 of tiny moments magnifies it.
            torch.testing.assert_close(tensor, whole[key], rtol=1e-3, atol=5e-5)


def test_sharded_state_is_written_by_every_rank_and_opens_as_any_model_does(folder):
    path = RunFolder(folder / "fsdp").latest()
    written = sorted(p.name for p in (path / "optimizer").iterdir())
    assert written == [".metadata", "__0_0.distcp", "__1_0.distcp"]
    stored, plain = DcpFolder(path / "optimizer"), RunFolder(folder / "ddp").latest()
    expected = read_tensors(plain / "optimizer.safetensors")
    assert stored.entries.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(stored.read(name), tensor, rtol=1e-2, atol=1e-6)
    for name in RUNS:
        run = folder / name.replace(" ", "-")
        assert load_model(RunFolder(run).latest(), "ema").config == preset("test")


def test_a_form_that_does_not_fit_the_ranks_is_refused(monkeypatch):
    device = torch.device("cpu")
    for name in ("fsdp", "hsdp"):
        with pytest.raises(ConfigError, match="there is one rank"):
            choose_layout(small_config(parallel=name), device)
    assert choose_layout(small_config(), device).strategy == "none"
    monkeypatch.setattr("hrmtext.runtime.dist.world_size", lambda: 4)
    with pytest.raises(ConfigError, match="would each train a model of their own"):
        choose_layout(small_config(parallel="none"), device)
    with pytest.raises(ConfigError, match="a divisor of the 4 ranks"):
        choose_layout(small_config(parallel="hsdp", shard_size=3), device)
    with pytest.raises(ConfigError, match="over all 4 ranks"):
        choose_layout(small_config(parallel="fsdp", shard_size=2), device)
    chosen = choose_layout(small_config(shard_size=2), device)
    assert (chosen.strategy, chosen.replicas, chosen.shard_size) == ("hsdp", 2, 2)
    assert choose_layout(small_config(), device).strategy == "ddp"
    assert choose_layout(small_config(), torch.device("cuda")).strategy == "fsdp"
