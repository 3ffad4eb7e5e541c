"""Blocks and optimizer in C++ for training small HRMs on CPUs, built by the machine itself."""

from hrmtext.train.cpp.blocks import CppBlocks
from hrmtext.train.cpp.choice import choose_blocks
from hrmtext.train.cpp.recurrence import CppRecurrence

__all__ = ["CppBlocks", "CppRecurrence", "choose_blocks"]
