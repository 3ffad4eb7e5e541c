"""What do the stability guard and telemetry cost, as shares of a training step?

The same step of the quickstart's shape, in turn: without guard, with it, and with telemetry in
every step; the last is divided by `telemetry_every` for its share on average.

    python benchmarks/guard_cost.py [--rounds 20] [--preset micro] [--batch-tokens 1024]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch
from common import interleave, ratios, summary, write_result
from train_step import quickstart_like_rows

from hrmtext.batch import PackedBatch
from hrmtext.config.base import build
from hrmtext.config.train import TrainConfig
from hrmtext.model import Depth, build_model
from hrmtext.runtime.device import pick_device, pick_training_dtype
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.precision import ComputeModel
from hrmtext.train.step import TrainStep


def side(preset: str, tokens: int, device: torch.device, **changes: object) -> Callable[[], None]:
    """One optimizer step at full backward depth under some settings of the config."""
    config = build(
        TrainConfig,
        {"model": {"preset": preset, "vocab_size": 512}, "batch_tokens": 1 << 20, **changes},
        where="benchmark",
    )
    shape = config.model.resolve()
    model = build_model(shape, seed=0, device=device)
    optimizer = AdamAtan2(model.parameters(), lr=1e-4)
    compute = ComputeModel(model, pick_training_dtype("auto", device))
    step = TrainStep(compute, optimizer, config, device)
    packed = PackedBatch.from_rows(quickstart_like_rows(tokens, shape.vocab_size, seed=0))
    batch = SimpleNamespace(
        index=0, epoch=0, bins=[packed], num_tokens=packed.layout.num_tokens,
        num_supervised_tokens=len(packed.supervised()),
    )  # fmt: skip
    depth = Depth.from_bp_steps(shape, 5)
    done = [0]

    def run() -> None:
        step.run(batch, depth=depth, lr=1e-5, step=done[0])
        done[0] += 1

    for _ in range(70):  # until the guard's window is full, as in nearly all steps of a run
        run()
    return run


def main() -> None:
    """Measure and write results/guard_cost-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--preset", default="micro")
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    settings = {
        "off": {"stability": "off", "telemetry_every": 0},
        "guard": {"stability": "guard", "telemetry_every": 0},
        "telemetry every step": {"stability": "guard", "telemetry_every": 1},
    }
    sides = {
        name: side(arguments.preset, arguments.batch_tokens, device, **changes)
        for name, changes in settings.items()
    }
    seconds = interleave(sides, rounds=arguments.rounds, device=device)
    guard = [100 * (ratio - 1) for ratio in ratios(seconds, "guard", "off")]
    telemetry = [100 * (r - 1) for r in ratios(seconds, "telemetry every step", "guard")]
    every = TrainConfig().telemetry_every
    write_result(
        "guard_cost",
        device,
        {
            "preset": arguments.preset,
            "batch_tokens": arguments.batch_tokens,
            "milliseconds": {n: summary([1e3 * s for s in v], 2) for n, v in seconds.items()},
            "guard_percent_of_step": summary(guard, 2),
            "telemetry_percent_of_its_step": summary(telemetry, 2),
            "telemetry_every": every,
            "telemetry_percent_on_average": round(statistics.median(telemetry) / every, 3),
        },
    )


if __name__ == "__main__":
    main()
