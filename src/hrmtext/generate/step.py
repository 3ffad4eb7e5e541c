"""Reading prompts and taking decode steps: eager, or steps compiled into one graph a shape.

Letters: B rows, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch

from hrmtext.batch import RowLayout
from hrmtext.model import Depth, HrmLM, KVCache, make_plan
from hrmtext.model.attention import AttentionPlan
from hrmtext.model.cache import DecodePlan, ExtendPlan, PrefillPlan

SMALLEST_WIDTH = 64


class StepFunction(Protocol):
    """Reads prompts and takes decode steps."""

    model: HrmLM
    is_compiled: bool
    """Rows and capacity stay as they are during a batch."""

    def __call__(
        self, tokens: torch.Tensor, cache: KVCache, depth: Depth | None, guidance: float
    ) -> torch.Tensor:
        """(B) tokens, appended to the cache -> (B, V) logits behind them."""
        ...

    def read(
        self,
        tokens: torch.Tensor,
        layout: RowLayout,
        cache: KVCache,
        depth: Depth | None,
        guidance: float,
    ) -> torch.Tensor:
        """Append several new tokens a row, such as prompts; (B, V) logits behind each row's last.

        Args:
            tokens: (T) packed without padding.
            layout: who sees whom among them; all see what their row holds already.

        Raises:
            DataError: they do not fit the cache.
        """
        ...


def read_by_module(
    model: HrmLM,
    tokens: torch.Tensor,
    layout: RowLayout,
    cache: KVCache,
    depth: Depth | None,
    guidance: float,
) -> torch.Tensor:
    """As `StepFunction.read`, by the module: packed attention for rows that hold nothing yet."""
    if cache.longest:
        plan: ExtendPlan | PrefillPlan = cache.extend(layout)
    else:
        weight = model.lm_head.weight
        attention = make_plan(
            layout,
            device=cache.device,
            dtype=weight.dtype,
            head_dim=model.config.head_dim,
        )
        plan = cache.prefill(layout, attention)
    ends = torch.tensor(layout.lengths, device=cache.device).cumsum(0)
    logits = run_model(model, tokens, plan.positions, plan, depth, guidance, select=ends - 1)
    plan.commit()
    return logits


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

    def read(
        self,
        tokens: torch.Tensor,
        layout: RowLayout,
        cache: KVCache,
        depth: Depth | None,
        guidance: float,
    ) -> torch.Tensor:
        """See `StepFunction.read`."""
        return read_by_module(self.model, tokens, layout, cache, depth, guidance)

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
