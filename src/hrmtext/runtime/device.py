"""Choice of device and number format; a device asked for by name is used or refused."""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path

import torch
import torch.distributed as torch_dist

from hrmtext.errors import BackendError, ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Short names of number formats, as configs and the command line spell them."""
KEPT_KERNELS = 32
"""Kernels that oneDNN keeps in training."""


def pick_device(name: str | None = None) -> torch.device:
    """The device called `name`; None or "auto": CUDA where there is one, else the CPU.

    Raises:
        BackendError: the device was asked for by name and is not there.
    """
    if name in (None, "auto"):
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise BackendError(f"unknown device {name!r}; expected cpu, cuda or cuda:N") from error
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(
                f"device {name!r} was asked for, but {why_no_cuda()}; use device=cpu, or "
                "`hrm-text doctor` to see what is there"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise BackendError(
                f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA "
                "devices, counted from cuda:0"
            )
    return device


def why_no_cuda() -> str:
    """Why torch sees no CUDA device, and what to do about it, as the end of a sentence."""
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA (install a CUDA build of torch on "
            "a machine with an NVIDIA GPU)"
        )
    if os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1"):
        return "CUDA_VISIBLE_DEVICES hides every GPU (unset it)"
    return (
        f"torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees no GPU (is there "
        "one, and is its driver new enough? `nvidia-smi` tells)"
    )


@functools.cache
def last_cache_bytes() -> int | None:
    """Size of the processor's last cache, which some or all cores share; None: not known."""
    sizes = {}
    for folder in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        try:
            level = int((folder / "level").read_text())
            size = (folder / "size").read_text().strip()
            sizes[level] = int(size.removesuffix("K")) << 10
        except (OSError, ValueError):  # some systems leave a file out, or write it otherwise
            continue
    return sizes[max(sizes)] if sizes else None


def keep_few_kernels() -> None:
    """Let oneDNN, by which a CPU multiplies bf16, keep few kernels; before its first product.

    It makes one for every shape and keeps 1,024, up to a gigabyte, and packed rows bring new shapes
    at every step. What the environment says already stays.
    """
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(name, str(KEPT_KERNELS))


def device_of_rank(local_rank: int) -> torch.device:
    """The GPU of a rank, by its number on its node.

    Raises:
        BackendError: the node has fewer GPUs than ranks.
    """
    num_devices = torch.cuda.device_count()
    if local_rank >= num_devices:
        raise BackendError(
            f"rank {local_rank} of this node has no GPU: torch sees {num_devices}, and every rank "
            f"needs one of its own. Start torchrun with --nproc-per-node {num_devices}, or train "
            "on the CPU with --device cpu"
        )
    return torch.device("cuda", local_rank)


def communication_backend(device: torch.device) -> str:
    """nccl for GPUs, gloo for the CPU.

    Raises:
        BackendError: this build of torch lacks it.
    """
    name = "nccl" if device.type == "cuda" else "gloo"
    is_there = torch_dist.is_available() and (
        torch_dist.is_nccl_available() if name == "nccl" else torch_dist.is_gloo_available()
    )
    if not is_there:
        raise BackendError(
            f"several ranks on {device.type} need {name}, and torch {torch.__version__} was built "
            "without it; install an official build of torch for Linux, or train on one device"
        )
    return name


def pick_dtype(name: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The number format called `name`; None or "auto": bf16 on CUDA, fp32 on the CPU."""
    if isinstance(name, torch.dtype):
        return name
    if name in (None, "auto"):
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"unknown dtype {name!r}; expected auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def pick_training_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """As `pick_dtype`, but "auto" is bf16 also on a CPU that has bf16 instructions.

    There a training step takes about half the time; elsewhere bf16 on a CPU is emulated and slow.
    """
    if name in (None, "auto") and device.type == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return pick_dtype(name, device)


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 matrices in hardware (AVX-512 BF16 or AMX)."""
    # torch 2.11 may lack the query; fp32 is then the safe answer.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def describe(device: torch.device) -> dict[str, str | int]:
    """Machine facts for run records: device name, cores, versions. No host names, no paths."""
    facts: dict[str, str | int] = {
        "device": device.type,
        "device_name": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cpu_cores": os.cpu_count() or 0,
        "cpu_threads_used": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        facts["device_memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    return facts


def cpu_name() -> str:
    """Model name of the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
