"""Exact match, intervals, majority answers."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hrmtext.errors import DataError
from hrmtext.evaluate.score import (
    exact_match,
    majority_answers,
    most_frequent,
    normalize_answer,
    wilson_interval,
)


def test_only_unicode_form_and_outer_white_space_do_not_count():
    assert exact_match(" 42\n", "42")
    assert exact_match("cafe\u0301", "caf\u00e9")
    for other in ("43", "4 2", "42.", "Forty"):
        assert not exact_match(other, "42")
    assert not exact_match("yes", "Yes")
    assert normalize_answer("\ta b ") == "a b"


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0),
     (81, 263, 0.2553, 0.3662)],
)  # fmt: skip
def test_wilson_intervals_are_the_published_ones(right, rows, low, high):
    found = wilson_interval(right, rows)
    assert found == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_share_and_narrows_with_more_rows(case):
    right, rows = case
    low, high = wilson_interval(right, rows)
    assert 0 <= low <= right / rows <= high <= 1
    more = wilson_interval(4 * right, 4 * rows)
    assert more[1] - more[0] < high - low


def test_no_rows_say_nothing_and_impossible_counts_are_refused():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="11 right of 10"):
        wilson_interval(11, 10)


def test_the_most_frequent_answer_is_taken_after_normalisation():
    assert most_frequent(["b", "a ", " a", "c"]) == "a"
    assert most_frequent(["b", "a"]) == "a"
    with pytest.raises(DataError, match="no answers"):
        most_frequent([])


def test_majority_answers_are_read_from_cleaned_training_rows(tmp_path):
    for name, answers in (("logic", ["no", "yes", "no "]), ("sums", ["3", "4", "4"])):
        lines = [json.dumps({"instruction": f"q{i}", "response": a}) for i, a in enumerate(answers)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    assert majority_answers(tmp_path) == {"logic": "no", "sums": "4"}
    with pytest.raises(DataError):
        majority_answers(tmp_path / "absent")
