"""What a public source is: where its rows lie, who may use them, how a row becomes examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple

from hrmtext.data.example import Example

Row = Mapping[str, Any]
Outcome = Iterable[Example | str]
"""Examples of one raw row; a string is the reason why the row, or half of it, gives none."""


@lru_cache(maxsize=256)
def _path(file: str) -> PurePosixPath:
    return PurePosixPath(file)  # costs more than many a rule, and is asked for row by row


class Origin(NamedTuple):
    """Where a raw row was read."""

    part: str
    """Name of the part of the source."""
    file: str = ""
    """Path of the file below the source's root, `/` between folders; empty where nobody knows."""

    @property
    def path(self) -> PurePosixPath:
        """`file` as a path."""
        return _path(self.file)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Rows that are read together: a config and split on the Hub, the same files in a mirror."""

    name: str = ""
    files: tuple[str, ...]
    """Patterns of the files, matched against the end of a path (`main/train-*.parquet`)."""
    config: str | None = None
    """The Hub's name for it."""
    split: str | None = "train"
    """None: every split."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """One row of the recipe's cleaning table."""

    name: str
    """Also the start of its strata's names."""
    rule: Callable[[Row, Origin], Outcome]
    """A pure function; its docstring states the rule."""
    columns: Mapping[str, type]
    """Columns that the rule reads, and the type of their values; `object`: any, null too."""
    nullable: frozenset[str] = frozenset()
    """Columns whose value may be null; a JSON object without such a key reads as null."""
    parts: tuple[Part, ...]
    hub: str | None
    """Id of the Hub data set; None: files that somebody has to fetch."""
    where: str = ""
    """For files without a Hub id: what they are."""
    conditions: tuple[str, ...]
    """Conditions of its examples; an empty string: no condition token."""
    licence: str
    citation: str
    max_rows: int | None = None
    """The published cap: rows of each stratum an epoch. None: all."""
    repeat: int = 1
    """Times that many rows an epoch."""
    sampling_note: str = ""
    """An exception to the cap."""
    by_file: bool = False
    """The Hub's files are read one by one: each is a stratum, or no config and split names them."""
    text: Literal["file", "line pairs"] = "file"
    """How .txt files are read: a row {text} a file, or {question, answer} from alternate lines."""
    stratum: Callable[[Row, Origin], str] | None = None
    """Name of a row's stratum; None: the source's name."""

    def stratum_of(self, row: Row, origin: Origin) -> str:
        """The stratum that a row's examples belong to."""
        return self.name if self.stratum is None else self.stratum(row, origin)

    @property
    def sampling(self) -> str:
        """The published rule in words."""
        words = "whole" if self.max_rows is None else f"{self.max_rows:,} rows a stratum"
        if self.repeat != 1:
            words = f"{words}, {self.repeat} times"
        return f"{words}; {self.sampling_note}" if self.sampling_note else words


def stratum_name(*names: str) -> str:
    """One name from several, joined by `__`; a `/` in them counts as another joint."""
    return "__".join(names).replace("/", "__")


def lettered(choices: Iterable[str], letters: Iterable[str] | None = None) -> str:
    """Choices as lines `A. text`; `letters` in place of A, B, C... where given."""
    marks = "ABCDEFGHIJKLMNOPQRSTUVWXYZ" if letters is None else letters
    return "\n".join(f"{mark}. {choice}" for mark, choice in zip(marks, choices, strict=False))


def letter(index: int, num_choices: int) -> str | None:
    """The letter of a choice counted from 0; None if there is no such choice."""
    return chr(ord("A") + index) if 0 <= index < min(num_choices, 26) else None


def is_empty(text: str | None) -> bool:
    """Whether there is nothing to read."""
    return text is None or not text.strip()


def asks_for_proof(question: str) -> bool:
    """Whether "prove" or "show that" stands anywhere in it, in capitals or not."""
    folded = question.casefold()
    return "prove" in folded or "show that" in folded
