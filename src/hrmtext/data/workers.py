"""Worker processes that answer JSON requests; plain subprocesses, so no `__main__` guard is needed.

They run with a fixed PYTHONHASHSEED: what they compute must not differ from run to run.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from hrmtext import errors
from hrmtext.errors import DataError, HrmTextError

Progress = Callable[[str, int, int], None]
"""Called with (what is done, done so far, total)."""


class WorkerPool:
    """Processes running `python -m module`; answers do not depend on which process gives them."""

    def __init__(self, module: str, num_workers: int) -> None:
        self.module = module
        self.num_workers = num_workers
        self._processes: list[tuple[subprocess.Popen[str], IO[bytes]]] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for process, log in self._processes:
            if exception[0] is not None:
                process.kill()
            _close(process.stdin)
            process.wait()
            _close(process.stdout)
            log.close()

    def ask(
        self,
        requests: Sequence[dict[str, Any]],
        on_answer: Callable[[int], None] = lambda index: None,
    ) -> list[Any]:
        """The answers to `requests`, in their order; `on_answer(index)` is called for each.

        Raises:
            HrmTextError: of the class and with the message that a worker raised.
            DataError: a worker died; the message ends with what it wrote last.
        """
        answers: list[Any] = [None] * len(requests)
        queue = collections.deque(range(len(requests)))
        failures: list[Exception] = []
        lock = threading.Lock()
        while len(self._processes) < min(self.num_workers, len(requests)):
            self._processes.append(self._start())

        def serve_one(process: subprocess.Popen[str], log: IO[bytes]) -> None:
            while not failures:
                try:
                    index = queue.popleft()
                except IndexError:
                    return
                try:
                    answers[index] = _exchange(process, log, requests[index])
                    with lock:
                        on_answer(index)
                except Exception as error:  # raised below, in the caller's thread
                    failures.append(error)
                    return

        threads = [
            threading.Thread(target=serve_one, args=pair, daemon=True) for pair in self._processes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]
        return answers

    def _start(self) -> tuple[subprocess.Popen[str], IO[bytes]]:
        log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with its process)
        source = str(Path(__file__).parents[2])  # workers run this very code, installed or not
        environment = {
            **os.environ,
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        }
        if self.num_workers > 1:
            environment["TOKENIZERS_PARALLELISM"] = "false"
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", self.module],  # -P: modules of the current folder stay out
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
            text=True,
            encoding="utf-8",
        )
        return process, log


def serve(handler: Callable[[dict[str, Any]], Any]) -> None:
    """Answer requests from stdin with `handler` until stdin ends; the main loop of a worker."""
    # Libraries print while they work; the answers need a channel of their own.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            try:
                reply = {"answer": handler(json.loads(line))}
            except HrmTextError as error:
                reply = {"error": type(error).__name__, "message": str(error)}
            answers.write(json.dumps(reply) + "\n")
            answers.flush()


def _exchange(process: subprocess.Popen[str], log: IO[bytes], request: dict[str, Any]) -> Any:
    assert process.stdin is not None and process.stdout is not None, "opened with pipes"
    try:
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
    except BrokenPipeError:
        line = ""
    if not line:
        status = process.wait()
        log.seek(0)
        tail = log.read()[-2000:].decode(errors="replace")
        what = request.get("what", "a request")
        raise DataError(f"the process for {what} ended with status {status}; it wrote:\n{tail}")
    reply = json.loads(line)
    if "error" in reply:
        raise getattr(errors, reply["error"])(reply["message"])
    return reply["answer"]


def _close(stream: IO[str] | None) -> None:
    if stream is not None:
        with contextlib.suppress(BrokenPipeError):  # a dead worker left bytes unread
            stream.close()
