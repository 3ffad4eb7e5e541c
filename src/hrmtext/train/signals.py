"""Ctrl-C and SIGTERM: the first asks for a stop after this step, the second leaves at once."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from hrmtext.runtime.log import logger


class StopRequest:
    """While entered, SIGINT and SIGTERM set `signal_name` instead of ending the process.

    A second signal raises KeyboardInterrupt. Outside the main thread Python allows no handlers;
    then nothing is changed.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyrefly: ignore
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = signal.Signals(number).name
        logger.warning(
            "%s: finishing this step and writing a checkpoint; once more leaves at once",
            self.signal_name,
        )
