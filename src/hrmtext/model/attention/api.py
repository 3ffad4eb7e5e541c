"""One specification of attention, and the choice of the backend that computes it.

Letters: T tokens of a packed stream, N heads, K head width.

A plan is built once for a micro-batch and used by every attention call of a recurrent forward. Its
`attend(q, k, v, slot)` maps (T, N, K) tensors to (T, N, K): query i sees key j of its own row if
and only if j < visible_end[i] (see `hrmtext.batch`), scores are scaled by K**-0.5, softmax is fp32
or better inside, and tokens behind the last row come out as zeros.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from hrmtext.batch import RowLayout
from hrmtext.config.base import nearest
from hrmtext.errors import BackendError
from hrmtext.model.attention.flash import FlashPlan
from hrmtext.model.attention.flex import FlexPlan
from hrmtext.model.attention.reference import ReferencePlan
from hrmtext.model.attention.sdpa import SdpaPlan
from hrmtext.model.attention.varlen import HALF, find_kernel
from hrmtext.runtime.compile import keep_outside
from hrmtext.runtime.log import logger


class AttentionPlan(Protocol):
    """Who sees whom in one micro-batch, prepared for one backend."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) queries, keys, values of the (stack call, layer) `slot` -> (T, N, K)."""
        ...


def _flash(kernel: str | None) -> Callable[..., AttentionPlan]:
    return lambda layout, device, dtype, head_dim: FlashPlan(
        layout, device, dtype, kernel=kernel, head_dim=head_dim
    )


BACKENDS: dict[str, Callable[..., AttentionPlan]] = {
    "reference": lambda layout, device, dtype, _: ReferencePlan(layout, device, dtype),
    "sdpa": lambda layout, device, dtype, _: SdpaPlan(layout, device, dtype),
    "flex": lambda layout, device, dtype, _: FlexPlan(layout, device, dtype),
    "flash": _flash(None),
    "flash_torch": _flash("torch"),
    "flash_attn": _flash("flash_attn"),
    "flash_reference": _flash("reference"),
}
"""`flash` takes the first kernel that runs; the names below it ask for one kernel, of which
`flash_reference` is plain torch: slow, and there to test the two passes. `flex` has a backward pass
on CUDA only."""
ON_EVERY_DEVICE = ("reference", "sdpa", "flash_reference")


def make_plan(
    layout: RowLayout,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
    head_dim: int | None = None,
) -> AttentionPlan:
    """The plan of `layout` for a backend.

    Args:
        dtype: number format of the queries that will come.
        backend: one of `BACKENDS`, or `auto`: `flash` on CUDA with bf16 or fp16 where a kernel
            runs and passes a small test, else `sdpa`, which runs on every device (logged).
        head_dim: K: FlashAttention takes only some widths, so `auto` takes it only for a known one.

    Raises:
        BackendError: a backend asked for by name does not exist or cannot run here.
    """
    if "torch._dynamo" in sys.modules:  # then someone compiles, with us or without
        keep_outside()
    device = torch.device(device)
    if backend == "auto":
        backend = _choose(device, dtype, head_dim)
    if backend not in BACKENDS:
        raise BackendError(f"unknown attention backend {backend!r}{nearest(backend, [*BACKENDS])}")
    return BACKENDS[backend](layout, device, dtype, head_dim)


@cache
def _choose(device: torch.device, dtype: torch.dtype, head_dim: int | None) -> str:
    """The backend for `auto`; logs once what was chosen and why."""
    if device.type != "cuda" or dtype not in HALF or head_dim is None:
        logger.debug("attention backend: sdpa, the one that runs on every device")
        return "sdpa"
    try:
        kernel = find_kernel(device, dtype, head_dim)
    except BackendError as error:
        logger.info("attention backend: sdpa, as %s", error)
        return "sdpa"
    logger.info("attention backend: flash, with the %s kernel, tested on %s", kernel, device)
    return "flash"
