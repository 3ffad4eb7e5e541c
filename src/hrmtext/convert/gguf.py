"""Writing GGUF files for llama.cpp, tensor by tensor, checked by running what was written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hrmtext.artifacts.gguf_file import (
    ARCHITECTURE,
    TYPES,
    outside_shapes,
    shape_values,
)
from hrmtext.artifacts.names import outside_names, tensor_names
from hrmtext.config.base import nearest
from hrmtext.config.model import ModelConfig
from hrmtext.convert.gguf_types import FILE_TYPES, encode, kind_of
from hrmtext.convert.gguf_verify import GgufComparison, TensorSource, compare_with_llama_cpp
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import BackendError, ConfigError, DataError, StorageError
from hrmtext.generate.gguf_tokenizer import tokenizer_values
from hrmtext.generate.runner import TextModel
from hrmtext.runtime.io import atomic_file

QUANTIZATION_VERSION = 2
"""Of ggml's block layouts."""


@dataclasses.dataclass
class LoadedSource:
    """A model in memory as a source."""

    model: TextModel

    @property
    def config(self) -> ModelConfig:
        """Shape of the model."""
        return self.model.config

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor by `HrmLM`'s name."""
        return self.model.model.state_dict()[name].detach().cpu()


@dataclasses.dataclass(frozen=True)
class GgufReport:
    """What was written, and how llama.cpp's logits compare with ours."""

    path: Path
    file_type: str
    kinds: dict[str, int]
    """Number formats -> tensors of each."""
    size_bytes: int
    comparison: GgufComparison | None
    """None where `verify` was false."""


def write_gguf(
    source: TensorSource | TextModel,
    path: str | Path,
    *,
    file_type: str = "bf16",
    tokenizer: PromptTokenizer | None = None,
    verify: bool = True,
    replace: bool = False,
    name: str = "HRM-Text",
    progress: Callable[[int, int], None] | None = None,
) -> GgufReport:
    """Write a model as one GGUF file; it gets its name only once it is whole and checked.

    Memory: about one tensor while writing; the check holds our model in fp32, then llama.cpp's.

    Args:
        file_type: key of `FILE_TYPES`.
        tokenizer: the model's; a loaded model brings its own.
        verify: run the file in llama.cpp and compare logits, see `compare_with_llama_cpp`.
        replace: allow `path` to exist.
        name: `general.name` of the header.
        progress: called after every tensor with the tensors done and in all.

    Raises:
        ConfigError: an unknown file type. DataError: no tokenizer, or one that llama.cpp cannot
            have. BackendError: a package of the extra `gguf` is missing.
        CheckpointError: llama.cpp computes something else; nothing is left behind.
        StorageError: `path` exists, or the disk is full.
    """
    if file_type not in FILE_TYPES:
        raise ConfigError(f"unknown file type {file_type!r}{nearest(file_type, list(FILE_TYPES))}")
    if isinstance(source, TextModel):
        tokenizer = tokenizer or source.tokenizer
        source = LoadedSource(source)
    if tokenizer is None:
        raise DataError("a GGUF file needs a tokenizer, and this model has none beside it")
    path = Path(path)
    if path.exists() and not replace:
        raise StorageError(f"{path} exists already; name another file or remove it first")
    config = source.config
    config.require_hrm("a GGUF file")
    values = {
        "general.name": name,
        "general.file_type": FILE_TYPES[file_type].number,
        "general.quantization_version": QUANTIZATION_VERSION,
        **{f"{ARCHITECTURE}.{key}": value for key, value in shape_values(config).items()},
        **tokenizer_values(tokenizer, config.vocab_size),
    }
    shapes = outside_shapes(config)
    num_blocks = 2 * config.num_layers_per_stack
    kinds = {key: kind_of(key, shape, file_type, num_blocks) for key, shape in shapes.items()}
    with atomic_file(path) as temporary:
        _write(temporary, values, shapes, kinds, _parts(source), progress)
        comparison = None
        if verify:
            comparison = compare_with_llama_cpp(source, tokenizer, temporary, file_type)
    counts = {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))}
    return GgufReport(path, file_type, counts, path.stat().st_size, comparison)


def _parts(source: TensorSource) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its GGUF name, each of ours read once."""
    layers = source.config.num_layers_per_stack
    for ours in tensor_names(source.config):
        names = outside_names(ours, "gguf", layers)
        yield from zip(names, source.tensor(ours).chunk(len(names)), strict=True)


def _write(
    path: Path,
    values: dict[str, Any],
    shapes: dict[str, tuple[int, ...]],
    kinds: dict[str, str],
    parts: Iterator[tuple[str, torch.Tensor]],
    progress: Callable[[int, int], None] | None,
) -> None:
    try:
        from gguf import GGMLQuantizationType, GGUFWriter
    except ImportError as error:
        raise BackendError(
            "writing GGUF needs the package gguf; install it with `pip install 'hrm-text[gguf]'`"
        ) from error
    writer = GGUFWriter(path, ARCHITECTURE)
    try:
        for key, value in values.items():
            _add(writer, key, value)
        for key, shape in shapes.items():
            kind = TYPES[kinds[key]]
            size = math.prod(shape) // kind.block_values * kind.block_bytes
            number = GGMLQuantizationType(kind.number)
            # The dtype is that of the logical values; the number format says how they are stored.
            writer.add_tensor_info(key, shape, np.dtype(np.float32), size, number)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for done, (key, tensor) in enumerate(parts):
            assert tuple(tensor.shape) == shapes[key], f"{key}: {tuple(tensor.shape)}"
            writer.write_tensor_data(encode(tensor, kinds[key]))
            if progress is not None:
                progress(done + 1, len(shapes))
    finally:
        writer.close()


def _add(writer: Any, key: str, value: Any) -> None:
    """Counts and ids are uint32, as llama.cpp's loader wants them."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)
