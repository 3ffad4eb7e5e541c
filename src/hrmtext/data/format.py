"""The folders of tokenised and sampled data, as the public pipeline writes and reads them.

Tokenised: one folder a stratum with `tokens.npy` (uint32) and four index arrays (uint64).
Sampled: one `tokens.npy` and, per epoch, four index arrays (int64). Beside them lie our own extra
files (completion marker, report, stratum ids), which other readers ignore and ours do without.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.data.arrays import Array, open_array
from hrmtext.data.tokenizer import (
    BEGIN,
    CONDITIONS,
    END,
    PROMPT_END,
    TOKENIZER_FILE,
    PromptTokenizer,
)
from hrmtext.data.turns import (
    TURN_COLUMNS,
    TURNS_FILE,
    check_turns,
    require_turns,
    turn_values,
    turns_of,
)
from hrmtext.errors import CheckpointError, DataError
from hrmtext.runtime.io import MARKER, fingerprint, require_complete

INDEX_NAMES = ("inst_start", "inst_len", "resp_start", "resp_len")
EXTRA_NAMES: tuple[str, ...] = TURN_COLUMNS
"""Further columns that a stratum's index may have; sampling takes them along as int64."""
TOKENS_FILE = "tokens.npy"
METADATA_FILE = "metadata.json"
TOKENIZER_INFO_FILE = "tokenizer_info.json"
STRATUM_FILE = "stratum.npy"
REPORT_FILE = "report.json"
ROWS_PER_CHECK = 1 << 20
VOCAB_MULTIPLE = 256
"""The model's vocabulary is the tokenizer's, padded up to a multiple of this."""


@dataclasses.dataclass(frozen=True)
class RowIndex:
    """Where rows lie in the token array; four arrays of the same length, int64.

    `extras` are further columns of that length; whatever selects or reorders rows takes them along.
    """

    inst_start: Array
    inst_len: Array
    resp_start: Array
    resp_len: Array
    extras: Mapping[str, Array] = dataclasses.field(default_factory=dict)

    def __iter__(self) -> Iterator[Array]:
        """The four arrays, in the order of `INDEX_NAMES`."""
        return iter((self.inst_start, self.inst_len, self.resp_start, self.resp_len))

    @property
    def num_rows(self) -> int:
        """Rows."""
        return len(self.inst_start)

    @property
    def num_tokens(self) -> int:
        """Prompt and response tokens of all rows."""
        return int(self.inst_len.sum()) + int(self.resp_len.sum())

    def take(self, which: Array | slice) -> RowIndex:
        """The rows that `which` selects, an index, a mask or a slice."""
        extras = {name: array[which] for name, array in self.extras.items()}
        return RowIndex(*(array[which] for array in self), extras=extras)

    def input_lengths(self) -> Array:
        """(R) tokens that each row feeds to the model: all but its last."""
        return self.inst_len + self.resp_len - 1


def tokenizer_info(tokenizer: PromptTokenizer) -> dict[str, Any]:
    """What the public pipeline stores of a tokenizer; its file lies beside, hence the bare name."""
    return {
        "tokenizer_path": TOKENIZER_FILE,
        "boq": BEGIN,
        "eoq": PROMPT_END,
        "eoa": END,
        "condition_mapping": dict(CONDITIONS),
        "vocab_size": tokenizer.vocab_size,
    }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stratum:
    """One tokenised stratum, memory-mapped and checked."""

    name: str
    folder: Path
    tokens: Array
    index: RowIndex
    turns: Array | None
    """(K, 3) earlier turns of chat rows, see `hrmtext.data.turns`; None where there are none."""
    metadata: dict[str, Any]
    """`source_mtime` (seconds) and `source_size` (bytes)."""
    marker: dict[str, Any]
    """Our completion marker; empty for folders that other programs wrote."""


def read_stratum(folder: str | Path) -> Stratum:
    """Open one tokenised stratum.

    Raises:
        DataError: a file is missing, truncated, of another type, or points beyond the tokens.
    """
    folder = Path(folder)
    marker = read_marker(folder)
    metadata = read_json(folder / METADATA_FILE)
    tokens = open_array(folder / TOKENS_FILE)
    turns = read_turns(folder)
    return Stratum(
        name=folder.name, folder=folder, tokens=tokens, index=read_index(folder, tokens, turns),
        turns=turns, metadata=metadata, marker=marker,
    )  # fmt: skip


def stratum_folders(root: str | Path) -> list[Path]:
    """The strata below a tokenised folder, by name; DataError if there are none."""
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"no such folder: {root}")
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        raise DataError(f"{root} holds no tokenised stratum; run `hrm-text data tokenize` first")
    return folders


def read_tokenizer_info(root: str | Path) -> dict[str, Any]:
    """The tokenizer_info.json of a tokenised folder, checked for what sampling needs."""
    path = Path(root) / TOKENIZER_INFO_FILE
    info = read_json(path)
    _check_vocab_size(info, path)
    return info


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampledData:
    """A sampled folder, memory-mapped; epochs are opened and checked when asked for."""

    folder: Path
    tokens: Array
    num_epochs: int
    max_seq_len: int
    """Context in tokens, the shift already taken off."""
    total_length: int
    """Mean number of tokens an epoch."""
    info: dict[str, Any]
    """tokenizer_info of the public pipeline."""
    report: dict[str, Any]
    """Our report of the sampling; empty for folders that other programs wrote."""

    @classmethod
    def open(cls, folder: str | Path) -> SampledData:
        """Open a sampled folder, ours or the public pipeline's.

        Raises:
            DataError: a file is missing, truncated or malformed.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise DataError(f"no such folder: {folder}")
        marker = read_marker(folder)
        path = folder / METADATA_FILE
        metadata = read_json(path)
        info = metadata.get("tokenizer_info")
        if not isinstance(info, dict):
            raise DataError(f"{path}: tokenizer_info is {info!r}, expected a mapping")
        _check_vocab_size(info, path)
        for key in ("max_seq_len", "total_length"):
            if not isinstance(metadata.get(key), int) or metadata[key] < 0:
                raise DataError(f"{path}: {key} is {metadata.get(key)!r}, expected an integer")
        num_epochs = 0
        while (folder / f"epoch_{num_epochs}").is_dir():
            num_epochs += 1
        if not num_epochs:
            raise DataError(f"{folder} holds no epoch_0; it is not a sampled folder, or not whole")
        return cls(
            folder=folder,
            tokens=open_array(folder / TOKENS_FILE),
            num_epochs=num_epochs,
            max_seq_len=metadata["max_seq_len"] - 1,
            total_length=metadata["total_length"],
            info=info,
            report=read_json(folder / REPORT_FILE) if marker else {},
        )

    @property
    def vocab_size(self) -> int:
        """Vocabulary of the model: the tokenizer's, padded up to a multiple of 256."""
        from hrmtext.config.model import round_up  # workers start sooner without it

        return round_up(self.info["vocab_size"], VOCAB_MULTIPLE)

    def epoch(self, number: int) -> RowIndex:
        """Rows of epoch `number`, in the order of the folder; DataError if they are damaged."""
        if not 0 <= number < self.num_epochs:
            raise DataError(f"epoch {number} of {self.folder}: it has {self.num_epochs}")
        return read_index(self.folder / f"epoch_{number}", self.tokens, self.turns)

    @cached_property
    def turns(self) -> Array | None:
        """(K, 3) earlier turns of chat rows, see `hrmtext.data.turns`; None without any."""
        return read_turns(self.folder)

    def strata(self) -> list[str]:
        """Names of the strata; empty where another program wrote the folder."""
        return list(self.report.get("strata", []))

    def stratum_ids(self, number: int) -> Array | None:
        """(R) index into `strata()` of each row of an epoch; None where it was not recorded."""
        path = self.folder / f"epoch_{number}" / STRATUM_FILE
        if not self.strata() or not path.is_file():
            return None
        return open_array(path)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that change with the rows, their tokens or the tokenizer."""
        if "fingerprint" in self.report:
            return self.report["fingerprint"]
        parts: list[Any] = [self.info, self.max_seq_len]
        for number in range(self.num_epochs):
            parts += [self.folder / f"epoch_{number}" / f"{name}.npy" for name in INDEX_NAMES]
        return fingerprint(*parts, self.folder / TOKENS_FILE)

    def tokenizer(self) -> PromptTokenizer:
        """The tokenizer that lies in the folder; DataError where another program wrote it."""
        return PromptTokenizer.load(self.folder / TOKENIZER_FILE)


def read_turns(folder: Path) -> Array | None:
    """(K, 3) the turns that a folder's rows point to; None where it has none."""
    path = folder / TURNS_FILE
    return turn_values(open_array(path), path) if path.is_file() else None


def read_index(folder: Path, tokens: Array, turns: Array | None = None) -> RowIndex:
    """The four index arrays of `folder` as int64, checked against the token array.

    They stay memory-mapped: however many rows there are, little is held. `turns` is `read_turns` of
    the folder, or of the sampled folder above it.

    Raises:
        DataError: missing or damaged files, different lengths, empty or out-of-range rows.
    """
    arrays: list[Array] = []
    for name in INDEX_NAMES:
        path = folder / f"{name}.npy"
        array = open_array(path)
        if arrays and len(array) != len(arrays[0]):
            raise DataError(
                f"{path} has {len(array)} rows, but {INDEX_NAMES[0]}.npy has {len(arrays[0])}"
            )
        if len(array) and (int(array.max()) > len(tokens) or int(array.min()) < 0):
            raise DataError(
                f"{path} points beyond tokens.npy, which has {len(tokens)} tokens: one of the two "
                "is truncated or from another run"
            )
        # Values are small, so uint64 can be read as int64 without a copy; what is taken of a plain
        # array costs half of what it costs of a memory map.
        as_int64 = array.view(np.int64) if array.dtype == np.uint64 else array
        arrays.append(np.asarray(as_int64.astype(np.int64, copy=False)))
    extras = {}
    for name in EXTRA_NAMES:
        path = folder / f"{name}.npy"
        if path.is_file():
            extras[name] = open_array(path)
            if len(extras[name]) != len(arrays[0]):
                raise DataError(
                    f"{path} has {len(extras[name])} rows, but {INDEX_NAMES[0]}.npy has "
                    f"{len(arrays[0])}"
                )
    index = RowIndex(*arrays, extras=extras)
    require_turns(folder, extras, turns)
    for at in range(0, index.num_rows, ROWS_PER_CHECK):
        part = index.take(slice(at, at + ROWS_PER_CHECK))
        for kind, start, length in (
            ("inst", part.inst_start, part.inst_len), ("resp", part.resp_start, part.resp_len),
        ):  # fmt: skip
            beyond = start + length > len(tokens)
            if beyond.any():
                row = int(beyond.argmax())
                raise DataError(
                    f"{folder}: row {at + row}: its {kind} range {int(start[row])} + "
                    f"{int(length[row])} ends beyond the {len(tokens)} tokens of tokens.npy, which "
                    "may be truncated"
                )
            if int(length.min()) < 1:
                row = at + int(length.argmin())
                raise DataError(f"{folder / f'{kind}_len.npy'}: row {row} is empty")
        if (earlier := turns_of(part.extras, turns)) is not None:
            check_turns(folder, earlier, part.inst_len)
    return index


def row_tokens(tokens: Array, index: RowIndex) -> Array:
    """The tokens of rows, prompt, response, prompt, response, ..., end to end."""
    starts = np.stack([index.inst_start, index.resp_start], axis=1).ravel()
    stops = np.stack(
        [index.inst_start + index.inst_len, index.resp_start + index.resp_len], axis=1
    ).ravel()
    if len(starts) and np.array_equal(stops[:-1], starts[1:]):
        return tokens[starts[0] : stops[-1]]
    return np.concatenate(
        [tokens[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file whose top level is a mapping; DataError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no such file: {path}; the folder is not whole") from None
    except (ValueError, OSError) as error:
        raise DataError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value


def read_marker(folder: Path) -> dict[str, Any]:
    """Our completion marker, or {} where the folder has none since another program wrote it."""
    if not (folder / MARKER).exists():
        return {}
    try:
        return require_complete(folder)
    except CheckpointError as error:
        raise DataError(str(error)) from error


def _check_vocab_size(info: dict[str, Any], path: Path) -> None:
    size = info.get("vocab_size")
    if not isinstance(size, int) or size < 1:
        raise DataError(f"{path}: vocab_size of the tokenizer is {size!r}, expected an integer")
