"""Rules of cleaning that look at one text, change it or give a reason to drop its row."""

from __future__ import annotations

import collections
from typing import TYPE_CHECKING

from hrmtext.data.example import Example
from hrmtext.data.pii import find, mask
from hrmtext.data.text import (
    boxed_answer,
    has_code_fence,
    mentions_python,
    script_share,
    without_thinking,
)

if TYPE_CHECKING:
    from hrmtext.config.data import CleaningConfig


class RowDropped(Exception):
    """Raised within a rule, with the reason; never seen outside of `apply_rules`."""


def apply_rules(
    example: Example, config: CleaningConfig, changed: collections.Counter[str]
) -> Example | str:
    """The row as the rules leave it, or why it is to be dropped.

    Thoughts go first, so that what is in them does not count; then boxed answers, code, scripts,
    personal data. Each turn of a conversation goes through them as a pair does.

    Args:
        changed: what was done is counted into it.
    """
    try:
        history = tuple(
            turn._replace(instruction=instruction, response=response)
            for turn in example.history
            for instruction, response in [_pair(turn.instruction, turn.response, config, changed)]
        )
        instruction, response = _pair(example.instruction, example.response, config, changed)
    except RowDropped as reason:
        return str(reason)
    if not changed:
        return example
    return example._replace(instruction=instruction, response=response, history=history)


def _pair(
    instruction: str, response: str, config: CleaningConfig, changed: collections.Counter[str]
) -> tuple[str, str]:
    if config.remove_thinking:
        answer = without_thinking(response)
        if answer is None:
            raise RowDropped("thinking does not end")
        if answer != response:
            if not answer:
                raise RowDropped("nothing but thinking")
            changed["thinking removed"] += 1
            response = answer
    if config.boxed_answers != "keep":
        answer = boxed_answer(response)
        if not answer:
            raise RowDropped("no boxed answer")
        if config.boxed_answers == "extract":
            changed["boxed answer extracted"] += 1
            response = answer
    if config.drop_code_fences and has_code_fence(response):
        raise RowDropped("code fence in the response")
    if config.drop_python and (mentions_python(instruction) or mentions_python(response)):
        raise RowDropped("mentions python")
    if config.scripts:
        share = script_share(instruction + response, config.scripts)
        if share < config.min_script_share:
            raise RowDropped("letters of another script")
    if config.pii != "keep":
        instruction = _without_pii(instruction, config, changed)
        response = _without_pii(response, config, changed)
    return instruction, response


def _without_pii(text: str, config: CleaningConfig, changed: collections.Counter[str]) -> str:
    found = find(text, config.pii_kinds)
    if not found:
        return text
    if config.pii == "drop":
        raise RowDropped(f"personal data: {found[0].kind}")
    for item in found:
        changed[f"{item.kind} masked"] += 1
    return mask(text, found)
