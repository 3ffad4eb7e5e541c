"""Does a model trained for several depths keep its answers at one H cycle less?

For every seed three micro models see the same data in the same order for as many steps: one trained
plainly, one with `elastic` as in configs/train/elastic.yaml, one with the early-cycle loss alone.
Each answers the held-out rows at both depths, greedily, with the averaged weights. Interrupted, the
same call goes on: data, runs and answers that are there are not made again.

    python benchmarks/elastic.py WORK [--only plain] [--steps 3000] [--seeds 0 1 2]

The result is written when all sides are done.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from common import write_result

from hrmtext.api import load
from hrmtext.artifacts.layout import RunFolder
from hrmtext.config.base import build, read_yaml, to_mapping
from hrmtext.config.data import DataConfig
from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.heldout import read_held_out
from hrmtext.data.prepare import prepare
from hrmtext.evaluate.run import evaluate
from hrmtext.evaluate.score import majority_answers, wilson_interval
from hrmtext.runtime.io import write_json
from hrmtext.train.estimate import estimate
from hrmtext.train.loop import train
from hrmtext.train.metrics import read_metrics

RECIPE = Path(__file__).parents[1] / "configs" / "train" / "elastic.yaml"
DATA = {
    "reasoning_gym": {
        "seed": 0,
        "eval_size": 250,
        "num_workers": 1,
        "families": [
            {"name": "spell_backward", "size": 12_000,
             "config": {"min_word_len": 3, "max_word_len": 5}},
            {"name": "rotate_matrix", "size": 6_000, "config": {"min_n": 2, "max_n": 2}},
        ],
    },
    "tokenizer": {"vocab_size": 512, "max_rows_per_stratum": 1_500},
    "sampling": {"epochs": 4, "max_seq_len": 192},
}  # fmt: skip
SIDES: dict[str, dict[str, object]] = {
    "plain": {},
    "elastic": read_yaml(RECIPE)["elastic"],
    "early_loss_alone": {"early_loss_weight": 0.5},
}


def run_side(name: str, work: Path, steps: int, seed: int) -> dict[str, Any]:
    """Train (or go on with, or take up) one side, and ask it at both depths."""
    side = f"{name}-seed{seed}"
    done = work / f"{side}.json"
    if done.is_file():
        return json.loads(done.read_text())
    shared = {**read_yaml(RECIPE), "max_steps": steps, "seed": seed, "checkpoint_every": 100}
    recipe = build(TrainConfig, {**shared, "elastic": SIDES[name]}, where=name)
    data, run = work / "data", work / side
    result = train(recipe, data_folder=data, run_folder=run, device="cpu", progress="none")
    lines = read_metrics(RunFolder(run).path / "metrics.jsonl")
    validation = [line for line in lines if line.get("kind") == "validation"][-1]
    found: dict[str, Any] = {
        "elastic": to_mapping(recipe)["elastic"],
        "steps": steps,
        "flops": estimate(recipe, device=torch.device("cpu")).total_flops,
        "seconds": round(result.elapsed_s, 1),
        "loss_by_cycle": validation["ema"]["loss_by_cycle"],
        "exact_match": {
            f"H_cycles={cycles}": ask(result.checkpoint, data, cycles) for cycles in (2, 1)
        },
    }
    write_json(done, found)
    return found


def ask(checkpoint: Path, data: Path, H_cycles: int) -> dict[str, object]:
    """Exact match over all held-out rows with its 95 % interval, and by family."""
    rows = read_held_out(data / "heldout")
    report = evaluate(
        load(checkpoint, device="cpu", dtype="fp32"),
        rows,
        EvaluateConfig(max_new_tokens=40, H_cycles=H_cycles),
        train_majority=majority_answers(data / "clean"),
    )
    right = sum(prediction.right for prediction in report.predictions)
    low, high = wilson_interval(right, len(rows))
    return {
        "right": right,
        "rows": len(rows),
        "share": right / len(rows),
        "interval": [low, high],
        "families": {family.name: family.exact_match for family in report.families},
        "majority": report.mean["majority"],
    }


def main() -> None:
    """Run what is wanted and not done; write the result when everything is."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--only", choices=[*SIDES, "data"])
    parser.add_argument("--steps", type=int, default=3_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    options = parser.parse_args()
    prepare(build(DataConfig, DATA, where="data"), options.work / "data")
    if options.only == "data":
        return
    wanted = [options.only] if options.only else [*SIDES]
    sides: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in wanted}
    for seed in options.seeds:
        for name in wanted:
            sides[name][seed] = run_side(name, options.work, options.steps, seed)
    if options.only:
        print(json.dumps(sides, indent=2))
        return
    kept = {name: share_kept(by_seed.values()) for name, by_seed in sides.items()}
    by_seed = {
        name: {seed: share_kept([side]) for seed, side in runs.items()}
        for name, runs in sides.items()
    }
    write_result(
        "elastic", torch.device("cpu"),
        {"threads": torch.get_num_threads(), "data": DATA, "recipe": read_yaml(RECIPE),
         "share_kept_at_one_cycle_less": kept, "by_seed": by_seed, "sides": sides},
    )  # fmt: skip


def share_kept(sides: Collection[dict[str, Any]]) -> float | None:
    """Right answers at one cycle for each at two, over all runs; None where there is none."""
    full, less = (
        sum(side["exact_match"][f"H_cycles={cycles}"]["right"] for side in sides)
        for cycles in (2, 1)
    )
    return round(less / full, 4) if full else None


if __name__ == "__main__":
    main()
