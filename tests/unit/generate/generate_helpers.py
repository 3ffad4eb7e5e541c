"""A tiny model with a real, small tokenizer."""

from __future__ import annotations

import random
from functools import cache

from hrmtext.config import preset
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.generate import TextModel
from hrmtext.model import build_model

WORDS = (
    "add", "count", "sort", "the", "list", "of", "numbers", "please", "what", "is", "seven",
    "letters", "in", "word", "red", "blue",
)  # fmt: skip


def sentences(count: int, seed: int = 0) -> list[str]:
    """Texts of different length, the same on every call."""
    generator = random.Random(seed)
    return [
        " ".join(generator.choices(WORDS, k=generator.randint(1, 9)))
        + f" {generator.randrange(1_000)}"
        for _ in range(count)
    ]


@cache
def small_tokenizer() -> PromptTokenizer:
    """Trained on the sentences."""
    return PromptTokenizer(train_tokenizer(sentences(200), 330))


def text_model(seed: int = 0, **changes) -> TextModel:
    """Random weights; the vocabulary is padded beyond the tokenizer's, as in released models."""
    config = preset("test", **{"vocab_size": 384, "max_seq_len": 96, **changes})
    return TextModel(build_model(config, seed=seed), small_tokenizer())
