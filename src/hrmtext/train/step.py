"""One optimizer step: microbatches, gradient sum over ranks, the guards, the update."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from hrmtext.config.train import TrainConfig
from hrmtext.data.collate import padding_bin
from hrmtext.data.loader import GlobalBatch
from hrmtext.errors import BackendError, NonFiniteError
from hrmtext.model.depth import Depth
from hrmtext.model.layers import BlockCall
from hrmtext.runtime import dist
from hrmtext.train.cpp import (
    CppBlocks,
    CppHead,
    CppModel,
    CppRecurrence,
    choose_blocks,
    choose_head,
)
from hrmtext.train.loss import NUM_SUMS, Microbatch, forward_loss, step_sums
from hrmtext.train.modules import Modules
from hrmtext.train.optim import AdamAtan2, local
from hrmtext.train.precision import ComputeModel
from hrmtext.train.recompute import recomputing
from hrmtext.train.stability import Observation
from hrmtext.train.telemetry import CallProbe
from hrmtext.train.watch import StepWatch

if TYPE_CHECKING:
    from hrmtext.train.parallel.sharded import ShardedModel

SPARSE_TABLE = 1 << 22
"""Numbers of an embedding from which its gradient may be that of some rows."""


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step gives to the log."""

    sums: torch.Tensor
    """(4) fp64 on the device, of this rank: as `loss.step_sums`."""
    gradient_norm: float
    """L2 norm of the whole gradient, as it was before any damping."""
    lr: float
    """The learning rate that was used; 0 where the step was left out."""
    records: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """What the stability guard did and what telemetry saw, for the log."""


class TrainStep:
    """The step of a run; holds the module that computes and the optimizer."""

    def __init__(
        self,
        compute: ComputeModel | ShardedModel,
        optimizer: AdamAtan2,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self.compute = compute
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self.blocks: CppBlocks | None = None
        self.cpp_head: CppHead | None = None
        self.cpp_model: CppModel | None = None
        if isinstance(compute, ComputeModel):
            self.blocks = choose_blocks(compute.master, config, device, compute.dtype)
            if self.blocks is not None:
                compute.use_master()
                self.cpp_head = choose_head(config, self.blocks.dtype)
            if isinstance(self.blocks, CppRecurrence) and self.cpp_head is not None:
                self.cpp_model = CppModel(compute.master, self.blocks, self.cpp_head)
        elif config.block_kernel == "cpp":
            raise BackendError(
                "block_kernel=cpp needs whole weights, and parallel spreads them over the ranks; "
                "use block_kernel=torch or parallel=ddp"
            )
        if isinstance(compute, ComputeModel) and self._suits_sparse_embedding():
            compute.use_sparse_embedding()
        self.call_block: BlockCall | None = self.blocks or recomputing(
            compute.module, config.activation_checkpointing
        )
        modules = Modules(compute.shards.parameters, compute.shards.sum_over_shards)
        self.watch = StepWatch(modules, optimizer, config)
        self._probe: CallProbe | None = None

    def _suits_sparse_embedding(self) -> bool:
        """Whether a step looks up few of many rows, and the optimizer takes the gradient so."""
        table = self.compute.master.model.embed_tokens.weight
        is_large = table.numel() >= SPARSE_TABLE and len(table) >= 8 * self.config.batch_tokens
        return (
            is_large
            and table.requires_grad
            and not dist.is_distributed()
            and self.optimizer.takes_rows(table)
        )

    def run(self, batch: GlobalBatch, *, depth: Depth, lr: float, step: int) -> StepResult:
        """Accumulate this rank's bins, sum over ranks, check, update or leave out.

        Args:
            step: the step's number, from 0; decides whether telemetry is due.

        Raises:
            NonFiniteError: loss or gradient are NaN or infinite; no weight has been changed.
        """
        every = self.config.telemetry_every
        if every and (step + 1) % every == 0:
            self._probe = CallProbe(self.compute.module, depth)
        sums = self.accumulate(batch, depth)
        inside = None if self._probe is None else self._probe.measurements()
        self._probe = None
        self.compute.reduce()
        seen = self.watch.observe(sums, batch.num_supervised_tokens)
        norm = seen.gradient_norm
        if not (math.isfinite(norm) and math.isfinite(seen.loss)):
            self.refuse(batch, seen, step)
        decision = self.watch.decide(seen, lr=lr, depth=depth)
        used_lr = 0.0 if decision.skip else lr * decision.rate
        if not decision.skip:
            self.watch.damp(decision)
            self.optimizer.set_lr(used_lr)
            self.optimizer.step()
            self.watch.visit()
            self.compute.refresh()
        records: list[dict[str, Any]] = [decision.record] if decision.record is not None else []
        if inside is not None:
            modules = self.watch.module_telemetry(seen, lr=used_lr)
            records.append({"kind": "telemetry", **inside, **modules})
        for record in records:
            record["step"] = step + 1
        return StepResult(sums, norm, used_lr, records)

    def accumulate(self, batch: GlobalBatch, depth: Depth) -> torch.Tensor:
        """Gradients of this rank's bins in the master weights' `grad`; returns the (4) sums."""
        self.compute.clear_gradients()
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self.device)
        scale = 1.0 / max(1, batch.num_supervised_tokens)
        # A rank that is short of a bin takes part all the same, with one that bears no loss.
        bins = [packed for packed in batch.bins if packed.layout.lengths] or [padding_bin(1)]
        if self.blocks is not None:
            self.blocks.pack()
        for packed in bins:
            micro = Microbatch.prepare(
                packed,
                device=self.device,
                dtype=self.compute.dtype,
                backend=self.config.attention,
                head_dim=self.compute.module.config.head_dim,
                plan=None if self.blocks is None else self.blocks.rows(packed.layout),
            )
            if (direct := self._direct(micro, depth)) is not None:
                sums += direct.add_gradients(micro, depth, scale)
                continue
            with self._watched(micro) as call_block:
                loss = self.compute.call(
                    forward_loss,
                    micro,
                    depth=depth,
                    scale=scale,
                    chunk_bytes=self.config.loss_chunk_bytes,
                    call_block=call_block,
                    kernel=self.config.loss,
                    early_weight=self.config.elastic.early_loss_weight,
                    cpp_head=self.cpp_head,
                )
            self.compute.backward(loss.total)
            if len(micro.labels):  # padding alone is no row
                sums += step_sums(loss, micro)
        return sums

    def _direct(self, micro: Microbatch, depth: Depth) -> CppModel | None:
        """What computes this microbatch without autograd; None: it takes the general way."""
        model = self.cpp_model
        has_other_losses = self.config.elastic.early_loss_weight and depth.H_cycles > 1
        if model is None or has_other_losses or self._is_watched(micro):
            return None
        return model if model.suits(depth, len(micro.labels)) else None

    def _is_watched(self, micro: Microbatch) -> bool:
        """The first bin of a step is watched where telemetry is due."""
        return self._probe is not None and not self._probe.has_seen and len(micro.labels) > 0

    @contextlib.contextmanager
    def _watched(self, micro: Microbatch) -> Iterator[BlockCall | None]:
        """What calls the blocks."""
        if self._probe is None or not self._is_watched(micro):
            yield self.call_block
        else:
            with self._probe.forward(micro, self.call_block) as call_block:
                yield call_block

    def refuse(self, batch: GlobalBatch, seen: Observation, step: int) -> NoReturn:
        """Raise NonFiniteError that names the parameters whose gradients are not finite."""
        shards = self.compute.shards
        found = {name: local(p.grad) for name, p in shards.parameters.items() if p.grad is not None}
        flags = torch.zeros(len(found), device=self.device)
        for index, gradient in enumerate(found.values()):
            flags[index] = (~gradient.isfinite()).any()
        counts = shards.sum_over_shards(flags).tolist()
        bad = [name for name, count in zip(found, counts, strict=True) if count]
        listed = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        raise NonFiniteError(
            f"step {step}: the gradient is not finite (norm {seen.gradient_norm}; first in "
            f"{listed or 'the sum'}; loss {seen.loss}), at batch {batch.index} of epoch "
            f"{batch.epoch}. No weight was changed by this step: resume from the last checkpoint "
            "with a lower lr, or look at the rows of that batch"
        )
