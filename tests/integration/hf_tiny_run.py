"""A tiny model that really learned something, exported; and the task that it is fine-tuned on."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import torch

import hrmtext
from hrmtext.batch import RowLayout
from hrmtext.cli.main import main
from hrmtext.convert import export_hf
from hrmtext.hf import encode_prompts
from hrmtext.model import make_plan

TINY = [
    "model.preset=null", "model.vocab_size=512", "model.hidden_size=64",
    "model.num_layers_per_stack=1", "model.num_heads=2", "model.head_dim=32",
    "model.intermediate_size=128", "model.max_seq_len=320", "epochs=40", "max_steps=110",
    "batch_tokens=1024", "warmup_steps=20", "lr=3e-3", "ema_decay=0.9", "precision=fp32",
    "validate_every=0", "validation_rows=40", "seed=3",
]  # fmt: skip
NUM_HELD_OUT = 40


def words(seed: int) -> list[str]:
    found = ["".join(letters) for letters in itertools.product("abcdef", repeat=3)]
    random.Random(seed).shuffle(found)
    return found


def next_rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and held-out rows of a task that the model has not seen: each letter's next one."""
    rows = [
        {"instruction": f"next {w}", "response": "".join(chr(ord(c) + 1) for c in w)}
        for w in words(seed=1)
    ]
    return rows[NUM_HELD_OUT:], rows[:NUM_HELD_OUT]


def write_jsonl(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def train_and_export(root: Path) -> Path:
    """Learn to copy three letters (a few seconds), by the commands of the README; export."""
    rows = [{"instruction": f"copy {w}", "response": w} for w in words(seed=0)]
    write_jsonl(root / "rows.jsonl", rows)
    (root / "data.yaml").write_text(
        f"local: [{{path: {root / 'rows.jsonl'}, eval_size: {NUM_HELD_OUT}}}]\n"
        "tokenizer: {vocab_size: 290}\nsampling: {epochs: 40, max_seq_len: 32}\n"
    )
    (root / "train.yaml").write_text("{}\n")
    data, run = str(root / "data"), str(root / "run")
    assert main(["data", "prepare", str(root / "data.yaml"), data]) == 0
    arguments = ["train", str(root / "train.yaml"), *TINY, "--data", data, "--run", run]
    assert main([*arguments, "--device", "cpu"]) == 0
    export_hf(run, root / "hf")
    return root / "hf"


def exact_match(model, tokenizer, rows: list[dict[str, str]]) -> float:
    """Share of rows that `generate` answers exactly, all in one padded batch."""
    model.eval()
    inputs = encode_prompts(tokenizer, [row["instruction"] for row in rows])
    found = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    answers = tokenizer.batch_decode(
        found[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return sum(a == row["response"] for a, row in zip(answers, rows, strict=True)) / len(rows)


@torch.inference_mode()
def reference_logits(folder: Path, ids: list[int], num_prompt: int) -> torch.Tensor:
    """(T, V) logits of our reference backend in fp32; the first `num_prompt` see one another."""
    model = hrmtext.load(folder, device="cpu", dtype="fp32").model
    layout = RowLayout.from_prefixes([len(ids)], [num_prompt])
    plan = make_plan(layout, backend="reference")
    return model(torch.tensor(ids), torch.arange(len(ids)), plan).logits


def largest_miss(folder: Path, ids: list[int], num_prompt: int) -> float:
    """How far a continuation of a prompt is from greedy under the prefix mask.

    The largest gap between a chosen token's logit and the best, as a share of the largest logit.
    """
    logits = reference_logits(folder, ids, num_prompt)
    steps = logits[num_prompt - 1 : -1]
    chosen = steps.gather(1, torch.tensor(ids[num_prompt:])[:, None])[:, 0]
    return float((steps.amax(1) - chosen).max() / logits.abs().max())
