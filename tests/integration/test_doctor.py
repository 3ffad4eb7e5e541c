"""The doctor finds what is wrong with a machine, a data folder and a run, and says what to do."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from small_run import make_config, prepare_additions

from hrmtext.artifacts import RunFolder
from hrmtext.cli.main import main
from hrmtext.config.base import dump_yaml
from hrmtext.doctor import Finding, examine
from hrmtext.doctor.disk import check_disk
from hrmtext.doctor.finding import guarded
from hrmtext.doctor.folders import check_data_folder, check_run_folder
from hrmtext.doctor.kernels import check_backends
from hrmtext.doctor.machine import check_devices, check_memory, check_versions
from hrmtext.model.attention.api import BACKENDS
from hrmtext.model.attention.reference import ReferencePlan
from hrmtext.runtime.io import MARKER
from hrmtext.train import train

CPU = torch.device("cpu")
LAUNCH = Path(__file__).parents[2] / "launch"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_additions(tmp_path_factory.mktemp("data"), num_rows=300)


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """A run of four steps with two checkpoints."""
    folder = tmp_path_factory.mktemp("run") / "run"
    train(recipe(), data_folder=data, run_folder=folder, device="cpu", progress="none")
    return folder


def recipe(**changes):
    values = {"max_steps": 4, "checkpoint_every": 2, "tensorboard": False, "ema_decay": 0.1}
    return make_config(**(values | changes))


def of(findings, status):
    return [finding for finding in findings if finding.status == status]


def test_a_good_machine_with_good_folders_has_no_problem(data, run):
    findings = examine(CPU, data=data, run=run, recipe=recipe())
    assert not of(findings, "problem"), findings
    assert {finding.area for finding in findings} == {
        "versions", "devices", "memory", "formats", "kernels", "ranks", "disk", "data", "run",
    }  # fmt: skip
    found = {finding.what: finding.found for finding in findings}
    assert found["resume"] == "the recipe goes on at step 4 of 4"
    assert found["attention sdpa"].startswith("right to")
    assert "needs a CUDA device" in found["attention flash"]
    assert "checkpoints of" in found["room"] and "MB/s synced" in found["write"]


def test_every_backend_is_tried_and_a_wrong_one_is_a_problem(monkeypatch):
    class Causal(ReferencePlan):
        def __init__(self, layout, device, dtype):
            super().__init__(layout, device, dtype)
            self.mask = self.mask.tril()

    monkeypatch.setitem(BACKENDS, "sdpa", lambda layout, device, dtype, _: Causal(layout, device, dtype))  # fmt: skip  # noqa: E501
    findings = check_backends(CPU)
    assert [finding.what for finding in findings] == [f"attention {name}" for name in BACKENDS]
    (wrong,) = of(findings, "problem")
    assert wrong.what == "attention sdpa" and "off by" in wrong.found


def test_a_missing_and_an_old_package_are_problems(monkeypatch):
    wanted = ["torch>=99", "no-such-package-here>=1", "numpy>=1", "tensorboard>=1; extra == 'x'"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    findings = check_versions()
    assert [(f.what, f.status) for f in findings] == [
        ("torch", "problem"), ("no-such-package-here", "problem"), ("numpy", "ok"),
    ]  # fmt: skip
    assert "needed is >=99" in findings[0].found and "pip install" in findings[1].advice


def test_a_driver_that_torch_cannot_use_is_a_problem(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    (problem,) = of(check_devices(), "problem")
    assert problem.what == "cuda" and "CUDA build" in problem.advice


def test_a_recipe_too_large_for_memory_or_disk_is_a_problem(tmp_path):
    (memory,) = check_memory(CPU, recipe(model={"preset": "XL"}, batch_tokens=8 << 20, bin_tokens=None))  # fmt: skip  # noqa: E501
    assert memory.status == "problem" and "bin_tokens" in memory.advice
    room, write = check_disk(tmp_path, recipe(keep_last=10_000_000))
    assert room.status == "problem" and "of room" in room.advice
    assert write.status == "ok"
    assert not list(tmp_path.iterdir()), "the probe is removed"


def test_a_folder_that_cannot_be_written_is_a_problem():
    if not Path("/proc/self").is_dir():
        pytest.skip("no /proc to fail on")
    write = check_disk(Path("/proc/self/run"), None)[-1]
    assert (write.what, write.status) == ("write", "problem")


def test_damaged_data_is_a_problem_and_foreign_data_is_named(data, tmp_path):
    damaged = tmp_path / "data"
    shutil.copytree(data, damaged)
    tokens = damaged / "sampled" / "tokens.npy"
    with tokens.open("r+b") as stream:
        stream.truncate(tokens.stat().st_size - 8)
    problems = of(check_data_folder(damaged, None), "problem")
    assert problems and "data prepare" in problems[0].advice
    shutil.copytree(data, tmp_path / "clean")
    (marked,) = [p.parent for p in (tmp_path / "clean" / "heldout").glob(MARKER)]
    file = next(p for p in marked.iterdir() if p.name != MARKER)
    file.write_bytes(file.read_bytes() + b"x")
    (problem,) = of(check_data_folder(tmp_path / "clean", None), "problem")
    assert problem.what == "heldout" and "as written" in problem.found
    small = recipe(model={"preset": "test", "vocab_size": 64, "max_seq_len": 32})
    (problem,) = of(check_data_folder(data, small), "problem")
    assert problem.what == "recipe" and "vocab_size is 64" in problem.found
    (problem,) = check_data_folder(tmp_path, None)
    assert problem.status == "problem" and "not a prepared data folder" in problem.found


def test_a_run_that_the_recipe_would_not_go_on_with_is_a_problem(run, tmp_path):
    (problem,) = of(check_run_folder(run, recipe(lr=1.0)), "problem")
    assert "lr: 0.003 in the checkpoint, 1.0 now" in problem.found
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    (RunFolder(broken).checkpoint_path(2) / MARKER).unlink()
    findings = check_run_folder(broken, recipe())
    (warning,) = of(findings, "warning")
    assert warning.found == "incomplete: step_0000002"
    assert not of(findings, "problem")
    assert check_run_folder(tmp_path / "new", None)[0].found.startswith("not there yet")


def test_a_check_that_fails_itself_is_a_problem_of_its_own():
    def check():
        raise OSError("bus error")

    (problem,) = guarded("disk", check)
    assert (problem.area, problem.status, problem.found) == ("disk", "problem", "OSError: bus error")  # fmt: skip  # noqa: E501
    with pytest.raises(AssertionError, match="without advice"):
        Finding("disk", "room", "warning", "little")


def test_the_command_prints_a_table_and_its_status_tells_problems(data, run, tmp_path, capsys):
    file = tmp_path / "recipe.yaml"
    file.write_text(dump_yaml(recipe()))
    given = ["doctor", "--data", str(data), "--run", str(run), "--recipe", str(file)]
    assert main([*given, "--device", "cpu", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert {"area", "what", "status", "found", "advice"} == findings[0].keys()
    assert main(["doctor", "lr=2.0", *given[1:], "--device", "cpu"]) == 1
    shown = capsys.readouterr().out
    assert "problem: run, resume: give the recipe of that run" in shown
    assert "1 problem" in shown
    assert main(["doctor", "lr=2.0"]) == 2
    assert "--recipe FILE" in capsys.readouterr().err


def test_the_launch_file_brings_two_nodes_together_and_the_doctor_measures_them(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {
        "NODES": "2", "MASTER": "127.0.0.1", "PORT": str(port), "RANKS_PER_NODE": "1",
        "RESTARTS": "0", "VERB": "doctor", "OMP_NUM_THREADS": "1", "PYTHON": sys.executable,
    }  # fmt: skip
    command = ["bash", str(LAUNCH / "torchrun.sh"), "--device", "cpu", "--json"]
    nodes = [
        subprocess.Popen(
            command, cwd=tmp_path, env={**os.environ, **place, "NODE": str(node)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for node in (0, 1)
    ]  # fmt: skip
    outputs = [node.communicate(timeout=240) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], outputs
    (report,) = [out for out, _ in outputs if out.strip()]  # rank 0 alone prints
    ranks = {f["what"]: f["found"] for f in json.loads(report) if f["area"] == "ranks"}
    assert ranks["world size"] == "2 ranks on 2 nodes over gloo"
    assert "GB/s bus bandwidth" in ranks["all_reduce"]


def test_launch_files_are_valid_and_refuse_what_they_cannot_start():
    for name in ("torchrun.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", str(LAUNCH / name)], check=True)
    done = subprocess.run(
        ["bash", str(LAUNCH / "torchrun.sh"), "recipe.yaml"],
        env={**os.environ, "NODES": "2"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "needs MASTER" in done.stderr
    outside = {k: v for k, v in os.environ.items() if not k.startswith("SLURM")}
    done = subprocess.run(
        ["bash", str(LAUNCH / "slurm.sbatch")],
        env=outside, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "usage: sbatch" in done.stderr
