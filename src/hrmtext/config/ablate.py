"""A comparison: variants of one training recipe, trained at equal cost with several seeds."""

from __future__ import annotations

import copy
from typing import Any, Literal

import pydantic

from hrmtext.config.base import build, config_class
from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.config.train import TrainConfig
from hrmtext.errors import ConfigError


@config_class
class Variant:
    """One row of the table."""

    name: str
    """Its name in the table and in folder names: letters, digits, `-`, `_`."""
    changes: dict[str, Any] = pydantic.Field(default_factory=dict)
    """Keys of the training recipe that differ, dotted: `{model.architecture: ut, bp_first: 2}`."""


@config_class
class AblationConfig:
    """Which variants are compared, at what cost, and how they are judged."""

    title: str
    """Heading of the table: the question that it answers."""
    train: dict[str, Any]
    """Keys of the training recipe that all variants share; needs max_steps, the first one's."""
    variants: tuple[Variant, ...]
    """Rows of the table; the first is the reference."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every variant is trained once with each; they decide initial weights and data order."""
    match: Literal["flops", "steps"] = "flops"
    """Steps of the other variants: as many as the reference's operations pay for, or as many."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """How the held-out rows are answered."""

    def __post_init__(self) -> None:
        names = [variant.name for variant in self.variants]
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(f"variants are {names}, expected at least two of different names")
        for name in names:
            if not name or not name.replace("-", "").replace("_", "").isalnum():
                raise ConfigError(f"variant name {name!r}: expected letters, digits, - and _")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ConfigError(f"seeds are {list(self.seeds)}, expected different ones")
        if self.train.get("max_steps") is None:
            raise ConfigError("train.max_steps is missing: it sets the cost of the comparison")
        for variant in self.variants:
            self.recipe(variant, self.seeds[0])

    def recipe(self, variant: Variant, seed: int, max_steps: int | None = None) -> TrainConfig:
        """The training config of a variant; `max_steps`: instead of the shared one.

        Raises:
            ConfigError: an unknown key, or a value that the recipe refuses; the variant is named.
        """
        values = copy.deepcopy(self.train)
        for key, value in {**variant.changes, "seed": seed}.items():
            node = values
            *parents, leaf = key.split(".")
            for parent in parents:
                node = node.setdefault(parent, {})
                if not isinstance(node, dict):
                    raise ConfigError(f"variant {variant.name}: {key}: {parent!r} is no section")
            node[leaf] = value
        if max_steps is not None:
            values["max_steps"] = max_steps
        return build(TrainConfig, values, where=f"variant {variant.name}")
