"""Thoughts, code, boxed answers and scripts in texts."""

from __future__ import annotations

import time

import pytest

from hrmtext.data.text import (
    boxed_answer,
    boxed_answers,
    has_code_fence,
    mentions_python,
    script_share,
    without_thinking,
)


@pytest.mark.parametrize(("text", "left"), [
    (" as it is ", " as it is "),
    ("<think>a\nb</think>\n\nfour", "four"),
    ("one <think>x</think> two <think>y</think>", "one  two"),
    ("thought that began in the prompt</think> four", "four"),
    ("<think></think>", ""),
    ("<think>for ever", None),
    ("<think>a</think> b <think>for ever", None),
])  # fmt: skip
def test_thinking_is_removed_and_an_endless_thought_is_told(text, left):
    assert without_thinking(text) == left


@pytest.mark.parametrize(("text", "answers"), [
    (r"so \boxed{4}", ["4"]),
    (r"\boxed{\frac{1}{2}} or \boxed {\text{no}}.", [r"\frac{1}{2}", r"\text{no}"]),
    (r"\boxed{\left\{x : x^{2} > 1\right\}}", [r"\left\{x : x^{2} > 1\right\}"]),
    (r"\boxed{outer \boxed{inner}}", [r"outer \boxed{inner}"]),
    (r"\fbox{7} and \boxed{never ends", ["7"]),
    (r"\boxed{a{b \boxed{c}", ["c"]),
    (r"\boxed 5, boxed{6}, \boxed{}", [""]),
    ("\\boxed{ends in a backslash\\", []),
    ("", []),
])  # fmt: skip
def test_boxed_answers_keep_nested_braces(text, answers):
    assert boxed_answers(text) == answers
    assert boxed_answer(text) == (answers[-1] if answers else None)


def test_hostile_texts_take_a_moment_not_hours():
    start = time.perf_counter()
    assert without_thinking("<think>" * 100_000) is None
    assert boxed_answers("\\boxed{" * 100_000) == []
    assert time.perf_counter() - start < 5


def test_code_is_a_fence_at_the_start_of_a_line_and_python_any_mention():
    assert has_code_fence("so:\n```python\nprint(1)\n```") and has_code_fence("> ~~~\nx")
    assert not has_code_fence("use ``` in Markdown") and not has_code_fence("``x``")
    assert mentions_python("A Python's length") and not mentions_python("pyt hon")


def test_scripts_are_counted_in_letters():
    assert script_share("plain, 12 + 3!", ["LATIN"]) == 1.0
    assert script_share("12 + 3 = 15", ["CYRILLIC"]) == 1.0
    assert script_share("plain", ["CYRILLIC"]) == 0.0
    assert script_share("abc где", ["LATIN"]) == 0.5
    assert script_share("日本 ab", ["CJK"]) == 0.5
    assert script_share("\uff21\U0001d400 \u03b1\u03b2", ["LATIN"]) == 0.5
