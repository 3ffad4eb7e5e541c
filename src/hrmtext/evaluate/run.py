"""Evaluate a model on held-out rows."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from hrmtext.config.base import to_mapping
from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.config.generate import GenerateConfig
from hrmtext.data.example import HeldOutRow
from hrmtext.errors import BackendError, DataError
from hrmtext.evaluate.report import EvaluationReport, FamilyResult, Prediction
from hrmtext.evaluate.score import (
    NORMALISATION,
    exact_match,
    most_frequent,
    wilson_interval,
)
from hrmtext.generate import Generated, TextModel
from hrmtext.runtime.log import warn_once

HELD_OUT, TRAINING = "held-out rows", "training rows"


def evaluate(
    model: TextModel,
    rows: Sequence[HeldOutRow],
    config: EvaluateConfig | None = None,
    *,
    train_majority: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> EvaluationReport:
    """Greedy answers to every row, scored by family.

    Args:
        rows: held-out rows; a row's family is its stratum.
        train_majority: stratum -> most frequent training answer (see `majority_answers`) for the
            baseline; None: the most frequent held-out answer, which flatters the baseline.
        progress: called with the answers done and wanted.

    Raises:
        DataError: no rows, a family without a training answer, or an unknown condition.
    """
    config = config or EvaluateConfig()
    rows = _limited(rows, config.limit)
    if not rows:
        raise DataError("no held-out rows to evaluate on")
    families = list(dict.fromkeys(row.stratum for row in rows))
    if train_majority is not None:
        missing = [family for family in families if family not in train_majority]
        if missing:
            raise DataError(f"no training answers are given for: {', '.join(missing)}")
    began = time.monotonic()
    answers = _answer(model, rows, config, progress)
    elapsed_s = time.monotonic() - began
    predictions = [_judge(row, answer, config) for row, answer in zip(rows, answers, strict=True)]
    too_long = [answer is None for answer in answers]
    results = []
    for family in families:
        chosen = [i for i, row in enumerate(rows) if row.stratum == family]
        results.append(
            _family(
                family,
                [predictions[i] for i in chosen],
                sum(too_long[i] for i in chosen),
                None if train_majority is None else train_majority[family],
            )
        )
    return EvaluationReport(
        families=results,
        mean={
            "exact_match": _mean([result.exact_match for result in results]),
            "majority": _mean([result.majority for result in results]),
            "invalid": _mean([result.invalid for result in results]),
            "score": _mean([result.score for result in results if result.score is not None]),
        },
        majority_source=HELD_OUT if train_majority is None else TRAINING,
        settings={
            **to_mapping(config),
            "temperature": 0.0,
            "normalisation": NORMALISATION,
            "interval": "Wilson, 95 %",
        },
        generated_tokens=sum(len(answer.tokens) for answer in answers if answer is not None),
        elapsed_s=elapsed_s,
        predictions=predictions,
    )


def _limited(rows: Sequence[HeldOutRow], limit: int | None) -> list[HeldOutRow]:
    taken: dict[str, int] = {}
    kept = []
    for row in rows:
        taken[row.stratum] = taken.get(row.stratum, 0) + 1
        if limit is None or taken[row.stratum] <= limit:
            kept.append(row)
    return kept


def _answer(
    model: TextModel,
    rows: Sequence[HeldOutRow],
    config: EvaluateConfig,
    progress: Callable[[int, int], None] | None,
) -> list[Generated | None]:
    """One answer a row, None where the prompt leaves no room for one."""
    conditions = [row.condition if config.condition is None else config.condition for row in rows]
    encoded = [
        model.tokenizer.encode_question(row.history, row.instruction, condition)
        for row, condition in zip(rows, conditions, strict=True)
    ]
    prompts, blocks = zip(*encoded, strict=True)
    fits = [i for i, prompt in enumerate(prompts) if len(prompt) < model.config.max_seq_len]
    if len(fits) < len(rows):
        warn_once(
            f"{len(rows) - len(fits)} of {len(rows)} held-out prompts are longer than this model's "
            f"{model.config.max_seq_len - 1} tokens; they count as wrong"
        )
    depth = None
    if config.H_cycles is not None or config.L_cycles is not None:
        depth = (config.H_cycles or model.config.H_cycles, config.L_cycles or model.config.L_cycles)
    settings = GenerateConfig(
        max_new_tokens=config.max_new_tokens,
        guidance=config.guidance,
        batch_tokens=config.batch_tokens,
    )
    options: dict[str, Any] = {"depth": depth, "with_logprobs": False, "progress": progress}
    if any(rows[i].history for i in fits):
        if not isinstance(model, TextModel):
            raise BackendError(
                f"{type(model).__name__} reads a prompt as one block, and some held-out rows have "
                "earlier turns, a block each; evaluate the model in another form than GGUF"
            )
        found = model.generate_ids(
            [prompts[i] for i in fits], [blocks[i] for i in fits], settings, **options
        )
    else:
        found = model.generate_tokens(
            [rows[i].instruction for i in fits], [conditions[i] for i in fits], settings, **options
        )
    answers: list[Generated | None] = [None] * len(rows)
    for place, answer in zip(fits, found, strict=True):
        answers[place] = answer
    return answers


def _judge(row: HeldOutRow, answer: Generated | None, config: EvaluateConfig) -> Prediction:
    text = "" if answer is None else answer.text
    valid = answer is not None and answer.finish_reason == "stop"
    return Prediction(
        family=row.stratum,
        condition=row.condition if config.condition is None else config.condition,
        instruction=row.instruction,
        expected=row.response,
        answer=text,
        # An answer that was cut off is none, even where its beginning looks right.
        right=valid and exact_match(text, row.response),
        valid=valid,
        score=_family_score(row, text if valid else None),
    )


def _family_score(row: HeldOutRow, answer: str | None) -> float | None:
    """The reasoning-gym scorer's mark (0 for no answer); None where it cannot judge the row."""
    if row.family is None or row.metadata is None:
        return None
    if importlib.util.find_spec("reasoning_gym") is None:
        warn_once("families' own scorers are left out: reasoning-gym is not installed")
        return None
    if answer is None:
        return 0.0
    from hrmtext.data.sources.reasoning_gym import score

    entry = {"question": row.instruction, "answer": row.response, "metadata": row.metadata}
    return score(row.family, entry, answer)


def _family(
    name: str, predictions: Sequence[Prediction], too_long: int, majority_answer: str | None
) -> FamilyResult:
    count = len(predictions)
    if majority_answer is None:
        majority_answer = most_frequent(p.expected for p in predictions)
    num_right = sum(p.right for p in predictions)
    low, high = wilson_interval(num_right, count)
    scores = [p.score for p in predictions if p.score is not None]
    return FamilyResult(
        name=name,
        rows=count,
        exact_match=num_right / count,
        low=low,
        high=high,
        majority=sum(exact_match(majority_answer, p.expected) for p in predictions) / count,
        majority_answer=majority_answer,
        invalid=sum(not p.valid for p in predictions) / count,
        too_long=too_long,
        score=_mean(scores),
        scored_rows=len(scores),
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
