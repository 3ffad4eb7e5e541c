"""Cross-entropy over the supervised tokens, in chunks of rows, and the accuracies beside it.

Letters: S supervised tokens, D hidden size, V vocabulary, R rows of a packed batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch

from hrmtext.batch import PackedBatch
from hrmtext.errors import BackendError
from hrmtext.model import AttentionPlan, HrmLM, make_plan
from hrmtext.model.depth import Depth
from hrmtext.model.layers import BlockCall
from hrmtext.runtime.transfer import send
from hrmtext.train.cpp import CppHead

LossKernel = Literal["auto", "chunked", "compiled", "linear"]
NUM_SUMS = 4
"""Numbers that `step_sums` gives."""
PRODUCT_ROWS = 8192
"""Tokens of the vocabulary whose share of a chunk's product with bf16 factors exists at a time."""


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
        plan: AttentionPlan | None = None,
    ) -> Microbatch:
        """Move `batch` (on the CPU) to `device` and plan its attention.

        Args:
            dtype: number format of the forward pass.
            backend: attention backend.
            head_dim: width of the model's heads, by which `auto` chooses.
            plan: a plan for what is to call the blocks, in place of an attention backend's.
        """
        # Indices are found on the host: `nonzero` on a GPU would wait for all queued work.
        select, labels, row_of = batch.targets
        return cls(
            tokens=send(batch.tokens, device),
            positions=send(batch.positions, device),
            select=send(select, device),
            labels=send(labels, device),
            row_of=send(row_of, device),
            num_rows=len(batch.layout.lengths),
            plan=plan
            or make_plan(
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
    kernel: LossKernel = "auto",
) -> TokenLoss:
    """Cross-entropy of `hidden @ weight.T`, summed and multiplied by `scale`.

    Softmax is fp32 or better. The logits of only a chunk of tokens exist at a time, in the forward
    and in the backward pass: the gradient is computed along with the loss.

    Args:
        hidden: (S, D). weight: (V, D), rounded to the format of `hidden` for the products; its
            gradient has its own. labels: (S) int64, all within the vocabulary.
        chunk_bytes: the fp32 logits of a chunk stay below this, at one token at least.
        kernel: `chunked`: plain torch; `compiled`: what lies between the matrix products of a chunk
            as one compiled kernel; `linear`: torch's own `linear_cross_entropy`, beside which a
            second pass finds what is right; `auto`: compiled on CUDA, chunked elsewhere.

    Raises:
        BackendError: `linear` with a torch that lacks it (2.13 brought it).
    """
    chunk_rows = max(1, chunk_bytes // (4 * weight.shape[0]))
    if kernel == "linear":
        return _torch_linear(hidden, weight.to(hidden.dtype), labels, scale, chunk_rows)
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    fused = kernel == "compiled" or (kernel == "auto" and hidden.device.type == "cuda")
    softmax = _compiled_softmax() if fused else _softmax_and_gradient
    arguments = (hidden, weight, labels, scale, chunk_rows, needs_gradient, softmax)
    return TokenLoss(*_ChunkedCrossEntropy.apply(*arguments))


def _softmax_and_gradient(
    logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(C, V) logits of a chunk -> losses, correct (C) each; gradient of the logits (C, V)."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    correct = logits.argmax(-1) == labels
    log_probs = torch.log_softmax(logits, -1, dtype=wide)  # (C, V)
    picked = labels[:, None]
    losses = -log_probs.gather(1, picked).squeeze(1)
    if not needs_gradient:
        return losses, correct, None
    grad = log_probs.exp_()
    grad.scatter_add_(1, picked, grad.new_full(picked.shape, -1.0))
    return losses, correct, grad.mul_(scale).to(logits.dtype)


def _softmax_by_comparison(
    logits: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor, needs_gradient: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The same without a scatter, so that a compiler makes one pass a reduction of it."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    is_label = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]  # (C, V)
    correct = logits.argmax(-1) == labels
    log_probs = torch.log_softmax(logits, -1, dtype=wide)  # (C, V)
    losses = -log_probs.masked_fill(~is_label, 0.0).sum(1)
    if not needs_gradient:
        return losses, correct, None
    return losses, correct, ((log_probs.exp() - is_label.to(wide)) * scale).to(logits.dtype)


@cache
def _compiled_softmax() -> Callable[..., Any]:
    return torch.compile(_softmax_by_comparison, dynamic=True)


def _torch_linear(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float, chunk_rows: int
) -> TokenLoss:
    try:
        from torch.nn import LinearCrossEntropyOptions
        from torch.nn.functional import linear_cross_entropy
    except ImportError as error:
        raise BackendError(
            f"loss=linear needs torch 2.13 or later, this is {torch.__version__}; use loss=chunked"
        ) from error
    options = LinearCrossEntropyOptions(batch_chunk_size=chunk_rows, chunking_method=None)
    # Summed by torch the loss would have the format of `hidden`, eight bits of a sum over bf16.
    losses = linear_cross_entropy(hidden, weight, labels, reduction="none", options=options)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    with torch.no_grad():
        parts = zip(hidden.split(chunk_rows), labels.split(chunk_rows), strict=True)
        correct = [(part @ weight.T).argmax(-1) == label for part, label in parts]
    total = losses.sum(dtype=wide) * scale
    return TokenLoss(total, losses.detach().to(wide), torch.cat(correct))


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
        softmax: Callable[..., Any],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        losses = hidden.new_empty(len(labels), dtype=wide)  # (S)
        correct = torch.empty_like(labels, dtype=torch.bool)  # (S)
        grad_hidden = torch.empty_like(hidden) if needs_gradient else None
        rounded = weight.to(hidden.dtype)
        # Chunks add up in fp32 and are rounded once to the weight's format, as one alone is.
        with_weight = needs_gradient and ctx.needs_input_grad[1]  # not where it is frozen
        is_one = len(labels) <= chunk_rows
        sums = weight.dtype if is_one else torch.promote_types(weight.dtype, torch.float32)
        grad_weight = torch.zeros_like(weight, dtype=sums) if with_weight else None
        # A float would be compiled anew at every step; a CPU scalar goes into any kernel.
        factor = torch.tensor(scale, dtype=wide)
        for start in range(0, len(labels), chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = hidden[rows] @ rounded.T  # (C, V)
            losses[rows], correct[rows], grad = softmax(
                logits, labels[rows], factor, needs_gradient
            )
            del logits
            if grad_hidden is None:
                continue
            torch.mm(grad, rounded, out=grad_hidden[rows])
            if start + chunk_rows >= len(labels):
                del rounded  # as large as half of what comes
            if grad_weight is not None:
                _add_product(grad_weight, grad, hidden[rows])
        if grad_hidden is not None:
            of_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
            ctx.save_for_backward(grad_hidden, of_weight)
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum() * scale, losses, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        arriving = grad_outputs[0]
        if arriving.device.type == "cpu" and arriving == 1:  # no second copy of the head's size
            return grad_hidden, grad_weight, None, None, None, None, None
        of_weight = None if grad_weight is None else grad_weight * arriving
        of_hidden = grad_hidden * arriving.to(grad_hidden.dtype)
        return of_hidden, of_weight, None, None, None, None, None


def _add_product(sums: torch.Tensor, grad: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add `grad.T @ hidden`, (V, D), of a chunk's (C, V) and (C, D) to `sums`."""
    if sums.dtype == grad.dtype:
        sums.addmm_(grad.T, hidden)
        return
    for columns in range(0, len(sums), PRODUCT_ROWS):  # what is to be widened stays small
        part = slice(columns, columns + PRODUCT_ROWS)
        sums[part] += grad[:, part].T @ hidden


def forward_loss(
    model: HrmLM,
    batch: Microbatch,
    *,
    depth: Depth | None,
    scale: float,
    chunk_bytes: int,
    call_block: BlockCall | None = None,
    kernel: LossKernel = "auto",
    early_weight: float = 0.0,
    cpp_head: CppHead | None = None,
) -> TokenLoss:
    """The loss of one microbatch: only the supervised tokens reach the head.

    Args:
        call_block: see `train.recompute`.
        early_weight: weight in `total` of the losses of earlier cycles; the other fields are the
            last cycle's alone.
        cpp_head: computes the losses that suit it, in place of `kernel`.
    """
    states = model.model(batch.tokens, batch.positions, batch.plan, depth, batch.select, call_block)
    head = model.lm_head.weight

    def loss_of(state: torch.Tensor, weight: float) -> TokenLoss:
        if cpp_head is not None and cpp_head.suits(state, head):
            return TokenLoss(*cpp_head.loss(state, head, batch.labels, weight * scale))
        return cross_entropy(
            state, head, batch.labels, scale=weight * scale, chunk_bytes=chunk_bytes, kernel=kernel
        )

    loss = loss_of(states[-1], 1.0)
    if not early_weight:
        return loss
    total = loss.total
    for state in states[:-1]:  # (T, D) of all tokens
        total = total + loss_of(state.index_select(0, batch.select), early_weight).total
    return dataclasses.replace(loss, total=total)


def exact_rows(correct: torch.Tensor, row_of: torch.Tensor, num_rows: int) -> torch.Tensor:
    """(R) bool: every supervised token of the row is right; (S) inputs, on the device."""
    wrong = torch.zeros(num_rows, device=correct.device)
    wrong.index_add_(0, row_of, (~correct).float())
    return wrong == 0


def step_sums(loss: TokenLoss, batch: Microbatch) -> torch.Tensor:
    """(4) fp64 on the device: sum of the losses, tokens right, rows right as a whole, rows."""
    exact = exact_rows(loss.correct, batch.row_of, batch.num_rows)
    wide = torch.float64
    rows = exact.new_full((), batch.num_rows, dtype=wide)
    parts = (loss.losses, loss.correct, exact)
    return torch.stack([*(part.sum(dtype=wide) for part in parts), rows])
