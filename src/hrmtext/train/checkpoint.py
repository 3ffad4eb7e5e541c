"""Checkpoints of a run: written whole or not at all, resumed exactly or refused with the reason."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.layout import VALIDATION_LOSS, RunFolder
from hrmtext.artifacts.weights import load_state, read_tensors, save_model, write_tensors
from hrmtext.config.base import to_mapping
from hrmtext.config.train import TrainConfig, run_differences
from hrmtext.errors import CheckpointError
from hrmtext.runtime.io import atomic_folder, is_complete, require_complete, write_json
from hrmtext.runtime.log import logger
from hrmtext.train.state import TrainState

FORMAT_VERSION = 1
OPTIMIZER_FILE = "optimizer.safetensors"
TRAINING_FILE = "training.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What must be equal for a checkpoint to be the same run's."""

    config: TrainConfig
    data_fingerprint: str
    precision: str
    """Number format of forward and backward, resolved: fp32 or bf16."""
    total_steps: int
    """Planned steps; the schedules depend on them."""


def save_checkpoint(
    run: RunFolder,
    state: TrainState,
    identity: RunIdentity,
    tokenizer_folder: Path | None,
    validation_loss: float | None = None,
) -> Path:
    """Write the checkpoint of `state.step`, then apply the retention rule; returns its folder.

    A checkpoint of that step that is complete stays as it is; an incomplete one is replaced.

    Args:
        validation_loss: EMA loss of a validation at this step; None: there was none.

    Raises:
        StorageError: the disk is full; earlier checkpoints are untouched.
    """
    path = run.checkpoint_path(state.step)
    if path.exists() and is_complete(path):
        return path
    marker: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": state.step}
    if validation_loss is not None and math.isfinite(validation_loss):
        marker[VALIDATION_LOSS] = validation_loss
    with atomic_folder(path, replace=True, **marker) as folder:
        save_model(
            folder,
            identity.config.model.resolve(),
            state.model.state_dict(),
            ema=state.average(),
            tokenizer_folder=tokenizer_folder,
        )
        write_tensors(folder / OPTIMIZER_FILE, state.optimizer.export_state(state.names()))
        write_json(folder / TRAINING_FILE, _training_record(state, identity))
    config = identity.config
    run.prune(keep_last=config.keep_last, keep_every=config.keep_every, keep_best=config.keep_best)
    return path


def load_checkpoint(path: Path, state: TrainState, identity: RunIdentity) -> None:
    """Bring `state` to the checkpoint at `path`.

    Raises:
        CheckpointError: incomplete, damaged, of another format, or of another run: the message
            names every difference that would change the run.
    """
    require_complete(path)
    record = read_training_record(path)
    _refuse_other_run(path, record, identity)
    state.model.load_state_dict(load_state(path, "raw"))
    state.optimizer.import_state(
        state.names(), read_tensors(path / OPTIMIZER_FILE), load_state(path, "ema")
    )
    for name in ("step", "tokens", "supervised_tokens", "elapsed_s", "cursor", "interval"):
        setattr(state, name, record[name])
    state.stability = record.get("stability", {})  # absent in checkpoints of before the guard


def read_training_record(path: Path) -> dict[str, Any]:
    """training.json of a checkpoint: counters, cursor, config, what it was run with."""
    file = path / TRAINING_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no {TRAINING_FILE}: it holds a model, but training can't resume from it"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from None
    if record.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{file} has format version {record.get('format_version')!r}, this program reads "
            f"version {FORMAT_VERSION}; use the hrm-text that wrote it"
        )
    return record


def _training_record(state: TrainState, identity: RunIdentity) -> dict[str, Any]:
    return {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "total_steps": identity.total_steps,
        "tokens": state.tokens,
        "supervised_tokens": state.supervised_tokens,
        "elapsed_s": state.elapsed_s,
        "cursor": state.cursor,
        "interval": state.interval,
        "stability": state.stability,
        "precision": identity.precision,
        "data_fingerprint": identity.data_fingerprint,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "config": to_mapping(identity.config),
    }


def _refuse_other_run(path: Path, record: dict[str, Any], identity: RunIdentity) -> None:
    differences = run_differences(record["config"], identity.config)
    for key in ("data_fingerprint", "precision", "total_steps"):
        saved, now = record[key], getattr(identity, key)
        if saved != now:
            differences.append(f"{key}: {saved} in the checkpoint, {now} now")
    if differences:
        lines = "\n".join(f"  {line}" for line in differences)
        raise CheckpointError(
            f"{path} belongs to another run; resuming would change it silently:\n{lines}\n"
            "Give the same config and data, or start a new run in another folder"
        )
    if record["torch"] != torch.__version__ or record["threads"] != torch.get_num_threads():
        logger.warning(
            "the checkpoint was written with torch %s and %d threads, this is torch %s and %d: "
            "the run goes on, but rounding may differ in the last bits",
            record["torch"], record["threads"], torch.__version__, torch.get_num_threads(),
        )  # fmt: skip
