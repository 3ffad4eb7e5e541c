"""Loss and accuracy on held-out rows: in total, by condition, by stratum, and by H cycle."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from hrmtext.config.train import TrainConfig
from hrmtext.data.heldout import ValidationBatch
from hrmtext.model import HrmLM
from hrmtext.runtime import dist
from hrmtext.train.cpp import CppBlocks
from hrmtext.train.loss import Microbatch, cross_entropy, exact_rows
from hrmtext.train.precision import ComputeModel

if TYPE_CHECKING:
    from hrmtext.train.parallel.sharded import ShardedModel

# Columns of the sums: rows, tokens, loss, tokens right, rows right as a whole.
_NUM_COLUMNS = 5


@torch.no_grad()
def validate(
    model: HrmLM,
    batches: Sequence[ValidationBatch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str = "auto",
    chunk_bytes: int = 1 << 28,
    blocks: CppBlocks | None = None,
) -> dict[str, Any]:
    """Score the supervised tokens of held-out rows under teacher forcing.

    The batches are shared out over the ranks; every rank returns the sums over all.

    Args:
        blocks: what computes the model's blocks in training, with the weights as they are now.

    Returns:
        `rows`, `tokens`, `loss` (nats a token), `token_accuracy`, `exact_answer` (share of rows
        whose every response token is right), `loss_by_cycle` (one an H cycle),
        `by_condition` and `by_stratum` (the same keys but the last three, for each name).
    """
    groups = _groups(batches)
    sums = torch.zeros(len(groups), _NUM_COLUMNS, dtype=torch.float64)
    by_cycle = torch.zeros(model.config.H_cycles, dtype=torch.float64)
    if blocks is not None:
        blocks.pack()
    for batch in batches[dist.rank() :: dist.world_size()]:
        micro = Microbatch.prepare(
            batch.batch,
            device=device,
            dtype=dtype,
            backend=backend,
            head_dim=model.config.head_dim,
            plan=None if blocks is None else blocks.rows(batch.batch.layout),
        )
        rows, cycles = _score(model, micro, chunk_bytes, blocks)
        by_cycle += cycles
        for kind, names in (("condition", batch.conditions), ("stratum", batch.strata)):
            index = torch.tensor([groups[(kind, name)] for name in names], dtype=torch.int64)
            sums.index_add_(0, index, rows)
    sums = dist.sum_over_ranks(sums.to(device)).cpu()
    by_cycle = dist.sum_over_ranks(by_cycle.to(device)).cpu()
    named = {key: _summary(sums[index]) for key, index in groups.items()}
    total = sum(sums[index] for (kind, _), index in groups.items() if kind == "condition")
    if not isinstance(total, torch.Tensor):
        total = torch.zeros(_NUM_COLUMNS, dtype=torch.float64)
    return {
        **_summary(total),
        "loss_by_cycle": [float(loss) / max(1.0, float(total[1])) for loss in by_cycle],
        "by_condition": {name: value for (kind, name), value in named.items() if kind[0] == "c"},
        "by_stratum": {name: value for (kind, name), value in named.items() if kind[0] == "s"},
    }


def validate_both(
    compute: ComputeModel | ShardedModel,
    averages: Sequence[torch.Tensor],
    batches: Sequence[ValidationBatch],
    config: TrainConfig,
    device: torch.device,
    blocks: CppBlocks | None = None,
) -> dict[str, dict[str, Any]]:
    """`validate` of the `raw` weights and of the averages (`ema`) of a run."""
    results = {}
    for name, weights in (("raw", None), ("ema", averages)):
        with compute.using(weights) as module:
            results[name] = validate(
                module,
                batches,
                device=device,
                dtype=compute.dtype,
                backend=config.attention,
                chunk_bytes=config.loss_chunk_bytes,
                blocks=blocks,
            )
    return results


def _score(
    model: HrmLM, micro: Microbatch, chunk_bytes: int, blocks: CppBlocks | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(R, columns) sums of each row and (H_cycles) loss sums, fp64 on the CPU."""
    states = model.model(micro.tokens, micro.positions, micro.plan, call_block=blocks)
    weight = model.lm_head.weight
    cycles = []
    for state in states:
        selected = state.index_select(0, micro.select)
        loss = cross_entropy(selected, weight, micro.labels, chunk_bytes=chunk_bytes)
        cycles.append(loss.losses.sum(dtype=torch.float64))
    exact = exact_rows(loss.correct, micro.row_of, micro.num_rows)
    columns = torch.stack(
        (torch.ones_like(loss.losses), loss.losses, loss.correct.float()), dim=1
    ).double()  # (S, 3): tokens, loss, right
    per_row = torch.zeros(micro.num_rows, 3, dtype=torch.float64)
    per_row.index_add_(0, micro.row_of.cpu(), columns.cpu())
    ones = torch.ones(micro.num_rows, 1, dtype=torch.float64)
    rows = torch.cat((ones, per_row, exact.double().cpu()[:, None]), dim=1)
    return rows, torch.stack(cycles).cpu()


def _groups(batches: Sequence[ValidationBatch]) -> dict[tuple[str, str], int]:
    """(kind, name) of every group -> row of the sums, sorted, the same on every rank."""
    keys = {("condition", name) for batch in batches for name in batch.conditions}
    keys |= {("stratum", name) for batch in batches for name in batch.strata}
    return {key: index for index, key in enumerate(sorted(keys))}


def _summary(sums: torch.Tensor) -> dict[str, Any]:
    rows, tokens, loss, right, exact = sums.tolist()
    return {
        "rows": int(rows),
        "tokens": int(tokens),
        "loss": loss / max(1.0, tokens),
        "token_accuracy": right / max(1.0, tokens),
        "exact_answer": exact / max(1.0, rows),
    }


@dataclasses.dataclass(frozen=True)
class Validation:
    """One validation of a run."""

    step: int
    raw: dict[str, Any]
    """`validate` of the raw weights."""
    ema: dict[str, Any]
    """`validate` of the averaged weights, which are what is released."""

    def record(self) -> dict[str, Any]:
        """The line of metrics.jsonl."""
        return {"kind": "validation", "step": self.step, "raw": self.raw, "ema": self.ema}
