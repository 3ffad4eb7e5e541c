"""All checks in order."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from hrmtext.config.train import TrainConfig
from hrmtext.doctor.disk import check_disk
from hrmtext.doctor.finding import Finding, guarded
from hrmtext.doctor.folders import check_data_folder, check_run_folder
from hrmtext.doctor.kernels import check_backends, check_compile
from hrmtext.doctor.machine import check_devices, check_formats, check_memory, check_versions
from hrmtext.doctor.ranks import check_ranks


def examine(
    device: torch.device,
    *,
    data: Path | None = None,
    run: Path | None = None,
    recipe: TrainConfig | None = None,
) -> list[Finding]:
    """Everything that can be checked with what is given; no check ends the others.

    Args:
        device: of this rank, within a process group where there are several: all ranks call this.
        data: a prepared data folder.
        run: the folder of a run, present or planned; its disk is probed, else the current folder's.
        recipe: memory, disk and data are held against it.
    """
    checks: list[tuple[str, Callable[[], list[Finding]]]] = [
        ("versions", check_versions),
        ("devices", check_devices),
        ("memory", lambda: check_memory(device, recipe)),
        ("formats", lambda: check_formats(device)),
        ("kernels", lambda: check_backends(device)),
        ("kernels", lambda: check_compile(device)),
        ("ranks", lambda: check_ranks(device)),
        ("disk", lambda: check_disk(run or Path(), recipe)),
    ]
    if data is not None:
        checks.append(("data", lambda: check_data_folder(data, recipe)))
    if run is not None:
        checks.append(("run", lambda: check_run_folder(run, recipe)))
    return [finding for area, check in checks for finding in guarded(area, check)]
