"""Where the numbers of a run go beside metrics.jsonl: TensorBoard, wandb, trackio."""

from __future__ import annotations

import importlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hrmtext.artifacts.layout import RunFolder
from hrmtext.config.base import to_mapping
from hrmtext.config.train import TrainConfig
from hrmtext.errors import ConfigError
from hrmtext.runtime.io import write_json

PROJECT = "hrm-text"
IDENTITY_FILE = "trackers.json"


class Tracker(Protocol):
    """Takes scalars by name; all of a run come from rank 0, in the order of the steps."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Scalars after `step` optimizer steps."""
        ...

    def flush(self) -> None:
        """Hand over what is buffered, before a checkpoint counts on it."""
        ...

    def close(self) -> None:
        """End the session; the run may go on later in another process."""
        ...


def open_trackers(run: RunFolder, config: TrainConfig, *, resumed_step: int) -> list[Tracker]:
    """TensorBoard and those of `config.trackers`, ready to go on after `resumed_step`.

    Raises:
        ConfigError: the package of a tracker is not installed.
    """
    openers = {"wandb": Wandb, "trackio": Trackio}
    opened: list[Tracker] = [openers[name](run, config, resumed_step) for name in config.trackers]
    return [TensorBoard(run, resumed_step), *opened] if config.tensorboard else opened


class TensorBoard:
    """Event files in the run folder; what is later than the resumed step is hidden by a purge."""

    def __init__(self, run: RunFolder, resumed_step: int) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        purge = resumed_step + 1 if resumed_step else None
        self._writer = SummaryWriter(str(run.tensorboard_folder), purge_step=purge)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One scalar event a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write the events to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()


class Wandb:
    """Weights & Biases; WANDB_MODE=offline keeps everything in the run folder.

    Values carry their own `step`, so that lines after a resumed checkpoint may come twice: wandb's
    own counter refuses to go back.
    """

    def __init__(self, run: RunFolder, config: TrainConfig, resumed_step: int) -> None:
        wandb = _import("wandb")
        self._run = wandb.init(
            project=PROJECT,
            name=run.path.resolve().name,
            dir=str(run.path),
            id=_identity(run),
            resume="allow",
            config=to_mapping(config),
        )
        self._run.define_metric("*", step_metric="step")

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self._run.log({**values, "step": step})

    def flush(self) -> None:
        """Nothing to do: a process of wandb's own writes what it is given."""

    def close(self) -> None:
        """Wait until that process has written everything."""
        self._run.finish()


class Trackio:
    """Hugging Face trackio, which keeps its data on this machine; see its TRACKIO_DIR."""

    def __init__(self, run: RunFolder, config: TrainConfig, resumed_step: int) -> None:
        self._trackio = _import("trackio")
        self._trackio.init(
            project=PROJECT,
            name=f"{run.path.resolve().name}-{_identity(run)}",
            config=to_mapping(config),
            resume="allow",
        )

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One row."""
        self._trackio.log(dict(values), step=step)

    def flush(self) -> None:
        """Nothing to do: a thread of trackio's own writes what it is given."""

    def close(self) -> None:
        """Wait until that thread has written everything."""
        self._trackio.finish()


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a record by name: `train/loss`, `validation/ema/loss_by_cycle_1`."""
    return dict(_flatten(record, str(record["kind"])))


def _flatten(record: Mapping[str, Any], prefix: str) -> Sequence[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if key in ("kind", "step"):
            continue
        name = f"{prefix}/{key}"
        if isinstance(value, dict):
            found += _flatten(value, name)
        elif isinstance(value, list):
            found += [(f"{name}_{index + 1}", float(item)) for index, item in enumerate(value)]
        elif isinstance(value, int | float):
            found.append((name, float(value)))
    return found


def _import(package: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ConfigError(
            f"trackers holds {package!r}, but the package is not installed; install it with "
            f"`pip install 'hrm-text[track]'`, or take it out of trackers"
        ) from None


def _identity(run: RunFolder) -> str:
    """Eight hex digits, drawn once and kept in the run folder, by which a tracker knows the run."""
    path = run.path / IDENTITY_FILE
    if not path.is_file():
        write_json(path, {"id": uuid.uuid4().hex[:8]})
    return str(json.loads(path.read_text(encoding="utf-8"))["id"])
