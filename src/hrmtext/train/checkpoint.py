"""Checkpoints of a run: written whole or not at all, resumed exactly or refused with the reason."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as torch_dist

from hrmtext.artifacts.adapters import BaseReference, read_adapters, read_base, save_adapters
from hrmtext.artifacts.layout import VALIDATION_LOSS, RunFolder
from hrmtext.artifacts.safetensors_file import (
    Entry,
    SafetensorsFile,
    file_order,
    write_safetensors,
)
from hrmtext.artifacts.weights import (
    EMA_FILE,
    WEIGHTS_FILE,
    save_model,
    write_description,
    write_tensors,
)
from hrmtext.config.base import to_mapping
from hrmtext.config.train import TrainConfig, run_differences
from hrmtext.errors import CheckpointError
from hrmtext.runtime import dist
from hrmtext.runtime.io import atomic_folder, is_complete, require_complete, write_json
from hrmtext.runtime.log import logger
from hrmtext.train.lora import from_file, read_off
from hrmtext.train.moments import (
    OPTIMIZER_FILE,
    OPTIMIZER_FOLDER,
    StoredParts,
    open_moments,
    write_sharded,
)
from hrmtext.train.parallel import Shards, wait_for_all
from hrmtext.train.state import TrainState
from hrmtext.train.writer import Writer

FORMAT_VERSION = 1
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint will hold: this rank's chunks, as they were at one step."""

    step: int
    record: dict[str, Any]
    """training.json."""
    marker: dict[str, Any]
    weights: dict[str, torch.Tensor]
    """Parameters and buffers by name, as `averages`."""
    averages: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    """As `AdamAtan2.export_state` gives them."""
    base: BaseReference | None
    """What the adapters sit on; None: all weights are trained, and stored."""


def snapshot(
    state: TrainState,
    identity: RunIdentity,
    validation_loss: float | None = None,
    *,
    copy: bool = False,
) -> Snapshot:
    """The state of this moment.

    Args:
        validation_loss: EMA loss of a validation at this step; None: there was none.
        copy: copy it to the host's memory, so that training may go on while it is written.
    """
    marker: dict[str, Any] = {"format_version": FORMAT_VERSION, "step": state.step}
    if validation_loss is not None and math.isfinite(validation_loss):
        marker[VALIDATION_LOSS] = validation_loss
    weights = {**state.shards.buffers, **state.names()}
    groups = (weights, state.average(), state.optimizer.export_state(state.names()))
    taken = [
        {
            name: _on_host(tensor, copy) if copy else tensor.detach()
            for name, tensor in group.items()
        }
        for group in groups
    ]
    if copy and any(tensor.is_cuda for tensor in weights.values()):
        torch.cuda.synchronize()
    return Snapshot(
        step=state.step,
        record=_training_record(state, identity),
        marker=marker,
        weights=taken[0],
        averages=taken[1],
        moments=taken[2],
        base=state.base,
    )


def _on_host(tensor: torch.Tensor, copy: bool) -> torch.Tensor:
    """On the CPU, without waiting for the device; `copy`: never the tensor itself."""
    tensor = tensor.detach()
    if not tensor.is_cuda:
        return tensor.clone() if copy else tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=copy)
    return host.copy_(tensor, non_blocking=copy)


class CheckpointWriter:
    """Writes the checkpoints of a run; every rank has one and calls every method."""

    def __init__(
        self,
        run: RunFolder,
        shards: Shards,
        identity: RunIdentity,
        tokenizer_folder: Path | None,
        *,
        in_background: bool,
    ) -> None:
        """`in_background`: copy the state and write it while training goes on."""
        self.writer = Writer(in_background)
        self.run, self.shards, self.identity = run, shards, identity
        self.tokenizer_folder = tokenizer_folder
        # Communication of its own, so that a background thread does not meet the loop's.
        self._group: Any = None
        if shards.num_shards > 1:
            self._group = torch_dist.new_group(range(shards.num_shards), backend="gloo")

    def save(self, state: TrainState, validation_loss: float | None) -> None:
        """Write the state of this moment, or begin to; `write` says more."""
        copy = self.writer.in_background
        self.writer.wait()  # for the one before, whose copy then makes room
        taken = snapshot(state, self.identity, validation_loss, copy=copy)
        self.writer.submit(lambda: self.write(taken))
        if not copy:
            wait_for_all()

    def finish(self) -> None:
        """Return when the last checkpoint is complete, on every rank; raises what went wrong."""
        self.writer.wait()
        wait_for_all()

    def write(self, taken: Snapshot) -> Path:
        """Write the checkpoint, then apply the retention rule; returns its folder.

        A checkpoint of that step that is complete stays as it is; an incomplete one is replaced.

        Raises:
            StorageError: the disk is full; earlier checkpoints are untouched.
        """
        path = self.run.checkpoint_path(taken.step)
        if self.shards.num_shards > 1:
            self._write_sharded(path, taken)
        elif dist.rank() == 0 and not is_complete(path):
            with atomic_folder(path, replace=True, **taken.marker) as folder:
                self._write_weights(folder, taken)
                write_tensors(folder / OPTIMIZER_FILE, taken.moments)
                write_json(folder / TRAINING_FILE, taken.record)
        if dist.rank() == 0:
            config = self.identity.config
            self.run.prune(
                keep_last=config.keep_last, keep_every=config.keep_every, keep_best=config.keep_best
            )
        return path

    def _write_weights(self, folder: Path, taken: Snapshot) -> None:
        """The model, or, where only adapters are trained, those and a reference to their base."""
        config = self.identity.config
        model, lora = config.model.resolve(), config.lora
        if taken.base is None or lora is None:
            tokenizer = self.tokenizer_folder
            save_model(folder, model, taken.weights, ema=taken.averages, tokenizer_folder=tokenizer)
            return
        write_description(folder, model, self.tokenizer_folder)
        raw, ema = read_off(taken.weights), read_off(taken.averages)
        save_adapters(folder, lora, taken.base, raw=raw, ema=ema)

    def _write_sharded(self, path: Path, taken: Snapshot) -> None:
        """The ranks of the first copy write: each its moments, the first the gathered weights."""
        if dist.rank() >= self.shards.num_shards:
            return
        is_first = dist.rank() == 0
        with contextlib.ExitStack() as stack:
            folder = None
            if is_first and not is_complete(path):
                opened = atomic_folder(path, replace=True, **taken.marker)
                folder = stack.enter_context(opened)
            shared = [folder]
            torch_dist.broadcast_object_list(shared, src=0, group=self._group)
            folder = shared[0]
            if folder is None:
                return
            moments = {name: _on_host(tensor, False) for name, tensor in taken.moments.items()}
            write_sharded(folder / OPTIMIZER_FOLDER, moments, self.shards, self._group)
            for file, tensors in ((WEIGHTS_FILE, taken.weights), (EMA_FILE, taken.averages)):
                self._write_gathered(folder / file, tensors)
            if is_first:
                config = self.identity.config.model.resolve()
                write_description(folder, config, self.tokenizer_folder)
                write_json(folder / TRAINING_FILE, taken.record)

    def _write_gathered(self, file: Path, tensors: dict[str, torch.Tensor]) -> None:
        """One whole tensor at a time exists on the first rank."""
        entries = {
            name: Entry(tensor.dtype, tuple(self.shards.shapes.get(name, tensor.shape)))
            for name, tensor in tensors.items()
        }

        def whole(name: str) -> torch.Tensor | None:
            return self.shards.gather(name, _on_host(tensors[name], False), self._group)

        if dist.rank() == 0:
            write_safetensors(file, entries, lambda name: cast(torch.Tensor, whole(name)))
        else:
            for name in file_order(entries):
                whole(name)


def load_checkpoint(path: Path, state: TrainState, identity: RunIdentity) -> None:
    """Bring `state` to the checkpoint at `path`, whatever number of ranks wrote it.

    Raises:
        CheckpointError: incomplete, damaged, of another format, or of another run: the message
            names every difference that would change the run.
    """
    require_complete(path)
    record = read_training_record(path)
    _refuse_other_run(path, record, identity)
    averages = _load_weights(path, state)
    state.optimizer.import_state(state.names(), open_moments(path, state.shards), averages)
    for name in ("step", "tokens", "supervised_tokens", "elapsed_s", "cursor", "interval"):
        setattr(state, name, record[name])
    state.stability = record.get("stability", {})  # absent in checkpoints of before the guard


def _load_weights(path: Path, state: TrainState) -> Mapping[str, torch.Tensor]:
    """Bring the model to the raw weights of a checkpoint; returns the averages by name."""
    if state.base is None:
        weights = _whole_tensors(path / WEIGHTS_FILE, state)
        for name in weights.entries:
            state.shards.assign(name, weights.read(name))
        return StoredParts(_whole_tensors(path / EMA_FILE, state), state.shards)
    reference, _ = read_base(path)
    if reference.fingerprint != state.base.fingerprint:
        raise CheckpointError(
            f"{path} holds adapters for other weights than init_from gives now (fingerprint "
            f"{state.base.fingerprint}, expected {reference.fingerprint}); bring them back to "
            f"{reference.path}"
        )
    names = state.names()
    raw = from_file(read_adapters(path, "raw"), names, f"{path} (raw)")
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(raw[name])
    return from_file(read_adapters(path, "ema"), names, f"{path} (EMA)")


def _whole_tensors(path: Path, state: TrainState) -> SafetensorsFile:
    file = SafetensorsFile(path)
    shapes = {name: tuple(buffer.shape) for name, buffer in state.shards.buffers.items()}
    shapes |= {name: tuple(shape) for name, shape in state.shards.shapes.items()}
    found = {name: entry.shape for name, entry in file.entries.items()}
    if found != shapes:
        wrong = sorted(name for name in {*found, *shapes} if found.get(name) != shapes.get(name))
        raise CheckpointError(
            f"{path} does not fit the model's shape: {wrong[0]} is "
            f"{found.get(wrong[0], 'absent')}, expected {shapes.get(wrong[0], 'no such tensor')}"
        )
    return file


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
        "ranks": dist.world_size(),
        "shards": state.shards.num_shards,
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
    ranks = record.get("ranks", dist.world_size())
    if ranks != dist.world_size():
        logger.warning(
            "the checkpoint was written by %d ranks, now there are %d: the batches stay the same, "
            "but gradients are summed in another order, so rounding may differ in the last bits",
            ranks, dist.world_size(),
        )  # fmt: skip
    if record["torch"] != torch.__version__ or record["threads"] != torch.get_num_threads():
        logger.warning(
            "the checkpoint was written with torch %s and %d threads, this is torch %s and %d: "
            "the run goes on, but rounding may differ in the last bits",
            record["torch"], record["threads"], torch.__version__, torch.get_num_threads(),
        )  # fmt: skip
