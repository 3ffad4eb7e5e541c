"""Prompts in the form that HRM-Text was trained on, for transformers users."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hrmtext.data.example import DEFAULT_CONDITION
from hrmtext.data.tokenizer import SPECIAL_TOKENS, PromptTokenizer, prompt_text
from hrmtext.errors import DataError


def format_prompt(instruction: str, condition: str | Sequence[str] = DEFAULT_CONDITION) -> str:
    """`<|im_start|>`, the condition's tokens, the instruction, `<|im_end|>`, as one text.

    Args:
        condition: names out of direct, cot, noisy, synth, in the order in which they are wanted:
            "synth,cot" or ["synth", "cot"].

    Raises:
        DataError: an unknown condition, or an instruction that holds a special token, which a
            tokenizer would take for the real one; `encode_prompts` takes such texts.
    """
    if found := [token for token in SPECIAL_TOKENS if token in instruction]:
        raise DataError(
            f"the instruction holds {', '.join(found)}, which the tokenizer would read as special "
            "tokens and not as text; encode_prompts(tokenizer, ...) encodes any text safely"
        )
    names = condition if isinstance(condition, str) else ",".join(condition)
    return prompt_text(instruction, names)


def encode_prompts(
    tokenizer: Any,
    instructions: str | Sequence[str],
    condition: str | Sequence[str] = DEFAULT_CONDITION,
) -> Any:
    """Ready inputs for `model.generate(**inputs)`: ids, masks and `token_type_ids`, padded left.

    Args:
        tokenizer: transformers' fast tokenizer of an HRM-Text model, the released one too, whose
            own call gives no `token_type_ids`.
        instructions: texts; special tokens written in them are plain text.
        condition: for all of them, as in `format_prompt`.

    Returns:
        transformers' `BatchEncoding` of (B, S) int64 tensors: `input_ids`, `token_type_ids` (1 on
        the prompt, 0 on padding) and `attention_mask`.

    Raises:
        DataError: an unknown condition, a tokenizer without the special tokens, or no instruction.
    """
    import torch
    from transformers import BatchEncoding

    texts = [instructions] if isinstance(instructions, str) else list(instructions)
    if not texts:
        raise DataError("no instruction was given; expected one text or more")
    names = condition if isinstance(condition, str) else ",".join(condition)
    plain = plain_tokenizer(tokenizer)
    prompts = plain.encode_prompts(texts, names)
    width = max(map(len, prompts))
    pad = plain.pad_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    ids = torch.full((len(prompts), width), pad)
    real = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        real[row, width - len(prompt) :] = 1
    return BatchEncoding({"input_ids": ids, "token_type_ids": real, "attention_mask": real.clone()})


def plain_tokenizer(tokenizer: Any) -> PromptTokenizer:
    """Our tokenizer over transformers' fast one, or the given one where it is ours already.

    Raises:
        DataError: a slow tokenizer, or one without the special tokens of prompts.
    """
    if isinstance(tokenizer, PromptTokenizer):
        return tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise DataError(
            f"{type(tokenizer).__name__} is not a fast tokenizer: expected AutoTokenizer."
            "from_pretrained(...) of an HRM-Text model"
        )
    return PromptTokenizer(backend)
