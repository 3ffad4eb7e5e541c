"""Blocks of a small HRM in C++ for training on CPUs, built by the machine's own compiler."""

from hrmtext.train.cpp.blocks import CppBlocks
from hrmtext.train.cpp.choice import choose_blocks

__all__ = ["CppBlocks", "choose_blocks"]
