"""One-dimensional .npy files: memory-mapped, read and written a piece at a time."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hrmtext.errors import DataError

Array = npt.NDArray[Any]


def open_array(path: Path) -> Array:
    """A one-dimensional array of integers, memory-mapped; DataError if it is anything else."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"no such file: {path}") from None
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"{path} is truncated or not a .npy file: {error}") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise DataError(
            f"{path} holds {array.dtype} of shape {array.shape}, expected one row of integers"
        )
    return array


def read_chunks(array: Array, size: int) -> Iterator[Array]:
    """The values of a memory-mapped array, `size` at a time, read without mapping them."""
    assert isinstance(array, np.memmap) and isinstance(array.filename, str | os.PathLike)
    with Path(array.filename).open("rb") as stream:
        stream.seek(array.offset)
        for at in range(0, len(array), size):
            count = min(size, len(array) - at)
            chunk = np.fromfile(stream, dtype=array.dtype, count=count)
            if len(chunk) != count:
                raise DataError(f"{array.filename} was cut short while it was read")
            yield chunk


def save_array(path: Path, array: Array) -> None:
    """Write a one-dimensional array as .npy; a full disk raises an OSError that says so.

    np.save does not: it writes behind Python's back and reports a count of bytes.
    """
    with ArrayWriter(path, array.dtype) as writer:
        writer.write(array)


class ArrayWriter:
    """Writes a one-dimensional .npy file piece by piece, without knowing its length beforehand."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        """Begin the file; its header says 0 values until it is closed."""
        self.dtype = np.dtype(dtype)
        self.count = 0
        """Values written."""
        self._stream = path.open("wb")
        self._write_header()

    def __enter__(self) -> ArrayWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        try:
            if kind is None:
                self._stream.seek(0)
                self._write_header()
                self._stream.flush()
        finally:
            with contextlib.suppress(OSError):  # of a full disk the first error is enough
                self._stream.close()

    def write(self, values: Array) -> None:
        """Append values; they must be of the file's type already, or fit it."""
        values = np.ascontiguousarray(values, dtype=self.dtype)
        self._stream.write(values.view(np.uint8).data)
        self.count += len(values)

    def _write_header(self) -> None:
        # numpy pads the header for a count of up to 21 digits, so its size does not change.
        shape = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count,)}
        np.lib.format.write_array_header_1_0(self._stream, shape)
