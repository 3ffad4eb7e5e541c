"""The run folder: what a training run leaves behind, and where.

RUN/config.yaml  versions.json  metrics.jsonl  tensorboard/  report.html  evaluation.json
RUN/checkpoints/step_0000100/   a native model folder plus optimizer.safetensors, training.json

`RUN/best` and `RUN/last` name checkpoints wherever a model is loaded by path.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hrmtext.errors import CheckpointError, StorageError
from hrmtext.runtime.device import describe
from hrmtext.runtime.io import (
    explain_storage_errors,
    is_complete,
    require_complete,
    write_json,
    write_text,
)
from hrmtext.runtime.log import logger

BEST, LAST = "best", "last"
_STEP = re.compile(r"step_(\d{7,})")
VALIDATION_LOSS = "validation_loss"
"""Key of a checkpoint's marker: EMA loss of the validation made at its step."""
_LEFTOVER = re.compile(r"\..+\.[0-9a-f]{8}\.(tmp|old)")


class RunFolder:
    """Paths of a run and its checkpoints; holds nothing but the path."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.versions_file = self.path / "versions.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.tensorboard_folder = self.path / "tensorboard"
        self.report_file = self.path / "report.html"
        self.evaluation_file = self.path / "evaluation.json"
        self.checkpoints_folder = self.path / "checkpoints"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.is_file()

    def start(self, config_yaml: str, versions: Mapping[str, Any]) -> None:
        """Begin a run: write config.yaml and versions.json.

        Raises:
            StorageError: the folder holds a run or other files already; nothing is changed.
        """
        if self.path.is_dir() and any(
            not _LEFTOVER.fullmatch(entry.name) for entry in self.path.iterdir()
        ):
            what = "a run" if self.exists else "other files"
            raise StorageError(
                f"{self.path} holds {what} already; name another folder, remove it first, or "
                "resume the run that is there"
            )
        with explain_storage_errors(self.path):
            self.checkpoints_folder.mkdir(parents=True, exist_ok=True)
        write_json(self.versions_file, dict(versions))
        write_text(self.config_file, config_yaml)

    def checkpoint_path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.checkpoints_folder / f"step_{step:07d}"

    @staticmethod
    def step_of(checkpoint: Path) -> int:
        """Optimizer steps done at a checkpoint, from its folder's name."""
        match = _STEP.fullmatch(checkpoint.name)
        if match is None:
            raise CheckpointError(f"{checkpoint} is not named like a checkpoint (step_0001000)")
        return int(match.group(1))

    def checkpoints(self) -> list[Path]:
        """Complete checkpoints by ascending step; incomplete ones are named in a warning."""
        found = []
        for path in self._folders():
            if is_complete(path):
                found.append(path)
            else:
                logger.warning("ignoring the incomplete checkpoint %s", path)
        return found

    def latest(self) -> Path:
        """The newest complete checkpoint.

        Raises:
            CheckpointError: there is none; the message says whether incomplete ones are there.
        """
        complete = self.checkpoints()
        if complete:
            return complete[-1]
        incomplete = self._folders()
        detail = (
            f"{len(incomplete)} checkpoint folders are there, but none was written to its end"
            if incomplete
            else "it has no checkpoints yet"
            if self.exists
            else f"it is not a run folder (no {self.config_file.name})"
        )
        raise CheckpointError(f"no checkpoint to load in {self.path}: {detail}")

    def losses(self) -> dict[Path, float]:
        """EMA validation loss of the complete checkpoints whose step was validated."""
        found = {path: require_complete(path).get(VALIDATION_LOSS) for path in self.checkpoints()}
        return {path: float(loss) for path, loss in found.items() if loss is not None}

    def best(self) -> Path:
        """The complete checkpoint with the lowest EMA validation loss; the first of equals.

        Raises:
            CheckpointError: there is none, or no checkpoint was written at a validated step.
        """
        losses = self.losses()
        if losses:
            return min(losses, key=lambda path: losses[path])
        self.latest()  # explains where there is no checkpoint at all
        raise CheckpointError(
            f"no checkpoint of {self.path} was written at a step that was validated, so none is "
            f"best; take {self.path / LAST}, and let checkpoint_every be a multiple of "
            "validate_every"
        )

    def named(self, name: str) -> Path:
        """The checkpoint called `best` or `last`; raises CheckpointError as `best` and `latest`."""
        return {BEST: self.best, LAST: self.latest}[name]()

    def prune(self, *, keep_last: int, keep_every: int = 0, keep_best: bool = False) -> list[Path]:
        """Remove old complete checkpoints and return their paths.

        Args:
            keep_last: how many of the newest stay; at least 1.
            keep_every: checkpoints at multiples of this many steps stay as well; 0: none do.
            keep_best: the one with the lowest EMA validation loss stays as well.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}, expected at least 1")
        removed = []
        best = self.best() if keep_best and self.losses() else None
        for path in self.checkpoints()[:-keep_last]:
            if path == best:
                continue
            if keep_every and self.step_of(path) % keep_every == 0:
                continue
            # Renamed first, so that a kill while it is removed leaves no half checkpoint by name.
            doomed = path.with_name(f".{path.name}.{0:08x}.old")
            with explain_storage_errors(path):
                path.replace(doomed)
                shutil.rmtree(doomed, ignore_errors=True)
            removed.append(path)
        return removed

    def remove_leftovers(self) -> list[Path]:
        """Remove temporary files and folders that a killed run left, and return their paths."""
        removed = []
        for folder in (self.path, self.checkpoints_folder):
            if not folder.is_dir():
                continue
            for entry in sorted(folder.iterdir()):
                if not _LEFTOVER.fullmatch(entry.name):
                    continue
                if entry.is_dir():
                    shutil.rmtree(entry, ignore_errors=True)
                else:
                    entry.unlink(missing_ok=True)
                removed.append(entry)
        return removed

    def _folders(self) -> list[Path]:
        if not self.checkpoints_folder.is_dir():
            return []
        folders = [p for p in self.checkpoints_folder.iterdir() if _STEP.fullmatch(p.name)]
        return sorted(folders, key=self.step_of)


def describe_versions(device: torch.device, data_fingerprint: str) -> dict[str, Any]:
    """Facts of versions.json: packages, commit, device, data. No host names, no paths."""
    packages = ("hrm-text", "torch", "transformers", "tokenizers", "safetensors", "numpy")
    versions: dict[str, Any] = {"python": platform.python_version()}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "versions": versions,
        "commit": project_commit(),
        "device": describe(device),
        "data_fingerprint": data_fingerprint,
    }


def project_commit() -> str | None:
    """Commit of the checkout that this package runs from, `+changes` behind it; None if unknown."""
    folder = Path(__file__).parent
    try:
        root = _git(folder, "rev-parse", "--show-toplevel")
        # An installed copy inside someone else's repository must not report that one's commit.
        if not (Path(root) / "src" / "hrmtext").is_dir():
            return None
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()
