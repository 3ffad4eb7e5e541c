"""What do planted faults do to a run, with the stability guard and without it?

A small model learns reasoning-gym families from the quickstart's recipe. Faults, all together or
(--alone) each by itself too: poisoned batches (labels shuffled), gradients multiplied by 10,000,
and a learning rate ten times too high for twenty steps. The undisturbed run is watched as well:
there the guard must do nothing. Compared is the validation loss of the averaged weights at the end.

    python benchmarks/stability.py [--steps 240] [--batch-tokens 1024] [--seed 0 1 2] [--alone]
        [--work FOLDER]

A seed decides the initial weights and the data order; the data are the same for all. With --work, a
run that was interrupted goes on when the same command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from common import write_result

from hrmtext.artifacts import RunFolder
from hrmtext.batch import IGNORE
from hrmtext.cli.recipes import recipe
from hrmtext.config.base import build, load, read_values
from hrmtext.config.data import DataConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.prepare import prepare
from hrmtext.runtime.rng import torch_generator
from hrmtext.train import FolderSource, loop, train_on
from hrmtext.train.metrics import read_metrics
from hrmtext.train.step import TrainStep

FAULTS = ("poisoned batches", "gradients times 10,000", "rate times 10 for 20 steps")


@contextlib.contextmanager
def faulty(faults: tuple[str, ...], steps: int) -> Iterator[dict[str, list[int]]]:
    """Plant faults between half and three quarters of the run; yields the steps of each."""
    at = {
        "poisoned batches": [steps // 2, steps // 2 + 1, steps // 2 + 2],
        "gradients times 10,000": [steps * 5 // 8, steps * 5 // 8 + 10],
        "rate times 10 for 20 steps": list(range(steps * 11 // 16, steps * 11 // 16 + 20)),
    }
    at = {name: at[name] if name in faults else [] for name in FAULTS}
    run, accumulate, rate = TrainStep.run, TrainStep.accumulate, loop.learning_rate
    now = [0]

    def faulty_run(self: TrainStep, batch: Any, **named: Any) -> Any:
        now[0] = named["step"]
        if now[0] in at["poisoned batches"]:
            bins = [shuffled(packed, now[0]) for packed in batch.bins]
            batch = dataclasses.replace(batch, bins=bins)
        return run(self, batch, **named)

    def faulty_accumulate(self: TrainStep, *arguments: Any) -> torch.Tensor:
        sums = accumulate(self, *arguments)
        if now[0] in at["gradients times 10,000"]:
            for parameter in self.compute.master.parameters():
                if parameter.grad is not None:
                    parameter.grad *= 1e4
        return sums

    def faulty_rate(step: int, *arguments: Any) -> float:
        return rate(step, *arguments) * (10.0 if step in at["rate times 10 for 20 steps"] else 1.0)

    with (
        mock.patch.object(TrainStep, "run", faulty_run),
        mock.patch.object(TrainStep, "accumulate", faulty_accumulate),
        mock.patch.object(loop, "learning_rate", faulty_rate),
    ):
        yield at


def shuffled(packed: Any, step: int) -> Any:
    """The same rows with their supervised labels in a random order."""
    labels = packed.labels.clone()
    where = (labels != IGNORE).nonzero().squeeze(1)
    order = torch.randperm(len(where), generator=torch_generator(step, "poison"))
    labels[where] = labels[where[order]]
    return dataclasses.replace(packed, labels=labels)


def main() -> None:
    """Measure and write results/stability-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="several: all, in turn")
    parser.add_argument("--alone", action="store_true", help="each fault by itself as well")
    parser.add_argument("--work", type=Path, default=None, help="keep data and runs here")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        work = arguments.work
        if work is None:
            work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        data = work / "data"
        values = read_values(recipe("data/quickstart.yaml"))
        for family in values["reasoning_gym"]["families"]:
            family |= {"size": 2000, "eval_size": 40}
        prepare(build(DataConfig, values, where="quickstart, few rows"), data)
        source = FolderSource(data)
        runs: dict[str, dict[str, dict[str, Any]]] = {}
        plans: list[tuple[str, ...]] = [(), FAULTS]
        if arguments.alone:
            plans += [(fault,) for fault in FAULTS]
        for seed in arguments.seed:
            found = runs[f"seed {seed}"] = {}
            for faults in plans:
                for mode in ("guard", "off"):
                    if not faults and mode == "off":
                        continue  # equal bit for bit: tests/unit/train/test_stability.py
                    name = f"{' + '.join(faults) or 'undisturbed'}, {mode}"
                    place = work / "runs" / f"seed {seed}" / name
                    found[name] = one_run(source, place, faults, mode, seed, arguments)
                    print(f"seed {seed}", name, found[name], flush=True)
            calm = found["undisturbed, guard"]["validation_loss"]
            for run in found.values():
                run["against_undisturbed"] = round(run["validation_loss"] / calm - 1, 4)
    against = {
        name: [found[name]["against_undisturbed"] for found in runs.values()]
        for name in next(iter(runs.values()))
        if not name.startswith("undisturbed")
    }
    write_result(
        "stability",
        torch.device("cpu"),
        {
            "steps": arguments.steps,
            "batch_tokens": arguments.batch_tokens,
            "against_undisturbed_by_seed": against,
            "runs": runs,
        },
    )


def one_run(
    source: FolderSource,
    folder: Path,
    faults: tuple[str, ...],
    mode: str,
    seed: int,
    arguments: Any,
) -> dict[str, Any]:
    """Train once; final losses, and the guard's actions by kind and step."""
    steps = arguments.steps
    overrides = [
        f"max_steps={steps}", f"batch_tokens={arguments.batch_tokens}", "warmup_steps=20",
        "ema_decay=0.97", "precision=fp32", f"checkpoint_every={steps}", "validate_every=0",
        "validation_rows=200", "tensorboard=false", f"stability={mode}",
        "telemetry_every=10", f"seed={seed}",
    ]  # fmt: skip
    config = load(TrainConfig, recipe("train/quickstart.yaml"), overrides)
    with faulty(faults, steps) as at:
        result = train_on(config, source, run_folder=folder, device="cpu", progress="none")
    assert result.step == steps, "the run has come to its end, perhaps after an interruption"
    records = read_metrics(RunFolder(folder).metrics_file)
    validation = [record for record in records if record["kind"] == "validation"][-1]
    actions = [record for record in records if record["kind"] == "stability"]
    return {
        "faults_at_steps": {name: [one + 1 for one in where] for name, where in at.items()},
        "validation_loss": round(validation["ema"]["loss"], 4),
        "last_training_loss": round([r for r in records if r["kind"] == "train"][-1]["loss"], 4),
        "actions": {
            kind: [r["step"] for r in actions if kind in r["action"].split("+")]
            for kind in ("skip", "damp", "brake")
        },
        "seconds": round(result.elapsed_s, 1),
    }


if __name__ == "__main__":
    main()
