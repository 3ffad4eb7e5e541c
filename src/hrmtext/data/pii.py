"""Personal data that can be told by its form: addresses, numbers, keys. Names cannot.

What looks the same but is none is sorted out where a rule can: card numbers by issuer and check
digit, network addresses by whether they are public.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

EMAIL = re.compile(
    r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}\b"
)
# International with a plus sign, or North American in groups of 3, 3 and 4. Bare digits stay.
PHONE = re.compile(
    r"(?<![\w+])\+[1-9](?:[ .-]?\(?\d{1,4}\)?){2,6}(?![\w-])"
    r"|(?<![\w.-])(?:\([2-9]\d{2}\) ?|[2-9]\d{2}([.-]))[2-9]\d{2}(?(1)\1|-)\d{4}(?![\w.-]?\d)"
)
PHONE_DIGITS = range(8, 16)
IP4 = re.compile(r"(?<![\w.])\d{1,3}(?:\.\d{1,3}){3}(?![\w]|\.\d)")
IP6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
CARD = re.compile(
    r"(?<![\w.+-])\d{4}(?:([ -]?)\d{4}\1\d{4}\1\d{1,7}|([ -]?)\d{6}\2\d{4,5})(?![\w-])"
)
ISSUERS = re.compile(
    r"4(?:\d{12}|\d{15}|\d{18})"
    r"|(?:5[1-5]\d\d|222[1-9]|22[3-9]\d|2[3-6]\d\d|27[01]\d|2720)\d{12}"
    r"|3[47]\d{13}|(?:6011|65\d\d|64[4-9]\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}"
)
"""Visa, Mastercard, American Express, Discover, JCB, Diners Club."""
KEY = re.compile(
    r"(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,255}"
    r"|hf_[A-Za-z0-9]{34,64}|sk-[A-Za-z0-9_-]{20,200}|xox[abprs]-[A-Za-z0-9-]{10,250}"
    r"|AIza[0-9A-Za-z_-]{35}|eyJ[\w-]{8,2000}\.eyJ[\w-]{8,4000}\.[\w-]{8,2000})(?![A-Za-z0-9])"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----[A-Za-z0-9+/=\s]{1,20000}"
    r"-----END [A-Z ]{0,30}PRIVATE KEY-----"
)
"""Keys of well-known forms: cloud and model providers, code hosts, web tokens, PEM blocks."""


class Finding(NamedTuple):
    """One place in a text."""

    kind: str
    start: int
    stop: int


def find(text: str, kinds: Sequence[str]) -> list[Finding]:
    """What of `kinds` (`FINDERS`) a text holds, from left to right; none overlaps another.

    Where two kinds fit the same place, the one that starts first counts, then the longer one.
    """
    found = [Finding(kind, start, stop) for kind in kinds for start, stop in FINDERS[kind](text)]
    found.sort(key=lambda item: (item.start, -item.stop, kinds.index(item.kind)))
    kept: list[Finding] = []
    for item in found:
        if not kept or item.start >= kept[-1].stop:
            kept.append(item)
    return kept


def mask(text: str, findings: Sequence[Finding]) -> str:
    """The text with every finding replaced by its kind in brackets: `[email]`."""
    parts, at = [], 0
    for item in findings:
        parts += [text[at : item.start], f"[{item.kind}]"]
        at = item.stop
    return "".join([*parts, text[at:]])


def luhn(digits: str) -> bool:
    """Whether the last digit is the check digit of the others (ISO/IEC 7812-1, annex B)."""
    total = 0
    for place, digit in enumerate(reversed(digits)):
        value = int(digit) * (1 + place % 2)
        total += value - 9 if value > 9 else value
    return total % 10 == 0


def _emails(text: str) -> Iterator[tuple[int, int]]:
    if "@" in text:
        yield from (match.span() for match in EMAIL.finditer(text))


def _phones(text: str) -> Iterator[tuple[int, int]]:
    for match in PHONE.finditer(text):
        if sum(map(str.isdigit, match[0])) in PHONE_DIGITS:
            yield match.span()


def _addresses(text: str) -> Iterator[tuple[int, int]]:
    for pattern, mark in ((IP4, "."), (IP6, ":")):
        if text.count(mark) < 2:
            continue
        for match in pattern.finditer(text):
            try:
                public = ipaddress.ip_address(match[0]).is_global
            except ValueError:
                continue
            if public:
                yield match.span()


def _cards(text: str) -> Iterator[tuple[int, int]]:
    for match in CARD.finditer(text):
        digits = re.sub("[ -]", "", match[0])
        if ISSUERS.fullmatch(digits) and luhn(digits):
            yield match.span()


def _keys(text: str) -> Iterator[tuple[int, int]]:
    yield from (match.span() for match in KEY.finditer(text))


FINDERS = {"email": _emails, "phone": _phones, "ip": _addresses, "card": _cards, "key": _keys}
"""Kind -> the places of it in a text."""
