"""Loss and gradients of a microbatch in one call of the C++ kernel.

Autograd between the parts, and Python that has left the caches while one was computed, cost some
percent of a small model's step.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, cast

import torch

from hrmtext.errors import DataError
from hrmtext.model import HrmLM
from hrmtext.model.depth import Depth
from hrmtext.train.cpp.blocks import RowsPlan
from hrmtext.train.cpp.head import CppHead
from hrmtext.train.cpp.recurrence import CppRecurrence, Run

if TYPE_CHECKING:
    from hrmtext.train.loss import Microbatch

_I, _P = ctypes.c_int64, ctypes.c_void_p


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, _P) for name in ("recurrence", "calls", "steps")),
        ("num_steps", _I),
        ("workspace", _P),
        ("own", _I),
        *((name, _P) for name in ("head", "head_workspace", "row_of")),
        ("num_rows", _I),
        *((name, _P) for name in ("sums", "tokens", "table")),
        ("vocab", _I),
        ("scale", ctypes.c_float),
        *((name, _P) for name in ("embedded", "d_embedded", "d_table")),
    ]


class CppModel:
    """A model whose blocks and head are both computed in C++."""

    def __init__(self, model: HrmLM, blocks: CppRecurrence, head: CppHead) -> None:
        self.model, self.blocks, self.head = model, blocks, head

    def suits(self, depth: Depth, num_supervised: int) -> bool:
        """Whether `add_gradients` takes microbatches of so many supervised tokens."""
        return (
            num_supervised > 0
            and any(depth.carries_gradient)
            and not self.model.model.embed_tokens.sparse
            and self.head.takes(num_supervised, self.model.lm_head.weight)
        )

    @torch.no_grad()
    def add_gradients(self, batch: Microbatch, depth: Depth, scale: float) -> torch.Tensor:
        """Add the gradients of the loss times `scale` to the parameters'.

        To the bit those of `loss.forward_loss` by these blocks and this head.

        Args:
            batch: with the plan that the blocks gave for its rows.

        Returns:
            (4) fp64: as `loss.step_sums`.

        Raises:
            DataError: a token that is not in the vocabulary.
        """
        plan = cast(RowsPlan, batch.plan)
        core, head, tokens = self.model.model, self.model.lm_head.weight, batch.tokens.contiguous()
        table = core.embed_tokens.weight.contiguous()
        z_H = torch.empty(plan.num_tokens, table.shape[1])
        assert len(tokens) == plan.num_tokens, f"{len(tokens)} tokens in rows of {plan.num_tokens}"
        run = Run(self.blocks, depth, batch.positions, plan, batch.select)
        *earlier, state = run.prepare(z_H, core.z_L_init.expand_as(z_H), with_backward=True)
        d_state, d_head = torch.empty(state.shape), torch.empty(head.shape)
        loss = self.head.task(state, head, batch.labels, scale, (d_state, d_head))
        d_z_H, d_weights = run.prepare_backward([*(None for _ in earlier), d_state])
        has_table = d_z_H is not None and core.embed_tokens.weight.requires_grad
        d_table = torch.empty(table.shape) if has_table else None
        workspace, own = run.workspace(is_backward=True)  # forward takes less of it
        sums = torch.empty(4, dtype=torch.float64)
        task = _Model(
            recurrence=ctypes.addressof(run.recurrence),
            calls=ctypes.addressof(run.calls),
            steps=ctypes.addressof(run.steps),
            num_steps=len(run.steps),
            workspace=workspace,
            own=own,
            head=ctypes.addressof(loss.struct),
            head_workspace=loss.workspace,
            row_of=batch.row_of.data_ptr(),
            num_rows=batch.num_rows,
            sums=sums.data_ptr(),
            tokens=tokens.data_ptr(),
            table=table.data_ptr(),
            vocab=len(table),
            scale=core.config.scale,
            embedded=z_H.data_ptr(),
            d_embedded=None if d_z_H is None else d_z_H.data_ptr(),
            d_table=None if d_table is None else d_table.data_ptr(),
        )
        bad = self.blocks.library.hrm_model_gradients(ctypes.byref(task))
        run.finish()
        if bad >= 0:
            raise DataError(
                f"token {int(tokens[bad])} is not in the vocabulary of {len(table)}: was the data "
                "tokenised for another model?"
            )
        parameters = (core.embed_tokens.weight, *self.blocks.weights, head)
        for parameter, gradient in zip(parameters, (d_table, *d_weights, d_head), strict=True):
            if gradient is None or not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad += gradient
        return sums
