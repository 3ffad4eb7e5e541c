"""Raw rows of a source from files: Parquet, JSONL, JSON, CSV and text, in folders or archives."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple, cast

from hrmtext.data.parts import MAX_LINE_BYTES, SKIP_BYTES, open_parquet
from hrmtext.data.sources.local import ROWS_PER_BATCH, RowProblems
from hrmtext.data.sources.source import Origin, Part, Source
from hrmtext.errors import DataError

TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
ZIPS = (".zip", ".whl")
RawRows = Iterator[tuple[str, Any]]
"""Place (`file:line`) and value of each raw row."""


class SourceFile(NamedTuple):
    """A file of a source, in a folder or an archive."""

    origin: Origin
    path: Path
    """The file itself, or the archive that holds it."""
    open: Callable[[], IO[bytes]]
    archived: bool

    @property
    def place(self) -> str:
        """Its name in messages."""
        return f"{self.path}:{self.origin.file}" if self.archived else str(self.path)


def locate(path: str | Path, hub: str | None) -> Path:
    """The folder or file that holds a source's files.

    `path` may also be a Hub cache, a data set's folder in one (its snapshot is taken), or a folder
    with one folder a data set in it, `owner/name`.

    Raises:
        DataError: nothing there, or a cache with several snapshots and no main one.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise DataError(f"no such file or folder: {root}")
    if hub is not None and root.is_dir():
        for below in (f"datasets--{hub.replace('/', '--')}", hub):
            if (root / below).is_dir():
                root = root / below
                break
    if not (root / "snapshots").is_dir():
        return root
    snapshots = sorted(p for p in (root / "snapshots").iterdir() if p.is_dir())
    main = root / "refs" / "main"
    if main.is_file():
        wanted = root / "snapshots" / main.read_text().strip()
        if wanted in snapshots:
            return wanted
    if len(snapshots) != 1:
        raise DataError(
            f"{root} holds {len(snapshots)} snapshots and no main one; name one of its folders "
            "below snapshots/"
        )
    return snapshots[0]


def matching_files(source: Source, root: Path) -> list[Path]:
    """Files below `root` (or `root` itself) that hold rows of the source, archives included.

    Raises:
        DataError: none, or a symbolic link out of the folder or to nothing.
    """
    if root.is_file():
        return [root]
    # In a Hub cache the files are links to ../../blobs, which belongs to the data set's folder.
    inside = root.parent.parent if root.parent.name == "snapshots" else root
    found = []
    for file in sorted(root.rglob("*")):
        below = file.relative_to(root)
        if any(part.startswith(".") for part in below.parts):
            continue
        if not is_archive(below) and _part_of(source, PurePosixPath(root.name, *below.parts)) is (
            None
        ):
            continue
        if file.is_symlink():
            target = file.resolve()
            if not target.exists():
                raise DataError(f"{file} is a symbolic link to {target}, which does not exist")
            if not target.is_relative_to(inside.resolve()):
                raise DataError(
                    f"{file} is a symbolic link to {target}, outside {inside}; copy the file, or "
                    "name its own folder as the path"
                )
        if file.is_file():
            found.append(file)
    if not found:
        raise DataError(f"source {source.name}: {root} holds none of its files: {_wanted(source)}")
    return found


def source_files(source: Source, root: Path) -> Iterator[SourceFile]:
    """Every file of the source in order, those in archives too.

    A member of an archive must be read before the next is asked for.

    Raises:
        DataError: as `matching_files`; an archive that is not whole or holds none of the files; a
            single file that fits no part of a source with several.
    """
    for path in matching_files(source, root):
        if is_archive(path):
            number = 0
            for number, file in enumerate(_members(source, path), start=1):  # noqa: B007
                yield file
            if number == 0:
                raise DataError(
                    f"source {source.name}: {path} holds none of its files: {_wanted(source)}"
                )
            continue
        name = path.name if path == root else path.relative_to(root).as_posix()
        part = _part_of(source, PurePosixPath(path.absolute().as_posix()))
        if part is None and len(source.parts) == 1:
            part = source.parts[0]
        if part is None:
            raise DataError(
                f"source {source.name}: {path} does not tell which part it is; expected one of "
                f"{_wanted(source)}"
            )
        if path == root:
            name = PurePosixPath(*path.absolute().parts[-3:]).as_posix()
        origin = Origin(part.name, name)
        yield SourceFile(origin, path, lambda path=path: path.open("rb"), False)


def read_rows(source: Source, file: SourceFile, problems: RowProblems) -> RawRows:
    """The raw rows of one file; what is no row is added to `problems`.

    Raises:
        DataError: a file that is not whole or lacks a column, or of a kind that is not read.
    """
    suffix = file.origin.path.suffix
    if suffix == ".parquet":
        return _parquet_rows(source, file, problems)
    if suffix in (".jsonl", ".json"):
        return _json_rows(file, problems, lines=suffix == ".jsonl")
    if suffix == ".csv":
        return _csv_rows(source, file)
    if suffix == ".txt":
        return _text_rows(source, file, problems)
    raise DataError(
        f"source {source.name}: {file.place} is of a kind that is not read; expected "
        ".parquet, .jsonl, .json, .csv, .txt, or a tar or zip of them"
    )


def require_columns(source: Source, columns: list[str], place: str) -> None:
    """DataError that names the source and what is missing, unless all its columns are there."""
    missing = [name for name in source.columns if name not in columns]
    if missing:
        raise DataError(
            f"source {source.name}: {place} lacks {', '.join(missing)}; it has "
            f"{', '.join(columns) or 'no columns'}, expected {', '.join(source.columns)}. Is it "
            f"a file of {source.hub or source.where}?"
        )


def _wanted(source: Source) -> str:
    return ", ".join(pattern for part in source.parts for pattern in part.files)


def _part_of(source: Source, path: PurePosixPath) -> Part | None:
    for part in source.parts:
        if any(path.match(pattern) for pattern in part.files):
            return part
    return None


def is_archive(path: Path) -> bool:
    """Whether a file is read as an archive, by its name."""
    return path.name.endswith(TARS + ZIPS)


def _members(source: Source, path: Path) -> Iterator[SourceFile]:
    try:
        if path.name.endswith(ZIPS):
            with zipfile.ZipFile(path) as archive:
                for info in archive.infolist():
                    part = None if info.is_dir() else _part_of(source, PurePosixPath(info.filename))
                    if part is not None:
                        origin = Origin(part.name, info.filename)
                        yield SourceFile(
                            origin, path, lambda i=info: _buffered(archive.open(i)), True
                        )
            return
        # A stream, for there may be millions of members.
        with _decompressed(path) as stream, tarfile.open(fileobj=stream, mode="r|") as tar:
            for member in tar:
                part = _part_of(source, PurePosixPath(member.name)) if member.isfile() else None
                if part is not None:
                    origin = Origin(part.name, member.name)
                    yield SourceFile(origin, path, lambda m=member: _extract(tar, m), True)
                tar.members = []  # pyrefly: ignore[missing-attribute]  # or it keeps every header
            _require_whole_tar(path, stream)
    except (tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise DataError(f"{path} is not a whole archive: {error}") from error
    except OSError as error:
        raise DataError(f"could not read {path}: {error.strerror or error}") from error


def _decompressed(path: Path) -> IO[bytes]:
    for ending, opener in ((("gz", "tgz"), gzip.open), ("bz2", bz2.open), ("xz", lzma.open)):
        if path.name.endswith(ending):
            return cast("IO[bytes]", opener(path, "rb"))
    return path.open("rb")


def _require_whole_tar(path: Path, stream: IO[bytes]) -> None:
    """tarfile takes an archive that is cut between two members for a whole one."""
    if path.suffix == ".tar":
        stream.seek(-min(tarfile.BLOCKSIZE, path.stat().st_size), io.SEEK_END)
        if stream.read().strip(b"\0"):
            raise tarfile.ReadError("its end mark is missing")
    while stream.read(SKIP_BYTES):
        pass  # a compressed stream that was cut says so at its end


def _buffered(member: IO[bytes]) -> IO[bytes]:
    """zipfile reads lines of bounded length a peek at a time, many times slower."""
    return cast("IO[bytes]", io.BufferedReader(cast("io.RawIOBase", member), SKIP_BYTES))


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo) -> IO[bytes]:
    stream = tar.extractfile(member)
    assert stream is not None, "members that are no files were left out"
    return stream


def _parquet_rows(source: Source, file: SourceFile, problems: RowProblems) -> RawRows:
    if file.archived:
        raise DataError(f"{file.place}: Parquet is not read inside archives; unpack {file.path}")
    with open_parquet(file.path) as table:
        import pyarrow

        require_columns(source, table.schema_arrow.names, file.place)
        number = 0
        try:
            for batch in table.iter_batches(ROWS_PER_BATCH, columns=list(source.columns)):
                try:
                    rows = batch.to_pylist()
                except UnicodeDecodeError:  # Arrow does not check UTF-8 when it reads
                    rows = [_row(batch.slice(i, 1)) for i in range(len(batch))]
                for row in rows:
                    number += 1
                    if row is None:
                        problems.add("not UTF-8", f"{file.place}:{number}")
                    else:
                        yield f"{file.place}:{number}", row
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{file.place} is not a whole Parquet file: {error}") from error


def _row(batch: Any) -> dict[str, Any] | None:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError:
        return None


def _json_rows(file: SourceFile, problems: RowProblems, lines: bool) -> RawRows:
    if not lines:
        with file.open() as stream:
            content = stream.read()
        try:
            value = json.loads(content)
        except (ValueError, RecursionError):
            pass  # .json files of the Hub often hold a row a line
        else:
            rows = value if isinstance(value, list) else [value]
            for number, row in enumerate(rows, start=1):
                yield f"{file.place}:{number}", row
            return
    with file.open() as stream:
        for number, line in enumerate(_lines(stream), start=1):
            place = f"{file.place}:{number}"
            if line is None:
                problems.add("line too long", place)
                continue
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                problems.add("not UTF-8", place)
                continue
            except (ValueError, RecursionError):
                problems.add("malformed JSON", place)
                continue
            yield place, row


def _csv_rows(source: Source, file: SourceFile) -> RawRows:
    with file.open() as stream, io.TextIOWrapper(stream, "utf-8-sig", newline="") as text:
        reader = csv.DictReader(text)
        try:
            require_columns(source, list(reader.fieldnames or ()), file.place)
            for row in reader:
                yield f"{file.place}:{reader.line_num}", row
        except (csv.Error, UnicodeDecodeError) as error:
            raise DataError(
                f"{file.place}:{reader.line_num} is no CSV in UTF-8: {error}"
            ) from error


def _text_rows(source: Source, file: SourceFile, problems: RowProblems) -> RawRows:
    with contextlib.closing(file.open()) as stream:
        if source.text == "file":
            content = stream.read(MAX_LINE_BYTES + 1)
            if len(content) > MAX_LINE_BYTES:
                problems.add("file too long", file.place)
                return
            text = _decoded(content, problems, file.place)
            if text is not None:
                yield file.place, {"text": text}
            return
        question: bytes | None = b""
        number = 0
        for number, line in enumerate(_lines(stream), start=1):
            if number % 2:
                question = line
                continue
            place = f"{file.place}:{number - 1}"
            if question is None or line is None:
                problems.add("line too long", place)
                continue
            texts = [_decoded(value.rstrip(b"\r\n"), problems, place) for value in (question, line)]
            if None not in texts:
                yield place, {"question": texts[0], "answer": texts[1]}
        if number % 2:
            problems.add("question without an answer", f"{file.place}:{number}")


def _decoded(content: bytes, problems: RowProblems, place: str) -> str | None:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        problems.add("not UTF-8", place)
        return None


def _lines(stream: IO[bytes]) -> Iterator[bytes | None]:
    """Lines of a stream; None for one longer than MAX_LINE_BYTES."""
    while line := stream.readline(MAX_LINE_BYTES + 1):
        if len(line) <= MAX_LINE_BYTES:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(SKIP_BYTES)
        yield None
