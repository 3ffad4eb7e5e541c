"""How long does Adam-atan2 with its average take, by kernel, beside torch's fused AdamW?

The floor is the traffic: weight, two moments and average read and written once, gradient read.

    python benchmarks/optimizer.py [--preset mini] [--rounds 20] [--device auto]
"""

from __future__ import annotations

import argparse
import statistics

import torch
from common import interleave, read_bytes_per_s, summary, write_result

from hrmtext.config.model import preset
from hrmtext.model import build_model
from hrmtext.runtime.device import pick_device
from hrmtext.train.optim import AdamAtan2

PASSES = 9
"""Times 4 bytes a weight: 4 tensors read and written, the gradient read."""


def main() -> None:
    """Measure and write results/optimizer-<device>.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="mini")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    ours = ("foreach", "compiled", *(["cpp"] if device.type == "cpu" else []))
    sides = {}
    count = 0
    for name in (*ours, "torch AdamW, fused, no average"):
        weights = list(build_model(preset(arguments.preset), seed=0, device=device).parameters())
        count = sum(weight.numel() for weight in weights)
        for weight in weights:
            weight.grad = torch.randn_like(weight)
        if name in ours:
            sides[name] = AdamAtan2(weights, lr=1e-4, kernel=name).step
        else:
            sides[name] = torch.optim.AdamW(weights, lr=1e-4, fused=True).step
    seconds = interleave(sides, rounds=arguments.rounds, device=device, warmup=2)
    floor = PASSES * 4 * count / read_bytes_per_s(device)
    write_result(
        "optimizer",
        device,
        {
            "preset": arguments.preset,
            "parameters": count,
            "milliseconds": {
                name: summary([1e3 * value for value in values], digits=2)
                for name, values in seconds.items()
            },
            "floor_milliseconds": round(1e3 * floor, 2),
            "share_of_the_read_rate": {
                name: round(floor / statistics.median(values), 2)
                for name, values in seconds.items()
                if name in ours
            },
        },
    )


if __name__ == "__main__":
    main()
