"""The head's cross-entropy by a C++ kernel, for heads whose logits of a step are few.

Letters: S supervised tokens, D hidden size, V vocabulary.
"""

from __future__ import annotations

import ctypes
import dataclasses
from typing import Any

import torch

from hrmtext.train.cpp.library import library

MOST_WEIGHTS = 1 << 20
"""Weights of a head, which are packed anew for every loss, and ..."""
MOST_LOGITS = 1 << 22
"""... logits of a loss up to which the kernel pays; beyond it torch's chunks take less memory."""
MIN_OWN_TOKENS = 32
"""Tokens from which a thread of its own pays."""

_I, _P = ctypes.c_int64, ctypes.c_void_p


class CLossTask(ctypes.Structure):
    _fields_ = [
        *((name, _I) for name in ("tokens", "hidden", "vocab", "threads", "bf16")),
        ("scale", ctypes.c_float),
        *((name, _P) for name in ("states", "weight", "labels", "losses", "correct")),
        *((name, _P) for name in ("d_states", "d_weight")),
    ]


class CppHead:
    """Losses of a head, with their gradients, all logits of a call at once."""

    def __init__(self, dtype: torch.dtype) -> None:
        """`dtype`: format in which products multiply, fp32 or bf16; all else is fp32."""
        self.dtype = dtype
        self._library = library()
        self._widths = 2 * int(self._library.hrm_lanes())
        self._workspace = torch.empty(0)

    def suits(self, hidden: torch.Tensor, weight: torch.Tensor) -> bool:
        """Whether the kernel takes these: few, in fp32 on the CPU, in whole pairs of vectors."""
        return _is_plain(hidden) and self.takes(len(hidden), weight)

    def takes(self, tokens: int, weight: torch.Tensor) -> bool:
        """The same of so many tokens whose states are in fp32 on the CPU."""
        return (
            _is_plain(weight)
            and weight.numel() <= MOST_WEIGHTS
            and tokens * len(weight) <= MOST_LOGITS
            and all(size % self._widths == 0 for size in weight.shape)
        )

    def loss(
        self, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sum times `scale`, with gradient; (S) losses, unscaled; (S) bool, the label is highest.

        Args:
            hidden: (S, D). weight: (V, D). labels: (S) int64, all within the vocabulary.
        """
        needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
        return _HeadLoss.apply(hidden, weight, labels, scale, needs_gradient, self)

    def compute(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: float,
        gradients: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Losses and correctness; the gradients are put where they are wanted."""
        task = self.task(hidden, weight, labels, scale, gradients)
        self._library.hrm_head_loss(ctypes.byref(task.struct), _P(task.workspace))
        return task.losses, task.correct

    def task(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: float,
        gradients: tuple[torch.Tensor, torch.Tensor] | None,
    ) -> HeadTask:
        """What `compute` will do, for the kernel; no number is read yet."""
        read = [tensor.contiguous() for tensor in (hidden, weight, labels)]
        losses, correct = torch.empty(len(labels)), torch.empty(len(labels), dtype=torch.bool)
        threads = max(1, min(torch.get_num_threads(), len(labels) // MIN_OWN_TOKENS))
        vocab, width = weight.shape
        struct = CLossTask(len(labels), width, vocab, threads, self.dtype == torch.bfloat16, scale)
        struct.states, struct.weight, struct.labels = (tensor.data_ptr() for tensor in read)
        struct.losses, struct.correct = losses.data_ptr(), correct.data_ptr()
        if gradients is not None:
            struct.d_states, struct.d_weight = (tensor.data_ptr() for tensor in gradients)
        needed = int(self._library.hrm_head_workspace(ctypes.byref(struct)))
        if self._workspace.numel() < needed:
            self._workspace = torch.empty(needed + needed // 8)  # steps differ by a little
        return HeadTask(struct, losses, correct, self._workspace.data_ptr(), read)


@dataclasses.dataclass(frozen=True)
class HeadTask:
    """A loss that the kernel is to compute."""

    struct: CLossTask
    losses: torch.Tensor
    """(S) fp32, of any value before it is computed."""
    correct: torch.Tensor
    """(S) bool."""
    workspace: int
    """An address."""
    read: list[torch.Tensor]
    """What `struct` points to, and must live as long."""


def _is_plain(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        labels: torch.Tensor,
        scale: float,
        needs_gradient: bool,
        head: CppHead,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        gradients = None
        if needs_gradient:
            gradients = torch.empty_like(hidden), torch.empty_like(weight)
            ctx.save_for_backward(*gradients)
        losses, correct = head.compute(hidden, weight, labels, scale, gradients)
        ctx.mark_non_differentiable(losses, correct)
        return losses.sum() * scale, losses, correct

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        arriving = grad_outputs[0]
        if arriving != 1:
            d_hidden, d_weight = d_hidden * arriving, d_weight * arriving
        return d_hidden, d_weight, None, None, None, None
