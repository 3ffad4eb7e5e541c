"""Worker processes that answer JSON requests; plain subprocesses, so no `__main__` guard is needed.

They run with a fixed PYTHONHASHSEED: what they compute must not differ from run to run.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import signal
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


_Worker = tuple[subprocess.Popen[str], IO[bytes]]
"""A process and the file that it writes its messages to."""


class WorkerDied(DataError):
    """A worker process ended before it had answered."""


class WorkerPool:
    """Processes running `python -m module`; answers do not depend on which process gives them."""

    def __init__(self, module: str, num_workers: int) -> None:
        self.module = module
        self.num_workers = num_workers
        self._processes: list[_Worker] = []

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self._processes:
            if exception[0] is not None:
                worker[0].kill()
            _close_worker(worker)

    def ask(
        self,
        requests: Sequence[dict[str, Any]],
        on_answer: Callable[[int], dict[str, Any] | None] = lambda index: None,
    ) -> list[Any]:
        """The answers to `requests`, in their order; `on_answer(index)` is called for each.

        Where `on_answer` returns a further request, that is asked next; its answer is not kept. A
        request whose process dies is asked once more, so requests must be safe to repeat.

        Raises:
            HrmTextError: of the class and with the message that a worker raised.
            DataError: a worker died twice; the message ends with what it wrote last.
        """
        answers: list[Any] = [None] * len(requests)
        queue: collections.deque[tuple[dict[str, Any], int | None]] = collections.deque(
            (request, index) for index, request in enumerate(requests)
        )
        failures: list[Exception] = []
        died: list[tuple[tuple[dict[str, Any], int | None], _Worker, WorkerDied]] = []
        lock = threading.Lock()

        def serve_one(worker: _Worker) -> None:
            while not failures:
                try:
                    item = queue.popleft()
                except IndexError:
                    return
                request, index = item
                try:
                    answer = _exchange(*worker, request)
                    if index is not None:
                        answers[index] = answer
                        with lock:
                            further = on_answer(index)
                        if further is not None:
                            queue.appendleft((further, None))
                except WorkerDied as error:
                    died.append((item, worker, error))
                    return
                except Exception as error:  # raised below, in the caller's thread
                    failures.append(error)
                    return

        retried: set[int] = set()
        while queue and not failures:
            # Started here and not in the threads: a worker ends with the thread that started it.
            while len(self._processes) < min(self.num_workers, len(queue)):
                self._processes.append(self._start())
            threads = [
                threading.Thread(target=serve_one, args=(worker,), daemon=True)
                for worker in self._processes
            ]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            for item, worker, error in died:
                self._processes.remove(worker)
                _close_worker(worker)
                if id(item[0]) in retried:
                    failures.append(error)
                retried.add(id(item[0]))
                queue.append(item)
            died.clear()
        if failures:
            raise failures[0]
        return answers

    def _start(self) -> _Worker:
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
    _end_with_parent()
    # Libraries print while they work; the answers need a channel of their own.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            answers.write(json.dumps(reply_to(handler, json.loads(line))) + "\n")
            answers.flush()


def reply_to(handler: Callable[[dict[str, Any]], Any], request: dict[str, Any]) -> dict[str, Any]:
    """The handler's answer, or the error that it raised, for `unpack` on the other side."""
    try:
        return {"answer": handler(request)}
    except HrmTextError as error:
        return {"error": type(error).__name__, "message": str(error)}


def unpack(reply: dict[str, Any]) -> Any:
    """The answer in a reply; raises the error that is in it instead."""
    if "error" in reply:
        raise getattr(errors, reply["error"])(reply["message"])
    return reply["answer"]


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
        raise WorkerDied(f"the process for {what} ended with status {status}; it wrote:\n{tail}")
    return unpack(json.loads(line))


def _end_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, however that happens.

    Else a worker would go on writing beside those of the next run.
    """
    if sys.platform == "linux":
        import ctypes

        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _close_worker(worker: _Worker) -> None:
    process, log = worker
    _close(process.stdin)
    process.wait()
    _close(process.stdout)
    log.close()


def _close(stream: IO[str] | None) -> None:
    if stream is not None:
        with contextlib.suppress(BrokenPipeError):  # a dead worker left bytes unread
            stream.close()
