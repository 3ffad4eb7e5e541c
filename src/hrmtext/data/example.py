"""The row that every source yields and every later stage reads."""

from __future__ import annotations

from typing import NamedTuple


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
