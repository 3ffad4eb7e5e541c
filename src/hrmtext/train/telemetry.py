"""Inside the recurrence: state, change, gradient and logit-lens of every stack call, from outside.

One bin of a training step is watched while it runs anyway: hooks read the tensors and change none,
so that the training result is the same bit for bit. The quantities are those of the HRM-Text
paper's figures 4 to 8. Letters: T tokens, S supervised ones, D hidden size, C stack calls.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from hrmtext.model import HrmLM
from hrmtext.model.depth import Depth
from hrmtext.model.layers import BlockCall, Stack
from hrmtext.train.loss import Microbatch

LENS_TOKENS = 32
"""Supervised tokens whose predictions are compared, spread over the bin."""
TAIL_SAMPLE = 16_384
"""Gradient entries of a module that the tail ratio looks at."""
TAIL = 0.999


class CallProbe:
    """Watches the stack calls of one forward and backward pass."""

    def __init__(self, model: HrmLM, depth: Depth) -> None:
        self.model = model
        self.depth = depth
        self._residual: list[torch.Tensor] = []
        self._change: dict[int, torch.Tensor] = {}
        self._gradient: dict[int, torch.Tensor] = {}
        self._lens: list[torch.Tensor] = []
        self._last: dict[str, torch.Tensor] = {}

    @contextlib.contextmanager
    def forward(self, batch: Microbatch, call_block: BlockCall | None) -> Iterator[BlockCall]:
        """Watch the forward pass within; yields what is to call the blocks."""
        core = self.model.model
        stacks: list[nn.Module] = [core.H_module]
        if not core.config.shared_stack:
            stacks.append(core.L_module)
        ends = {id(stack.layers[-1]) for stack in stacks if isinstance(stack, Stack)}
        hook = functools.partial(self._after_call, batch.select)
        handles = [stack.register_forward_hook(hook) for stack in stacks]
        try:
            yield functools.partial(self._call_block, call_block, ends)
        finally:
            for handle in handles:
                handle.remove()

    def _call_block(
        self, call_block: BlockCall | None, ends: set[int], block: nn.Module, *arguments: Any
    ) -> torch.Tensor:
        output = block(*arguments) if call_block is None else call_block(block, *arguments)
        if id(block) in ends:
            self._residual.append(_rms(output.detach()))
        return output

    def _after_call(
        self, select: torch.Tensor, _: nn.Module, __: Any, output: torch.Tensor
    ) -> None:
        call = len(self._lens)
        state = output.detach()
        num_tokens = min(LENS_TOKENS, len(select))
        # Spread over the bin, by position among the supervised tokens.
        chosen = torch.arange(num_tokens, device=select.device) * len(select) // max(1, num_tokens)
        role = self.name(call).split(".")[1][0]
        before = self._last.get(role)
        is_selected = call == self.num_calls - 1  # only the supervised tokens are computed
        if before is not None:
            before = before.index_select(0, select) if is_selected else before
            moved = torch.linalg.vector_norm((state - before).float())
            self._change[call] = moved / torch.linalg.vector_norm(before.float())
        self._last[role] = state
        where = chosen if is_selected else select.index_select(0, chosen)
        self._lens.append(state.index_select(0, where))
        if output.requires_grad:
            output.register_hook(functools.partial(self._keep_gradient, call))

    def _keep_gradient(self, call: int, gradient: torch.Tensor) -> None:
        self._gradient[call] = torch.linalg.vector_norm(gradient.detach().float())

    @property
    def has_seen(self) -> bool:
        """Whether a forward pass was watched."""
        return bool(self._lens)

    @property
    def num_calls(self) -> int:
        """C."""
        return len(self.depth.carries_gradient)

    def name(self, call: int) -> str:
        """`1.L2`: H cycle 1, second L call; `2.H`: its H call."""
        cycle, index = divmod(call, self.depth.L_cycles + 1)
        is_H = index == self.depth.L_cycles
        return f"{cycle + 1}.{'H' if is_H else f'L{index + 1}'}"

    @torch.no_grad()
    def measurements(self) -> dict[str, dict[str, float]]:
        """What was seen, by quantity and call; a quantity that a call does not have is left out.

        `state_rms`: root mean square of the stack's output before its norm. `change`: relative to
        the same stack's call before. `gradient_norm`: of this bin's share of the loss, by the
        call's output. `lens_kl`: nats by which the head's prediction from the call's state is off
        the final one, KL(final || call), mean over tokens.
        """
        if not self.has_seen:  # a rank without rows in this step
            return {}
        weight = self.model.lm_head.weight
        states = torch.stack(self._lens)  # (C, n, D)
        wide = torch.promote_types(states.dtype, torch.float32)
        logits = states @ weight.to(states.dtype).T  # (C, n, V)
        log_probs = torch.log_softmax(logits, -1, dtype=wide)
        final = log_probs[-1]
        kl = (final.exp() * (final - log_probs)).sum(-1).mean(-1)  # (C)
        calls = range(len(self._lens))
        table = {
            "state_rms": dict(enumerate(self._residual)),
            "change": self._change,
            "gradient_norm": dict(sorted(self._gradient.items())),
            "lens_kl": {call: kl[call] for call in calls},
        }
        flat = [value.double() for column in table.values() for value in column.values()]
        values = iter(torch.stack(flat).tolist())
        return {
            quantity: {self.name(call): next(values) for call in column}
            for quantity, column in table.items()
        }


@torch.no_grad()
def tail_ratio(gradients: list[torch.Tensor]) -> torch.Tensor:
    """() 99.9th percentile of |g| over its median, of a module's entries that are not zero.

    Of a regular sample where there are many entries; of this rank's parts where they are sharded.
    NaN without any. Rows of the embedding whose token did not occur are zero and would hide the
    rest.
    """
    each = max(1, TAIL_SAMPLE // len(gradients))
    parts = [g.flatten()[:: max(1, -(-g.numel() // each))] for g in gradients]
    sizes = torch.cat(parts).abs().float()
    sizes = torch.where(sizes > 0, sizes, torch.nan)
    levels = torch.tensor([0.5, TAIL], device=sizes.device)
    middle, tail = torch.nanquantile(sizes, levels).unbind()
    return tail / middle


def _rms(tensor: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(tensor.float()) / max(1, tensor.numel()) ** 0.5
