"""Host tensors to a device, without the host waiting for the device."""

from __future__ import annotations

import torch


def send(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """`tensor` (on the CPU) on `device`; to CUDA by a queued copy from pinned memory.

    A copy from ordinary memory would first wait until all queued work is done.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
