"""Optimizer state in a checkpoint: one file, or one of every rank that holds a part of it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as torch_dist

from hrmtext.artifacts.dcp import METADATA_FILE, DcpFolder
from hrmtext.artifacts.safetensors_file import SafetensorsFile
from hrmtext.errors import CheckpointError
from hrmtext.runtime.io import explain_storage_errors
from hrmtext.train.parallel import Shards

OPTIMIZER_FILE = "optimizer.safetensors"
OPTIMIZER_FOLDER = "optimizer"
"""A torch.distributed.checkpoint folder, where the state was spread over ranks."""


class StoredParts(Mapping[str, torch.Tensor]):
    """This rank's chunks of stored parameters and moments, read one by one when asked for."""

    def __init__(
        self,
        stored: SafetensorsFile | DcpFolder,
        shards: Shards,
        names: Mapping[str, str] | None = None,
    ) -> None:
        """`names`: our names -> those in the file; None: they are the same."""
        self._names = {name: name for name in stored.entries} if names is None else names
        self._read: Callable[[str], torch.Tensor] = stored.read
        self._shards = shards

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self._names:
            raise KeyError(name)
        tensor = self._read(self._names[name])
        return tensor if tensor.dim() == 0 else self._shards.part(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_moments(checkpoint: Path, shards: Shards) -> StoredParts:
    """What `AdamAtan2.export_state` gave, in whichever form it lies there.

    Raises:
        CheckpointError: in none, or damaged.
    """
    if (checkpoint / OPTIMIZER_FOLDER / METADATA_FILE).is_file():
        return StoredParts(DcpFolder(checkpoint / OPTIMIZER_FOLDER), shards)
    return StoredParts(SafetensorsFile(checkpoint / OPTIMIZER_FILE), shards)


def has_moments(folder: Path) -> bool:
    """Whether a model folder holds optimizer state."""
    return (folder / OPTIMIZER_FILE).is_file() or (
        folder / OPTIMIZER_FOLDER / METADATA_FILE
    ).is_file()


def write_sharded(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    shards: Shards,
    group: torch_dist.ProcessGroup,
) -> None:
    """Every rank of `group` writes its chunks, which lie on the CPU, into `folder`.

    Raises:
        StorageError: the disk of some rank is full.
        CheckpointError: some rank failed otherwise; all ranks raise.
    """
    import torch.distributed.checkpoint as torch_checkpoint
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = DeviceMesh.from_group(group, "cpu", mesh_dim_names=("shard",))
    state: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        shape = shards.shapes.get(name.partition(".")[2])
        if shape is None or tensor.dim() == 0:
            state[name] = tensor
            continue
        stride = torch.empty(shape, device="meta").stride()
        state[name] = DTensor.from_local(
            tensor, mesh, [Shard(0)], run_check=False, shape=shape, stride=stride
        )
    writer = torch_checkpoint.FileSystemWriter(folder, sync_files=True, thread_count=1)
    with explain_storage_errors(folder):
        try:
            torch_checkpoint.save(state, storage_writer=writer, process_group=group)
        except CheckpointException as error:
            causes = [failure[0] for failure in error.failures.values()]
            if any("No space left" in str(cause) for cause in causes):
                raise OSError(errno.ENOSPC, "No space left on device") from error
            raise CheckpointError(
                f"{folder} could not be written by all ranks: {causes[0]!r}"
            ) from error
