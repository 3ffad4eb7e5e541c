"""When an answer ends: the tokens that end it, and where they stand."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import DataError

STOP, LENGTH = "stop", "length"
"""Finish reasons: a stop token came; the token limit or max_seq_len was reached."""


def stop_ids(tokenizer: PromptTokenizer, stop_tokens: Sequence[int | str] | None) -> list[int]:
    """Ids of the tokens that end an answer.

    Args:
        stop_tokens: ids, or tokens by their text; None: `<|box_end|>`. A list replaces it, so
            that an empty list lets every answer run to its limit.

    Raises:
        DataError: a text that is not exactly one token of the vocabulary.
    """
    if stop_tokens is None:
        return [tokenizer.eos_id]
    ids = []
    for token in stop_tokens:
        found = token if isinstance(token, int) else _id_of(tokenizer, token)
        if not 0 <= found < tokenizer.vocab_size:
            raise DataError(
                f"stop token {found} is outside the vocabulary of {tokenizer.vocab_size}"
            )
        ids.append(found)
    return ids


def stop_table(ids: Sequence[int], vocab_size: int, device: torch.device) -> torch.Tensor:
    """(V) bool: whether a token ends the answer; indexing it with (B) tokens tests a batch."""
    table = torch.zeros(vocab_size, dtype=torch.bool)
    table[list(ids)] = True
    return table.to(device)


def answer_lengths(
    stopped: torch.Tensor, limits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of each answer, its stop token included, and whether it has one.

    Args:
        stopped: (B, S) bool, whether token s of row b is a stop token.
        limits: (B) int64, tokens that row b may have.
    """
    inside = torch.arange(stopped.shape[1]) < limits[:, None]  # (B, S)
    hits = stopped & inside
    first = hits.int().argmax(1)
    found = hits.any(1)
    return torch.where(found, first + 1, limits), found


def _id_of(tokenizer: PromptTokenizer, text: str) -> int:
    found = tokenizer.tokenizer.token_to_id(text)
    if found is not None:
        return found
    ids = tokenizer.encode_texts([text])[0]
    if len(ids) != 1:
        raise DataError(
            f"stop token {text!r} is {len(ids)} tokens of this vocabulary, expected exactly one"
        )
    return ids[0]
