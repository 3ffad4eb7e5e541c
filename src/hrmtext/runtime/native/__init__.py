"""C++ kernels for CPUs: built by the machine's own compiler; what all of them are made of."""

from hrmtext.runtime.native.build import compiler, load_kernel

__all__ = ["compiler", "load_kernel"]
