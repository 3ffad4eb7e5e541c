"""Logging for the library: one logger, warnings that are said once."""

from __future__ import annotations

import logging

logger = logging.getLogger("hrmtext")
_said: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning the first time it is given in this process."""
    if message not in _said:
        _said.add(message)
        logger.warning(message)
