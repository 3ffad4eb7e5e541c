"""How fast is a training step against transformers' own model, each side at its best setting?

Same weights, same rows, same depth of backpropagation (`L_bp_cycles`), one optimizer step each:
ours with packed rows and Adam-atan2 with EMA, theirs with padded rows and torch's fused AdamW. The
best setting of each side (number format, attention) is found first, then all are timed in turn. As
a third side, theirs gets what it cannot do by itself: the batch cut into microbatches of rows of
similar length, which saves most of its padding; and both sides are timed compiled as well.

    python benchmarks/train_step.py [--rounds 12] [--preset micro] [--batch-tokens 1024]
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch
from common import interleave, matmul_flops, number_formats, ratios, summary, write_result

from hrmtext.artifacts.hf_folder import to_hf_config, to_split
from hrmtext.batch import IGNORE, PackedBatch
from hrmtext.config.model import preset
from hrmtext.config.train import TrainConfig
from hrmtext.model import Depth, build_model
from hrmtext.model.flops import training_flops
from hrmtext.runtime.compile import compile_blocks
from hrmtext.runtime.device import pick_device
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.precision import ComputeModel
from hrmtext.train.step import TrainStep

Rows = list[tuple[list[int], list[int]]]
L_BP_CYCLES = (0, 3)
"""Gradient through both H calls and the last three L calls: bp_steps=5, the recipe's depth."""


KINDS = {
    "chain_sum": (14, (19, 21), (2, 4)),
    "number_filtering": (11, (34, 40), (4, 13)),
    "rotate_matrix": (11, (48, 50), (8, 8)),
    "spell_backward": (45, (16, 20), (3, 6)),
    "word_reversal": (19, (35, 52), (4, 20)),
}
"""The quickstart's families: weight, and shortest and longest prompt and response in tokens."""


def quickstart_like_rows(tokens: int, vocab_size: int, seed: int) -> Rows:
    """Random tokens in rows of the quickstart's lengths and shares."""
    rng = random.Random(seed)
    kinds = list(KINDS.values())
    weights = [weight for weight, _, _ in kinds]
    rows: Rows = []
    used = 0
    while True:
        _, prompt, response = rng.choices(kinds, weights)[0]
        lengths = rng.randint(*prompt), rng.randint(*response)
        if used + sum(lengths) - 1 > tokens:
            return rows
        used += sum(lengths) - 1
        prompt_ids, response_ids = (
            [rng.randrange(32, vocab_size) for _ in range(count)] for count in lengths
        )
        rows.append((prompt_ids, response_ids))


def our_side(
    config, rows: Rows, device: torch.device, dtype: torch.dtype, *, compiled: bool = False
) -> Callable[[], float]:
    """One optimizer step of ours."""
    model = build_model(config, seed=0, device=device)
    optimizer = AdamAtan2(model.parameters(), lr=1e-4)
    train = TrainConfig(
        model={"preset": None, **vars(config)},  # pyrefly: ignore[bad-argument-type]
        batch_tokens=1 << 20,
        L_bp_cycles=L_BP_CYCLES,
        attention="auto",
        block_kernel="torch" if compiled else "auto",
    )
    compute = ComputeModel(model, dtype)
    compile_blocks(compute.module, compiled, device=device)
    step = TrainStep(compute, optimizer, train, device)
    packed = PackedBatch.from_rows(rows)
    batch = SimpleNamespace(
        index=0, epoch=0, bins=[packed], num_tokens=packed.layout.num_tokens,
        num_supervised_tokens=len(packed.supervised()),
    )  # fmt: skip
    depth = Depth.from_L_bp_cycles(config, L_BP_CYCLES)

    def run() -> float:
        result = step.run(batch, depth=depth, lr=1e-4, step=0)
        return float(result.sums[0]) / batch.num_supervised_tokens

    return run


def their_side(
    config,
    rows: Rows,
    device: torch.device,
    precision: str,
    num_splits: int,
    attention: str,
    *,
    compiled: bool = False,
) -> Callable[[], float]:
    """One optimizer step of transformers' model; rows sorted by length into padded microbatches.

    `bf16` is autocast over fp32 weights, as `Trainer(bf16=True)` does it and as our side keeps its
    master weights.
    """
    from transformers import HrmTextConfig, HrmTextForCausalLM

    ours = build_model(config, seed=0)
    settings = {**to_hf_config(config), "L_bp_cycles": list(L_BP_CYCLES)}
    settings.pop("model_type", None), settings.pop("architectures", None)
    model = HrmTextForCausalLM._from_config(
        HrmTextConfig(**settings), attn_implementation=attention
    )
    model.load_state_dict(to_split(ours.state_dict()))
    model.to(device).train()
    if compiled:
        model.forward = torch.compile(model.forward)
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True
    )
    ordered = sorted(rows, key=lambda row: len(row[0]) + len(row[1]))
    size = -(-len(ordered) // num_splits)
    parts = [ordered[at : at + size] for at in range(0, len(ordered), size)]
    batches = [padded(part, device) for part in parts]
    supervised = sum(int((batch["labels"] != IGNORE).sum()) for batch in batches)

    def run() -> float:
        optimizer.zero_grad(set_to_none=True)
        total = 0.0
        for batch in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                loss = model(**batch, use_cache=False, num_items_in_batch=supervised).loss
            loss.backward()
            total += loss.item()
        optimizer.step()
        return total

    return run


def padded(rows: Rows, device: torch.device) -> dict[str, torch.Tensor]:
    """Rows padded on the right, with the prefix mask and labels on responses."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    shape = (len(rows), longest)
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "token_type_ids": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, IGNORE),
    }
    for index, (prompt, response) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(response)
        batch["input_ids"][index, :end] = torch.tensor(prompt + response)
        batch["attention_mask"][index, :end] = 1
        batch["token_type_ids"][index, :start] = 1
        batch["labels"][index, start:end] = torch.tensor(response)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def best_of(
    makers: dict[str, Callable[[], Callable[[], float]]], device: torch.device
) -> tuple[str, Callable[[], float], dict[str, float]]:
    """The fastest setting by a short trial, its step, and all settings' seconds."""
    sides = {name: make() for name, make in makers.items()}
    trial = interleave(sides, rounds=3, device=device)
    seconds = {name: min(values) for name, values in trial.items()}
    name = min(seconds, key=seconds.__getitem__)
    return name, sides[name], {key: round(value, 4) for key, value in seconds.items()}


def main() -> None:
    """Measure and write results/train_step-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    config = preset(arguments.preset, vocab_size=512)
    rows = quickstart_like_rows(arguments.batch_tokens, config.vocab_size, seed=0)
    num_tokens = sum(len(prompt) + len(response) - 1 for prompt, response in rows)
    dtypes = number_formats(device)

    first_losses = {
        f"ours {name}": our_side(config, rows, device, dtype)() for name, dtype in dtypes.items()
    } | {
        f"transformers {name}": their_side(config, rows, device, name, 1, "sdpa")()
        for name in dtypes
    }
    ours = {
        name: (lambda dtype=dtype: our_side(config, rows, device, dtype))
        for name, dtype in dtypes.items()
    }

    def their_settings(splits: tuple[int, ...]) -> dict[str, Callable[[], Callable[[], float]]]:
        return {
            f"{name}, {attention}, {count} microbatches": (
                lambda n=name, c=count, a=attention: their_side(config, rows, device, n, c, a)
            )
            for name, count, attention in itertools.product(dtypes, splits, ("sdpa", "eager"))
        }

    best, steps, trials = {}, {}, {}
    for side, makers in {
        "ours": ours,
        "transformers": their_settings((1,)),
        "transformers, sorted by length": their_settings((2, 4)),
    }.items():
        best[side], steps[side], trials[side] = best_of(makers, device)
    their_precision, their_attention, _ = best["transformers"].split(", ")
    steps["ours, compiled"] = our_side(config, rows, device, dtypes[best["ours"]], compiled=True)
    steps["transformers, compiled"] = their_side(
        config, rows, device, their_precision, 1, their_attention, compiled=True
    )
    seconds = interleave(steps, rounds=arguments.rounds, device=device)
    packed = PackedBatch.from_rows(rows)
    flops = num_tokens * training_flops(
        config,
        Depth.from_L_bp_cycles(config, L_BP_CYCLES),
        context_tokens=float(packed.layout.visible_end.float().mean()),
        head_share=len(packed.supervised()) / num_tokens,
    )
    ceiling = matmul_flops(device, dtypes[best["ours"]])
    rate = flops / statistics.median(seconds["ours"])
    write_result(
        "train_step",
        device,
        {
            "preset": arguments.preset,
            "rows": len(rows),
            "input_tokens": num_tokens,
            "L_bp_cycles": list(L_BP_CYCLES),
            "best_setting": best,
            "trial_seconds": trials,
            "first_loss": {name: round(value, 5) for name, value in first_losses.items()},
            "tokens_per_s": {
                side: summary([num_tokens / value for value in values])
                for side, values in seconds.items()
            },
            "times_faster": {
                f"{fast}, than {slow}": summary(ratios(seconds, slow, fast), digits=2)
                for fast, slow in (
                    ("ours", "transformers"),
                    ("ours", "transformers, sorted by length"),
                    ("ours, compiled", "transformers, compiled"),
                )
            },
            "roofline": {
                "matmul_flops_per_s": round(ceiling),
                "model_flops_per_s": round(rate),
                "share": round(rate / ceiling, 3),
            },
        },
    )


if __name__ == "__main__":
    main()
