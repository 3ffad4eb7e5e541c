"""Progress of data stages: a bar on a terminal, a line a stage elsewhere."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 10.0


@contextlib.contextmanager
def stage_progress() -> Iterator[Callable[[str, int, int], None]]:
    """Yield a callback (what, done, total) that shows it with an estimate of the time left."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        tasks: dict[str, int] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done, total=total)  # pyrefly: ignore[bad-argument-type]

        yield show


def _lines() -> Callable[[str, int, int], None]:
    import sys

    began: dict[str, float] = {}
    said: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        began.setdefault(what, now)
        if done < total and now - said.setdefault(what, now) >= SECONDS_BETWEEN_LINES:
            left = time_left(now - began[what], done, total)
            print(f"{what}: {done:,} of {total:,}{left}", file=sys.stderr, flush=True)
            said[what] = now

    return show


def time_left(seconds: float, done: int, total: int) -> str:
    """An estimate in words, from the time that what is done has taken; empty at the start."""
    if done <= 0:
        return ""
    left = round(seconds * (total - done) / done)
    if left < 60:
        return f", {left} s left"
    if left < 3600:
        return f", {left // 60} min left"
    return f", {left // 3600} h {left % 3600 // 60} min left"
