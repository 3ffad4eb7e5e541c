"""One specification of attention, and the choice of the backend that computes it.

Letters: T tokens of a packed stream, N heads, K head width.

A plan is built once for a micro-batch and used by every attention call of a recurrent forward. Its
`attend(q, k, v, slot)` maps (T, N, K) tensors to (T, N, K): query i sees key j of its own row if
and only if j < visible_end[i] (see `hrmtext.batch`), scores are scaled by K**-0.5, softmax is fp32
or better inside, and tokens behind the last row come out as zeros.
"""

from __future__ import annotations

from typing import Protocol

import torch

from hrmtext.batch import RowLayout
from hrmtext.config.base import nearest
from hrmtext.errors import BackendError
from hrmtext.model.attention.reference import ReferencePlan
from hrmtext.model.attention.sdpa import SdpaPlan
from hrmtext.runtime.log import logger

BACKENDS = {"reference": ReferencePlan, "sdpa": SdpaPlan}


class AttentionPlan(Protocol):
    """Who sees whom in one micro-batch, prepared for one backend."""

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(T, N, K) queries, keys, values of the (stack call, layer) `slot` -> (T, N, K)."""
        ...


def make_plan(
    layout: RowLayout,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    backend: str = "auto",
) -> AttentionPlan:
    """The plan of `layout` for a backend.

    Args:
        dtype: number format of the queries that will come.
        backend: `reference`, `sdpa`, or `auto`: `sdpa`, which runs on every device (logged).

    Raises:
        BackendError: a backend asked for by name does not exist.
    """
    if backend == "auto":
        backend = "sdpa"
        logger.debug("attention backend: sdpa, the one that runs on every device")
    if backend not in BACKENDS:
        raise BackendError(f"unknown attention backend {backend!r}{nearest(backend, [*BACKENDS])}")
    return BACKENDS[backend](layout, torch.device(device), dtype)
