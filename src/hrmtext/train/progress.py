"""What a person sees while it trains: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from hrmtext.errors import ConfigError
from hrmtext.train.stability import EASING, describe_action

MODES = ("auto", "bar", "lines", "none")


class TrainingProgress:
    """Shows the newest numbers of a run on stderr."""

    def __init__(self, mode: str, total_steps: int, *, line_every_s: float = 10.0) -> None:
        """`mode`: bar, lines, none, or auto: a bar where stderr is a terminal, else lines."""
        if mode not in MODES:
            raise ConfigError(f"progress is {mode!r}, expected one of {', '.join(MODES)}")
        if mode == "auto":
            mode = "bar" if sys.stderr.isatty() else "lines"
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._total = total_steps
        self._every = line_every_s
        self._next_line = 0.0
        self._mode = mode
        self._bar: Progress | None = None
        if mode == "bar":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(None),
                TextColumn("{task.fields[numbers]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._task = self._bar.add_task("training", total=total_steps, numbers="")
            self._bar.start()

    def update(self, record: dict[str, Any], left_s: float | None) -> None:
        """Show a training record of the log."""
        step, numbers = record["step"], summarise(record, left_s)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, numbers=numbers)
        elif self._mode == "lines":
            now = time.monotonic()
            if now >= self._next_line or step >= self._total:
                self._next_line = now + self._every
                self.say(f"step {step}/{self._total}  {numbers}")

    def note(self, record: dict[str, Any]) -> None:
        """Say what the stability guard did, by its record of the log; other records say nothing.

        A brake that only eases is left to the log: a line each step would hide the rest.
        """
        if record["kind"] == "stability" and record["reason"] != EASING:
            self.say(describe_action(record))

    def say(self, message: str) -> None:
        """A line of its own."""
        if self._mode != "none":
            self._console.print(message, markup=False)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()


def summarise(record: dict[str, Any], left_s: float | None) -> str:
    """Loss, accuracy, depth, rate, speed and time left in one line."""
    timing = record["timing"]
    parts = [
        f"loss {record['loss']:.3f}",
        f"right {100 * record['token_accuracy']:.1f}%",
        f"depth {record['bp_steps']}",
        f"lr {record['lr']:.2e}",
        f"{timing['tokens_per_s']:,.0f} tok/s",
    ]
    share = timing.get("share_of_peak")
    if share is not None:
        parts.append(f"{100 * share:.1f}% of peak")
    else:
        parts.append(f"{timing['flops_per_s'] / 1e9:,.0f} GFLOP/s")
    if left_s is not None:
        parts.append(f"{format_time(left_s)} left")
    return "  ".join(parts)


def format_time(seconds: float) -> str:
    """`45s`, `3m20s`, `5h07m`, `2d03h`."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    if seconds < 86_400:
        return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
    return f"{seconds // 86_400}d{seconds % 86_400 // 3600:02d}h"
