"""Two ranks that hold half of every layer give what one rank gives."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

from hrmtext.hf import HrmTextConfig, HrmTextForCausalLM

RANK = """
import sys, torch
from transformers.distributed import DistributedConfig
from hrmtext.hf import HrmTextForCausalLM

folder, out = sys.argv[1:]
config = DistributedConfig(tp_size=2, tp_plan="auto")
model = HrmTextForCausalLM.from_pretrained(folder, distributed_config=config).eval()
ids = torch.arange(4, 14)[None]
types = (torch.arange(10) < 7).long()[None]
with torch.no_grad():
    logits = model(ids, token_type_ids=types).logits
tokens = model.generate(ids, token_type_ids=types * 0 + 1, attention_mask=torch.ones_like(ids),
                        max_new_tokens=12, do_sample=False)
weights = {n: tuple(w.to_local().shape) if hasattr(w, "to_local") else tuple(w.shape)
           for n, w in model.named_parameters()}
rank = torch.distributed.get_rank()
torch.save({"logits": logits, "tokens": tokens, "shapes": weights}, f"{out}/{rank}.pt")
"""


def test_two_ranks_give_the_logits_and_tokens_of_one(tmp_path: Path):
    torch.manual_seed(0)
    config = HrmTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, head_dim=8, pad_token_id=0, eos_token_id=3, initializer_range=0.2,
    )  # fmt: skip
    model = HrmTextForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "rank.py").write_text(RANK)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
            str(tmp_path / "rank.py"), str(tmp_path / "model"), str(tmp_path),
        ],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2_000:]
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
