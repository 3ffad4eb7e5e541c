"""The rows that sources yield and later stages read."""

from __future__ import annotations

import dataclasses
import unicodedata
from typing import Any, NamedTuple


class Example(NamedTuple):
    """One instruction/response pair. A tuple: there are hundreds of millions of them."""

    condition: str
    """Comma list of condition names (`synth,cot`); empty: no condition token."""
    instruction: str
    response: str


COLUMNS: tuple[str, ...] = Example._fields
"""Columns of a cleaned file, in order."""

DEFAULT_CONDITION = "direct"
"""Condition of a row that states none."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutRow:
    """A row for evaluation."""

    stratum: str
    """Stratum, for reasoning-gym the family's label."""
    condition: str
    instruction: str
    response: str
    family: str | None = None
    """Family whose scorer can judge the row, where there is one."""
    metadata: dict[str, Any] | None = None
    """What the family's scorer needs; None: only exact match can judge the row."""
    settings: dict[str, Any] | None = None
    """The family's settings where they are not its defaults; some scorers depend on them."""


def normalize_prompt(text: str) -> str:
    """The form in which prompts are compared: case, spacing and Unicode variants do not count."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())
