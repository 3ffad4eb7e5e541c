"""Rows from local JSONL and Parquet files; what is wrong with a row is counted, never hidden."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

from hrmtext.data.example import COLUMNS, DEFAULT_CONDITION, HISTORY, Example
from hrmtext.data.parts import Part, open_parquet, read_lines
from hrmtext.data.sources.chat import CHAT_KEYS, read_conversation, read_history
from hrmtext.data.tokenizer import CONDITIONS
from hrmtext.errors import DataError

SUFFIXES = (".jsonl", ".parquet")
ROWS_PER_BATCH = 1_000
PLACES_KEPT = 5
CHAT_EXTRAS = ("system", "tools", "functions")
"""Columns beside a conversation that it does not stand without."""


@dataclasses.dataclass(kw_only=True)
class RowProblems:
    """Rows that were not used, by reason, with the first places of each."""

    strict: bool = False
    """Raise at the first problem instead of counting it."""
    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    places: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Reason -> the first few `file:line` (Parquet: `file:row`), counted from 1."""
    num_read: int = 0
    """Lines or rows read so far, blank lines too, of the file or part being read."""

    def add(self, reason: str, place: str) -> None:
        """Count one row; DataError if `strict`."""
        if self.strict:
            raise DataError(f"{place}: {reason}. Mend the row, or set strict: false to drop it")
        self.counts[reason] = self.counts.get(reason, 0) + 1
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES_KEPT:
            places.append(place)

    @property
    def total(self) -> int:
        """Rows not used."""
        return sum(self.counts.values())

    def to_mapping(self) -> dict[str, Any]:
        """Reason -> count and first places."""
        return {
            reason: {"rows": count, "first": self.places[reason]}
            for reason, count in sorted(self.counts.items())
        }


def find_files(path: str | Path) -> dict[str, Path]:
    """Stratum name -> file, for a file or for every .jsonl and .parquet file below a folder.

    The name is the file's path below the folder, `/` written as `__`; hidden files do not count.

    Raises:
        DataError: nothing there, two files whose names become the same, or a symbolic link that
            leads out of the folder or to nothing.
    """
    path = Path(path)
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise DataError(f"{path}: expected a file ending in {' or '.join(SUFFIXES)}")
        return {path.name: path}
    if not path.is_dir():
        raise DataError(f"no such file or folder: {path}")
    files: dict[str, Path] = {}
    for file in sorted(path.rglob("*")):
        below = file.relative_to(path)
        hidden = any(part.startswith(".") for part in below.parts)
        if file.suffix in SUFFIXES and not hidden and (file.is_file() or file.is_symlink()):
            _refuse_stray_link(file, path)
            name = below.as_posix().replace("/", "__")
            if name in files:
                raise DataError(
                    f"{file} and {files[name]} both give the stratum {name}; rename one"
                )
            files[name] = file
    if not files:
        raise DataError(f"{path} holds no {' or '.join(SUFFIXES)} file")
    return files


def _refuse_stray_link(file: Path, root: Path) -> None:
    if file.is_symlink():
        target = file.resolve()
        if not target.is_file():
            raise DataError(f"{file} is a symbolic link to {target}, which does not exist")
        if not target.is_relative_to(root.resolve()):
            raise DataError(
                f"{file} is a symbolic link to {target}, outside {root}; copy the file, or name "
                "its own folder as the source"
            )


def stratum_label(name: str) -> str:
    """A stratum's name without the ending of its file."""
    for suffix in SUFFIXES:
        name = name.removesuffix(suffix)
    return name


def read_batches(
    path: Path, problems: RowProblems, part: Part | None = None
) -> Iterator[list[Example]]:
    """The usable rows of a JSONL or Parquet file, or of a part of it, in batches, in order.

    A row is an instruction and a response, or a conversation (see `hrmtext.data.sources.chat`).
    An absent or null condition means `direct`; blank lines are no rows. Rows with malformed JSON,
    bytes that are not UTF-8, missing, doubled or wrong-typed fields, an unknown condition, an empty
    response, or NUL characters are added to `problems`, and so are lines too long to be rows.
    Places in a part are counted from its start.

    Raises:
        DataError: a Parquet file that is not whole or lacks a column; anything, if strict.
    """
    if path.suffix == ".parquet":
        rows = _parquet_rows(path, problems, part)
    else:
        rows = _jsonl_rows(path, problems, part)
    batch: list[Example] = []
    for number, row in rows:
        checked = check_row(row)
        if isinstance(checked, str):
            problems.add(checked, f"{path}:{number}")
            continue
        batch.append(checked)
        if len(batch) == ROWS_PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def check_row(row: Any) -> Example | str:
    """The row as an Example with its condition in plain form, or what is wrong with it."""
    return _plain_pair(row) or _check_carefully(row)


def _plain_pair(row: Any) -> Example | None:
    """A usable row of two or three texts and nothing else, as nearly all are; None for others."""
    if type(row) is not dict:
        return None
    instruction, response = row.get("instruction"), row.get("response")
    condition: str | None = DEFAULT_CONDITION
    if len(row) == 3:
        given = row.get("condition")
        condition = plain_condition(given) if type(given) is str else None
    elif len(row) != 2:
        return None
    if (
        condition is None
        or type(instruction) is not str
        or type(response) is not str
        or not response
        or response.isspace()
        or "\0" in instruction
        or "\0" in response
        or not (_is_unicode(instruction) and _is_unicode(response))
    ):
        return None
    return Example(condition, instruction, response)


def _check_carefully(row: Any) -> Example | str:
    """What `check_row` gives, by its definition."""
    if not isinstance(row, dict):
        return "not a JSON object"
    example = _as_conversation(row) if _is_conversation(row) else _as_pair(row)
    if isinstance(example, str):
        return example
    plain = plain_condition(example.condition)
    if plain is None:
        return "unknown condition"
    return check_text(example._replace(condition=plain))


def _is_conversation(row: dict[str, Any]) -> bool:
    return any(row.get(key) is not None for key in CHAT_KEYS) or (
        "instruction" not in row and any(key in row for key in CHAT_KEYS)
    )


def _as_conversation(row: dict[str, Any]) -> Example | str:
    if row.get("instruction") is not None or row.get("response") is not None:
        return "both a conversation and an instruction or response"
    return read_conversation(row)


def _as_pair(row: dict[str, Any]) -> Example | str:
    for key in ("instruction", "response"):
        if key not in row:
            return f"missing {key}"
        if not isinstance(row[key], str):
            return f"{key} is not a string"
    condition = row.get("condition")
    if condition is None:
        condition = DEFAULT_CONDITION
    if not isinstance(condition, str):
        return "condition is not a string"
    history = row.get(HISTORY)
    if isinstance(history, str):  # as Parquet files hold it
        try:
            history = json.loads(history)
        except (ValueError, RecursionError):  # a number of too many digits is a plain ValueError
            return "history is not JSON"
    turns = read_history([] if history is None else history)
    if isinstance(turns, str):
        return turns
    return Example(condition, row["instruction"], row["response"], turns)


def check_text(example: Example) -> Example | str:
    """The example itself, or why no model can learn from its text."""
    for instruction, response, _ in example.turns() if example.history else (example[1:],):
        if not response or response.isspace():
            return "empty response"
        if "\0" in instruction or "\0" in response:
            return "NUL character"
        if not (_is_unicode(instruction) and _is_unicode(response)):
            return "lone surrogate (not valid Unicode)"
    return example


@lru_cache(maxsize=4096)
def plain_condition(condition: str) -> str | None:
    """The comma list without spaces, or None if a name in it is unknown."""
    names = [name.strip() for name in condition.split(",")]
    if names == [""]:
        return ""
    return ",".join(names) if all(name in CONDITIONS for name in names) else None


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _DoubledKey(ValueError):
    pass


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise _DoubledKey
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_object)
_scan_once: Callable[[str, int], tuple[Any, int]] = vars(_DECODER)["scan_once"]
_BLANK = object()


def _decode_line(line: bytes) -> Any:
    """The value of a line of JSON; _BLANK where there is nothing in it.

    Raises:
        UnicodeDecodeError, _DoubledKey, ValueError or RecursionError: what is wrong with it.
    """
    text = line.decode("utf-8")
    if text.startswith("{") and text.endswith("}\n"):
        # Nothing around the object: the scanner without what skips spaces at both ends.
        with contextlib.suppress(StopIteration):  # a value is missing: what follows says so
            row, end = _scan_once(text, 0)
            if end == len(text) - 1:
                return row
    if not text or text.isspace():
        return _BLANK
    return _DECODER.decode(text)


def _jsonl_rows(path: Path, problems: RowProblems, part: Part | None) -> Iterator[tuple[int, Any]]:
    """Line number, counted from 1, and value."""
    for number, line in enumerate(read_lines(path, part), start=1):
        problems.num_read = number
        if line is None:
            problems.add("line too long", f"{path}:{number}")
            continue
        if number == 1 and not (part and part.start):
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            row = _decode_line(line)
        except UnicodeDecodeError:
            problems.add("not UTF-8", f"{path}:{number}")
        except _DoubledKey:
            problems.add("a key stands twice", f"{path}:{number}")
        except (ValueError, RecursionError):  # a number of too many digits is a plain ValueError
            problems.add("malformed JSON", f"{path}:{number}")
        else:
            if row is not _BLANK:
                yield number, row


def _parquet_rows(
    path: Path, problems: RowProblems, part: Part | None
) -> Iterator[tuple[int, Any]]:
    """Row number, counted from 1, and value."""
    with open_parquet(path) as file:
        import pyarrow

        try:
            columns = _parquet_columns(path, file.schema_arrow)
            groups = None if part is None else list(range(*part))
            number = 0
            for batch in file.iter_batches(
                batch_size=ROWS_PER_BATCH, columns=columns, row_groups=groups
            ):
                values = [_column_values(batch.column(name)) for name in columns]
                for row in zip(*values, strict=True):
                    number += 1
                    problems.num_read = number
                    if any(value is UnicodeDecodeError for value in row):
                        problems.add("not UTF-8", f"{path}:{number}")
                    else:
                        yield number, dict(zip(columns, row, strict=True))
        except (pyarrow.ArrowException, OSError) as error:
            raise DataError(f"{path} is not a whole Parquet file: {error}") from error


def _parquet_columns(path: Path, schema: Any) -> list[str]:
    import pyarrow

    names = [name for name in (*CHAT_KEYS, *COLUMNS, HISTORY, *CHAT_EXTRAS) if name in schema.names]
    for name in names:
        if schema.names.count(name) > 1:
            raise DataError(f"{path} has {schema.names.count(name)} columns {name!r}, expected one")
    chat = [name for name in CHAT_KEYS if name in names]
    if chat:
        for name in chat:
            kind = schema.field(name).type
            if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)):
                raise DataError(f"{path}: column {name!r} is {kind}, expected lists of messages")
    else:
        for name in ("instruction", "response"):
            if name not in names:
                raise DataError(
                    f"{path} has no column {name!r}; it has {', '.join(schema.names) or 'none'}. "
                    f"Expected instruction and response, or {' or '.join(CHAT_KEYS)}"
                )
    for name in (*COLUMNS, HISTORY):
        if name not in names:
            continue
        kind = schema.field(name).type
        if pyarrow.types.is_dictionary(kind):
            kind = kind.value_type
        is_text = (
            pyarrow.types.is_string(kind)
            or pyarrow.types.is_large_string(kind)
            or pyarrow.types.is_string_view(kind)
            or (name in ("condition", HISTORY) and pyarrow.types.is_null(kind))
        )
        if not is_text:
            raise DataError(f"{path}: column {name!r} is {kind}, expected strings")
    return names if chat else [name for name in names if name not in CHAT_EXTRAS]


def _column_values(column: Any) -> Iterable[Any]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # Arrow does not check UTF-8 when it reads
        return [_value(item) for item in column]


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except UnicodeDecodeError:
        return UnicodeDecodeError
