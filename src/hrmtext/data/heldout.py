"""Rows for evaluation: prompts and responses as ids, and fixed packed validation batches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hrmtext.data.arrays import Array
from hrmtext.data.example import HISTORY, HeldOutRow
from hrmtext.data.format import (
    METADATA_FILE,
    RowIndex,
    SampledData,
    read_json,
    read_stratum,
    read_tokenizer_info,
    stratum_folders,
)
from hrmtext.data.pack import plan_epoch
from hrmtext.data.sources.chat import read_history
from hrmtext.data.sources.local import stratum_label
from hrmtext.data.tokenizer import CONDITIONS, SPECIAL_TOKENS
from hrmtext.data.turns import turns_of
from hrmtext.errors import DataError

if TYPE_CHECKING:
    from hrmtext.batch import PackedBatch, TokenTurn

SAMPLED_KEY = "tokenizer_info"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenRow:
    """One row as token ids."""

    prompt: list[int]
    """Begin, conditions, instruction, prompt end; of a chat row, all before the last response."""
    response: list[int]
    """Text and its end token."""
    condition: str
    """Comma list of condition names, read back from the prompt."""
    stratum: str
    """Stratum without its file's ending; empty where it was not recorded."""
    blocks: tuple[tuple[int, int], ...] = ()
    """Of a chat row (start, end) of each turn's prompt; empty: the prompt is one turn's."""

    def turns(self) -> list[TokenTurn]:
        """The row's turns; only the last response is scored."""
        from hrmtext.batch import TokenTurn  # torch comes with it; preparing data does without

        blocks = list(self.blocks) or [(0, len(self.prompt))]
        found = [
            TokenTurn(self.prompt[start:end], self.prompt[end:after], False)
            for (start, end), (after, _) in pairwise(blocks)
        ]
        return [*found, TokenTurn(self.prompt[blocks[-1][0] :], self.response)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationBatch:
    """A packed batch with the group of each of its rows."""

    batch: PackedBatch
    conditions: tuple[str, ...]
    """(R) condition of each row."""
    strata: tuple[str, ...]
    """(R) stratum of each row."""


def load_rows(folder: str | Path, limit: int | None = None, epoch: int = 0) -> list[TokenRow]:
    """Rows of a tokenised or a sampled folder, in its order.

    Args:
        limit: rows of each stratum of a tokenised folder, or of the whole epoch of a sampled one.
        epoch: which epoch of a sampled folder.

    Raises:
        DataError: no such folder, or damaged files.
    """
    folder = Path(folder)
    if (folder / METADATA_FILE).is_file() and SAMPLED_KEY in read_json(folder / METADATA_FILE):
        data = SampledData.open(folder)
        index, ids = data.epoch(epoch), data.stratum_ids(epoch)
        labels = [stratum_label(name) for name in data.strata()]
        names = [""] * index.num_rows if ids is None else [labels[i] for i in ids.tolist()]
        conditions = condition_names(data.info)
        return list(_rows(data.tokens, index, data.turns, names, conditions, limit))
    conditions = condition_names(read_tokenizer_info(folder))
    rows: list[TokenRow] = []
    for path in stratum_folders(folder):
        stratum = read_stratum(path)
        names = [stratum_label(stratum.name)] * stratum.index.num_rows
        rows += _rows(stratum.tokens, stratum.index, stratum.turns, names, conditions, limit)
    return rows


def fitting_rows(rows: Sequence[TokenRow], max_seq_len: int) -> tuple[list[TokenRow], int]:
    """The rows whose inputs fit a context of `max_seq_len` tokens, and how many do not."""
    kept = [row for row in rows if len(row.prompt) + len(row.response) - 1 <= max_seq_len]
    return kept, len(rows) - len(kept)


def validation_batches(
    rows: Sequence[TokenRow], bin_tokens: int, *, pad_to: int | None = None, prefix_lm: bool = True
) -> list[ValidationBatch]:
    """Pack rows into as few batches of at most `bin_tokens` tokens as their order allows.

    The same rows always give the same batches; `row_ids` are places in `rows`.

    Raises:
        DataError: a row longer than `bin_tokens`.
    """
    from hrmtext.batch import PackedBatch

    lengths = [len(row.prompt) + len(row.response) - 1 for row in rows]
    plan = plan_epoch(np.array(lengths, dtype=np.int64), bin_tokens)
    batches = []
    for number in range(plan.num_batches):
        ids = plan.batch(number).tolist()
        members = [rows[i] for i in ids]
        batches.append(
            ValidationBatch(
                batch=PackedBatch.from_turns(
                    [row.turns() for row in members],
                    num_tokens=pad_to,
                    prefix_lm=prefix_lm,
                    row_ids=ids,
                ),
                conditions=tuple(row.condition for row in members),
                strata=tuple(row.stratum for row in members),
            )
        )
    return batches


def write_held_out(path: Path, rows: Sequence[HeldOutRow]) -> None:
    """Write held-out rows as JSONL; `path` is a temporary name of the caller's."""
    with path.open("w", encoding="utf-8") as stream:
        for row in rows:
            values: dict[str, Any] = dataclasses.asdict(row)
            values[HISTORY] = [turn._asdict() for turn in row.history]
            if not row.history:
                del values[HISTORY]
            stream.write(json.dumps(values, ensure_ascii=False) + "\n")


def read_held_out(path: str | Path) -> list[HeldOutRow]:
    """Held-out rows of a JSONL file, or of all of them in a folder, by name.

    Raises:
        DataError: no file, or a line that is no held-out row.
    """
    path = Path(path)
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"no held-out .jsonl file at {path}; run `hrm-text data prepare` first")
    rows = []
    for file in files:
        with file.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    values = json.loads(line)
                    history = read_history(values.pop(HISTORY, []))
                    if isinstance(history, str):
                        raise ValueError(history)
                    rows.append(HeldOutRow(**values, history=history))
                except (ValueError, TypeError, AttributeError) as error:
                    raise DataError(f"{file}:{number} is not a held-out row: {error}") from error
    return rows


def condition_names(info: dict[str, Any]) -> dict[int, str]:
    """Token id -> condition name, for tokenizers with the usual special tokens."""
    mapping = info.get("condition_mapping", CONDITIONS)
    ids = {token: number for number, token in enumerate(SPECIAL_TOKENS)}
    return {ids[token]: name for name, token in mapping.items() if token in ids}


def _rows(
    tokens: Array,
    index: RowIndex,
    turn_values: Array | None,
    names: Sequence[str],
    conditions: dict[int, str],
    limit: int | None,
) -> Iterator[TokenRow]:
    count = index.num_rows if limit is None else min(limit, index.num_rows)
    turns = turns_of(index.extras, turn_values)
    for row in range(count):
        a, b, c, d = (int(array[row]) for array in index)
        prompt = tokens[a : a + b].tolist()
        yield TokenRow(
            prompt=prompt,
            response=tokens[c : c + d].tolist(),
            condition=_condition(prompt, conditions),
            stratum=names[row],
            blocks=() if turns is None else _blocks(turns.of_row(row), b),
        )


def _blocks(turns: list[tuple[int, int, bool]], prompt_length: int) -> tuple[tuple[int, int], ...]:
    """(start, end) of every prompt of a chat row."""
    starts = [0, *(response_end for _, response_end, _ in turns)]
    return tuple(zip(starts, [*(end for end, _, _ in turns), prompt_length], strict=True))


def _condition(prompt: list[int], names: dict[int, str]) -> str:
    found = []
    for token in prompt[1:]:
        if token not in names:
            break
        found.append(names[token])
    return ",".join(found)
