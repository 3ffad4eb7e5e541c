"""torch.distributed.checkpoint folders, tensor by tensor, without a process group.

The format: `.metadata`, a pickle of plain records that says which chunk of which tensor lies where;
`__R_N.distcp` files with one torch.save archive a chunk. The pickle is read by an unpickler that
knows those records and nothing else, the archives with weights_only: no code is ever run.
"""

from __future__ import annotations

import io
import pathlib
import pickle
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.safetensors_file import Entry
from hrmtext.errors import BackendError, CheckpointError
from hrmtext.runtime.io import explain_storage_errors

METADATA_FILE = ".metadata"
DATA_FILE = "__0_0.distcp"

_RECORDS = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
        "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
}  # fmt: skip
_DTYPES = {
    "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
}  # fmt: skip


class DcpFolder:
    """The tensors of a checkpoint folder by their flattened names (`model.lm_head.weight`)."""

    def __init__(self, folder: str | Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: no metadata, damaged, holding anything but plain records, or a data
                file that is missing or shorter than the metadata says.
        """
        self.folder = Path(folder)
        metadata = _read_metadata(self.folder / METADATA_FILE)
        self.entries: dict[str, Entry] = {}
        self._chunks: dict[str, list[tuple[tuple[int, ...], Any]]] = {}
        try:
            self._index(metadata)
        except (AttributeError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{self.folder / METADATA_FILE} is not the metadata of a "
                f"torch.distributed.checkpoint folder: {error!r}"
            ) from None
        self._check_files()

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """The values of a tensor, its chunks put together; see `SafetensorsFile.read`."""
        entry = self.entries[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype) if out is None else out
        whole = tensor.view(entry.shape)
        for offsets, info in self._chunks[name]:
            chunk = self._read_chunk(name, info)
            target = whole
            if chunk.dim() != whole.dim():
                raise self._damaged(name, f"a chunk has shape {tuple(chunk.shape)}")
            for axis, (offset, size) in enumerate(zip(offsets, chunk.shape, strict=True)):
                if offset + size > target.shape[axis]:
                    raise self._damaged(name, f"a chunk has shape {tuple(chunk.shape)}")
                target = target.narrow(axis, offset, size)
            if chunk.dtype != entry.dtype:
                raise self._damaged(name, f"a chunk has dtype {chunk.dtype}")
            target.copy_(chunk)
        return tensor

    def _index(self, metadata: Any) -> None:
        places = {
            (index.fqn, tuple(index.offset or ())): info
            for index, info in metadata.storage_data.items()
        }
        for name, record in metadata.state_dict_metadata.items():
            if not hasattr(record, "chunks"):
                continue  # bytes: learning rates and the like
            shape = tuple(record.size)
            self.entries[name] = Entry(record.properties.dtype, shape)
            chunks = []
            covered = 0
            for chunk in record.chunks:
                offsets = tuple(chunk.offsets)
                info = places[(name, offsets)]
                if getattr(info, "transform_descriptors", None):
                    raise CheckpointError(
                        f"{self.folder}: {name} is compressed or encrypted "
                        f"({info.transform_descriptors}); save the checkpoint without extensions"
                    )
                chunks.append((offsets, info))
                covered += _count(chunk.sizes)
            if covered != _count(shape):
                raise CheckpointError(
                    f"{self.folder}: the chunks of {name} hold {covered} values, its shape {shape} "
                    f"needs {_count(shape)}; was the checkpoint written by all ranks?"
                )
            self._chunks[name] = chunks

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for chunks in self._chunks.values():
            for _, info in chunks:
                end = info.offset + info.length
                needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
        for name, size in needed.items():
            if Path(name).name != name:
                raise CheckpointError(f"{self.folder} names {name!r}, a file outside its folder")
            file = self.folder / name
            if not file.is_file():
                raise CheckpointError(f"{self.folder} lacks {name}, which its metadata names")
            found = file.stat().st_size
            if found < size:
                raise CheckpointError(
                    f"{file} was truncated: expected at least {size} bytes, it has {found}"
                )

    def _read_chunk(self, name: str, info: Any) -> torch.Tensor:
        with (self.folder / info.relative_path).open("rb") as stream:
            stream.seek(info.offset)
            data = io.BytesIO(stream.read(info.length))
        try:
            chunk = torch.load(data, map_location="cpu", weights_only=True)
        except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError):
            # torch's message advises to allow code to run, which we never do.
            raise self._damaged(name, "its bytes are no archive of a plain tensor") from None
        if not isinstance(chunk, torch.Tensor):
            raise self._damaged(name, f"a chunk is {type(chunk).__name__}, not a tensor")
        return chunk

    def _damaged(self, name: str, why: str) -> CheckpointError:
        return CheckpointError(f"{self.folder}: {name} is damaged ({why})")


class DcpWriter:
    """Writes a checkpoint folder tensor by tensor; several names may share one stored tensor."""

    def __init__(self, folder: str | Path) -> None:
        """Begin in an existing, empty folder."""
        _require_dcp()
        self.folder = Path(folder)
        self._records: dict[str, Any] = {}
        self._places: dict[Any, Any] = {}
        self._paths: dict[str, tuple[str | int, ...]] = {}
        self._stream = (self.folder / DATA_FILE).open("wb")

    def add(self, names: Iterable[tuple[str | int, ...]], tensor: torch.Tensor) -> None:
        """Store a tensor once, under one or more paths of the nested state dict."""
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            TensorProperties,
            TensorStorageMetadata,
        )

        ready = tensor.detach().cpu().contiguous()
        if ready.untyped_storage().nbytes() != ready.nbytes:
            ready = ready.clone()  # torch.save would write the whole storage behind a view
        begin, length = self._write(lambda stream: torch.save(ready, stream))
        zero = torch.Size([0] * ready.dim())
        for path in names:
            record = TensorStorageMetadata(
                TensorProperties(dtype=ready.dtype),
                ready.size(),
                [ChunkStorageMetadata(offsets=zero, sizes=ready.size())],
            )
            self._register(path, record, begin, length, zero)

    def add_value(self, path: tuple[str | int, ...], value: Any) -> None:
        """Store a plain value (learning rate and the like)."""
        from torch.distributed.checkpoint.metadata import BytesStorageMetadata

        begin, length = self._write(lambda stream: torch.save(value, stream))
        self._register(path, BytesStorageMetadata(), begin, length, None)

    def close(self) -> None:
        """Write the metadata; without it the folder does not count."""
        from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

        self._stream.close()
        metadata = Metadata(
            state_dict_metadata=self._records,
            planner_data=self._paths,
            storage_data=self._places,
            storage_meta=StorageMeta(),
            version="1.0.0",
        )
        with explain_storage_errors(self.folder):
            (self.folder / METADATA_FILE).write_bytes(pickle.dumps(metadata))

    def abort(self) -> None:
        """Close the data file without metadata."""
        self._stream.close()

    def _write(self, write: Callable[[Any], None]) -> tuple[int, int]:
        with explain_storage_errors(self.folder):
            begin = self._stream.tell()
            write(self._stream)
            return begin, self._stream.tell() - begin

    def _register(
        self,
        path: tuple[str | int, ...],
        record: Any,
        begin: int,
        length: int,
        offsets: torch.Size | None,
    ) -> None:
        from torch.distributed.checkpoint.filesystem import _StorageInfo
        from torch.distributed.checkpoint.metadata import MetadataIndex

        name = ".".join(map(str, path))
        assert name not in self._records, name
        self._records[name] = record
        self._paths[name] = path
        index = MetadataIndex(name) if offsets is None else MetadataIndex(name, offsets, 0)
        self._places[index] = _StorageInfo(DATA_FILE, begin, length)


class _RecordsOnly(pickle.Unpickler):
    """Knows the records of DCP metadata and refuses every other global."""

    def find_class(self, module: str, name: str) -> Any:
        if name in _RECORDS.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and name == "Size":
            return torch.Size
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        if module.startswith("pathlib") and name in ("PosixPath", "WindowsPath", "Path"):
            return pathlib.PurePosixPath
        raise pickle.UnpicklingError(f"{module}.{name} is no record of checkpoint metadata")


def _read_metadata(path: Path) -> Any:
    _require_dcp()
    if not path.is_file():
        raise CheckpointError(
            f"{path.parent} has no {METADATA_FILE}: it is no torch.distributed.checkpoint folder, "
            "or it was not written to its end"
        )
    try:
        return _RecordsOnly(io.BytesIO(path.read_bytes())).load()
    except Exception as error:  # damaged pickles raise whatever their bytes happen to ask for
        raise CheckpointError(
            f"{path} cannot be read as checkpoint metadata, and nothing else in it is run: {error}"
        ) from None


def _require_dcp() -> None:
    if not torch.distributed.is_available():
        raise BackendError(
            f"torch {torch.__version__} was built without torch.distributed, which training "
            "checkpoints of the public code need; install a usual build of torch"
        )


def _count(sizes: Iterable[int]) -> int:
    total = 1
    for size in sizes:
        total *= size
    return total
