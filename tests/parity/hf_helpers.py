"""Our transformers classes beside transformers' own, with the same weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from parity_helpers import Case
from safetensors.torch import save_file
from transformers import HrmTextForCausalLM as TheirModel

from hrmtext.artifacts.hf_folder import to_hf_config, to_split
from hrmtext.hf import HrmTextConfig, HrmTextForCausalLM
from hrmtext.hf.cache_name import CACHE


def our_class(case: Case, attn_implementation: str = "sdpa") -> HrmTextForCausalLM:
    """The case's weights in our class."""
    values = to_hf_config(case.config, L_bp_cycles=case.L_bp_cycles)
    model = HrmTextForCausalLM(HrmTextConfig(**values, attn_implementation=attn_implementation))
    model.load_state_dict(case.ours.state_dict())
    return model.eval()


def loaded_class(case: Case, folder: Path, layout: str) -> HrmTextForCausalLM:
    """The case's weights, written in a file layout and loaded by our class."""
    folder.mkdir()
    state = case.ours.state_dict()
    chosen = to_split(state) if layout == "split" else state
    save_file(
        {name: tensor.contiguous() for name, tensor in chosen.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    values = to_hf_config(case.config, L_bp_cycles=case.L_bp_cycles)
    (folder / "config.json").write_text(json.dumps(values))
    return HrmTextForCausalLM.from_pretrained(folder).eval()


def cached_logits(
    model: TheirModel | HrmTextForCausalLM, batch: dict[str, torch.Tensor], prompt_columns: int
) -> torch.Tensor:
    """(B, S, V): the first `prompt_columns` in one pass, the others one by one over the cache."""
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    first = slice(0, prompt_columns)
    out = model(
        input_ids=batch["input_ids"][:, first],
        attention_mask=batch["attention_mask"][:, first],
        token_type_ids=batch["token_type_ids"][:, first],
        position_ids=positions[:, first],
        use_cache=True,
    )
    logits = [out.logits]
    for column in range(prompt_columns, batch["input_ids"].shape[1]):
        out = model(
            input_ids=batch["input_ids"][:, column : column + 1],
            attention_mask=batch["attention_mask"][:, : column + 1],
            position_ids=positions[:, column : column + 1],
            use_cache=True,
            **{CACHE: out[CACHE]},
        )
        logits.append(out.logits)
    return torch.cat(logits, dim=1)
