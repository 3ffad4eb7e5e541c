"""The forms that a conversion writes, tensor by tensor: native, Hugging Face, public training code.

Nothing here is atomic: every function writes into a folder that its caller makes whole or removes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from hrmtext.artifacts import hf_folder, upstream, weights
from hrmtext.artifacts.dcp import DcpWriter
from hrmtext.artifacts.names import outside_names, place_of
from hrmtext.artifacts.safetensors_file import Entry, file_order, plan_shards, write_safetensors
from hrmtext.config.model import ModelConfig
from hrmtext.convert.source import Source
from hrmtext.data.tokenizer import (
    BEGIN,
    CONDITIONS,
    END,
    PROMPT_END,
    export_tokenizer,
)
from hrmtext.errors import CheckpointError
from hrmtext.runtime.io import explain_storage_errors, write_json, write_text

GENERATION_CONFIG_FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 256
"""Written to generation_config.json: transformers would otherwise cut answers at 20 tokens."""

Progress = Callable[[str, int, int], None]


class CastReader:
    """Tensors of a source in the number format to write, one at a time, each counted."""

    def __init__(
        self, source: Source, dtype: torch.dtype | None, progress: Progress | None = None
    ) -> None:
        self.source, self.dtype, self.progress = source, dtype, progress
        self.done = 0
        self.total = len(source.names())

    def entry(self, name: str) -> Entry:
        """Dtype and shape to write."""
        entry = self.source.entry(name)
        return entry if self.dtype is None else Entry(self.dtype, entry.shape)

    def nbytes(self) -> int:
        """Bytes of all tensors to write."""
        return sum(self.entry(name).nbytes for name in self.source.names())

    def tensor(self, name: str) -> torch.Tensor:
        """The values to write.

        Raises:
            CheckpointError: a value that the number format to write cannot hold.
        """
        tensor = self.source.tensor(name)
        cast = tensor.to(self.entry(name).dtype)
        if cast.dtype != tensor.dtype and bool((cast.isinf() & tensor.isfinite()).any()):
            raise CheckpointError(
                f"{name} holds values up to {float(tensor.abs().max()):.3g}, which {cast.dtype} "
                "cannot hold; write bf16 or fp32"
            )
        return cast

    def count(self) -> None:
        """Tell the progress that one tensor more is written."""
        self.done += 1
        if self.progress is not None:
            self.progress("writing", self.done, self.total)


def write_native(reader: CastReader, folder: Path) -> None:
    """model.yaml, model.safetensors and, where there is a tokenizer, its files."""
    source = reader.source
    write_text(folder / weights.CONFIG_FILE, weights.config_text(source.config.canonical()))
    entries = {name: reader.entry(name) for name in source.names()}
    write_safetensors(folder / weights.WEIGHTS_FILE, entries, _counted(reader))
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        tokenizer.save(folder)


def write_hf(
    reader: CastReader,
    folder: Path,
    layout: str,
    *,
    max_shard_bytes: int | None = None,
    L_bp_cycles: Sequence[int] | None = None,
) -> None:
    """config.json, weights (one file, or shards and their index), tokenizer with the mask.

    Raises:
        ConfigError: a shape that transformers cannot express.
    """
    source = reader.source
    dtype = str(reader.entry("lm_head.weight").dtype).removeprefix("torch.")
    routing = source.gradient_routing if L_bp_cycles is None else L_bp_cycles
    values = hf_folder.to_hf_config(source.config, dtype=dtype, L_bp_cycles=routing)
    ids = source.special_ids()
    write_json(folder / hf_folder.CONFIG_FILE, values | ids)
    generation = {**ids, "do_sample": False, "max_new_tokens": DEFAULT_NEW_TOKENS}
    write_json(folder / GENERATION_CONFIG_FILE, generation)
    _write_hf_weights(reader, folder, "fused" if layout == "fused" else "split", max_shard_bytes)
    tokenizer = source.tokenizer()
    if tokenizer is not None:
        export_tokenizer(tokenizer, folder, source.config.max_seq_len)


def write_upstream(reader: CastReader, folder: Path, tokenizer_path: str) -> list[str]:
    """all_config.yaml, train_metadata.yaml, fsdp2_epoch_1, carry_epoch_1.0.pt; returns notes.

    The optimizer's state is there, as the public code's loader asks for it: the same weights as
    `param_ema`, moments of zero. Equal values are stored once and named often, so the folder is
    little larger than the weights.

    Args:
        tokenizer_path: where the public code shall look for the tokenizer.

    Raises:
        ConfigError: a shape that the public code cannot express.
    """
    source, notes = reader.source, []
    bp_steps, exact = upstream.bp_steps_of(source.config, source.gradient_routing)
    if not exact:
        notes.append(
            f"L_bp_cycles {source.gradient_routing} cannot be said by bp_max_steps, which counts "
            f"the last L calls over all cycles: wrote {bp_steps}; inference does not depend on it"
        )
    tokenizer = source.tokenizer()
    info: dict[str, Any] = {
        "tokenizer_path": tokenizer_path,
        "boq": BEGIN,
        "eoq": PROMPT_END,
        "eoa": END,
        "condition_mapping": dict(CONDITIONS),
    }
    values, metadata = upstream.to_upstream(source.config, bp_steps, info)
    write_text(folder / upstream.CONFIG_FILE, yaml.safe_dump(values, sort_keys=False))
    write_text(folder / upstream.METADATA_FILE, yaml.safe_dump(metadata, sort_keys=False))
    if tokenizer is not None:
        tokenizer.save(folder)
    epoch = folder / "fsdp2_epoch_1"
    with explain_storage_errors(folder):
        epoch.mkdir()
        with (folder / "carry_epoch_1.0.pt").open("wb") as stream:
            torch.save(None, stream)
    writer = DcpWriter(epoch)
    try:
        _write_upstream_state(reader, writer, values)
    except BaseException:
        writer.abort()
        raise
    writer.close()
    return notes


def _write_upstream_state(reader: CastReader, writer: DcpWriter, values: dict[str, Any]) -> None:
    config = reader.source.config
    trained = upstream.parameter_order(config)
    zeros: dict[Entry, list[tuple[str | int, ...]]] = {}
    for name in reader.source.names():
        (outside,) = outside_names(name, "upstream")
        paths: list[tuple[str | int, ...]] = [("model", outside)]
        if outside in trained:
            state: tuple[str | int, ...] = ("optim", "state", outside)
            paths.append((*state, upstream.EMA))
            moments = zeros.setdefault(reader.entry(name), [])
            moments += [(*state, "exp_avg"), (*state, "exp_avg_sq")]
        writer.add(paths, reader.tensor(name))
        reader.count()
    for entry, paths in zeros.items():
        writer.add(paths, torch.zeros(entry.shape, dtype=entry.dtype))
    writer.add([("optim", "state", name, "step") for name in trained], torch.tensor(0.0))
    group: tuple[str | int, ...] = ("optim", "param_groups", 0)
    writer.add([(*group, "lr")], torch.tensor(0.0))
    for key, value in (
        ("betas", (values["beta1"], values["beta2"])),
        ("weight_decay", values["weight_decay"]),
        ("ema", values["ema"]),
        ("params", trained),
    ):
        writer.add_value((*group, key), value)


def _write_hf_weights(
    reader: CastReader, folder: Path, form: str, max_shard_bytes: int | None
) -> None:
    entries = {}
    for name in reader.source.names():
        entry = reader.entry(name)
        parts = outside_names(name, form)
        shape = (entry.shape[0] // len(parts), *entry.shape[1:])
        entries.update({part: Entry(entry.dtype, shape) for part in parts})
    # transformers refuses a file that does not say which framework's tensors it holds.
    metadata = {"format": "pt"}
    read = _split_reader(reader, form)
    total = sum(entry.nbytes for entry in entries.values())
    if max_shard_bytes is None or total <= max_shard_bytes:
        write_safetensors(folder / hf_folder.WEIGHTS_FILE, entries, read, metadata)
        return
    shards = plan_shards(entries, file_order(entries), max_shard_bytes)
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, {n: entries[n] for n in names}, read, metadata)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_json(folder / hf_folder.INDEX_FILE, index)


def _counted(reader: CastReader) -> Callable[[str], torch.Tensor]:
    def read(name: str) -> torch.Tensor:
        reader.count()
        return reader.tensor(name)

    return read


def _split_reader(reader: CastReader, form: str) -> Callable[[str], torch.Tensor]:
    """Reads a fused matrix when one of its parts is asked for; files hold parts nearly together."""
    held: dict[str, torch.Tensor] = {}

    def read(outside: str) -> torch.Tensor:
        place = place_of(outside, form)
        assert place is not None, outside
        if place.name not in held:
            while len(held) > 1:
                held.pop(next(iter(held)))
            held[place.name] = reader.tensor(place.name)
        if place.index == place.num_parts - 1:
            reader.count()
        whole = held[place.name]
        return whole if place.num_parts == 1 else whole.chunk(place.num_parts)[place.index]

    return read


def check_expressible(config: ModelConfig, to: str) -> None:
    """ConfigError where form `to` cannot say this model's shape; before anything is written."""
    if to in ("hf", "hf-split"):
        hf_folder.to_hf_config(config)
    elif to == "upstream":
        upstream.to_upstream(config, 2, {})
