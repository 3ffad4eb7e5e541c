"""The tokenizer inside a GGUF file: written for llama.cpp, read back for us.

llama.cpp gets tokens, merges and the name of a split pattern that it knows. We also store the
tokenizer.json itself, under the key that the format reserves for it, and read that one first:
llama.cpp's form has no place for Unicode normalisation.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from hrmtext.data.tokenizer import SPLIT_PATTERN, PromptTokenizer, chat_template
from hrmtext.errors import CheckpointError, DataError

JSON_KEY = "tokenizer.huggingface.json"
PREFIX = "tokenizer.ggml."
PRE_TYPES = {"qwen2": SPLIT_PATTERN}
"""Names of split patterns, as llama.cpp knows them, that give the same ids as ours."""
PADDING = "[PAD{}]"
"""Text of the entries that fill the vocabulary up to the rows of the embedding."""

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""llama.cpp's token types."""


def tokenizer_values(tokenizer: PromptTokenizer, vocab_size: int) -> dict[str, Any]:
    """Header values, by key, for a model whose embedding has `vocab_size` rows.

    Raises:
        DataError: llama.cpp has no way to express this tokenizer.
    """
    fields = json.loads(tokenizer.tokenizer.to_str())
    refuse_inexpressible(fields)
    entries = {token["content"]: token for token in fields["added_tokens"]}
    by_id = {id_: text for text, id_ in tokenizer.tokenizer.get_vocab(True).items()}
    tokens, types = [], []
    for id_ in range(vocab_size):
        text = by_id.get(id_)
        if text is None:
            tokens.append(PADDING.format(id_))
            types.append(UNUSED)
            continue
        tokens.append(text)
        added = entries.get(text)
        types.append(NORMAL if added is None else CONTROL if added["special"] else USER_DEFINED)
    return {
        PREFIX + "model": "gpt2",
        PREFIX + "pre": pre_type(fields),
        PREFIX + "tokens": tokens,
        PREFIX + "token_type": types,
        PREFIX + "merges": [
            merge if isinstance(merge, str) else " ".join(merge)
            for merge in fields["model"]["merges"]
        ],
        PREFIX + "bos_token_id": tokenizer.bos_id,
        PREFIX + "eos_token_id": tokenizer.eos_id,
        PREFIX + "padding_token_id": tokenizer.pad_id,
        PREFIX + "add_bos_token": False,
        PREFIX + "add_eos_token": False,
        JSON_KEY: tokenizer.tokenizer.to_str(),
        "tokenizer.chat_template": chat_template(),
    }


def tokenizer_of(values: Mapping[str, Any], where: str) -> PromptTokenizer:
    """The tokenizer of a header: the stored tokenizer.json, else rebuilt from tokens and merges.

    A rebuilt one normalises to NFC, as HRM-Text's tokenizers do; the file does not say.

    Raises:
        CheckpointError: there is none, or one that is not HRM-Text's kind.
    """
    try:
        if JSON_KEY in values:
            return PromptTokenizer(Tokenizer.from_str(values[JSON_KEY]))
        return PromptTokenizer(_rebuild(values))
    except DataError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    except Exception as error:  # tokenizers raises a bare Exception for whatever is wrong
        raise CheckpointError(f"{where}: its tokenizer cannot be read: {error}") from error


def pre_type(fields: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the split pattern of a tokenizer.json; None where it has none."""
    parts = fields.get("pre_tokenizer") or {}
    steps = parts.get("pretokenizers", [parts])
    if len(steps) != 2 or [step.get("type") for step in steps] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = steps
    plain = byte_level.get("use_regex") is False and not byte_level.get("add_prefix_space")
    if split.get("behavior") != "Isolated" or split.get("invert") or not plain:
        return None
    pattern = split.get("pattern", {}).get("Regex")
    return next((name for name, known in PRE_TYPES.items() if known == pattern), None)


def refuse_inexpressible(fields: Mapping[str, Any]) -> None:
    """DataError where a tokenizer.json means something that llama.cpp's form cannot say."""
    model = fields["model"]
    normalizer = (fields.get("normalizer") or {}).get("type", "NFC")
    problems = {
        f"its model is {model.get('type')}, not BPE": model.get("type") != "BPE",
        f"its normaliser is {normalizer}, not NFC": normalizer != "NFC",
        "it splits text by a pattern that llama.cpp has no name for": pre_type(fields) is None,
        "it ignores merges": bool(model.get("ignore_merges")),
        "it marks the inside or the end of words": bool(
            model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        ),
    }
    found = [text for text, wrong in problems.items() if wrong]
    if found:
        raise DataError(
            f"this tokenizer cannot be written for llama.cpp: {'; '.join(found)}. llama.cpp would "
            "read other tokens than the model was trained on"
        )


def _rebuild(values: Mapping[str, Any]) -> Tokenizer:
    tokens, merges = values.get(PREFIX + "tokens"), values.get(PREFIX + "merges")
    if not tokens or merges is None:
        raise CheckpointError("the file holds no tokenizer; convert the model again with one")
    kind, pre = values.get(PREFIX + "model"), values.get(PREFIX + "pre")
    if kind != "gpt2" or pre not in PRE_TYPES:
        raise CheckpointError(
            f"its tokenizer is {kind!r} with the split pattern {pre!r}, expected 'gpt2' with "
            f"{', '.join(PRE_TYPES)}"
        )
    types = values.get(PREFIX + "token_type") or [NORMAL] * len(tokens)
    kept = len(tokens)
    while kept and types[kept - 1] == UNUSED:
        kept -= 1
    vocabulary = {text: id_ for id_, text in enumerate(tokens[:kept])}
    pairs = [(a, b) for a, _, b in (merge.partition(" ") for merge in merges)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TYPES[pre]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    for text, type_ in zip(tokens[:kept], types, strict=False):
        if type_ == CONTROL:
            tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False)])
        elif type_ == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False)])
    return tokenizer
