"""GGUF files of llama.cpp: header, tensors by our names, the shape that the header states.

Only what HRM-Text needs: little-endian files of version 2 or 3, one file a model. Tensors are read
one at a time from a memory map; quantised ones come back as fp32.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from hrmtext.artifacts.names import outside_names, tensor_names, tensor_shapes
from hrmtext.artifacts.safetensors_file import Entry
from hrmtext.artifacts.stored import StoredModel
from hrmtext.config.base import build
from hrmtext.config.model import ModelConfig
from hrmtext.errors import BackendError, CheckpointError, ConfigError

ARCHITECTURE = "hrm_text"
MAGIC = b"GGUF"
ALIGNMENT = 32
"""Bytes; `general.alignment` may state another."""


@dataclasses.dataclass(frozen=True)
class TensorType:
    """One of ggml's number formats."""

    number: int
    """Its id in a file."""
    block_values: int
    """Values that are stored together; a row is a whole number of blocks."""
    block_bytes: int


TYPES: dict[str, TensorType] = {
    "f32": TensorType(0, 1, 4),
    "f16": TensorType(1, 1, 2),
    "bf16": TensorType(30, 1, 2),
    "q4_0": TensorType(2, 32, 18),
    "q4_1": TensorType(3, 32, 20),
    "q5_0": TensorType(6, 32, 22),
    "q5_1": TensorType(7, 32, 24),
    "q8_0": TensorType(8, 32, 34),
    "q2_k": TensorType(10, 256, 84),
    "q3_k": TensorType(11, 256, 110),
    "q4_k": TensorType(12, 256, 144),
    "q5_k": TensorType(13, 256, 176),
    "q6_k": TensorType(14, 256, 210),
    "iq4_nl": TensorType(20, 32, 18),
}
"""Number formats that can be read, by name."""
PLAIN = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
"""Those that torch has too; they are read without loss."""

_NAME_OF = {kind.number: name for name, kind in TYPES.items()}

# Value types of the header: struct code of each number; 8 is text, 9 is an array.
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_TEXT, _ARRAY = 8, 9
DEQUANTISED_AT_ONCE = 1 << 22
"""Values."""
_LONGEST = 1 << 31
"""Bytes of a text or entries of an array above which a header is taken for damaged."""


@dataclasses.dataclass(frozen=True)
class TensorPlace:
    """How and where a tensor lies in a file."""

    shape: tuple[int, ...]
    """As torch orders it: rows first."""
    kind: str
    """Key of `TYPES`."""
    offset: int
    """From the start of the file, in bytes."""
    num_bytes: int


class GgufFile:
    """An opened GGUF file: `values` of its header, `entries` of its tensors, read one by one."""

    def __init__(self, path: str | Path) -> None:
        """Read the header.

        Raises:
            CheckpointError: no such file, no GGUF, another byte order or version, a number format
                that we cannot read, or a file that ends too early.
        """
        self.path = Path(path)
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as stream:
                self.values, self.places = _read_header(stream, self.path)
        except FileNotFoundError:
            raise CheckpointError(f"no such file: {path}") from None
        except (struct.error, EOFError, UnicodeDecodeError, OverflowError, MemoryError) as error:
            raise CheckpointError(
                f"{path} is damaged or cut short: its header cannot be read ({error})"
            ) from None
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from None
        for name, place in self.places.items():
            if place.offset + place.num_bytes > size:
                raise CheckpointError(
                    f"{path} is cut short: {name} ends at byte {place.offset + place.num_bytes:,}, "
                    f"the file has {size:,}; copy it again"
                )
        self.entries = {
            name: Entry(PLAIN.get(place.kind, torch.float32), place.shape)
            for name, place in self.places.items()
        }

    @property
    def kinds(self) -> dict[str, int]:
        """Number formats in the file -> tensors of each."""
        found: dict[str, int] = {}
        for place in self.places.values():
            found[place.kind] = found.get(place.kind, 0) + 1
        return found

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """A tensor by its GGUF name: as stored where torch has the format, else as fp32.

        Args:
            out: contiguous CPU memory of the right shape and dtype to read into.

        Raises:
            BackendError: it is quantised and the package gguf is missing.
        """
        place, dtype = self.places[name], self.entries[name].dtype
        tensor = torch.empty(place.shape, dtype=dtype) if out is None else out
        raw = np.memmap(
            self.path, dtype=np.uint8, mode="r", offset=place.offset, shape=(place.num_bytes,)
        )
        if place.kind not in PLAIN:
            _dequantise(raw, place, tensor.view(-1).numpy())
        elif PLAIN[place.kind] == dtype:
            tensor.view(-1).view(torch.uint8).numpy()[:] = raw
        else:
            stored = torch.from_numpy(np.array(raw)).view(PLAIN[place.kind])
            tensor.view(-1).copy_(stored)
        return tensor

    def widen(self, names: Sequence[str]) -> None:
        """Read these as fp32 from now on, where their number formats differ from each other."""
        if len({self.entries[name].dtype for name in names}) > 1:
            for name in names:
                self.entries[name] = Entry(torch.float32, self.entries[name].shape)


def open_gguf(path: str | Path) -> StoredModel:
    """Open a GGUF file as a model; no tensor is read yet.

    Raises:
        CheckpointError: as `GgufFile`; another architecture; a tensor missing, unexpected or of
            another shape than the header's numbers give.
    """
    file = GgufFile(path)
    config = config_of(file)
    expected = outside_shapes(config)
    problems = [f"missing {name}" for name in expected if name not in file.entries]
    problems += [f"unexpected {name}" for name in file.entries if name not in expected]
    problems += [
        f"{name} has shape {file.entries[name].shape}, the header says {shape}"
        for name, shape in expected.items()
        if name in file.entries and file.entries[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise CheckpointError(
            f"{path}: tensors do not fit: {'; '.join(problems[:6])}{more}; convert the model again"
        )
    parts = {
        name: outside_names(name, "gguf", config.num_layers_per_stack)
        for name in tensor_names(config)
    }
    for several in parts.values():
        file.widen(several)
    return StoredModel(
        kind="gguf",
        folder=file.path,
        config=config,
        weights="only",
        alternatives=("only",),
        tokenizer_folder=None,
        gradient_routing=None,
        token_ids=_token_ids(file.values),
        parts={name: [(file, part) for part in several] for name, several in parts.items()},
    )


def _token_ids(values: Mapping[str, Any]) -> dict[str, int]:
    keys = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}
    found = {ours: values.get(f"tokenizer.ggml.{theirs}_token_id") for theirs, ours in keys.items()}
    return {key: value for key, value in found.items() if value is not None}


def outside_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by their GGUF names, in the order in which they are written."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes(config).items():
        parts = outside_names(name, "gguf", config.num_layers_per_stack)
        for part in parts:
            shapes[part] = (shape[0] // len(parts), *shape[1:])
    return shapes


def shape_values(config: ModelConfig) -> dict[str, Any]:
    """The header's numbers for a shape, by key without the architecture in front.

    `block_count` counts KV slots, as llama.cpp wants it; the file has 2 * layers_per_stack blocks.
    """
    return {
        "context_length": config.max_seq_len,
        "embedding_length": config.hidden_size,
        "block_count": config.num_slots,
        "feed_forward_length": config.mlp_size,
        "vocab_size": config.vocab_size,
        "embedding_scale": float(config.scale),
        "attention.head_count": config.num_heads,
        "attention.head_count_kv": config.num_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "hrm.layers_per_stack": config.num_layers_per_stack,
        "hrm.h_cycles": config.H_cycles,
        "hrm.l_cycles": config.L_cycles,
        "hrm.prefix_lm": config.prefix_lm,
    }


def config_of(file: GgufFile) -> ModelConfig:
    """The ModelConfig that a header states.

    Raises:
        CheckpointError: another architecture, a missing number, or numbers that do not go together.
    """
    found = file.values.get("general.architecture")
    if found != ARCHITECTURE:
        raise CheckpointError(
            f"{file.path} holds the architecture {found!r}, expected {ARCHITECTURE!r}: only "
            "HRM-Text models can be read"
        )

    def number(key: str, default: Any = None) -> Any:
        value = file.values.get(f"{ARCHITECTURE}.{key}", default)
        if value is None:
            raise CheckpointError(f"{file.path}: the header lacks {ARCHITECTURE}.{key}")
        return value

    hidden_size, num_heads = number("embedding_length"), number("attention.head_count")
    embedding = file.entries.get("token_embd.weight")
    head_dim = number("attention.key_length", hidden_size // num_heads)
    fields = {
        "vocab_size": embedding.shape[0] if embedding else number("vocab_size"),
        "hidden_size": hidden_size,
        "num_layers_per_stack": number("hrm.layers_per_stack"),
        "num_heads": num_heads,
        "head_dim": head_dim,
        "intermediate_size": number("feed_forward_length"),
        "H_cycles": number("hrm.h_cycles"),
        "L_cycles": number("hrm.l_cycles"),
        "max_seq_len": number("context_length"),
        "rope_theta": _shortest(number("rope.freq_base", 10_000.0)),
        "rms_norm_eps": _shortest(number("attention.layer_norm_rms_epsilon")),
        # llama.cpp does not scale where the key is missing.
        "embedding_scale": _shortest(number("embedding_scale", 1.0)),
        "prefix_lm": number("hrm.prefix_lm", True),
    }
    try:
        config = build(ModelConfig, fields, where=str(file.path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    same = {
        "block_count": config.num_slots,
        "attention.head_count_kv": config.num_heads,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
    }
    for key, expected in same.items():
        if number(key, expected) != expected:
            raise CheckpointError(
                f"{file.path}: {ARCHITECTURE}.{key} is {number(key)}, expected {expected}"
            )
    if file.values.get(f"{ARCHITECTURE}.rope.scaling.type", "none") != "none":
        raise CheckpointError(f"{file.path}: scaled rotary embedding is not supported")
    return config


def _shortest(value: float) -> float:
    """The shortest decimal that gives the same fp32: the header stores 1e-6 as fp32."""
    single = np.float32(value)
    # sqrt(hidden_size), the usual scale, is meant where it gives the same fp32.
    root = math.sqrt(round(float(single) ** 2))
    return root if np.float32(root) == single else float(str(single))


def _read_header(stream: BinaryIO, path: Path) -> tuple[dict[str, Any], dict[str, TensorPlace]]:
    if stream.read(4) != MAGIC:
        raise CheckpointError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}")
    version = _number(stream, "I")
    if version not in (2, 3):
        raise CheckpointError(
            f"{path}: GGUF version {version}, expected 2 or 3 of a little-endian machine"
        )
    num_tensors, num_values = _number(stream, "Q"), _number(stream, "Q")
    values = {}
    for _ in range(num_values):
        key = _text(stream)
        values[key] = _value(stream, _number(stream, "I"))
    entries: dict[str, TensorPlace] = {}
    for _ in range(num_tensors):
        name = _text(stream)
        shape = tuple(_number(stream, "Q") for _ in range(_number(stream, "I")))[::-1]
        number, offset = _number(stream, "I"), _number(stream, "Q")
        if number not in _NAME_OF:
            raise CheckpointError(
                f"{path}: {name} has ggml's number format {number}, which cannot be read here; "
                f"known: {', '.join(TYPES)}"
            )
        kind = TYPES[_NAME_OF[number]]
        if not shape or shape[-1] % kind.block_values:
            raise EOFError(f"{name} has rows that are no whole blocks")
        num_bytes = math.prod(shape) // kind.block_values * kind.block_bytes
        entries[name] = TensorPlace(shape, _NAME_OF[number], offset, num_bytes)
    alignment = values.get("general.alignment", ALIGNMENT)
    start = -(-stream.tell() // alignment) * alignment
    return values, {
        name: dataclasses.replace(entry, offset=start + entry.offset)
        for name, entry in entries.items()
    }


def _number(stream: BinaryIO, code: str) -> Any:
    layout = struct.Struct("<" + code)
    return layout.unpack(stream.read(layout.size))[0]


def _text(stream: BinaryIO) -> str:
    length = _number(stream, "Q")
    if length > _LONGEST:
        raise EOFError(f"a text of {length} bytes")
    data = stream.read(length)
    if len(data) < length:
        raise EOFError("the file ends inside a text")
    return data.decode("utf-8")


def _value(stream: BinaryIO, kind: int) -> Any:
    if kind == _TEXT:
        return _text(stream)
    if kind == _ARRAY:
        inner, count = _number(stream, "I"), _number(stream, "Q")
        if count > _LONGEST:
            raise EOFError(f"an array of {count} entries")
        if inner in _NUMBERS:
            layout = struct.Struct(f"<{count}{_NUMBERS[inner]}")
            return list(layout.unpack(stream.read(layout.size)))
        return [_value(stream, inner) for _ in range(count)]
    if kind not in _NUMBERS:
        raise EOFError(f"unknown value type {kind}")
    return _number(stream, _NUMBERS[kind])


def _dequantise(raw: np.ndarray, place: TensorPlace, out: np.ndarray) -> None:
    try:
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize
    except ImportError as error:
        raise BackendError(
            "reading quantised tensors needs the package gguf; install it with "
            "`pip install 'hrm-text[gguf]'`"
        ) from error
    kind = TYPES[place.kind]
    width = place.shape[-1]
    rows = raw.reshape(-1, width // kind.block_values * kind.block_bytes)
    # A few million values at a time: dequantize makes several copies of what it is given.
    step = max(1, DEQUANTISED_AT_ONCE // width)
    for start in range(0, len(rows), step):
        part = dequantize(np.asarray(rows[start : start + step]), GGMLQuantizationType(kind.number))
        out[start * width : start * width + part.size] = part.reshape(-1)
