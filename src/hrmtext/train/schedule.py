"""What changes with the step: the learning rate and the backward depth. Steps count from 0."""

from __future__ import annotations

import math

from hrmtext.config.model import ModelConfig
from hrmtext.config.train import TrainConfig
from hrmtext.model.depth import Depth, bp_steps_at
from hrmtext.train.elastic import H_cycles_at, gradient_depth


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
    """Cycles of a step and which of its stack calls carry gradient.

    Cycles: the model's, or as `elastic` draws them. Gradient: `L_bp_cycles`, or the depth warmup.
    """
    return depth_with(step, config, model, total_steps, H_cycles_at(step, config, model))


def depth_with(
    step: int, config: TrainConfig, model: ModelConfig, total_steps: int, H_cycles: int
) -> Depth:
    """`depth_at` where the step runs `H_cycles`."""
    steps = bp_steps_at(
        step,
        total_steps,
        first=config.bp_first,
        last=config.bp_last,
        warmup_ratio=config.bp_warmup_ratio,
    )
    return gradient_depth(config, model, steps, H_cycles)
