"""The C++ kernel of a model's blocks and head, which this machine builds."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

from hrmtext.runtime.native import load_kernel

_SIZES = ("lanes", "block_has_bf16", "block_gap", "block_workspace", "head_workspace",
          "model_gradients")  # fmt: skip
_WORK = ("block_pack", "head_loss", "block_forward", "block_backward", "norm_forward",
         "norm_backward", "recurrence_forward", "recurrence_backward")  # fmt: skip


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel; BackendError where it cannot be built."""
    loaded = load_kernel(Path(__file__).with_name("model.cpp"), "block_kernel=cpp")
    for name in _SIZES:
        getattr(loaded, f"hrm_{name}").restype = ctypes.c_int64
    for name in _WORK:
        getattr(loaded, f"hrm_{name}").restype = None
    return loaded
