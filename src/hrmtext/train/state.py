"""What a training run is at a moment: weights, optimizer, counters, data cursor."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hrmtext.model import HrmLM
from hrmtext.train.optim import AdamAtan2


@dataclasses.dataclass
class TrainState:
    """Everything that a checkpoint holds and an exact resume needs.

    There is no generator state: every random choice is keyed by (seed, purpose, step).
    """

    model: HrmLM
    """fp32 master weights."""
    optimizer: AdamAtan2
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

    def names(self) -> dict[str, torch.nn.Parameter]:
        """Parameters by name, in the order of the optimizer."""
        return dict(self.model.named_parameters())

    def average(self) -> dict[str, torch.Tensor]:
        """The EMA weights under the names of the model's state, buffers included."""
        averaged = dict(zip(self.names(), self.optimizer.averages(), strict=True))
        return {**self.model.state_dict(), **averaged}
