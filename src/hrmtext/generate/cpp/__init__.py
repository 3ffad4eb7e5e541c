"""Reading prompts and decode steps of an HRM in C++ for CPUs."""

from hrmtext.generate.cpp.step import CppStep

__all__ = ["CppStep"]
