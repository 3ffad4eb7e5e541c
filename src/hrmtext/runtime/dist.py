"""Rank, world size and the one collective training needs; all are trivial in a single process."""

from __future__ import annotations

import torch
import torch.distributed as torch_dist


def is_distributed() -> bool:
    """Whether a process group is up."""
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    """This process's rank, 0 in a single process."""
    return torch_dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of ranks, 1 in a single process."""
    return torch_dist.get_world_size() if is_distributed() else 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over all ranks, in place, and return it."""
    if is_distributed():
        torch_dist.all_reduce(tensor)
    return tensor
