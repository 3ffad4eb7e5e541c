"""The rows that sources yield and later stages read."""

from __future__ import annotations

import dataclasses
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple


class Turn(NamedTuple):
    """An earlier turn of a conversation."""

    instruction: str
    response: str
    train: bool = True
    """Whether the response bears loss."""


class Example(NamedTuple):
    """One instruction/response pair. A tuple: there are hundreds of millions of them."""

    condition: str
    """Comma list of condition names (`synth,cot`); empty: no condition token."""
    instruction: str
    """Of the last turn, where there are several."""
    response: str
    history: tuple[Turn, ...] = ()
    """Earlier turns of a chat row, oldest first; the row's condition stands in each of them."""

    def turns(self) -> tuple[Turn, ...]:
        """All turns, the last one included; it always bears loss."""
        return (*self.history, Turn(self.instruction, self.response))

    def to_mapping(self) -> dict[str, Any]:
        """The row of a cleaned file; `history` only where there is one."""
        row: dict[str, Any] = dict(zip(COLUMNS, self, strict=False))
        if self.history:
            row[HISTORY] = [turn._asdict() for turn in self.history]
        return row


COLUMNS: tuple[str, ...] = ("condition", "instruction", "response")
"""Columns of a cleaned file, in order."""

HISTORY = "history"
"""Further column of cleaned files that hold chat rows (ours; other readers see the last turn)."""

TURN_MARK = "\x1e"
"""Between turns in the keys of `prompt_keys`."""

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
    history: tuple[Turn, ...] = ()
    """Earlier turns of a chat row; `instruction` and `response` are its last turn."""


def normalize_prompt(text: str) -> str:
    """The form in which prompts are compared: case, spacing and Unicode variants do not count."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def prompt_keys(instructions: Sequence[str], responses: Sequence[str]) -> list[str]:
    """What each turn of a conversation is asked, context included, in the form for comparison.

    A follow-up such as `and then?` means nothing alone, so a turn's key is all up to its prompt;
    the key of a first turn is `normalize_prompt` of its text.

    Args:
        instructions: (K) of all turns. responses: (K - 1 or K) of the turns before the last.
    """
    keys, before = [], ""
    for number, instruction in enumerate(instructions):
        before += normalize_prompt(instruction)
        keys.append(before)
        if number < len(responses):
            before += TURN_MARK + normalize_prompt(responses[number]) + TURN_MARK
    return keys


def example_keys(example: Example) -> list[str]:
    """`prompt_keys` of a training row, one a turn."""
    if not example.history:
        return [normalize_prompt(example.instruction)]
    turns = example.turns()
    return prompt_keys([turn.instruction for turn in turns], [turn.response for turn in turns])
