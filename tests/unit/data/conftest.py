"""Shared by the data tests: generated text, a small trained tokenizer."""

from __future__ import annotations

import random

import pytest

from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer

WORDS = [
    "what", "is", "the", "sum", "of", "two", "numbers", "count", "letters", "in",
    "word", "reverse", "order", "sort", "list", "question", "answer", "hello", "world", "response",
    "number", "please", "compute", "value", "given", "between", "first", "last", "longest",
    "shortest",
]  # fmt: skip


def make_texts(count: int, seed: int = 0) -> list[str]:
    """`count` sentences of common words and numbers, the same on every call."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choices(WORDS, k=generator.randint(3, 20)))
        + f" {generator.randrange(10_000)}?"
        for _ in range(count)
    ]


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return make_texts(300)


@pytest.fixture(scope="session")
def tokenizer(texts) -> PromptTokenizer:
    return PromptTokenizer(train_tokenizer(texts, 360))
