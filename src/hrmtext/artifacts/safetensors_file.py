"""Safetensors files, tensor by tensor: reading into given memory, writing without holding a model.

The format: 8 bytes little-endian length, that many bytes of JSON (name -> dtype, shape, range of
bytes behind the header), the tensors. Files are byte for byte those of the safetensors library.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch

from hrmtext.errors import CheckpointError
from hrmtext.runtime.io import explain_storage_errors

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
# The library's order of number formats in a file, widest first.
_ORDER = ("I64", "F64", "F32", "I32", "BF16", "F16", "I16", "I8", "U8", "BOOL")
_NAME_OF = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A file of which only the header is in memory; it is opened anew for every tensor."""

    def __init__(self, path: str | Path) -> None:
        """Read and check the header.

        Raises:
            CheckpointError: missing, truncated, or not a safetensors file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise CheckpointError(f"no such weights file: {path}")
        self.entries: dict[str, Entry] = {}
        self._starts: dict[str, int] = {}
        try:
            with self.path.open("rb") as stream:
                self._read_header(stream)
        except OSError as error:
            raise CheckpointError(f"could not read {path}: {error.strerror or error}") from None

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values of a tensor, in newly allocated memory or in `out`.

        Args:
            out: a contiguous CPU tensor of the same dtype and number of values.
        """
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype) if out is None else out
        assert tensor.dtype == entry.dtype and tensor.is_contiguous(), name
        if entry.nbytes:
            target = tensor.view(-1).view(torch.uint8).numpy().data
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(self._starts[name])
                got = 0
                while got < entry.nbytes:
                    count = stream.readinto(target[got:])
                    if not count:
                        raise self._not_whole(f"{name} ends {entry.nbytes - got} bytes too early")
                    got += count
        return tensor

    def map(self) -> torch.Tensor:
        """The whole file as a private mapping: bytes are read when first used, nothing is copied.

        The mapping outlives this object. The file must not be cut short while it is in use.
        """
        size = self.path.stat().st_size
        return torch.from_file(str(self.path), shared=False, size=size, dtype=torch.uint8)

    def view(self, name: str, mapping: torch.Tensor) -> torch.Tensor | None:
        """A tensor inside `mapping`; None where its bytes are not aligned for its dtype."""
        entry, start = self.entries[name], self._starts[name]
        if start % entry.dtype.itemsize:
            return None
        return mapping[start : start + entry.nbytes].view(entry.dtype).view(entry.shape)

    def _read_header(self, stream: BinaryIO) -> None:
        size = self.path.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, size - 8):
            raise self._not_whole(f"its header should have {length} bytes, the file has {size}")
        try:
            header = json.loads(stream.read(length))
            self.metadata = dict(header.pop("__metadata__", {}))
            ranges = []
            for name, value in header.items():
                begin, end = value["data_offsets"]
                entry = Entry(DTYPES[value["dtype"]], tuple(value["shape"]))
                if end - begin != entry.nbytes:
                    raise self._not_whole(f"{name} has {end - begin} bytes, its shape says else")
                self.entries[name] = entry
                self._starts[name] = 8 + length + begin
                ranges.append((begin, end))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._not_whole(f"its header is damaged: {error!r}") from None
        expected = 0
        for begin, end in sorted(ranges):
            if begin != expected:
                raise self._not_whole(f"its tensors leave a gap or overlap at byte {expected}")
            expected = end
        if 8 + length + expected != size:
            raise self._not_whole(f"expected {8 + length + expected} bytes, it has {size}")

    def _not_whole(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole safetensors file ({why}); it was truncated or damaged, "
            "use an earlier checkpoint or copy the file again"
        )


def file_order(entries: Mapping[str, Entry]) -> list[str]:
    """Names in the order that the safetensors library gives them: widest dtype first, then name."""
    return sorted(entries, key=lambda name: (_ORDER.index(_NAME_OF[entries[name].dtype]), name))


def write_safetensors(
    path: str | Path,
    entries: Mapping[str, Entry],
    read: Callable[[str], torch.Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a file of `entries`, asking `read` for one tensor after another.

    Raises:
        StorageError: the disk is full or the folder not writable.
    """
    path = Path(path)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    order = file_order(entries)
    position = 0
    for name in order:
        entry = entries[name]
        end = position + entry.nbytes
        header[name] = {
            "dtype": _NAME_OF[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with explain_storage_errors(path), path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for name in order:
            tensor = read(name).detach().cpu().contiguous()
            entry = entries[name]
            got = Entry(tensor.dtype, tuple(tensor.shape))
            assert got == entry, f"{name} was announced as {entry}, got {got}"
            if entry.nbytes:
                stream.write(tensor.view(-1).view(torch.uint8).numpy().data)


def plan_shards(
    entries: Mapping[str, Entry], names: Iterable[str], max_bytes: int
) -> list[Sequence[str]]:
    """Names by file: filled in the given order, a new file where the next tensor would not fit.

    A tensor larger than `max_bytes` gets a file of its own.
    """
    shards: list[list[str]] = [[]]
    used = 0
    for name in names:
        size = entries[name].nbytes
        if shards[-1] and used + size > max_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += size
    return list(shards)
