"""What a step looks at before the update, in one fetch from the device."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hrmtext.config.train import TrainConfig
from hrmtext.model.depth import Depth
from hrmtext.runtime import dist
from hrmtext.train.modules import Modules
from hrmtext.train.optim import AdamAtan2, local
from hrmtext.train.stability import PROCEED, Decision, Observation, StabilityGuard
from hrmtext.train.telemetry import tail_ratio


class StepWatch:
    """Norms and loss of every step, and the stability guard over them where there is one."""

    def __init__(self, modules: Modules, optimizer: AdamAtan2, config: TrainConfig) -> None:
        self.modules = modules
        self.optimizer = optimizer
        self.guard: StabilityGuard | None = None
        if config.stability != "off":
            applied = config.stability == "guard"
            self.guard = StabilityGuard(config.stability_limits, modules.names, applied=applied)
        # Update and weights of one module a step, in turn; they are fetched with the next step.
        self._visited: tuple[int, torch.Tensor] | None = None
        self._next = 0

    def observe(self, sums: torch.Tensor, supervised_tokens: int) -> Observation:
        """Fetch the gradient's norms and the loss.

        Args:
            sums: (4) of this rank, as `loss.step_sums`.
            supervised_tokens: over all ranks.
        """
        squares = self.modules.gradient_squares(self.optimizer)  # (P)
        if self.guard is not None and dist.is_distributed():
            sums = dist.sum_over_ranks(sums.clone())
        parts = [sums, squares]
        if self._visited is not None:
            parts.append(self.modules.sum_over_shards(self._visited[1]))
        sums_now, squares_now, *visited = _fetch(parts)
        if visited:
            self._note(visited[0])
        by_module = self.modules.sums(squares_now)
        return Observation(
            loss=sums_now[0] / max(1, supervised_tokens),
            supervised_tokens=supervised_tokens,
            gradient_norms=np.sqrt(by_module),
        )

    def decide(self, seen: Observation, *, lr: float, depth: Depth) -> Decision:
        """What the guard decides; to proceed where there is none."""
        return PROCEED if self.guard is None else self.guard.decide(seen, lr=lr, depth=depth)

    def damp(self, decision: Decision) -> None:
        """Scale the gradients of the modules that are to be damped."""
        for module, factor in decision.damp.items():
            members = self.modules.members(module)
            present = [local(p.grad) for p in members if p.grad is not None]
            torch._foreach_mul_(present, factor)

    def visit(self) -> None:
        """Measure the last update of the module whose turn it is, without waiting for it."""
        if self.guard is None:
            return
        module = self._next % len(self.modules.names)
        self._next = module + 1
        self._visited = (module, self.modules.update_squares(self.optimizer, module))

    @torch.no_grad()
    def module_telemetry(self, seen: Observation, *, lr: float) -> dict[str, dict[str, float]]:
        """Norms of gradients and updates by module, and the tails of the gradients.

        To be asked for after the update; `lr` is the one that was used.
        """
        names = self.modules.names
        norms = dict(zip(names, seen.gradient_norms.tolist(), strict=True))
        members = [self.modules.members(module) for module in range(len(names))]
        parts = [[local(p.grad) for p in own if p.grad is not None] for own in members]
        found = [[part for part in own if part.numel()] for own in parts]
        tails = [tail_ratio(one).double() if one else self._nan() for one in found]
        squares = [self.modules.update_squares(self.optimizer, m) for m in range(len(names))]
        sums = self.modules.sum_over_shards(torch.cat(squares))
        fetched = torch.cat((sums, torch.stack(tails))).tolist()
        pairs = zip(fetched[0 : 2 * len(names) : 2], fetched[1 : 2 * len(names) : 2], strict=True)
        updates = [lr * (update / max(weights, 1e-300)) ** 0.5 for update, weights in pairs]
        measured = {
            "module_gradient_norm": norms,
            "update_ratio": dict(zip(names, updates, strict=True)),
            "gradient_tail": dict(zip(names, fetched[2 * len(names) :], strict=True)),
        }
        return {
            quantity: {name: value for name, value in column.items() if value > 0}
            for quantity, column in measured.items()
        }

    def _nan(self) -> torch.Tensor:
        device = self.modules.parameters[0].device
        return torch.full((), torch.nan, dtype=torch.float64, device=device)

    def state(self) -> dict[str, Any]:
        """The guard's state and whose turn it is; every rank must ask for it at the same step."""
        if self.guard is None:
            return {}
        if self._visited is not None:
            sums = self.modules.sum_over_shards(self._visited[1])
            self._note(sums.tolist())
        return {**self.guard.state(), "next": self._next}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what `state` gave."""
        if self.guard is not None and state:
            self.guard.restore(state)
            self._next = state["next"]

    def _note(self, squares: Sequence[float]) -> None:
        assert self.guard is not None and self._visited is not None, "a guard visits"
        self.guard.note_update(self._visited[0], *squares)
        self._visited = None


def _fetch(tensors: Sequence[torch.Tensor]) -> list[list[float]]:
    """The numbers of one-dimensional tensors; the host waits once for a device."""
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.tolist() for tensor in tensors]
    numbers = iter(torch.cat(list(tensors)).tolist())
    return [list(itertools.islice(numbers, len(tensor))) for tensor in tensors]
