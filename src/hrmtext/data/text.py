"""What cleaning and the sources look for in a text: thoughts, code, boxed answers, scripts."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache

THINK, THINK_END = "<think>", "</think>"
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?=\{)")
BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
CODE_FENCE = re.compile(r"^[ \t>]*(?:```|~~~)", re.MULTILINE)
PYTHON = re.compile("python", re.IGNORECASE)


def without_thinking(text: str) -> str | None:
    """The text without its `<think>...</think>` blocks, stripped; as it is where it has none.

    Chat templates often put the opening tag into the prompt: then all up to the closing one goes.
    None: a thought that does not end, so that nobody can say where the answer begins.
    """
    if THINK not in text and THINK_END not in text:
        return text
    kept = []
    at = 0
    while (start := text.find(THINK, at)) >= 0:
        end = text.find(THINK_END, start)
        if end < 0:
            return None
        kept.append(text[at:start])
        at = end + len(THINK_END)
    kept.append(text[at:])
    return "".join(kept).rpartition(THINK_END)[2].strip()


def has_code_fence(text: str) -> bool:
    """Whether a line opens with a fence of Markdown, three backquotes or tildes."""
    return CODE_FENCE.search(text) is not None


def mentions_python(text: str) -> bool:
    """Whether the word stands anywhere, in capitals or not, inside other words too."""
    return PYTHON.search(text) is not None


def boxed_answers(text: str) -> list[str]:
    r"""The contents of every `\boxed{...}` (or `\fbox`), outermost ones, braces inside kept.

    Escaped braces (`\{`) do not nest. A box that does not end is left out.
    """
    closing = _closing_braces(text)
    answers = []
    at = 0
    while (box := BOX.search(text, at)) is not None:
        at = box.end()
        end = closing.get(at)
        if end is not None:
            answers.append(text[at + 1 : end].strip())
            at = end + 1
    return answers


def boxed_answer(text: str) -> str | None:
    r"""The contents of the last `\boxed{...}` that ends; None where there is none."""
    answers = boxed_answers(text)
    return answers[-1] if answers else None


def script_share(text: str, scripts: Iterable[str]) -> float:
    """Share of the letters that are of `scripts` (`LATIN`, `GREEK`, `CYRILLIC`, `CJK`, ...).

    A script is the first word of a character's Unicode name. 1.0 for a text without letters: it is
    in no other script. This tells scripts apart, not languages: French passes for English.
    """
    wanted = frozenset(scripts)
    if text.isascii():
        return 1.0 if "LATIN" in wanted or not any(map(str.isalpha, text)) else 0.0
    letters = [character for character in text if character.isalpha()]
    return sum(_script(c) in wanted for c in letters) / len(letters) if letters else 1.0


def _closing_braces(text: str) -> dict[int, int]:
    """Place of an opening brace -> place of its closing one; in one pass, however hostile."""
    closing: dict[int, int] = {}
    if "{" not in text:
        return closing
    opened: list[int] = []
    for match in BRACE.finditer(text):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


@lru_cache(maxsize=1 << 16)
def _script(character: str) -> str:
    # Full-width and mathematical letters go by what they stand for.
    plain = unicodedata.normalize("NFKC", character)[:1] or character
    return unicodedata.name(plain, "UNKNOWN").partition(" ")[0].partition("-")[0]
