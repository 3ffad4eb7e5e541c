"""Scores: exact match, its confidence interval, and what a constant answer would reach."""

from __future__ import annotations

import math
import unicodedata
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from hrmtext.data.sources.local import RowProblems, find_files, read_batches, stratum_label
from hrmtext.errors import DataError

NORMALISATION = "Unicode NFC, white space at both ends removed; everything else counts"
Z_95 = 1.959_963_984_540_054
"""Half-width of a 95 % interval of a normal distribution, in standard deviations."""


def normalize_answer(text: str) -> str:
    """The form in which answers are compared, see NORMALISATION."""
    return unicodedata.normalize("NFC", text).strip()


def exact_match(answer: str, expected: str) -> bool:
    """Whether both are the same after normalisation."""
    return normalize_answer(answer) == normalize_answer(expected)


def wilson_interval(num_right: int, num_rows: int, z: float = Z_95) -> tuple[float, float]:
    """Wilson's score interval of a share; (0, 1) for no rows. Source: Wilson 1927."""
    if not 0 <= num_right <= num_rows:
        raise ValueError(f"{num_right} right of {num_rows} rows")
    if num_rows == 0:
        return 0.0, 1.0
    share = num_right / num_rows
    spread = z * z / num_rows
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / num_rows + spread / (4 * num_rows))
    low = 0.0 if num_right == 0 else max(0.0, centre - half)
    high = 1.0 if num_right == num_rows else min(1.0, centre + half)
    return low, high


def most_frequent(answers: Iterable[str]) -> str:
    """The most frequent normalised answer; of equally frequent ones the alphabetically first."""
    counts = Counter(map(normalize_answer, answers))
    if not counts:
        raise DataError("no answers to take the most frequent of")
    best = max(counts.values())
    return min(answer for answer, count in counts.items() if count == best)


def majority_answers(clean_folder: str | Path) -> dict[str, str]:
    """Stratum -> most frequent answer of its training rows, from a folder of cleaned rows.

    Raises:
        DataError: no such files, or damaged ones.
    """
    found = {}
    for name, path in find_files(Path(clean_folder)).items():
        counts: Counter[str] = Counter()
        for batch in read_batches(path, RowProblems(strict=True)):
            counts.update(normalize_answer(example.response) for example in batch)
        if counts:
            best = max(counts.values())
            found[stratum_label(name)] = min(a for a, count in counts.items() if count == best)
    return found
