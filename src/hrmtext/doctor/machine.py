"""Packages, devices, memory and number formats."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path

import torch
from packaging.requirements import Requirement

from hrmtext.config.train import TrainConfig
from hrmtext.doctor.finding import Finding, size
from hrmtext.errors import ConfigError
from hrmtext.runtime.device import cpu_has_bf16, cpu_name, pick_training_dtype, why_no_cuda
from hrmtext.train.estimate import estimate

TIGHT_SHARE = 0.9
"""A run that needs more than this share of the memory is warned of; the estimate is not exact."""


def check_versions() -> list[Finding]:
    """Whether the packages that hrm-text needs are there, in versions that it takes."""
    try:
        wanted = importlib.metadata.requires("hrm-text") or []
    except importlib.metadata.PackageNotFoundError:
        return [
            Finding("versions", "hrm-text", "warning", "runs from its source, is not installed",
                    "install it (`pip install -e .`), so that versions can be checked")
        ]  # fmt: skip
    findings = []
    for requirement in map(Requirement, wanted):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name = requirement.name
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            advice = f"install it: pip install '{requirement}'"
            findings.append(Finding("versions", name, "problem", "not installed", advice))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            findings.append(Finding("versions", name, "ok", version))
        else:
            found = f"{version}, needed is {requirement.specifier}"
            advice = f"pip install '{requirement}'"
            findings.append(Finding("versions", name, "problem", found, advice))
    return findings


def check_devices() -> list[Finding]:
    """What torch sees, and whether a GPU is there that it does not see."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = torch.get_num_threads()
    found = [Finding("devices", "cpu", "ok", f"{cpu_name()}, {cores} cores, {threads} threads")]
    if not torch.cuda.is_available():
        has_driver = shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()
        if has_driver:
            advice = "install a CUDA build of torch that fits the driver, or unhide the GPU"
            found.append(Finding("devices", "cuda", "problem", why_no_cuda(), advice))
        else:
            found.append(Finding("devices", "cuda", "ok", f"none; {why_no_cuda()}"))
        return found
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        name = f"cuda:{index}"
        text = f"{facts.name}, {size(free)} free of {size(total)}, sm_{facts.major}{facts.minor}"
        if free < 0.9 * total:
            advice = "another process uses this GPU (`nvidia-smi`); end it, or take another GPU"
            found.append(Finding("devices", name, "warning", text, advice))
        else:
            found.append(Finding("devices", name, "ok", text))
    return found


def check_formats(device: torch.device) -> list[Finding]:
    """The number format that `precision: auto` takes, proved by a product in it."""
    chosen = pick_training_dtype("auto", device)
    name = str(chosen).removeprefix("torch.")
    if device.type == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return [
            Finding("formats", "bf16", "warning", "this GPU has no bf16 instructions",
                    "train with precision=fp32; bf16 is emulated and slow here")
        ]  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(64, 64, generator=generator, dtype=torch.float64) for _ in range(2))
    product = (a.to(device, chosen) @ b.to(device, chosen)).double().cpu()
    # Inputs are rounded to the format, the sum of 64 products is in fp32 or better.
    error = float((product - a @ b).norm() / (a @ b).norm())
    if not error <= 4 * torch.finfo(chosen).eps:
        advice = "the device computes wrongly: look at its temperature, memory errors and driver"
        return [Finding("formats", name, "problem", f"a product is off by {error:.1%}", advice)]
    why = ""
    if device.type == "cpu":
        why = " (bf16 in hardware)" if cpu_has_bf16() else " (bf16 would be emulated here)"
    return [Finding("formats", "precision: auto", "ok", f"{name}{why}")]


def check_memory(device: torch.device, recipe: TrainConfig | None) -> list[Finding]:
    """Free memory, against what the recipe takes on one device."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_memory()
    if recipe is None:
        return [Finding("memory", str(device), "ok", f"{size(free)} free")]
    needed = estimate(recipe, device=device).memory.total
    text = f"about {size(needed)} needed, {size(free)} free"
    advice = (
        "smaller bins (bin_tokens), activation_checkpointing=all, or a smaller model; "
        "`hrm-text train RECIPE --dry-run` shows the parts"
    )
    if needed > free:
        return [Finding("memory", str(device), "problem", text, advice)]
    if needed > TIGHT_SHARE * free:
        return [Finding("memory", str(device), "warning", text, advice)]
    return [Finding("memory", str(device), "ok", text)]


def available_memory() -> int:
    """Bytes that this process may still take: what is free, or what its group's limit leaves."""
    free = None
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) << 10
    except OSError:
        pass
    if free is None:
        try:
            free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        except (AttributeError, ValueError, OSError):
            raise ConfigError("this system does not tell how much memory it has") from None
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free = min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return free
