"""The disk of a run: room for its checkpoints, speed of a synced write, renaming."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path

from hrmtext.config.train import TrainConfig
from hrmtext.doctor.finding import Finding, size
from hrmtext.model.flops import count_parameters

PROBE_BYTES = 64 << 20
BYTES_PER_PARAMETER = 16
"""Of a checkpoint, in fp32: weights, average, two moments."""
SLOW_WRITE_S = 120.0
"""A checkpoint that takes longer to write holds up all ranks for long."""


def check_disk(folder: Path, recipe: TrainConfig | None) -> list[Finding]:
    """Probe the folder, or the nearest one above it that exists."""
    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = None if recipe is None else checkpoint_bytes(recipe)
    findings = [_room(free, needed, recipe)]
    try:
        rate = _write(place, min(PROBE_BYTES, free // 4))
    except OSError as error:
        advice = "choose a folder that this user may write to, on a disk with room"
        text = f"cannot write: {error.strerror or error}"
        return [*findings, Finding("disk", "write", "problem", text, advice)]
    text = f"{rate / 1e6:,.0f} MB/s synced, renaming works"
    if needed is not None:
        seconds = needed / rate
        text += f"; a checkpoint of {size(needed)} takes about {seconds:,.0f} s"
        if seconds > SLOW_WRITE_S:
            advice = "put the run on a faster disk, or raise checkpoint_every"
            return [*findings, Finding("disk", "write", "warning", text, advice)]
    return [*findings, Finding("disk", "write", "ok", text)]


def checkpoint_bytes(recipe: TrainConfig) -> int:
    """Size of one checkpoint of a recipe."""
    return count_parameters(recipe.model.resolve()).stored * BYTES_PER_PARAMETER


def _room(free: int, needed: int | None, recipe: TrainConfig | None) -> Finding:
    if needed is None or recipe is None:
        return Finding("disk", "room", "ok", f"{size(free)} free")
    # The new one is written whole before the oldest goes.
    count = recipe.keep_last + 1 + (1 if recipe.keep_best else 0)
    text = f"{size(free)} free, {count} checkpoints of {size(needed)} at a time"
    if free < count * needed:
        advice = f"make {size(count * needed - free)} of room, or lower keep_last"
        return Finding("disk", "room", "problem", text, advice)
    if recipe.keep_every:
        text += f"; every {recipe.keep_every} steps one more stays"
    return Finding("disk", "room", "ok", text)


def _write(place: Path, num_bytes: int) -> float:
    """Bytes a second of a write with fsync, in a folder that is renamed and removed then."""
    block = os.urandom(1 << 20)
    with tempfile.TemporaryDirectory(prefix=".doctor.", dir=place) as temporary:
        folder = Path(temporary, "written")
        folder.mkdir()
        began = time.perf_counter()
        with (folder / "probe").open("wb") as stream:
            for _ in range(max(1, num_bytes >> 20)):
                stream.write(block)
            stream.flush()
            os.fsync(stream.fileno())
        seconds = time.perf_counter() - began
        folder.rename(Path(temporary, "renamed"))
        if (Path(temporary, "renamed") / "probe").read_bytes()[: len(block)] != block:
            raise OSError("what was written reads back otherwise")
    return max(1, num_bytes >> 20) * len(block) / max(1e-9, seconds)
