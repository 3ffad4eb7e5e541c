"""torch.compile, applied from outside to the blocks of a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import nn

from hrmtext.errors import BackendError
from hrmtext.runtime.log import logger

C = TypeVar("C", bound=type)

_OUTSIDE: list[tuple[type, str]] = []
"""Methods that no graph holds."""


def compile_blocks(
    model: nn.Module,
    wanted: bool | Literal["auto"] = True,
    *,
    device: torch.device,
    fixed_shapes: bool = True,
) -> bool:
    """Compile every block in place (same weights, same names); attention stays outside.

    Args:
        wanted: True, False, or "auto": on CUDA with fixed shapes yes, on the CPU no. There the
            matrix products dominate: 8 % gained on a small model, ten seconds spent.
        fixed_shapes: every forward pass has as many tokens as the first; False compiles kernels
            for any number of tokens.

    Returns:
        Whether the blocks are compiled; they become so at their first call.

    Raises:
        BackendError: compilation was asked for by name on a machine without a C++ compiler.
    """
    if wanted == "auto":
        wanted = device.type == "cuda" and fixed_shapes
        logger.debug("compile=auto: %s on %s", wanted, device.type)
    if not wanted:
        return False
    if device.type == "cpu" and not any(shutil.which(name) for name in ("g++", "clang++", "cl")):
        raise BackendError(
            "compile=true needs a C++ compiler (g++ or clang++) on the CPU and none was found; "
            "install one, or set compile=false"
        )
    keep_outside()
    for name, module in model.named_modules():
        if name.rpartition(".")[0].endswith(".layers"):
            module.compile(dynamic=not fixed_shapes)
    return True


def outside_graphs(method: str) -> Callable[[C], C]:
    """Class decorator: `torch.compiler.disable` for `method`, once something is compiled.

    The plain decorator would import torch._dynamo, two seconds of every command that compiles
    nothing. `keep_outside` makes up for it.
    """

    def remember(owner: C) -> C:
        _OUTSIDE.append((owner, method))
        return owner

    return remember


def keep_outside() -> None:
    """Disable tracing of the `outside_graphs` methods; call it before the first compiled call."""
    for owner, method in _OUTSIDE:
        setattr(owner, method, torch.compiler.disable(getattr(owner, method)))
    _OUTSIDE.clear()
