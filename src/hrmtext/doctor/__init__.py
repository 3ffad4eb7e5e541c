"""Checks before a long run: machine, kernels, ranks, disk, data. Every check is a real probe."""

from hrmtext.doctor.examine import examine
from hrmtext.doctor.finding import Finding, Status

__all__ = ["Finding", "Status", "examine"]
