"""Progress where there is no terminal: a line now and then, with the time left."""

from __future__ import annotations

import pytest

from hrmtext.cli import progress
from hrmtext.cli.progress import time_left


@pytest.mark.parametrize(
    ("seconds", "done", "total", "words"),
    [
        (5, 0, 10, ""),
        (10, 5, 15, ", 20 s left"),
        (60, 1, 3, ", 2 min left"),
        (3600, 2, 7, ", 2 h 30 min left"),
    ],
)
def test_the_time_left_is_that_of_the_pace_so_far(seconds, done, total, words):
    assert time_left(seconds, done, total) == words


def test_a_long_stage_says_how_far_it_is_every_ten_seconds(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.stage_progress() as show:
        for done in range(31):
            show("cleaning bytes", done, 30)
            now[0] += 1
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "cleaning bytes: 10 of 30, 20 s left",
        "cleaning bytes: 20 of 30, 10 s left",
    ]
