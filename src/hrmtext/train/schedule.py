"""What changes with the step: the learning rate and the backward depth. Steps count from 0."""

from __future__ import annotations

import math

from hrmtext.config.model import ModelConfig
from hrmtext.config.train import TrainConfig
from hrmtext.model.depth import Depth, bp_steps_at


def learning_rate(step: int, config: TrainConfig, total_steps: int) -> float:
    """Linear warmup to `lr` in `warmup_steps`, then constant, or a cosine to `lr_min_ratio * lr`.

    The first step has lr / warmup_steps, not zero. At and past the end the cosine stays at its
    minimum; a warmup that is longer than the run just does not end.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    decay_steps = max(1, total_steps - config.warmup_steps)
    progress = min(1.0, (step - config.warmup_steps) / decay_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.lr_min_ratio + (1.0 - config.lr_min_ratio) * cosine)


def depth_at(step: int, config: TrainConfig, model: ModelConfig, total_steps: int) -> Depth:
    """Which stack calls carry gradient at a step: `L_bp_cycles`, or the depth warmup."""
    if config.L_bp_cycles is not None:
        return Depth.from_L_bp_cycles(model, config.L_bp_cycles)
    steps = bp_steps_at(
        step,
        total_steps,
        first=config.bp_first,
        last=config.bp_last,
        warmup_ratio=config.bp_warmup_ratio,
    )
    return Depth.from_bp_steps(model, steps)
