"""Choice of device and number format; a device asked for by name is used or refused."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import torch

from hrmtext.errors import BackendError, ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Short names of number formats, as configs and the command line spell them."""


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
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BackendError(
            f"device {name!r} was asked for, but torch {torch.__version__} sees no CUDA device; "
            "use device=cpu, or install a CUDA build of torch on a machine with a GPU"
        )
    return device


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
