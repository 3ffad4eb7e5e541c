"""Two ranks that hold half of every layer give what one rank gives."""

from __future__ import annotations

from pathlib import Path

import torch
from processes import ended, said, start_ranks
from tensor_parallel_ranks import answer_with_half_of_every_layer

from hrmtext.hf import HrmTextConfig, HrmTextForCausalLM


def test_two_ranks_give_the_logits_and_tokens_of_one(tmp_path: Path):
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, head_dim=8, pad_token_id=0, eos_token_id=3, initializer_range=0.2,
    )  # fmt: skip
    model = HrmTextForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    place = (str(tmp_path / "model"), str(tmp_path))
    ranks = start_ranks(2, answer_with_half_of_every_layer, *place, log=tmp_path / "log")
    assert ended(ranks) == [0, 0], said(tmp_path / "log")
    ids = torch.arange(4, 14)[None]
    types = (torch.arange(10) < 7).long()[None]
    with torch.no_grad():
        logits = model(ids, token_type_ids=types).logits
    options = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    tokens = model.generate(ids, token_type_ids=torch.ones_like(ids), **options)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(found["logits"], logits, atol=1e-5, rtol=1e-4)
        assert torch.equal(found["tokens"], tokens)
        layer = "model.L_module.layers.0."
        assert found["shapes"][layer + "attn.gqkv_proj.weight"] == (64, 32)
        assert found["shapes"][layer + "attn.o_proj.weight"] == (32, 16)
        assert found["shapes"][layer + "mlp.gate_up_proj.weight"] == (48, 32)
        assert found["shapes"][layer + "mlp.down_proj.weight"] == (32, 24)
