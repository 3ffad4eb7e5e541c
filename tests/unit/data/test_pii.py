"""Personal data by its form: what is found, what only looks like it, what masking leaves."""

from __future__ import annotations

import time

import pytest

from hrmtext.data.pii import FINDERS, find, luhn, mask

KINDS = tuple(FINDERS)

THERE = {
    "email": ["a.b+c@mail.example.org", "x_1@example.co.uk"],
    "phone": [
        "+49 30 1234567", "+1 (415) 555-2671", "+442079460958", "(415) 555-2671", "415-555-2671",
        "415.555.2671",
    ],
    "ip": ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"],
    "card": [
        "4111111111111111", "4111 1111 1111 1111", "5555-5555-5555-4444", "3782 822463 10005",
        "6011111111111117", "2221000000000009",
    ],
    "key": [
        "AKIA" + "IOSFODNN7EXAMPLE", "ghp_" + "a1B2" * 9, "hf_" + "x" * 34, "sk-" + "Ab3" * 10,
        "-----BEGIN RSA PRIVATE KEY-----\nMIIB\nAAA=\n-----END RSA PRIVATE KEY-----",
    ],
}  # fmt: skip
NOT_THERE = [
    "a @ b.com", "x@y", "1 + 2 = 3", "3.14159265358979", "12345678901", "10:30:45",
    "version 1.2.3", "192.168.0.1", "127.0.0.1", "300.1.2.3", "1.2.3.4.5", "::1", "std::vector",
    "4111111111111112", "1234 5678 9012 3456", "0000000000000000", "2024-11-25", "555-2671",
    "+1 +2 +3", "x+12345678", "415-555.2671", "sk-short", "100-200-3000", "f(2)=+12",
    "414111111111111111111111",
]  # fmt: skip


@pytest.mark.parametrize(("kind", "value"), [(k, v) for k, values in THERE.items() for v in values])
def test_every_form_is_found_at_its_place_and_masked(kind, value):
    text = f"Say: {value}, please."
    found = find(text, KINDS)
    assert [(item.kind, text[item.start : item.stop]) for item in found] == [(kind, value)]
    assert mask(text, found) == f"Say: [{kind}], please."


@pytest.mark.parametrize("text", NOT_THERE)
def test_what_only_looks_alike_is_left(text):
    assert find(f"so {text} is", KINDS) == []


def test_kinds_are_chosen_and_several_findings_masked_from_left_to_right():
    text = "a@b.org 8.8.8.8 a@b.org"
    assert [item.kind for item in find(text, KINDS)] == ["email", "ip", "email"]
    assert mask(text, find(text, ["ip"])) == "a@b.org [ip] a@b.org"
    assert mask(text, find(text, KINDS)) == "[email] [ip] [email]"
    assert mask("", []) == "" and find("", KINDS) == []


def test_the_check_digit_is_that_of_the_standard():
    assert luhn("79927398713") and not any(luhn(f"7992739871{d}") for d in "012456789")


def test_hostile_texts_take_a_moment():
    start = time.perf_counter()
    for text in ("1 " * 50_000, "a." * 50_000 + "@", "@" * 50_000, ":" * 50_000, "+1" * 50_000,
                 "eyJ" * 20_000, "-----BEGIN PRIVATE KEY-----" * 2_000):  # fmt: skip
        find(text, KINDS)
    assert time.perf_counter() - start < 10
