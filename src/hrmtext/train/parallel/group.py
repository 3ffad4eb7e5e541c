"""The distributed seam: process group, gradient sum over ranks, decisions all ranks share."""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as torch_dist

from hrmtext.errors import RankError
from hrmtext.runtime import dist
from hrmtext.runtime.device import communication_backend, device_of_rank

BUCKET_BYTES = 64 << 20
"""Gradients travel in flat buffers of about this size."""


def _meeting_place(timeout: datetime.timedelta) -> dict[str, Any]:
    """Where ranks exchange addresses, if not where torch would: on one node under torchrun.

    Its store outlives the ranks (torch 2.13), so that ranks started again would meet the addresses
    of those that are gone. On several nodes every restart has a store of its own, and the nodes'
    counts of restarts differ.
    """
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if os.environ.get("GROUP_WORLD_SIZE") != "1" or restarts == "0":
        return {}
    store, rank, num_ranks = next(iter(torch_dist.rendezvous("env://", timeout=timeout)))
    store = torch_dist.PrefixStore(f"restart_{restarts}", store)
    return {"store": store, "rank": rank, "world_size": num_ranks}


@contextlib.contextmanager
def process_group(device: torch.device, *, timeout_s: float = 1_800.0) -> Iterator[torch.device]:
    """Join the group that `torchrun` announces in the environment; yield this rank's device.

    Without it, or within a group that is up already, nothing happens.

    Args:
        timeout_s: ranks wait no longer than this for one another.

    Raises:
        BackendError: fewer GPUs than ranks on this node, or a torch without NCCL.
        RankError: the other ranks could not be reached.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1 or dist.is_distributed():
        yield device
        return
    if device.type == "cuda":
        device = device_of_rank(int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    backend = communication_backend(device)
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        torch_dist.init_process_group(backend, timeout=timeout, **_meeting_place(timeout))
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"rank {os.environ.get('RANK', '?')} of {num_ranks} could not join the others at "
            f"{os.environ.get('MASTER_ADDR', '(no MASTER_ADDR)')}:"
            f"{os.environ.get('MASTER_PORT', '(no MASTER_PORT)')} over {backend}: {error}. Start "
            "all ranks with torchrun, and let the address be one that every node reaches"
        ) from error
    try:
        yield device
    finally:
        torch_dist.destroy_process_group()


@torch.no_grad()
def sum_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Sum the gradients of all ranks into each rank's; the loss is normalised already.

    A parameter that has a gradient on some rank gets one on all (zeros count for a rank without
    microbatches); one that has none anywhere keeps None.
    """
    if not dist.is_distributed() or not parameters:
        return
    device = parameters[0].device
    present = torch.tensor([p.grad is not None for p in parameters], device=device).float()
    present = dist.sum_over_ranks(present).tolist()
    bucket: list[torch.Tensor] = []
    size = 0
    for parameter, count in zip(parameters, present, strict=True):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        bucket.append(parameter.grad)
        size += parameter.grad.nbytes
        if size >= BUCKET_BYTES:
            _sum_bucket(bucket)
            bucket, size = [], 0
    _sum_bucket(bucket)


def _sum_bucket(gradients: list[torch.Tensor]) -> None:
    if not gradients:
        return
    flat = dist.sum_over_ranks(torch.cat([gradient.flatten() for gradient in gradients]))
    pieces = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [p.view_as(g) for p, g in zip(pieces, gradients, strict=True)])


def any_rank(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up on some rank; all ranks get the same answer at the same step."""
    if not dist.is_distributed():
        return flag
    return bool(dist.sum_over_ranks(torch.tensor(float(flag), device=device)).item())


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if dist.is_distributed():
        torch_dist.barrier()
