"""The log of a run: metrics.jsonl and trackers, exact over interruptions but for `timing`."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.layout import RunFolder
from hrmtext.config.train import TrainConfig
from hrmtext.runtime import dist
from hrmtext.runtime.io import explain_storage_errors, write_text
from hrmtext.runtime.memory import peak_memory_bytes
from hrmtext.train.loss import NUM_SUMS
from hrmtext.train.trackers import Tracker, open_trackers, scalars

PEAK_BF16_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bf16 operations a second by a part of the device's name; from the vendor's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 peak; None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    return named_peak_flops(torch.cuda.get_device_name(device))


def named_peak_flops(name: str) -> float | None:
    """Dense bf16 operations a second of a GPU of this name; None where it is not known."""
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def device_use(device: torch.device, flops_per_s: float) -> dict[str, float]:
    """Peak memory of this process, and the share of the peak rate where that is known.

    Args:
        flops_per_s: of one device.
    """
    found: dict[str, float] = {}
    memory, peak = peak_memory_bytes(device), peak_flops(device)
    if memory is not None:
        found["peak_memory_bytes"] = memory
    if peak is not None:
        found["share_of_peak"] = flops_per_s / peak
    return found


class Interval:
    """Sums since the last line of the log; the device's stay there until they are asked for."""

    COUNTS = ("steps", "tokens", "supervised_tokens", "flops", "gradient_norm")

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=device)
        self._counts = dict.fromkeys(self.COUNTS, 0.0)

    def add(self, sums: torch.Tensor, **counts: float) -> None:
        """Add one step: (4) sums of this rank, and host counts over all ranks."""
        self._sums += sums
        for name, count in counts.items():
            self._counts[name] += count

    def state(self) -> dict[str, Any]:
        """Plain values over all ranks, to go on from after a resume."""
        total = dist.sum_over_ranks(self._sums.clone()).tolist()
        return {"sums": total, "counts": dict(self._counts)}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave; only rank 0, as sums are added over the ranks."""
        if not state:
            return
        self._counts.update(state["counts"])
        self._sums.zero_()
        if dist.rank() == 0:
            self._sums += torch.tensor(state["sums"], dtype=torch.float64, device=self._sums.device)

    def take(self) -> dict[str, float]:
        """Means over the interval, which then starts anew."""
        state = self.state()
        counts = state["counts"]
        loss, right, exact, rows = state["sums"]
        self._sums.zero_()
        self._counts = dict.fromkeys(self.COUNTS, 0.0)
        return {
            "loss": loss / max(1.0, counts["supervised_tokens"]),
            "token_accuracy": right / max(1.0, counts["supervised_tokens"]),
            "exact_answer": exact / max(1.0, rows),
            "gradient_norm": counts["gradient_norm"] / max(1.0, counts["steps"]),
            "interval_tokens": counts["tokens"],
            "interval_flops": counts["flops"],
        }


class Stopwatch:
    """Training time of the interval, pauses (validation, checkpoints) left out."""

    def __init__(self) -> None:
        self._spent = 0.0
        self._since = time.perf_counter()

    def pause(self) -> None:
        """Stop counting."""
        self._spent += time.perf_counter() - self._since

    def go_on(self) -> None:
        """Count again."""
        self._since = time.perf_counter()

    def take(self) -> float:
        """Seconds counted since the last call; counting goes on."""
        now = time.perf_counter()
        spent, self._spent, self._since = self._spent + now - self._since, 0.0, now
        return spent


class MetricsLog:
    """Lines of metrics.jsonl, and the same numbers to the trackers. One writer: rank 0."""

    def __init__(
        self, run: RunFolder, *, resumed_step: int, trackers: Sequence[Tracker] = ()
    ) -> None:
        """Open the log to go on after `resumed_step`; what is later than that step is cut off."""
        self._path = run.metrics_file
        self._trackers = trackers
        truncate(self._path, resumed_step)
        with explain_storage_errors(self._path):
            self._stream = self._path.open("a", encoding="utf-8")

    @classmethod
    def of(cls, run: RunFolder, config: TrainConfig, *, resumed_step: int) -> MetricsLog:
        """The log with the trackers that the config names."""
        trackers = open_trackers(run, config, resumed_step=resumed_step)
        return cls(run, resumed_step=resumed_step, trackers=trackers)

    def write(self, record: dict[str, Any]) -> None:
        """Append a record; its `step` is the number of optimizer steps done."""
        with explain_storage_errors(self._path):
            self._stream.write(json.dumps(record) + "\n")
            self._stream.flush()
        if self._trackers:
            values = scalars(record)
            for tracker in self._trackers:
                tracker.log(values, record["step"])

    def sync(self) -> None:
        """Force what was written to the disk, before a checkpoint counts on it."""
        with explain_storage_errors(self._path):
            os.fsync(self._stream.fileno())
        for tracker in self._trackers:
            tracker.flush()

    def close(self) -> None:
        """Close the files."""
        self._stream.close()
        for tracker in self._trackers:
            tracker.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line that a kill cut short is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def truncate(path: Path, step: int) -> None:
    """Drop the records after `step`, so that a resumed run writes them again."""
    if not path.is_file():
        return
    kept = [record for record in read_metrics(path) if record["step"] <= step]
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))
