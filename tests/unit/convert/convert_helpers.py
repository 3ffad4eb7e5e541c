"""A tiny model with a real tokenizer, as native folder or loaded."""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path

from hrmtext.artifacts import save_model
from hrmtext.config import preset
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.generate import TextModel
from hrmtext.model import build_model
from hrmtext.runtime.io import atomic_folder

WORDS = ("add", "count", "sort", "the", "list", "of", "numbers", "please", "what", "is", "word")
PROMPTS = ["what is the word", "add 7", "sort the list of numbers 4 1 3", "count <|im_end|> x"]


@cache
def small_tokenizer() -> PromptTokenizer:
    """320 entries, trained on made-up texts."""
    generator = random.Random(0)
    texts = [
        f"{' '.join(generator.choices(WORDS, k=8))} {generator.randrange(1_000)}"
        for _ in range(200)
    ]
    return PromptTokenizer(train_tokenizer(texts, 320))


def tiny(seed: int = 0, **changes) -> TextModel:
    """Random weights; the vocabulary is padded beyond the tokenizer's."""
    config = preset("test", **{"vocab_size": 384, **changes})
    return TextModel(build_model(config, seed=seed), small_tokenizer())


def save_native(model: TextModel, folder: Path, ema: TextModel | None = None) -> Path:
    """A complete native model folder with its tokenizer."""
    tokenizer_folder = folder.parent / f"{folder.name}_tokenizer"
    tokenizer_folder.mkdir(parents=True)
    model.tokenizer.save(tokenizer_folder)
    with atomic_folder(folder) as temporary:
        save_model(
            temporary,
            model.config,
            model.model.state_dict(),
            ema=None if ema is None else ema.model.state_dict(),
            tokenizer_folder=tokenizer_folder,
        )
    return folder
