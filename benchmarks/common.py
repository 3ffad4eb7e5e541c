"""What every benchmark shares: interleaved timing, machine facts, the ceiling, the result file."""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from hrmtext.runtime.device import cpu_has_bf16, describe

RESULTS = Path(__file__).parent / "results"


def number_formats(device: torch.device) -> dict[str, torch.dtype]:
    """The formats worth a trial: without instructions for it a CPU only emulates bf16, slowly."""
    formats = {"fp32": torch.float32, "bf16": torch.bfloat16}
    if device.type == "cpu" and not cpu_has_bf16():
        del formats["bf16"]
    return formats


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def interleave(
    sides: dict[str, Callable[[], object]], *, rounds: int, device: torch.device, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every call, sides in turn, so that a drift of the machine meets all alike."""
    for side in sides.values():
        for _ in range(warmup):
            side()
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            synchronize(device)
            start = time.perf_counter()
            side()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def summary(values: list[float], digits: int = 1) -> dict[str, float]:
    """Median, p10 and p90."""
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return {
        "median": round(statistics.median(values), digits),
        "p10": round(deciles[0], digits),
        "p90": round(deciles[-1], digits),
    }


def ratios(seconds: dict[str, list[float]], slow: str, fast: str) -> list[float]:
    """How many times `fast` beats `slow`, pair by pair."""
    return [a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)]


def matmul_flops(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Best rate of a large square matrix product on this machine, in operations a second."""
    a = torch.randn(size, size, device=device, dtype=dtype)
    times = interleave({"matmul": lambda: a @ a}, rounds=7, device=device, warmup=2)["matmul"]
    return 2 * size**3 / min(times)


def read_bytes_per_s(device: torch.device, size: int = 1 << 28) -> float:
    """Best rate of summing a large array, in bytes a second."""
    x = torch.ones(size // 4, device=device)
    times = interleave({"sum": lambda: x.sum()}, rounds=7, device=device, warmup=2)["sum"]
    return size / min(times)


def write_result(
    name: str, device: torch.device, values: dict[str, object], folder: Path | None = None
) -> Path:
    """Write <name>-<device>.json with machine, commit and versions under results/; print it."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parent,
    ).stdout.strip()  # fmt: skip
    record = {
        "benchmark": name,
        "commit": commit or "unknown",
        "machine": describe(device),
        "versions": {p: version(p) for p in ("hrm-text", "torch", "transformers", "numpy")},
        **values,
    }
    folder = folder or RESULTS
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{device.type}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2))
    print(f"written to {folder.name}/{path.name}")
    return path
