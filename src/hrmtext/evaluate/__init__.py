"""Evaluation on held-out rows: exact match by family with intervals and a baseline."""

from hrmtext.evaluate.report import EvaluationReport, FamilyResult, Prediction
from hrmtext.evaluate.run import evaluate
from hrmtext.evaluate.score import exact_match, majority_answers, normalize_answer, wilson_interval

__all__ = [
    "EvaluationReport",
    "FamilyResult",
    "Prediction",
    "evaluate",
    "exact_match",
    "majority_answers",
    "normalize_answer",
    "wilson_interval",
]
