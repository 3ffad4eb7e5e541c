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

    said: dict[str, float] = {}

    def show(what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if done < total and now - said.get(what, now - SECONDS_BETWEEN_LINES) >= (
            SECONDS_BETWEEN_LINES
        ):
            print(f"{what}: {done:,} of {total:,}", file=sys.stderr, flush=True)
            said[what] = now
        said.setdefault(what, now)

    return show
