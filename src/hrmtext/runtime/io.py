"""Files and folders that are whole or absent: temporary name, fsync, rename, completion marker."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hrmtext.errors import CheckpointError, StorageError

MARKER = "COMPLETE.json"
"""Written last into a folder; without it, or if a file differs in size, it does not count."""


@contextlib.contextmanager
def explain_storage_errors(path: str | Path) -> Iterator[None]:
    """Turn a full disk, a quota or a missing permission below `path` into StorageError."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(_storage_message(path, error)) from error
    except RuntimeError as error:
        # torch and safetensors wrap the operating system's error in their own.
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number.group(1)) if number else errno.ENOSPC
        if number is None and os.strerror(code) not in str(error):
            raise
        raise StorageError(_storage_message(path, OSError(code, os.strerror(code)))) from error


@contextlib.contextmanager
def atomic_file(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path; on success it is synced and renamed to `path`, else removed.

    Raises:
        StorageError: the disk is full or the folder not writable; `path` is as it was before.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explain_storage_errors(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            _sync(temporary)
            temporary.replace(path)
            _sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, indented, keys in the given order."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def atomic_folder(
    path: str | Path,
    *,
    replace: bool = False,
    late: Mapping[str, Any] | None = None,
    **marker: Any,
) -> Iterator[Path]:
    """Yield a temporary folder; on success mark it complete, sync it and rename it to `path`.

    Args:
        replace: allow `path` to exist; it is swapped for the new folder.
        late: extra values for the completion marker, read only when the folder is done.
        marker: extra values for the completion marker (format version, step, ...).

    Raises:
        StorageError: `path` exists and `replace` is false, the disk is full, ...; nothing changed.
    """
    path = Path(path)
    if path.exists() and not replace:
        raise StorageError(f"{path} exists already; name another folder or remove it first")
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explain_storage_errors(path):
        try:
            temporary.mkdir(parents=True)
            yield temporary
            mark_complete(temporary, **marker, **(late or {}))
            if path.exists():
                stale = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.old")
                path.replace(stale)
                temporary.replace(path)
                shutil.rmtree(stale, ignore_errors=True)
            else:
                temporary.replace(path)
            _sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def exclusive(path: str | Path) -> Iterator[None]:
    """Keep other processes from writing `path` meanwhile; remove what killed ones left beside it.

    The lock goes with the process, however it ends.

    Raises:
        StorageError: another process holds the lock, or the folder is not writable.
    """
    path = Path(path)
    lock = path.with_name(f".{path.name}.lock")
    with explain_storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(lock)
        try:
            remove_leftovers(path.parent, name=path.name)
            yield
        finally:
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def remove_leftovers(*folders: Path, name: str | None = None) -> None:
    """Remove what killed runs were writing in `folders`; nobody else may be writing there.

    Args:
        name: only what was to become this file or folder; None: anything.
    """
    pattern = f".{'*' if name is None else glob.escape(name)}"
    for folder in folders:
        for ending in ("tmp", "old"):
            for leftover in folder.glob(f"{pattern}.*.{ending}"):
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                else:
                    leftover.unlink()


def _lock(lock: Path) -> int:
    """An open, locked descriptor of the file `lock`, which may have to be made."""
    import fcntl  # POSIX only

    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise StorageError(
                f"another process is writing {lock.name[1:].removesuffix('.lock')} in "
                f"{lock.parent}; wait for it to end, or name another folder"
            ) from None
        # The holder before may have removed the file between the two calls: then it locks nothing.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                return descriptor
        os.close(descriptor)


def mark_complete(folder: Path, **values: Any) -> None:
    """Sync every file below `folder`, then write the marker with their sizes in bytes."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MARKER)
    for file in files:
        _sync(file)
    sizes = {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}
    write_json(folder / MARKER, {**values, "files": sizes})


def require_complete(folder: str | Path) -> dict[str, Any]:
    """The completion marker of `folder`.

    Raises:
        CheckpointError: no such folder, no marker, or a file is missing or of another size.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"no such folder: {folder}")
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder} has no {MARKER}: it was not written to its end. Use an earlier one, "
            "or run the step that writes it again"
        ) from None
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{folder / MARKER} is not valid JSON: {error}") from None
    for name, size in marker["files"].items():
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            got = "it is missing" if found is None else f"it has {found}"
            raise CheckpointError(f"{file}: expected {size} bytes as written, but {got}")
    return marker


def is_complete(folder: str | Path) -> bool:
    """Whether `require_complete` would accept `folder`."""
    try:
        require_complete(folder)
    except CheckpointError:
        return False
    return True


def fingerprint(*parts: Any) -> str:
    """16 hex digits that depend on every part; bytes and paths are read, the rest goes by JSON."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Path):
            with part.open("rb") as stream:
                for chunk in iter(lambda: stream.read(1 << 20), b""):
                    digest.update(chunk)
        elif isinstance(part, bytes | memoryview):
            digest.update(part)
        else:
            digest.update(json.dumps(part, sort_keys=True, default=str).encode())
        digest.update(b"\x1f")
    return digest.hexdigest()


def _storage_message(path: str | Path, error: OSError) -> str:
    full = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file may not grow that large here (see `ulimit -f`)",
    }
    if error.errno in full:
        return (
            f"{full[error.errno]}: could not write {path}. Nothing that was there has changed; "
            "make room and run the same command again"
        )
    return f"could not write {path}: {error.strerror or error}"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
