"""What a training run is at a moment: weights, optimizer, counters, data cursor."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import torch

from hrmtext.artifacts.adapters import BaseReference
from hrmtext.model import HrmLM
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.parallel import Shards
from hrmtext.train.validate import Validation


@dataclasses.dataclass
class TrainState:
    """Everything that a checkpoint holds and an exact resume needs.

    There is no generator state: every random choice is keyed by (seed, purpose, step).
    """

    model: HrmLM
    """fp32 master weights."""
    optimizer: AdamAtan2
    shards: Shards = None  # pyrefly: ignore[bad-assignment]
    """The optimizer's parameters; by default all of `model`, whole."""
    step: int = 0
    """Optimizer steps done."""
    tokens: int = 0
    """Input tokens seen, over all ranks."""
    supervised_tokens: int = 0
    """Tokens that bore loss, over all ranks."""
    elapsed_s: float = 0.0
    """Training time, validations and checkpoints included, over all interruptions."""
    cursor: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The loader's state: where the next step reads."""
    interval: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Sums since the last line of the log, so that a resumed log goes on exactly."""
    stability: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The stability guard's running statistics and counts."""

    base: BaseReference | None = None
    """What the frozen weights are, where only adapters are trained."""

    def __post_init__(self) -> None:
        if self.shards is None:
            self.shards = Shards.whole(self.model)

    def names(self) -> dict[str, torch.nn.Parameter]:
        """The optimizer's parameters by name, in its order: this rank's chunks."""
        return self.shards.parameters

    def average(self) -> dict[str, torch.Tensor]:
        """The EMA of what is trained, by name, and the model's buffers."""
        return {
            **self.shards.buffers,
            **dict(zip(self.names(), self.optimizer.averages(), strict=True)),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainResult:
    """How a run ended."""

    run_folder: Path
    checkpoint: Path
    """The last one."""
    step: int
    total_steps: int
    tokens: int
    elapsed_s: float
    """Training time over all interruptions."""
    stopped_by: Literal["end", "max_minutes"]
    validation: Validation | None
    """The last one of this session; None where nothing was left to do, or without held-out rows."""
