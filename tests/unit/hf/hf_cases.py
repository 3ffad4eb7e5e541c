"""Small models of our classes and batches for them."""

from __future__ import annotations

import torch

from hrmtext.hf import HrmTextConfig, HrmTextForCausalLM

VOCAB, PAD, END = 61, 0, 3


def small_config(**changes) -> HrmTextConfig:
    """Two layers a stack, 2 x 2 cycles: 12 KV slots."""
    values = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 2, "head_dim": 16, "H_cycles": 2, "L_cycles": 2,
        "L_bp_cycles": [1, 2], "max_position_embeddings": 128, "pad_token_id": PAD,
        "bos_token_id": 1, "eos_token_id": END, "initializer_range": 0.2,
    }  # fmt: skip
    return HrmTextConfig(**values | changes)


def small_model(seed: int = 0, **changes) -> HrmTextForCausalLM:
    """Random weights, eval mode."""
    torch.manual_seed(seed)
    return HrmTextForCausalLM(small_config(**changes)).eval()


def prompts(lengths: tuple[int, ...] = (9, 4, 6), side: str = "left", seed: int = 1):
    """Rows that are all prompt, padded to the longest."""
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    batch = {
        name: torch.full((len(lengths), width), fill)
        for name, fill in (("input_ids", PAD), ("attention_mask", 0), ("token_type_ids", 0))
    }
    for row, length in enumerate(lengths):
        at = slice(width - length, width) if side == "left" else slice(0, length)
        batch["input_ids"][row, at] = torch.randint(4, VOCAB, (length,), generator=generator)
        batch["attention_mask"][row, at] = 1
        batch["token_type_ids"][row, at] = 1
    return batch


def rows_with_answers(seed: int = 2) -> dict[str, torch.Tensor]:
    """Two unpadded rows of 12 tokens, prompts of 7 and 5, and labels on the answers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(4, VOCAB, (2, 12), generator=generator)
    types = (torch.arange(12) < torch.tensor([[7], [5]])).long()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "token_type_ids": types,
        "labels": ids.masked_fill(types == 1, -100),
    }
