"""Depth-elastic training: a model that answers at fewer H cycles than it has.

A step may run fewer cycles (drawn at random), and the state after an earlier cycle may bear a loss
of its own. Each loss of a step that ends at cycle n has the routing of a model of n cycles: the
same rule counted back from call n * (L_cycles + 1), at most the calls that there are. With several
losses in one pass, the calls that carry gradient are the union: a call carries the gradient of
every loss behind it, or of none.
"""

from __future__ import annotations

from hrmtext.config.model import ModelConfig
from hrmtext.config.train import TrainConfig
from hrmtext.model.depth import Depth
from hrmtext.runtime.rng import numpy_generator


def cycle_choices(config: TrainConfig, model: ModelConfig) -> list[tuple[int, float]]:
    """(H cycles, probability) of what a step may run."""
    elastic = config.elastic
    if not elastic.H_cycles:
        return [(model.H_cycles, 1.0)]
    given = elastic.probabilities or (1.0,) * len(elastic.H_cycles)
    return [(c, p / sum(given)) for c, p in zip(elastic.H_cycles, given, strict=True)]


def H_cycles_at(step: int, config: TrainConfig, model: ModelConfig) -> int:
    """H cycles of a step, keyed by (seed, step): the same on every rank and after a resume."""
    choices = cycle_choices(config, model)
    if len(choices) == 1:
        return choices[0][0]
    drawn = numpy_generator(config.seed, "H_cycles", step).random()
    for cycles, probability in choices:
        drawn -= probability
        if drawn < 0:
            return cycles
    return choices[-1][0]  # the probabilities add up to a hair below 1


def gradient_depth(config: TrainConfig, model: ModelConfig, bp_steps: int, H_cycles: int) -> Depth:
    """Depth of a step of `H_cycles`: the routing of its last loss, joined with the earlier ones'.

    Args:
        bp_steps: stack calls that carry gradient, were all cycles run; not used where the recipe
            fixes `L_bp_cycles`.
    """

    def up_to(cycles: int) -> Depth:
        if config.L_bp_cycles is not None:
            return Depth.from_L_bp_cycles(model, config.L_bp_cycles, cycles)
        calls = cycles * (model.L_cycles + 1)
        return Depth.from_bp_steps(model, min(bp_steps, calls), cycles)

    depth = up_to(H_cycles)
    if config.elastic.early_loss_weight:
        for cycles in range(1, H_cycles):
            depth = depth.joined(up_to(cycles))
    return depth


def num_losses(config: TrainConfig, depth: Depth) -> int:
    """States of a step that go through the head in training."""
    return depth.H_cycles if config.elastic.early_loss_weight else 1
