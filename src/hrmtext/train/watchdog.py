"""Hung and lost ranks: whoever makes no headway says where it stands, with its stack, and ends.

A rank that hangs keeps all others waiting, without a word. So every rank watches itself: the loop
tells the watchdog what it begins, and a phase that outlasts `rank_timeout_s` ends the process, upon
which the launcher starts all ranks again from the last complete checkpoint.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as torch_dist

from hrmtext.errors import HrmTextError, RankError
from hrmtext.runtime import dist
from hrmtext.runtime.log import logger

EXIT_STATUS = 75
"""Of a rank that ended itself because it hung (EX_TEMPFAIL: trying again may help)."""
GROUP_MARGIN = 1.2
"""Collectives wait this many times `rank_timeout_s`, so that a rank that hangs speaks first."""
SLOW_FACTOR, SLOW_S = 20.0, 30.0
"""A phase this many times as long as usual, and this many seconds at least, is warned of."""
REMEMBERED = 20
BACKSTOP_S = 5.0


class Watchdog:
    """While entered, a phase that takes longer than `timeout_s` ends this process.

    It watches where someone else waits or can start again: among several ranks, and under torchrun.
    """

    def __init__(self, timeout_s: float, *, always: bool = False) -> None:
        """`always`: watch a single process without a launcher as well."""
        self.timeout_s = timeout_s
        self.is_on = always or dist.world_size() > 1 or "TORCHELASTIC_RUN_ID" in os.environ
        self._who = f"rank {dist.rank()} of {dist.world_size()}"
        self._what, self._kind, self._since = "the start", "start", time.monotonic()
        self._durations: dict[str, collections.deque[float]] = {}
        self._warned = False
        self._ended = threading.Event()
        self._watched = threading.get_ident()

    @property
    def position(self) -> str:
        """What this rank is at, for messages: `rank 1 of 2, in step 37`."""
        return f"{self._who}, in {self._what}"

    def beat(self, kind: str, number: int) -> None:
        """A phase begins: `kind` (step, validation, checkpoint) and the step's number."""
        now = time.monotonic()
        usual = self._durations.setdefault(self._kind, collections.deque(maxlen=REMEMBERED))
        usual.append(now - self._since)
        self._what, self._kind, self._since = f"{kind} {number}", kind, now
        self._warned = False
        self._arm_backstop()

    def __enter__(self) -> Watchdog:
        self._since = time.monotonic()
        if self.is_on:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
            self._arm_backstop()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        if self.is_on:
            faulthandler.cancel_dump_traceback_later()

    def _arm_backstop(self) -> None:
        # A thread of Python can't act while C code holds the interpreter's lock; this one can.
        if self.is_on:
            later = self.timeout_s * GROUP_MARGIN + BACKSTOP_S
            faulthandler.dump_traceback_later(later, exit=True, file=_stderr())

    def _watch(self) -> None:
        while not self._ended.wait(min(1.0, self.timeout_s / 10)):
            late, usual = time.monotonic() - self._since, self._usual()
            if late > self.timeout_s:
                self._end(late, usual)
            elif usual is not None and late > max(SLOW_S, SLOW_FACTOR * usual) and not self._warned:
                self._warned = True
                logger.warning(
                    "%s: %.0f s so far, usually %.1f s; %s. It is given up at rank_timeout_s=%g",
                    self.position, late, usual, self._place(), self.timeout_s,
                )  # fmt: skip

    def _usual(self) -> float | None:
        durations = self._durations.get(self._kind)
        return statistics.median(durations) if durations else None

    def _end(self, late: float, usual: float | None) -> None:
        often = "" if usual is None else f" (usually {usual:.1f} s)"
        message = (
            f"error: {self.position}: no headway for {late:.0f} s{often}, more than "
            f"rank_timeout_s={self.timeout_s:g}; {self._place()}. This rank ends with status "
            f"{EXIT_STATUS}; started again, the run goes on from its last complete checkpoint. "
            "Where all ranks wait for one another, the hung one is the rank whose stack is "
            "elsewhere, or that says nothing. The stacks of this one:\n"
        )
        with contextlib.suppress(OSError):
            os.write(_stderr(), message.encode())
            faulthandler.dump_traceback(file=_stderr(), all_threads=True)
        os._exit(EXIT_STATUS)

    def _place(self) -> str:
        """Where the watched thread stands: our innermost line, and whether it waits for others."""
        frame = sys._current_frames().get(self._watched)
        waits, place = False, "outside hrmtext"
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            waits = waits or path.match("torch/distributed/*.py")
            if "hrmtext" in path.parts:
                place = f"{path.parent.name}/{path.name}:{frame.f_lineno}"
                place = f"in {frame.f_code.co_name} ({place})"
                break
            frame = frame.f_back
        return f"it waits for the other ranks {place}" if waits else f"it is {place}"


@contextlib.contextmanager
def explain_lost_ranks(watchdog: Watchdog) -> Iterator[None]:
    """Turn a broken or timed-out collective into RankError that says who noticed, and when."""
    try:
        yield
    except HrmTextError:
        raise
    except RuntimeError as error:
        if not dist.is_distributed() or not _is_of_collective(error):
            raise
        said = str(error).strip().splitlines()[0].split(". This is typically")[0]
        raise RankError(
            f"{watchdog.position}: another rank was lost, or ended with an error of its own, which "
            f"its output names ({said}). This rank ends too; under torchrun --max-restarts the run "
            "goes on from its last complete checkpoint, otherwise run the same command again"
        ) from error


def _is_of_collective(error: RuntimeError) -> bool:
    # gloo's errors are plain RuntimeErrors that name its source files.
    return isinstance(error, torch_dist.DistError) or any(
        part in str(error) for part in ("gloo/", "NCCL", "Connection closed by peer")
    )


def _stderr() -> int:
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # captured, or closed
        return 2
