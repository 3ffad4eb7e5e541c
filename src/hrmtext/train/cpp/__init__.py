"""Blocks and optimizer in C++ for training small HRMs on CPUs, built by the machine itself."""

from hrmtext.train.cpp.blocks import CppBlocks
from hrmtext.train.cpp.choice import choose_blocks, choose_head
from hrmtext.train.cpp.direct import CppModel
from hrmtext.train.cpp.head import CppHead
from hrmtext.train.cpp.recurrence import CppRecurrence

__all__ = ["CppBlocks", "CppHead", "CppModel", "CppRecurrence", "choose_blocks", "choose_head"]
