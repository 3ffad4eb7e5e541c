"""Several ranks: whether they meet, add rightly, and how fast they exchange gradients."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as torch_dist

from hrmtext.doctor.finding import Finding
from hrmtext.errors import BackendError
from hrmtext.runtime import dist
from hrmtext.runtime.device import communication_backend
from hrmtext.train.parallel import wait_for_all

PROBE_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
REPEATS = 5
SLOW_BYTES_PER_S = {"cpu": 0.1e9, "cuda": 20e9}
"""Below these, exchanging gradients takes longer than a step of a large model computes."""


def check_ranks(device: torch.device) -> list[Finding]:
    """Backends of this torch; under torchrun a sum over all ranks, right and timed."""
    try:
        backend = communication_backend(device)
    except BackendError as error:
        advice = "several ranks can't train with this torch; install an official build"
        return [Finding("ranks", "backend", "warning", str(error).split(";")[0], advice)]
    if not dist.is_distributed():
        launched = int(os.environ.get("WORLD_SIZE", "1"))
        text = f"{launched} process; {backend} is there. Under torchrun the exchange is measured"
        return [Finding("ranks", "world size", "ok", text)]
    world = dist.world_size()
    nodes = max(1, world // int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    found = [Finding("ranks", "world size", "ok", f"{world} ranks on {nodes} nodes over {backend}")]
    sent = torch.full((PROBE_BYTES[device.type] // 4,), float(dist.rank() + 1), device=device)
    expected = world * (world + 1) / 2
    total = dist.sum_over_ranks(sent.clone())
    if not bool((total == expected).all()):
        advice = "the network or a GPU corrupts data: test the nodes one by one"
        return [*found, Finding("ranks", "sum", "problem", "a sum over ranks is wrong", advice)]
    rate = _bytes_per_s(sent, device)
    text = f"{rate / 1e9:.2f} GB/s bus bandwidth, sums of {sent.nbytes >> 20} MiB"
    if rate < SLOW_BYTES_PER_S[device.type]:
        advice = (
            "look at the network: NCCL_DEBUG=INFO says which it takes (InfiniBand, NVLink, or "
            "plain TCP), GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME choose one"
        )
        return [*found, Finding("ranks", "all_reduce", "warning", text, advice)]
    return [*found, Finding("ranks", "all_reduce", "ok", text)]


def _bytes_per_s(tensor: torch.Tensor, device: torch.device) -> float:
    """Bus bandwidth: bytes that every link carries, 2 (n - 1) / n of the tensor a sum."""
    world = dist.world_size()
    times = []
    for _ in range(REPEATS):
        wait_for_all()
        began = time.perf_counter()
        torch_dist.all_reduce(tensor)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - began)
    return 2 * (world - 1) / world * tensor.nbytes / sorted(times)[REPEATS // 2]
