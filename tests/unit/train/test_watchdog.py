"""A rank that hangs says where and ends; a lost rank is named by the one that notices."""

import os
import re
import subprocess
import sys
import time

import pytest

from hrmtext.errors import RankError
from hrmtext.train.watchdog import EXIT_STATUS, Watchdog, explain_lost_ranks

HANG = """
import os, sys, time
from hrmtext.train import watchdog

def stuck_in_the_data():
    time.sleep(60)

def hold_the_lock():  # C code that never lets other threads of Python run
    import ctypes
    ctypes.PyDLL(None).sleep(60)

watchdog.BACKSTOP_S = 0.1
for how in (stuck_in_the_data, hold_the_lock):
    if (child := os.fork()) == 0:
        with watchdog.Watchdog(0.3, always=True) as dog:
            for step in (1, 2, 3):
                dog.beat("step", step)
            how()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(f"status {status}", file=sys.stderr, flush=True)
"""


def test_a_hung_step_ends_the_process_with_rank_step_and_stack():
    done = subprocess.run(
        [sys.executable, "-c", HANG],
        capture_output=True, text=True, timeout=100, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    python, lock, rest = re.split(r"status (?=\d+\n)", done.stderr)
    assert lock.startswith(f"{EXIT_STATUS}\n")
    assert "error: rank 0 of 1, in step 3: no headway for" in python
    assert "more than rank_timeout_s=0.3" in python
    assert "in stuck_in_the_data" in python, "no stack"
    # Nothing of Python runs any more; the stack comes from the backstop, with its own status.
    assert "in hold_the_lock" in lock and rest == "1\n"


def test_headway_keeps_a_process_alive(monkeypatch, caplog):
    monkeypatch.setattr("hrmtext.train.watchdog.SLOW_S", 0.3)
    with Watchdog(0.6, always=True) as watchdog:
        for step in range(13):
            watchdog.beat("step", step)
            time.sleep(0.1)
    assert watchdog.position == "rank 0 of 1, in step 12"
    assert "so far" not in caplog.text


def test_a_slow_phase_is_warned_of_before_it_is_given_up(monkeypatch, caplog):
    monkeypatch.setattr("hrmtext.train.watchdog.SLOW_S", 0.2)
    with Watchdog(3.0, always=True) as watchdog:
        for step in range(1, 8):
            watchdog.beat("step", step)
        time.sleep(1.0)
    assert caplog.text.count("rank 0 of 1, in step 7: ") == 1
    assert "It is given up at rank_timeout_s=3" in caplog.text


def test_a_single_process_without_a_launcher_is_not_watched(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert not Watchdog(1.0).is_on
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    assert Watchdog(1.0).is_on


def test_only_errors_of_collectives_become_rank_errors(monkeypatch):
    watchdog = Watchdog(1.0)
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer")
    with pytest.raises(RuntimeError, match="gloo") as caught, explain_lost_ranks(watchdog):
        raise lost
    assert not isinstance(caught.value, RankError), "a single process has no other ranks"
    monkeypatch.setattr("hrmtext.runtime.dist.is_distributed", lambda: True)
    text = r"in the start: another rank was lost.*reset by peer"
    with pytest.raises(RankError, match=text), explain_lost_ranks(watchdog):
        raise lost
    with pytest.raises(RuntimeError, match="shapes") as caught, explain_lost_ranks(watchdog):
        raise RuntimeError("shapes cannot be multiplied")
    assert not isinstance(caught.value, RankError)
