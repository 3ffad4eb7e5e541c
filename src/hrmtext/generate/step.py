"""One decode step: eager, or compiled into one graph a shape.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch

from hrmtext.model import Depth, HrmLM, KVCache
from hrmtext.model.attention import AttentionPlan
from hrmtext.model.cache import DecodePlan

SMALLEST_WIDTH = 64


class StepFunction(Protocol):
    """Takes one decode step."""

    model: HrmLM
    is_compiled: bool
    """Rows and capacity stay as they are during a batch."""

    def __call__(
        self, tokens: torch.Tensor, cache: KVCache, depth: Depth | None, guidance: float
    ) -> torch.Tensor:
        """(B) tokens, appended to the cache -> (B, V) logits behind them."""
        ...


def run_model(
    model: HrmLM,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    plan: AttentionPlan,
    depth: Depth | None,
    guidance: float,
    select: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits of the selected tokens, auto-guided where the weight is not 0."""
    out = model(tokens, positions, plan, depth=depth, select=select)
    if guidance == 0:
        return out.logits
    return guided(model.head(out.states[0], select), out.logits, guidance)


def guided(first: torch.Tensor, last: torch.Tensor, weight: float) -> torch.Tensor:
    """Auto-guidance: (1 + w) * logits after the last H cycle - w * logits after the first."""
    return (1 + weight) * last - weight * first


def compiled_width(longest: int, capacity: int) -> int:
    """Columns that a compiled step reads: powers of two, so that few shapes are compiled."""
    width = SMALLEST_WIDTH
    while width <= longest:
        width *= 2
    return min(width, capacity)


class DecodeStep:
    """Logits of one further token a row.

    Compiled, each (number of rows, capacity, width) costs seconds once; small models, whose steps
    are mostly overhead, then run about a third faster on a CPU. Rows and capacity stay as they are
    during a batch.
    """

    def __init__(self, model: HrmLM, *, compiled: bool = False) -> None:
        self.model = model
        self.is_compiled = compiled
        self._run = torch.compile(_step, dynamic=False, fullgraph=True) if compiled else _step

    def __call__(
        self, tokens: torch.Tensor, cache: KVCache, depth: Depth | None, guidance: float
    ) -> torch.Tensor:
        """(B) tokens, appended to the cache -> (B, V) logits behind them."""
        cache.require_room()
        width = cache.longest + 1
        if self.is_compiled:
            width = compiled_width(cache.longest, cache.capacity)
        logits = self._run(
            self.model, tokens, cache.keys, cache.values, cache.lengths, width, depth, guidance
        )
        cache.advance()
        return logits


def _step(
    model: HrmLM,
    tokens: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    lengths: torch.Tensor,
    width: int,
    depth: Depth | None,
    guidance: float,
) -> torch.Tensor:
    plan = DecodePlan(keys, values, lengths, width)
    return run_model(model, tokens, lengths, plan, depth, guidance)
