"""The distributed seam: process group, gradient sum over ranks, decisions all ranks share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as torch_dist

from hrmtext.runtime import dist

BUCKET_BYTES = 64 << 20
"""Gradients travel in flat buffers of about this size."""


@contextlib.contextmanager
def process_group(device: torch.device) -> Iterator[torch.device]:
    """Join the group that `torchrun` announces in the environment; yield this rank's device.

    Without it, or within a group that is up already, nothing happens.
    """
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks == 1 or dist.is_distributed():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    torch_dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
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
