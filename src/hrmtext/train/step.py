"""One optimizer step: microbatches, gradient sum over ranks, the non-finite guard, the update."""

from __future__ import annotations

import dataclasses
import math

import torch

from hrmtext.config.train import TrainConfig
from hrmtext.data.loader import GlobalBatch
from hrmtext.errors import NonFiniteError
from hrmtext.model.depth import Depth
from hrmtext.train.loss import NUM_SUMS, Microbatch, forward_loss, step_sums
from hrmtext.train.optim import AdamAtan2
from hrmtext.train.parallel import sum_gradients
from hrmtext.train.precision import ComputeModel
from hrmtext.train.recompute import recomputing


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step gives to the log."""

    sums: torch.Tensor
    """(4) fp64 on the device, of this rank: as `loss.step_sums`."""
    gradient_norm: float
    """L2 norm of the whole gradient."""


class TrainStep:
    """The step of a run; holds the module that computes and the optimizer."""

    def __init__(
        self, compute: ComputeModel, optimizer: AdamAtan2, config: TrainConfig, device: torch.device
    ) -> None:
        self.compute = compute
        self.optimizer = optimizer
        self.config = config
        self.device = device
        self.call_block = recomputing(compute.module, config.activation_checkpointing)
        self._parameters = list(compute.master.parameters())

    def run(self, batch: GlobalBatch, *, depth: Depth, lr: float, step: int) -> StepResult:
        """Accumulate this rank's bins, sum over ranks, check, update.

        Args:
            step: the step's number, from 0; only named in errors.

        Raises:
            NonFiniteError: the gradient holds NaN or infinity; no weight has been changed.
        """
        sums = self.accumulate(batch, depth)
        sum_gradients(self._parameters)
        gradient_norm = self.guard(batch, sums, step)
        self.optimizer.set_lr(lr)
        self.optimizer.step()
        self.compute.refresh()
        return StepResult(sums, gradient_norm)

    def accumulate(self, batch: GlobalBatch, depth: Depth) -> torch.Tensor:
        """Gradients of this rank's bins in the master weights' `grad`; returns the (4) sums."""
        self.compute.clear_gradients()
        sums = torch.zeros(NUM_SUMS, dtype=torch.float64, device=self.device)
        scale = 1.0 / max(1, batch.num_supervised_tokens)
        for packed in batch.bins:
            if not packed.layout.lengths:  # padding alone, at the end of an epoch
                continue
            micro = Microbatch.prepare(
                packed,
                device=self.device,
                dtype=self.compute.dtype,
                backend=self.config.attention,
                head_dim=self.compute.module.config.head_dim,
            )
            loss = forward_loss(
                self.compute.module,
                micro,
                depth=depth,
                scale=scale,
                chunk_bytes=self.config.loss_chunk_bytes,
                call_block=self.call_block,
                kernel=self.config.loss,
                early_weight=self.config.elastic.early_loss_weight,
            )
            loss.total.backward()
            self.compute.collect_gradients()
            sums += step_sums(loss, micro)
        return sums

    def guard(self, batch: GlobalBatch, sums: torch.Tensor, step: int) -> float:
        """The gradient's norm, fetched once; NonFiniteError naming the parameters if not finite."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        if not gradients:
            return 0.0
        norm = float(torch.stack(torch._foreach_norm(gradients)).norm())
        if math.isfinite(norm):
            return norm
        bad = [
            name
            for name, parameter in self.compute.master.named_parameters()
            if parameter.grad is not None and not bool(parameter.grad.isfinite().all())
        ]
        listed = ", ".join(bad[:4]) + (f" and {len(bad) - 4} more" if len(bad) > 4 else "")
        loss = float(sums[0]) / max(1, batch.num_supervised_tokens)
        raise NonFiniteError(
            f"step {step}: the gradient is not finite (norm {norm}; first in {listed or 'the sum'};"
            f" this rank's share of the loss {loss}), at batch {batch.index} of epoch "
            f"{batch.epoch}. No weight was changed by this step: resume from the last checkpoint "
            "with a lower lr, or look at the rows of that batch"
        )
