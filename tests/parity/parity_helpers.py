"""Random models in both implementations, and batches in both forms."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from transformers import HrmTextConfig, HrmTextForCausalLM

from hrmtext.artifacts.hf_folder import to_hf_config, to_split
from hrmtext.batch import IGNORE, PackedBatch, RowLayout
from hrmtext.config import ModelConfig
from hrmtext.model import HrmLM, build_model, empty_model, make_plan

NUM_CASES = 24


@dataclasses.dataclass
class Case:
    """One random shape, model and batch."""

    config: ModelConfig
    ours: HrmLM
    theirs: HrmTextForCausalLM
    rows: list[list[int]]
    prefixes: list[int]
    L_bp_cycles: list[int]


def random_case(index: int) -> Case:
    """Case `index` of the parity table; the first ones cover the corners."""
    rng = np.random.default_rng([20_605, index])
    heads = int(rng.integers(1, 4))
    config = ModelConfig(
        vocab_size=int(rng.integers(40, 90)),
        hidden_size=heads * int(rng.choice([8, 16, 24])),
        num_layers_per_stack=1 + index % 3,
        num_heads=heads,
        head_dim=int(rng.choice([6, 8, 16, 32])),
        intermediate_size=int(rng.choice([24, 40, 64])),
        H_cycles=1 + (index // 3) % 3,
        L_cycles=1 + index % 4,
        max_seq_len=64,
        rope_theta=float(rng.choice([1_000.0, 10_000.0, 500_000.0])),
        embedding_scale=None if index % 2 else 3.5,
    )
    lengths = [int(n) for n in rng.integers(1, 28, size=int(rng.integers(1, 5)))] + [13]
    prefixes = [int(rng.integers(0, length + 1)) for length in lengths]
    prefixes[0] = (0, lengths[0])[index % 2]
    rows = [rng.integers(0, config.vocab_size, size=length).tolist() for length in lengths]
    choices = [
        [min(2, config.L_cycles)],
        [config.L_cycles] * config.H_cycles,
        [0] * config.H_cycles,
        [int(n) for n in rng.integers(0, config.L_cycles + 1, size=config.H_cycles)],
    ]
    ours = build_model(config, seed=index)
    L_bp_cycles = choices[index % len(choices)]
    return Case(config, ours, twin_of(ours, L_bp_cycles), rows, prefixes, L_bp_cycles)


def twin_of(model: HrmLM, L_bp_cycles: list[int] | None = None) -> HrmTextForCausalLM:
    """transformers' own model with the same weights."""
    values = to_hf_config(model.config, L_bp_cycles=L_bp_cycles)
    twin = HrmTextForCausalLM(HrmTextConfig(**values))
    twin.load_state_dict(to_split(model.state_dict()))
    assert not twin.model.z_L_init.requires_grad
    return twin.eval()


def in_fp64(model: HrmLM) -> HrmLM:
    """The same weights in fp64."""
    wide = empty_model(model.config, device="cpu", dtype=torch.float64)
    wide.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    return wide


def packed_logits(
    model: HrmLM, rows: list[list[int]], prefixes: list[int], backend: str = "sdpa", depth=None
) -> torch.Tensor:
    """(T, V) logits of the rows, packed in one stream."""
    layout = RowLayout.from_prefixes([len(row) for row in rows], prefixes)
    dtype = model.lm_head.weight.dtype
    plan = make_plan(layout, dtype=dtype, backend=backend)
    tokens = torch.tensor([token for row in rows for token in row])
    positions = torch.cat([torch.arange(len(row)) for row in rows])
    return model(tokens, positions, plan, depth=depth).logits


def padded(rows: list[list[int]], prefixes: list[int], side: str) -> dict[str, torch.Tensor]:
    """The rows as transformers takes them: padded, with masks and type ids."""
    width = max(map(len, rows))
    shape = (len(rows), width)
    batch = {
        name: torch.zeros(shape, dtype=torch.int64)
        for name in ("input_ids", "attention_mask", "token_type_ids")
    }
    for index, (row, prefix) in enumerate(zip(rows, prefixes, strict=True)):
        start = width - len(row) if side == "left" else 0
        batch["input_ids"][index, start : start + len(row)] = torch.tensor(row)
        batch["attention_mask"][index, start : start + len(row)] = 1
        batch["token_type_ids"][index, start : start + prefix] = 1
    return batch


def their_logits(twin: HrmTextForCausalLM, rows: list[list[int]], prefixes: list[int]):
    """(T, V) logits of the rows from a right-padded batch, in the packed order."""
    batch = padded(rows, prefixes, side="right")
    logits = twin(**batch, use_cache=False).logits
    return logits[batch["attention_mask"].bool()]


def training_batch(case: Case) -> tuple[PackedBatch, dict[str, torch.Tensor]]:
    """The rows with labels behind their prefix, packed for us and padded for transformers."""
    pairs = []
    for row, prefix in zip(case.rows, case.prefixes, strict=True):
        at = min(max(prefix, 1), len(row) - 1)
        if len(row) > 1:
            pairs.append((row[:at], row[at:]))
    packed = PackedBatch.from_rows(pairs)
    full = [[*prompt, *response] for prompt, response in pairs]
    batch = padded(full, [len(prompt) for prompt, _ in pairs], side="right")
    labels = torch.full_like(batch["input_ids"], IGNORE)
    for index, (prompt, response) in enumerate(pairs):
        labels[index, len(prompt) : len(prompt) + len(response)] = torch.tensor(response)
    return packed, {**batch, "labels": labels}
