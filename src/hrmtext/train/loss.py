"""Cross-entropy over the supervised tokens, in chunks of rows, and the accuracies beside it.

Letters: S supervised tokens, D hidden size, V vocabulary, R rows of a packed batch.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from hrmtext.batch import PackedBatch
from hrmtext.model import AttentionPlan, HrmLM, make_plan
from hrmtext.model.depth import Depth
from hrmtext.model.layers import BlockCall

NUM_SUMS = 4
"""Numbers that `step_sums` gives."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Microbatch:
    """A packed batch on its device, with what the loss needs; made without waiting for it."""

    tokens: torch.Tensor
    """(T) int64."""
    positions: torch.Tensor
    """(T) int64."""
    select: torch.Tensor
    """(S) stream indices of the supervised tokens."""
    labels: torch.Tensor
    """(S) int64."""
    row_of: torch.Tensor
    """(S) row of each supervised token."""
    num_rows: int
    plan: AttentionPlan

    @classmethod
    def prepare(
        cls,
        batch: PackedBatch,
        *,
        device: torch.device,
        dtype: torch.dtype,
        backend: str = "auto",
        head_dim: int | None = None,
    ) -> Microbatch:
        """Move `batch` (on the CPU) to `device` and plan its attention.

        Args:
            dtype: number format of the forward pass.
            backend: attention backend.
            head_dim: width of the model's heads, by which `auto` chooses.
        """
        # Indices are found on the host: `nonzero` on a GPU would wait for all queued work.
        select = batch.supervised()
        lengths = torch.tensor(batch.layout.lengths, dtype=torch.int64)
        rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        send = lambda tensor: tensor.to(device, non_blocking=True)  # noqa: E731
        return cls(
            tokens=send(batch.tokens),
            positions=send(batch.positions),
            select=send(select),
            labels=send(batch.labels[select]),
            row_of=send(rows[select]),
            num_rows=len(lengths),
            plan=make_plan(
                batch.layout, device=device, dtype=dtype, backend=backend, head_dim=head_dim
            ),
        )


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Loss and correctness of supervised tokens; every field stays on the device."""

    total: torch.Tensor
    """() sum of the cross-entropies times the scale, fp32; carries gradient."""
    losses: torch.Tensor
    """(S) cross-entropy of each token in nats, unscaled, fp32."""
    correct: torch.Tensor
    """(S) bool: the label has the highest logit."""


def cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    *,
    scale: float = 1.0,
    chunk_bytes: int = 1 << 28,
) -> TokenLoss:
    """Cross-entropy of `hidden @ weight.T`, summed and multiplied by `scale`.

    Softmax is fp32 or better. The logits of only a chunk of tokens exist at a time, in the forward
    and in the backward pass: the gradient is computed along with the loss.

    Args:
        hidden: (S, D). weight: (V, D). labels: (S) int64, all within the vocabulary.
        chunk_bytes: the fp32 logits of a chunk stay below this, at one token at least.
    """
    chunk_rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    arguments = (hidden, weight, labels, scale, chunk_rows, needs_gradient)
    return TokenLoss(*_ChunkedCrossEntropy.apply(*arguments))


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Loss and its gradient in one pass over chunks; backward only multiplies by what arrives."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: float,
        chunk_rows: int,
        needs_gradient: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(labels), dtype=wide)  # (S)
        correct = torch.empty_like(labels, dtype=torch.bool)  # (S)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        # Chunks add up in fp32; the sum is rounded once to the weight's format.
        grad_weight = torch.zeros_like(weight, dtype=wide) if needs_gradient else None
        for start in range(0, len(labels), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = hidden[rows] @ weight.T  # (C, V)
            correct[rows] = logits.argmax(-1) == labels[rows]
            log_probs = torch.log_softmax(logits, -1, dtype=wide)  # (C, V)
            del logits
            picked = labels[rows, None]
            losses[rows] = -log_probs.gather(1, picked).squeeze(1)
            if grad_hidden is None or grad_weight is None:
                continue
            grad = log_probs.exp_()
            grad.scatter_add_(1, picked, grad.new_full(picked.shape, -1.0))
            grad = grad.mul_(scale).to(hidden.dtype)
            torch.mm(grad, weight, out=grad_hidden[rows])
            if grad.dtype == wide:
                grad_weight.addmm_(grad.T, hidden[rows])
            else:
                grad_weight += grad.T @ hidden[rows]
        if grad_hidden is not None and grad_weight is not None:
            ctx.save_for_backward(grad_hidden, grad_weight.to(weight.dtype))
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum() * scale, losses, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        arriving = grad_outputs[0].to(grad_hidden.dtype)
        return grad_hidden * arriving, grad_weight * arriving, None, None, None, None


def forward_loss(
    model: HrmLM,
    batch: Microbatch,
    *,
    depth: Depth | None,
    scale: float,
    chunk_bytes: int,
    call_block: BlockCall | None = None,
) -> TokenLoss:
    """The loss of one microbatch: only the supervised tokens reach the head.

    `call_block`: see `train.recompute`.
    """
    states = model.model(batch.tokens, batch.positions, batch.plan, depth, batch.select, call_block)
    return cross_entropy(
        states[-1], model.lm_head.weight, batch.labels, scale=scale, chunk_bytes=chunk_bytes
    )


def exact_rows(correct: torch.Tensor, row_of: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(R) bool: every supervised token of the row is right; (S) inputs, on the device."""
    wrong = torch.zeros(num_rows, device=correct.device)
    wrong.index_add_(0, row_of, (~correct).float())
    return wrong == 0


def step_sums(loss: TokenLoss, batch: Microbatch) -> torch.Tensor:
    """(4) fp64 on the device: sum of the losses, tokens right, rows right as a whole, rows."""
    exact = exact_rows(loss.correct, batch.row_of, batch.num_rows)
    rows = torch.full_like(exact, True).sum()
    parts = (loss.losses.sum(dtype=torch.float64), loss.correct.sum(), exact.sum(), rows)
    return torch.stack([part.double() for part in parts])
