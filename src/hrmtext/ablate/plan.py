"""Which runs a comparison takes, and what each costs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from hrmtext.config.ablate import AblationConfig, Variant
from hrmtext.config.train import TrainConfig
from hrmtext.train.estimate import estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """One training run of the comparison."""

    variant: str
    seed: int
    recipe: TrainConfig
    folder: Path
    flops: float
    """Operations of the whole run, by counting."""
    parameters: int
    """Stored ones."""


def plan(config: AblationConfig, out: str | Path) -> list[PlannedRun]:
    """All runs, seed by seed, so that a comparison cut short holds every variant.

    The reference (the first variant) does `train.max_steps`; with `match: flops` the others do as
    many steps as its operations pay for.
    """
    costs: dict[str, tuple[int, float, int]] = {}
    reference = None
    for variant in config.variants:
        steps = int(config.train["max_steps"])
        flops, parameters = _cost(config, variant, steps)
        if reference is not None and config.match == "flops":
            steps = max(1, round(steps * reference / flops))
            flops, parameters = _cost(config, variant, steps)
        reference = flops if reference is None else reference
        costs[variant.name] = (steps, flops, parameters)
    return [
        PlannedRun(
            variant=variant.name,
            seed=seed,
            recipe=config.recipe(variant, seed, costs[variant.name][0]),
            folder=Path(out) / "runs" / f"{variant.name}-seed{seed}",
            flops=costs[variant.name][1],
            parameters=costs[variant.name][2],
        )
        for seed in config.seeds
        for variant in config.variants
    ]


def _cost(config: AblationConfig, variant: Variant, steps: int) -> tuple[float, int]:
    recipe = config.recipe(variant, config.seeds[0], steps)
    found = estimate(recipe, device=torch.device("cpu"))
    assert found.total_flops is not None, "max_steps is set"
    return found.total_flops, found.stored_parameters
