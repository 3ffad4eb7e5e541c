"""Checkpoints written in the background: one at a time, and no error is lost."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Writer:
    """Runs one write after the other, at once or in a thread while training goes on."""

    def __init__(self, in_background: bool) -> None:
        self.in_background = in_background
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def submit(self, write: Callable[[], object]) -> None:
        """Run `write` when the one before it has ended; raises that one's error."""
        self.wait()
        if not self.in_background:
            write()
            return

        def work() -> None:
            try:
                write()
            except BaseException as error:  # handed over, and raised in the loop's thread
                self._error = error

        self._thread = threading.Thread(target=work, name="hrmtext-checkpoint", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise the error of a write that has ended with one; do not wait."""
        if self._thread is not None and not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written; raises the error of what was."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Wait without raising: for the way out with another error."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
