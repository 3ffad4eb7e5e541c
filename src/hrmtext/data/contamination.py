"""How much of a benchmark stands in the training data, and whether that moves its score.

The audit of the HRM-Text paper (section 4.2): a question's contamination is the share of its tokens
inside an n-gram that the corpus holds too, for n = 13 and 20; questions are split into clean (below
20 %), not clean, not dirty (below 80 %) and dirty; the score of each subset is compared with that
of all questions. N questions, k of them in a subset.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hrmtext.data.arrays import Array
from hrmtext.data.format import RowIndex, read_stratum, stratum_folders
from hrmtext.data.ngrams import Ngrams, row_segments, rows_with_ngrams
from hrmtext.data.parts import read_lines
from hrmtext.data.sources.local import stratum_label
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.data.workers import Progress
from hrmtext.errors import DataError

NGRAM_SIZES = (13, 20)
CLEAN_BELOW, DIRTY_FROM = 0.2, 0.8
SIGNIFICANT = 2.0
"""|Z| beyond which a subset's score differs from that of all questions."""
SHOWN = 20
"""Questions listed in a report, the most contaminated first."""
SHOWN_CHARS = 300
SUBSETS: dict[str, Callable[[Array], Array]] = {
    "clean": lambda share: share < CLEAN_BELOW,
    "not clean": lambda share: share >= CLEAN_BELOW,
    "not dirty": lambda share: share < DIRTY_FROM,
    "dirty": lambda share: share >= DIRTY_FROM,
}
CONTAMINATED = "holds an n-gram of a benchmark"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """Questions, and what a model scored on each."""

    name: str
    questions: tuple[str, ...]
    scores: tuple[float, ...] | None = None
    """One a question; None: only the overlap is audited."""


def read_benchmark(path: str | Path) -> Benchmark:
    """A JSONL file with `question` and, in every line or in none, a number `score`.

    Raises:
        DataError: no such file, no question, or a line that is not of this form.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"no such benchmark file: {path}")
    questions: list[str] = []
    scores: list[float] = []
    for number, line in enumerate(read_lines(path), start=1):
        if line is not None and not line.strip():
            continue
        try:
            row = json.loads(line or b"")
        except ValueError as error:
            raise DataError(f"{path}:{number} is not a line of JSON: {error}") from None
        question = row.get("question") if isinstance(row, dict) else None
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{path}:{number}: expected an object with a string `question`")
        questions.append(question)
        if "score" in row:
            score = row["score"]
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise DataError(f"{path}:{number}: score is {score!r}, expected a number")
            scores.append(float(score))
        if len(scores) not in (0, len(questions)):
            raise DataError(f"{path}:{number}: some lines have a score and some have none")
    if not questions:
        raise DataError(f"{path} holds no question")
    return Benchmark(
        name=path.stem, questions=tuple(questions), scores=tuple(scores) if scores else None
    )


def audit(
    tokenized: str | Path,
    benchmarks: Sequence[Benchmark],
    *,
    sizes: Sequence[int] = NGRAM_SIZES,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Look for every benchmark's n-grams in a tokenised folder, in one pass over its tokens.

    Questions are tokenised as plain text with the folder's tokenizer. A match lies within one
    prompt or one response. Memory does not grow with the corpus.

    Returns:
        Plain values for JSON: `corpus`, and `benchmarks` by name, each with `ngrams` by size.

    Raises:
        DataError: a damaged folder, one without a tokenizer, or two benchmarks of one name.
    """
    tokenized = Path(tokenized)
    names = [benchmark.name for benchmark in benchmarks]
    if len(set(names)) < len(names) or not names:
        raise DataError(f"benchmarks {names}: expected at least one, each with its own name")
    tokenizer = PromptTokenizer.load(tokenized)
    texts = tokenizer.encode_texts([q for b in benchmarks for q in b.questions])
    searches = [_Search(Ngrams(texts, size)) for size in sizes]
    folders = stratum_folders(tokenized)
    rows = tokens = 0
    for number, folder in enumerate(folders):
        stratum = read_stratum(folder)
        rows += stratum.index.num_rows
        tokens += stratum.index.num_tokens
        for values, bounds, first in row_segments(stratum.tokens, stratum.index):
            for search in searches:
                search.look(values, bounds, number, first)
        if progress is not None:
            progress("searching strata", number + 1, len(folders))
    labels = [stratum_label(folder.name) for folder in folders]
    result: dict[str, Any] = {
        "corpus": {"rows": rows, "tokens": tokens, "tokenizer": tokenizer.fingerprint},
        "benchmarks": {},
    }
    at = 0
    for benchmark in benchmarks:
        which = slice(at, at + len(benchmark.questions))
        at = which.stop
        result["benchmarks"][benchmark.name] = {
            "questions": len(benchmark.questions),
            "scored": benchmark.scores is not None,
            "ngrams": {
                str(search.ngrams.size): search.result(benchmark, which, labels)
                for search in searches
            },
        }
    return result


class _Search:
    """Which n-grams of one size the corpus holds, where first, and in how many rows."""

    def __init__(self, ngrams: Ngrams) -> None:
        self.ngrams = ngrams
        self.found = np.zeros(len(ngrams), dtype=bool)
        self.first = np.full((len(ngrams), 2), -1, dtype=np.int64)  # (S, stratum and row)
        self.rows: dict[int, int] = {}

    def look(self, tokens: Array, bounds: Array, stratum: int, first_row: int) -> None:
        places, numbers = self.ngrams.find(tokens, bounds)
        if not len(places):
            return
        rows = first_row + np.searchsorted(bounds, places, side="right") // 2
        self.rows[stratum] = self.rows.get(stratum, 0) + len(np.unique(rows))
        numbers, at = np.unique(numbers, return_index=True)
        fresh = ~self.found[numbers]
        self.first[numbers[fresh], 0] = stratum
        self.first[numbers[fresh], 1] = rows[at[fresh]]
        self.found[numbers] = True

    def result(self, benchmark: Benchmark, which: slice, labels: Sequence[str]) -> dict[str, Any]:
        covered, lengths = (values[which] for values in self.ngrams.coverage(self.found))
        share = covered / np.maximum(lengths, 1)
        order = np.argsort(-share, kind="stable")[:SHOWN]
        return {
            "questions_shorter": int((lengths < self.ngrams.size).sum()),
            "questions_matched": int((covered > 0).sum()),
            "mean_contamination": float(share.mean()),
            # All benchmarks of the audit together: a row may hold n-grams of several.
            "corpus_rows_matched": {labels[s]: count for s, count in self.rows.items()},
            **subset_statistics(share, benchmark.scores),
            "most_contaminated": [
                {
                    "question": int(number),
                    "contamination": float(share[number]),
                    "text": benchmark.questions[number][:SHOWN_CHARS],
                    **self._place(which.start + int(number), labels),
                }
                for number in order
                if share[number] > 0
            ],
            "contamination": [round(float(value), 6) for value in share],
        }

    def _place(self, text: int, labels: Sequence[str]) -> dict[str, Any]:
        """Where the corpus holds the first n-gram of a text that it holds."""
        a, b = np.searchsorted(self.ngrams.starts, self.ngrams.bounds[text : text + 2])
        ids = self.ngrams.ids[a:b]
        stratum, row = self.first[ids[self.found[ids]][0]]
        return {"stratum": labels[stratum], "row": int(row)}


def subset_statistics(share: Array, scores: Sequence[float] | None) -> dict[str, Any]:
    """The four subsets of questions by contamination, and how far their scores stand out.

    Z = (mean of the subset - mean of all) / sigma(k), sigma(k) the standard deviation of the mean
    of k questions drawn from the N without replacement: S / sqrt(k) * sqrt((N - k) / (N - 1)), S
    the standard deviation over all N. `z_uncorrected` leaves out the second root, as for questions
    drawn from an endless supply. Contamination counts as significant only if |Z| > 2 in all four
    subsets; None where one is empty, or holds all questions, or all score the same.

    Args:
        share: (N) contamination of each question, 0 to 1.
        scores: (N) score of each; None: no Z.
    """
    values = None if scores is None else np.asarray(scores, dtype=np.float64)
    subsets: dict[str, dict[str, Any]] = {}
    for name, rule in SUBSETS.items():
        mask = rule(share)
        subset: dict[str, Any] = {"questions": int(mask.sum())}
        if values is not None:
            subset |= _z_values(values, mask)
        subsets[name] = subset
    result: dict[str, Any] = {"subsets": subsets}
    if values is not None:
        result["mean_score"] = float(values.mean())
        for verdict, key in (("significant", "z"), ("significant_uncorrected", "z_uncorrected")):
            found = [subset[key] for subset in subsets.values()]
            known = None not in found
            result[verdict] = all(abs(z) > SIGNIFICANT for z in found) if known else None
    return result


def _z_values(scores: Array, mask: Array) -> dict[str, Any]:
    total, count = len(scores), int(mask.sum())
    if not count:
        return {"mean_score": None, "z": None, "z_uncorrected": None}
    mean = float(scores[mask].mean())
    deviation = float(scores.std())
    values: dict[str, Any] = {"mean_score": mean, "z": None, "z_uncorrected": None}
    if deviation > 0 and count < total:
        plain = (mean - float(scores.mean())) / (deviation / math.sqrt(count))
        values["z_uncorrected"] = plain
        values["z"] = plain / math.sqrt((total - count) / (total - 1))
    return values


class ContaminationFilter:
    """Leaves the rows of a stratum that hold no n-gram of a benchmark; counts the others."""

    def __init__(self, ngrams: Ngrams, tokens: Array, dropped: dict[str, int]) -> None:
        """`tokens` are the stratum's; `dropped` is counted into."""
        self.ngrams, self.tokens, self.dropped = ngrams, tokens, dropped

    def __call__(self, index: RowIndex) -> RowIndex:
        """The rows without a match."""
        hit = rows_with_ngrams(self.tokens, index, self.ngrams)
        if hit.any():
            self.dropped[CONTAMINATED] = self.dropped.get(CONTAMINATED, 0) + int(hit.sum())
        return index.take(~hit)


def benchmark_ngrams(files: Sequence[str], size: int, tokenizer: PromptTokenizer) -> Ngrams:
    """The n-grams of the questions of benchmark files."""
    texts = [question for file in files for question in read_benchmark(file).questions]
    return Ngrams(tokenizer.encode_texts(texts), size)


def audit_text(result: Mapping[str, Any]) -> str:
    """The audit in a few lines for the terminal."""
    corpus = result["corpus"]
    lines = [f"{corpus['rows']:,} rows, {corpus['tokens']:,} tokens searched"]
    for name, benchmark in result["benchmarks"].items():
        for size, found in benchmark["ngrams"].items():
            parts = []
            for subset, values in found["subsets"].items():
                z = values.get("z")
                parts.append(f"{subset} {values['questions']:,}" + _signed(z))
            lines.append(
                f"{name}, n = {size}: {found['questions_matched']:,} of "
                f"{benchmark['questions']:,} questions overlap, {found['mean_contamination']:.1%} "
                f"of a question on average; {', '.join(parts)}"
            )
            if benchmark["scored"]:
                said = {True: "significant", False: "not significant", None: "cannot be judged"}
                lines[-1] += f"; {said[found['significant']]}"
            if found["questions_shorter"]:
                lines[-1] += f"; {found['questions_shorter']:,} questions are shorter than n"
    return "\n".join(lines)


def _signed(z: float | None) -> str:
    return "" if z is None else f" (Z {z:+.2f})"
