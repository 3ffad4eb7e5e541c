"""What cleaning decides of one row, and what it counts."""

from __future__ import annotations

import collections
import dataclasses
import re
from typing import TYPE_CHECKING, Any, Self

from hrmtext.data.example import HISTORY, Example, example_keys
from hrmtext.data.pii import find, mask
from hrmtext.data.row_files import history_text
from hrmtext.data.rules import apply_rules
from hrmtext.data.sources.local import PLACES_KEPT, check_text, plain_condition

if TYPE_CHECKING:
    from hrmtext.config.data import CleaningConfig

SAMPLES_KEPT = 3
SAMPLE_CHARS = 200
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
HELD_OUT = "prompt is held out"


@dataclasses.dataclass(kw_only=True)
class StratumCleaning:
    """What cleaning did to one stratum."""

    kept: int = 0
    dropped: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows by reason."""
    samples: dict[str, list[dict[str, str]]] = dataclasses.field(default_factory=dict)
    """The first few rows of each reason, cut short."""
    changed: dict[str, int] = dataclasses.field(default_factory=dict)
    """Rows kept (before near duplicates go) that the rules changed, by what was done."""
    unreadable: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Rows that the source could not use: reason -> rows and first places."""

    def drop(self, reason: str, example: Example) -> None:
        """Count one row, and keep it as a sample if it is among the first."""
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        samples = self.samples.setdefault(reason, [])
        if len(samples) < SAMPLES_KEPT:
            row = example.to_mapping()
            if example.history:
                row[HISTORY] = history_text(example)
            cut = {
                name: value[:SAMPLE_CHARS].encode(errors="replace").decode()
                for name, value in row.items()
            }
            samples.append(cut)

    def add(self, part: Self, num_read: int) -> None:
        """Add the counts of the stratum's next part, before which its file has `num_read` rows."""
        self.kept += part.kept
        for mine, its in ((self.dropped, part.dropped), (self.changed, part.changed)):
            for reason, count in its.items():
                mine[reason] = mine.get(reason, 0) + count
        for reason, samples in part.samples.items():
            known = self.samples.setdefault(reason, [])
            known += samples[: SAMPLES_KEPT - len(known)]
        add_places(self.unreadable, part.unreadable, num_read)

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON, in an order of their own."""
        values = dataclasses.asdict(self)
        return {
            key: dict(sorted(value.items())) if isinstance(value, dict) else value
            for key, value in values.items()
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class CleaningReport:
    """What cleaning did; also `report.json` beside the cleaned rows."""

    strata: dict[str, StratumCleaning]

    @property
    def kept(self) -> int:
        """Rows written."""
        return sum(stratum.kept for stratum in self.strata.values())

    @property
    def dropped(self) -> dict[str, int]:
        """Rows not written, by reason, over all strata; unreadable ones included."""
        total: dict[str, int] = {}
        for stratum in self.strata.values():
            for reason, count in stratum.dropped.items():
                total[reason] = total.get(reason, 0) + count
            for reason, problem in stratum.unreadable.items():
                total[reason] = total.get(reason, 0) + problem["rows"]
        return dict(sorted(total.items()))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values for JSON."""
        strata = {name: value.to_mapping() for name, value in self.strata.items()}
        return {"kept": self.kept, "dropped": self.dropped, "strata": strata}


class Cleaner:
    """Decides row by row, each seen by itself."""

    def __init__(
        self, config: CleaningConfig, held_out_prompts: frozenset[str] = frozenset()
    ) -> None:
        """`held_out_prompts` are in the form of `prompt_keys`."""
        self.config = config
        self.held_out_prompts = held_out_prompts

    def clean(
        self, batch: list[Example], report: StratumCleaning
    ) -> list[tuple[Example, frozenset[str]]]:
        """The rows to keep, as they are to be written, each with what was changed in it.

        The others are counted in `report`; those kept are not.
        """
        kept = []
        for example in batch:
            changed: collections.Counter[str] = collections.Counter()
            result = tidy(example, self.config, changed)
            if isinstance(result, str):
                report.drop(result, self._without_pii(example))
            elif self._is_held_out(result):
                report.drop(HELD_OUT, self._without_pii(example))
            else:
                kept.append((result, frozenset(changed)))
        return kept

    def _without_pii(self, row: Example) -> Example:
        """What may be shown of a dropped row: personal data that is to go goes from samples too."""
        if self.config.pii == "keep":
            return row
        kinds = self.config.pii_kinds

        def shown(text: str) -> str:
            return mask(text, find(text, kinds))

        return row._replace(
            instruction=shown(row.instruction),
            response=shown(row.response),
            history=tuple(
                turn._replace(instruction=shown(turn.instruction), response=shown(turn.response))
                for turn in row.history
            ),
        )

    def _is_held_out(self, row: Example) -> bool:
        prompts = self.held_out_prompts
        return bool(prompts) and not prompts.isdisjoint(example_keys(row))


def tidy(
    example: Example, config: CleaningConfig, changed: collections.Counter[str] | None = None
) -> Example | str:
    """The row as it is to be written, or why it is to be dropped, seen by itself."""
    result = apply_rules(example, config, collections.Counter() if changed is None else changed)
    return result if isinstance(result, str) else content_problem(result, config) or result


def content_problem(example: Example, config: CleaningConfig) -> str | None:
    """What is wrong with a row by itself, or None."""
    if plain_condition(example.condition) is None:
        return "unknown condition"
    checked = check_text(example)
    if isinstance(checked, str):
        return checked
    for instruction, response, _ in example.turns():
        if not instruction or instruction.isspace():
            return "empty instruction"
        if len(instruction) > config.max_instruction_chars:
            return "instruction too long"
        if len(response) > config.max_response_chars:
            return "response too long"
        if config.drop_control_characters and (
            CONTROL.search(instruction) or CONTROL.search(response)
        ):
            return "control character"
    return None


def add_places(total: dict[str, dict[str, Any]], more: dict[str, Any], num_read: int) -> None:
    """Add the problems of a part, before which the file has `num_read` lines or rows."""
    for reason, problem in more.items():
        known = total.setdefault(reason, {"rows": 0, "first": []})
        known["rows"] += problem["rows"]
        for place in problem["first"][: PLACES_KEPT - len(known["first"])]:
            if num_read:
                file, _, number = place.rpartition(":")
                place = f"{file}:{int(number) + num_read}"
            known["first"].append(place)
