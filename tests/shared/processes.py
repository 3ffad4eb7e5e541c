"""Processes forked from a server that has torch loaded: a rank starts in milliseconds, not seconds.

The server belongs to the process of the tests and ends with it. What runs in a process must be a
function of a module that can be imported, so not of a test file.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

TIMEOUT_S = 300


def start(
    function: Callable[..., Any],
    *arguments: Any,
    log: str | Path,
    environment: Mapping[str, Any] = {},
) -> multiprocessing.Process:
    """Start a process of one thread; its stderr goes to the file `log`.

    It ends with status 0, or with 1 and a traceback where `function` raised.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hrmtext.train", "torch._dynamo"])
    values = {name: str(value) for name, value in environment.items()}
    process = context.Process(
        target=_live, args=(function, arguments, str(log), values), daemon=True
    )
    with _one_thread():
        process.start()
    return process


def start_ranks(
    num_ranks: int, function: Callable[..., Any], *arguments: Any, log: str | Path
) -> list[multiprocessing.Process]:
    """Start `function(*arguments)` on ranks that find one another; stderr: `log`.0, `log`.1, ..."""
    port = free_port()
    return [
        start(
            function,
            *arguments,
            log=f"{log}.{rank}",
            environment={
                "WORLD_SIZE": num_ranks, "RANK": rank, "LOCAL_RANK": rank,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(num_ranks)
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ended(processes: Sequence[multiprocessing.Process]) -> list[int | None]:
    """Exit statuses; None: not ended in time, and killed now."""
    for process in processes:
        process.join(TIMEOUT_S)
    statuses = [process.exitcode for process in processes]
    for process in processes:
        if process.exitcode is None:
            process.kill()
    return statuses


def said(log: str | Path) -> dict[str, str]:
    """What the processes of `start_ranks` wrote to stderr, by file name."""
    log = Path(log)
    return {path.name: path.read_text() for path in sorted(log.parent.glob(f"{log.name}.*"))}


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """For the server, which is started with the first process and loads torch then."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before


def _live(
    function: Callable[..., Any],
    arguments: Sequence[Any],
    log: str,
    environment: Mapping[str, str],
) -> None:
    import torch

    os.environ.update(environment)
    with Path(log).open("w") as stream:
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    status = 0
    try:
        function(*arguments)
    except SystemExit as exit:
        status = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stderr.flush()
    os._exit(status)  # without what the tests' own process would do at its end
