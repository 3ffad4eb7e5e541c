"""Adam-atan2 on a CPU by a C++ kernel: one pass over weight, gradient, moments and average."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path

import torch

from hrmtext.errors import BackendError
from hrmtext.runtime.log import logger
from hrmtext.runtime.native import compiler, load_kernel

PROBE_UNITS = 4
"""Units in the last place that an arc tangent of the kernel may be off torch's."""
_NUMBERS = 7

_I, _P = ctypes.c_int64, ctypes.c_void_p


class _Parameter(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("weight", "first", "second", "average", "gradient")),
        ("count", _I),
    ]


class _Moments(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("weight", "first", "second")),
        ("count", _I),
        ("correction", ctypes.c_float),
    ]


@dataclasses.dataclass(frozen=True)
class Update:
    """A parameter and what its step changes: fp32 on the CPU, without gaps, of one shape."""

    parameter: torch.Tensor
    gradient: torch.Tensor
    """Of some rows of a table it may be sparse and coalesced, where `takes_rows`."""
    first: torch.Tensor
    second: torch.Tensor
    """The moments."""
    average: torch.Tensor | None


@functools.cache
def library() -> ctypes.CDLL:
    """The kernel, proved on this machine.

    Raises:
        BackendError: it cannot be built, or does not compute here what the formula says.
    """
    loaded = load_kernel(Path(__file__).with_suffix(".cpp"), "optimizer_kernel=cpp")
    for name in ("adam_atan2", "adam_atan2_rows", "squares", "update_squares"):
        getattr(loaded, f"hrm_{name}").restype = None
    _probe(loaded)
    return loaded


@functools.cache
def is_usable() -> bool:
    """Whether this machine builds the kernel and it computes what it should."""
    if compiler() is None:
        return False
    try:
        library()
    except BackendError as error:
        logger.warning("optimizer_kernel=auto takes foreach, which is slower: %s", error)
        return False
    return True


def update(kernel: ctypes.CDLL, updates: Sequence[Update], numbers: Sequence[float]) -> None:
    """One step of parameters, and of their averages where there are some, in place.

    Args:
        numbers: 1 - lr * wd, 1 - b1, b2, 1 - b2, lr / (1 - b1^t), 1 / sqrt(1 - b2^t), 1 - decay of
            the average.
    """
    factors, threads = (ctypes.c_float * _NUMBERS)(*numbers), _I(torch.get_num_threads())
    dense = [one for one in updates if not one.gradient.is_sparse]
    structs = (_Parameter * len(dense))(
        *((*_addresses(one), one.gradient.data_ptr(), one.parameter.numel()) for one in dense)
    )
    kernel.hrm_adam_atan2(structs, _I(len(dense)), factors, threads)
    for one in updates:
        if one.gradient.is_sparse:
            given, values = one.gradient.indices(), one.gradient.values().contiguous()
            weight, *state = (_P(address) for address in _addresses(one))
            rows = (_I(size) for size in (given.shape[1], *one.parameter.shape))
            kernel.hrm_adam_atan2_rows(
                weight, _P(values.data_ptr()), _P(given.data_ptr()), *rows, *state, factors, threads
            )


def _addresses(one: Update) -> tuple[int | None, ...]:
    average = None if one.average is None else one.average.data_ptr()
    return one.parameter.data_ptr(), one.first.data_ptr(), one.second.data_ptr(), average


def takes_rows(kernel: ctypes.CDLL, parameter: torch.Tensor) -> bool:
    """Whether `update` takes the gradient of some rows of this table, zero in the others."""
    return parameter.ndim == 2 and parameter.shape[1] % kernel.hrm_optimizer_lanes() == 0


def update_squares(
    kernel: ctypes.CDLL,
    weights: Sequence[torch.Tensor],
    moments: Sequence[Sequence[torch.Tensor]],
    corrections: Sequence[float],
) -> tuple[list[float], list[float]]:
    """Of each weight the squared norms of atan2(first, sqrt(second) * correction) and of itself.

    The same for any number of threads.

    Args:
        weights, moments: fp32 on the CPU, without gaps; first and second moments of each.
    """
    count = len(weights)
    structs = (_Moments * count)(
        *(
            (weight.data_ptr(), *(moment.data_ptr() for moment in own), weight.numel(), correction)
            for weight, own, correction in zip(weights, moments, corrections, strict=True)
        )
    )
    found = (ctypes.c_double * (2 * count))()
    kernel.hrm_update_squares(structs, _I(count), found, _I(torch.get_num_threads()))
    return found[:count], found[count:]


def squares(kernel: ctypes.CDLL, tensors: Sequence[torch.Tensor]) -> list[float]:
    """Squared norm of each tensor, the same for any number of threads.

    Args:
        tensors: fp32 on the CPU, without gaps.
    """
    count = len(tensors)
    pointers = (_P * count)(*(tensor.data_ptr() for tensor in tensors))
    sizes = (_I * count)(*(tensor.numel() for tensor in tensors))
    found = (ctypes.c_double * count)()
    kernel.hrm_squares(pointers, sizes, _I(count), found, _I(torch.get_num_threads()))
    return list(found)


def _probe(kernel: ctypes.CDLL) -> None:
    """Refuse a kernel whose step is not that of the formula, over the range of an arc tangent."""
    draw = torch.Generator().manual_seed(0)
    size = torch.logspace(-30, 15, 101)
    gradient = size * torch.randn(101, generator=draw)
    weight, average = torch.zeros(101), torch.ones(101)
    moments = torch.zeros(101), size.square()
    one = Update(weight, gradient, *moments, average)
    update(kernel, [one], [1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.25])
    angle = torch.atan2(gradient, size.square().sqrt())
    expected = {"weight": -angle, "first moment": gradient, "average": 0.75 - 0.25 * angle}
    found = {"weight": weight, "first moment": moments[0], "average": average}
    for name, value in expected.items():
        tolerance = PROBE_UNITS * torch.finfo(torch.float32).eps
        if not torch.allclose(found[name], value, rtol=tolerance, atol=tolerance * math.pi):
            raise BackendError(
                f"the C++ optimizer's {name} is not that of the formula on this machine; use "
                "optimizer_kernel=foreach and report the compiler and processor"
            )
