"""One decode step of an HRM in C++ for CPUs, built by the machine's own compiler."""

from hrmtext.generate.cpp.step import CppStep

__all__ = ["CppStep"]
