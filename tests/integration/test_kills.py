"""30 ways to end a run too early; started again, each ends as the undisturbed run, bit for bit.

Every third of them is tried by default; with HRM_TEXT_KILLS=all in the environment all are.
"""

import contextlib
import dataclasses
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from kill_ranks import INTERRUPTED, LOST, NO_FAULT, REFUSED, STORED, Fault, start_ranks
from processes import TIMEOUT_S, ended, said
from small_run import make_config, prepare_additions

from hrmtext.artifacts import RunFolder, read_tensors
from hrmtext.config.base import dump_yaml
from hrmtext.train.metrics import read_metrics
from hrmtext.train.watchdog import EXIT_STATUS

NUM_STEPS, EVERY = 10, 3
FILES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


@dataclasses.dataclass(frozen=True)
class Kill:
    """One way to end a run."""

    ranks: int
    """World size."""
    how: str
    """A signal's name, `disk` (a full one), or what the `fault` says."""
    whom: tuple[int, ...] = ()
    """Ranks that get the signal."""
    when: str = ""
    """line N: the log has N lines; write N: the N-th checkpoint is being written."""
    fault: Fault = NO_FAULT
    expected: tuple[int, ...] = ()
    """How rank 0 ends; empty: as the signal tells."""

    def __str__(self):
        whom = "+".join(map(str, self.whom))
        fault = f"{self.fault.kind}{self.fault.at}" if self.fault.kind != "none" else ""
        parts = (f"{self.ranks}ranks", self.how, f"to{whom}" if whom else "", self.when, fault)
        return "-".join(part.replace(" ", "") for part in parts if part)


def all_kills():
    """30 kills, always the same."""
    moments = random.Random(5)
    line = [f"line {n}" for n in range(NUM_STEPS)]
    moments.shuffle(line)
    kill, term, interrupt = "SIGKILL", "SIGTERM", "SIGINT"
    at = moments.sample(range(12, 90), 5)
    return [
        *(Kill(2, kill, (1,), when) for when in line[:3]),
        *(Kill(2, kill, (0,), when) for when in line[3:6]),
        *(Kill(2, kill, (0, 1), when) for when in line[6:9]),
        Kill(1, kill, (0,), "line 5"),
        *(Kill(2, kill, (0,), f"write {n}") for n in (1, 2, 3)),
        *(Kill(2, kill, (1,), f"write {n}") for n in (1, 2)),
        *(Kill(1, "storage", fault=Fault("storage", n)) for n in at[:4]),
        Kill(2, "storage", fault=Fault("storage", at[4])),
        Kill(1, "half", fault=Fault("half", 2)),
        Kill(2, "half", fault=Fault("half", 1)),
        Kill(2, term, (0, 1), "line 4", expected=(INTERRUPTED,)),
        Kill(2, term, (1,), "line 7", expected=(INTERRUPTED,)),
        Kill(1, term, (0,), "write 2", expected=(INTERRUPTED,)),
        Kill(2, interrupt, (0, 1), "line 2", expected=(INTERRUPTED,)),
        Kill(1, interrupt, (0,), "line 6", expected=(INTERRUPTED,)),
        Kill(1, "disk", expected=(STORED,)),
        Kill(2, "disk", expected=(STORED,)),
        Kill(2, "limit", fault=Fault("limit", 300_000), expected=(STORED,)),
    ]


KILLS = all_kills() if os.environ.get("HRM_TEXT_KILLS") == "all" else all_kills()[::3]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return prepare_additions(tmp_path_factory.mktemp("data"), num_rows=400)


def config(**changes):
    model = {
        "preset": "test", "vocab_size": 287, "max_seq_len": 32,
        "num_layers_per_stack": 1, "L_cycles": 1,
    }  # fmt: skip
    values = {
        "model": model, "bp_last": 4,
        "max_steps": NUM_STEPS, "batch_tokens": 256, "bin_tokens": 128, "checkpoint_every": EVERY,
        "validate_every": 5, "validation_rows": 12, "log_every": 1, "tensorboard": False,
        "ema_decay": 0.5, "rank_timeout_s": 60, **changes,
    }  # fmt: skip
    return make_config(**values)


def finish(num_ranks, run, data, log, recipe=None):
    """Run to the end."""
    ranks = start_ranks(num_ranks, run, recipe or config(), data, log)
    assert ended(ranks) == [0] * num_ranks, said(log)


def lines(run):
    records = read_metrics(run.metrics_file)
    return [{key: value for key, value in r.items() if key != "timing"} for r in records]


def tensors(checkpoint):
    return {name: read_tensors(checkpoint / name) for name in FILES}


def assert_same(found, expected, where):
    for name, values in expected.items():
        assert found[name].keys() == values.keys()
        for key, tensor in values.items():
            assert torch.equal(found[name][key], tensor), f"{where}: {name}: {key}"


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """By world size: the log, and the tensors of every checkpoint by step, of a whole run."""
    found = {}
    for num_ranks in (1, 2):
        folder = tmp_path_factory.mktemp(f"whole{num_ranks}")
        # Every step, for signals stop where they come.
        recipe = config(checkpoint_every=1, keep_last=99)
        finish(num_ranks, folder / "run", data, folder / "log", recipe)
        run = RunFolder(folder / "run")
        found[num_ranks] = lines(run), {run.step_of(p): tensors(p) for p in run.checkpoints()}
    return found


@contextlib.contextmanager
def place_for(kill, folder):
    """The run's folder, and a call that makes room on its disk."""
    if kill.how != "disk":
        yield folder / "run", lambda: None
        return
    disk = folder / "disk"
    disk.mkdir()
    size = 500 + 700 * kill.ranks  # KiB: the first or the second checkpoint does not fit
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)]
    try:
        mounted = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user may not mount a small tmpfs")
    try:
        grow = ["mount", "-o", "remount,size=64m", str(disk)]
        yield disk / "run", lambda: subprocess.run(grow, check=True)
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def wait_until(when, run, ranks):
    """Watch the run's folder from outside until the moment comes, or the run is over."""
    what, number = when.split()
    seen = set()
    while all(rank.exitcode is None for rank in ranks):
        if what == "line":
            log = run.metrics_file
            if number == "0" and run.exists:
                return
            if number != "0" and log.is_file() and log.read_bytes().count(b"\n") >= int(number):
                return
        elif run.checkpoints_folder.is_dir():
            names = (path.name for path in run.checkpoints_folder.iterdir())
            seen |= {name for name in names if name.endswith(".tmp")}
            if len(seen) >= int(number):
                return
        time.sleep(0.0005)
    raise AssertionError(f"the run was over before {when}")


@pytest.mark.parametrize("kill", KILLS, ids=str)
def test_a_run_ended_too_early_goes_on_as_if_nothing_had_happened(kill, whole, data, tmp_path):
    log, checkpoints = whole[kill.ranks]
    with place_for(kill, tmp_path) as (place, make_room):
        run = RunFolder(place)
        ranks = start_ranks(kill.ranks, place, config(), data, tmp_path / "log", kill.fault)
        if kill.whom:
            wait_until(kill.when, run, ranks)
            for rank in kill.whom:
                os.kill(ranks[rank].pid, getattr(signal, kill.how))
        statuses = ended(ranks)
        check_statuses(kill, statuses, said(tmp_path / "log"))
        for path in run.checkpoints():  # whatever counts is whole, and what it should be
            assert_same(tensors(path), checkpoints[run.step_of(path)], path.name)
        make_room()
        finish(kill.ranks, place, data, tmp_path / "again")
        assert run.step_of(run.latest()) == NUM_STEPS
        assert_same(tensors(run.latest()), checkpoints[NUM_STEPS], "at the end")
        assert lines(run) == log
        left = {path.name for folder in (run.path, run.checkpoints_folder)
                for path in folder.iterdir() if path.name.startswith(".")}  # fmt: skip
        assert not left, "leftovers of the first attempt"


def check_statuses(kill, statuses, output):
    """Every rank ended as it should: killed, with the right error, or as one who lost another."""
    if kill.expected:
        assert statuses[0] in kill.expected, output
        others = {INTERRUPTED} if kill.expected == (INTERRUPTED,) else {LOST}
    else:
        killed = kill.whom or (0,)
        for rank in killed:
            assert statuses[rank] == -signal.SIGKILL, output
        others = {LOST, -signal.SIGKILL}
    assert set(statuses[1:]) <= others | ({-signal.SIGKILL} if not kill.expected else set()), output
    if LOST in statuses:
        text = output[f"log.{statuses.index(LOST)}"]
        assert re.search(r"RankError: rank \d of 2, in .*another rank was lost", text), text


def test_a_non_finite_gradient_leaves_nothing_half_written(whole, data, tmp_path):
    run, fault = RunFolder(tmp_path / "run"), Fault("nan", 5)
    ranks = start_ranks(2, run.path, config(), data, tmp_path / "log", fault)
    assert ended(ranks) == [REFUSED] * 2
    for text in said(tmp_path / "log").values():
        assert re.search("NonFiniteError: step 4: .*first in lm_head.weight", text), text
    (kept,) = run.checkpoints_folder.iterdir()
    assert kept == run.checkpoint_path(3)
    finish(2, run.path, data, tmp_path / "again")
    assert_same(tensors(run.latest()), whole[2][1][NUM_STEPS], "at the end")


def test_a_rank_that_stands_still_is_noticed_and_the_run_goes_on(whole, data, tmp_path):
    run = RunFolder(tmp_path / "run")
    ranks = start_ranks(2, run.path, config(rank_timeout_s=2), data, tmp_path / "log")
    wait_until("line 4", run, ranks)
    os.kill(ranks[1].pid, signal.SIGSTOP)
    ranks[0].join(TIMEOUT_S)
    assert ranks[0].exitcode == EXIT_STATUS
    text = said(tmp_path / "log")["log.0"]
    pattern = (
        r"error: rank 0 of 2, in (step|validation|checkpoint) \d+: no headway for .* more than "
        r"rank_timeout_s=2; it waits for the other ranks in \w+ \(runtime/dist.py|parallel/group"
    )
    assert re.search(pattern, text) and "most recent call first" in text, text
    ranks[1].kill()
    ranks[1].join(TIMEOUT_S)
    finish(2, run.path, data, tmp_path / "again")
    assert_same(tensors(run.latest()), whole[2][1][NUM_STEPS], "at the end")


def test_torchrun_starts_a_killed_run_again_by_itself(whole, data, tmp_path):
    import psutil

    launch = Path(__file__).parents[2] / "launch" / "torchrun.sh"
    recipe, run = tmp_path / "recipe.yaml", RunFolder(tmp_path / "run")
    recipe.write_text(dump_yaml(config()))
    # A thread each: equal numbers of threads are a part of equal bits.
    place = {"NODES": "1", "RANKS_PER_NODE": "2", "RESTARTS": "3", "OMP_NUM_THREADS": "1"}
    place["PYTHON"] = sys.executable
    command = [
        "bash", str(launch), str(recipe), "--data", str(data), "--run", str(run.path),
        "--device", "cpu",
    ]  # fmt: skip
    log = tmp_path / "log"
    with log.open("w") as stream:
        launcher = psutil.Popen(
            command, env={**os.environ, **place}, stdout=stream, stderr=subprocess.STDOUT
        )
    deadline = time.monotonic() + TIMEOUT_S
    while launcher.poll() is None and time.monotonic() < deadline:
        if run.metrics_file.is_file() and run.metrics_file.read_bytes().count(b"\n") >= 5:
            break
        time.sleep(0.001)
    ranks = [child for child in launcher.children(recursive=True)
             if child.environ().get("LOCAL_RANK") == "1"]  # fmt: skip
    assert ranks, log.read_text()
    ranks[0].kill()
    assert launcher.wait(TIMEOUT_S) == 0, log.read_text()
    text = log.read_text()
    assert "exitcode: -9" in text, text
    assert_same(tensors(run.latest()), whole[2][1][NUM_STEPS], "at the end")
    assert lines(run) == whole[2][0]
