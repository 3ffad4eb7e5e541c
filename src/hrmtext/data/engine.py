"""Where the tasks of cleaning and tokenising run: this process, processes beside it, or a cluster.

A task is a request of plain JSON values whose key `task` names what is to be done. It reads and
writes files that it names, whole or not at all, so it may be repeated anywhere: a task whose worker
is lost is run again, and no engine changes a byte of the result.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from hrmtext.data.parts import part_bytes_for
from hrmtext.data.workers import WorkerPool

if TYPE_CHECKING:  # a worker starts twice as fast without the configuration classes
    from hrmtext.config.engine import EngineConfig

TASKS = {
    "clean": "hrmtext.data.clean_parts",
    "collect": "hrmtext.data.sources.collect",
    "hold out": "hrmtext.data.heldout_choice",
    "texts": "hrmtext.data.tokenizer_texts",
    "tokenize": "hrmtext.data.tokenize",
}
"""Task -> the module whose `answer(request)` does it."""
WORKER = "hrmtext.data.task_worker"
MIN_BYTES_FOR_WORKERS = 8_000_000
"""Below this, starting processes takes longer than doing the work in this one."""

Request = dict[str, Any]
OnAnswer = Callable[[int], Request | None]


class Engine(Protocol):
    """Answers requests; a context manager, which lets go of its workers at the end."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: object) -> None: ...

    def require(self, *, written: Sequence[Path], read: Sequence[Path]) -> None:
        """Make sure that every worker runs this version and sees what tasks write and read.

        Args:
            written: folders on this machine that tasks will write to.
            read: files that they will read.

        Raises:
            DataError: one does not; the message names it.
        """
        ...

    def part_bytes(self, num_bytes: int) -> int:
        """About how much of a file one task should read, of `num_bytes` in all."""
        ...

    def ask(
        self,
        requests: Sequence[Request],
        on_answer: OnAnswer = lambda index: None,
        *,
        num_bytes: int,
    ) -> list[Any]:
        """The answers to `requests`, in their order; see `WorkerPool.ask`.

        Args:
            num_bytes: about how much all of them read, for the choice of how many workers.
        """
        ...


def open_engine(config: EngineConfig | None = None) -> Engine:
    """The engine that a configuration names; no process is started before there is work.

    Raises:
        BackendError: its package is not installed, or its cluster cannot be reached.
    """
    from hrmtext.config.engine import EngineConfig

    config = config or EngineConfig()
    if config.name == "ray":
        from hrmtext.data.ray_engine import RayEngine

        return RayEngine(config.address, config.num_workers)
    return LocalEngine(config.num_workers)


def run_task(request: Request) -> Any:
    """Do one task in this process."""
    return importlib.import_module(TASKS[request["task"]]).answer(request)


class LocalEngine:
    """Processes of this machine, kept for further requests; little work is done in this process."""

    def __init__(self, num_workers: int | None = None) -> None:
        """`num_workers`: processes; None: one a core where there is enough to do; 1: this one."""
        self.num_workers = num_workers
        self._pool: WorkerPool | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._pool is not None:
            self._pool.__exit__(*exception)

    def require(self, *, written: Sequence[Path], read: Sequence[Path]) -> None:
        """Nothing to be checked: all is on this machine."""

    def part_bytes(self, num_bytes: int) -> int:
        """So much that every process has eight parts; of 2 to 32 MiB."""
        return part_bytes_for(num_bytes, self._workers_for(num_bytes))

    def _workers_for(self, num_bytes: int) -> int:
        if self.num_workers is not None:
            return self.num_workers
        return (os.cpu_count() or 1) if num_bytes >= MIN_BYTES_FOR_WORKERS else 1

    def ask(
        self,
        requests: Sequence[Request],
        on_answer: OnAnswer = lambda index: None,
        *,
        num_bytes: int,
    ) -> list[Any]:
        """As `Engine.ask`."""
        num_workers = self._workers_for(num_bytes)
        if num_workers > 1 and len(requests) > 1:
            if self._pool is None:
                self._pool = WorkerPool(WORKER, num_workers)
            return self._pool.ask(requests, on_answer)
        answers = []
        for index, request in enumerate(requests):
            answers.append(run_task(request))
            further = on_answer(index)
            if further is not None:
                run_task(further)
        return answers
