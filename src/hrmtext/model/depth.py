"""How deep a forward pass recurs, and which of its stack calls carry gradient.

Stack calls are numbered in the order of execution: in H cycle h, calls h*(L+1) .. h*(L+1)+L-1 are
of the L stack and call h*(L+1)+L is of the H stack.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hrmtext.config.model import ModelConfig
from hrmtext.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Depth:
    """Cycles to run and, for each stack call, whether gradient flows through it."""

    H_cycles: int
    L_cycles: int
    carries_gradient: tuple[bool, ...]
    """One entry for each of the H_cycles * (L_cycles + 1) stack calls."""

    @classmethod
    def full(cls, config: ModelConfig) -> Depth:
        """Every call carries gradient: plain backpropagation through the whole recurrence."""
        calls = config.H_cycles * (config.L_cycles + 1)
        return cls(config.H_cycles, config.L_cycles, (True,) * calls)

    @classmethod
    def from_bp_steps(cls, config: ModelConfig, bp_steps: int) -> Depth:
        """The last min(H_cycles, bp_steps - 1) H calls and the last remaining L calls.

        L calls are counted over all cycles. Source: the paper's warmup deep credit assignment.

        Raises:
            ConfigError: bp_steps below 2 or above the number of stack calls.
        """
        H_cycles, L_cycles = config.H_cycles, config.L_cycles
        fewest = min(2, config.num_stack_calls)
        if not fewest <= bp_steps <= config.num_stack_calls:
            raise ConfigError(
                f"bp_steps is {bp_steps}, expected {fewest} to {config.num_stack_calls}, the "
                f"number of stack calls at H_cycles={H_cycles}, L_cycles={L_cycles}"
            )
        # Without L calls (a plain transformer) every step is an H call.
        H_steps = min(H_cycles, bp_steps - 1 if L_cycles else bp_steps)
        first_L = H_cycles * L_cycles - (bp_steps - H_steps)
        flags = []
        for h in range(H_cycles):
            flags += [h * L_cycles + call >= first_L for call in range(L_cycles)]
            flags.append(h >= H_cycles - H_steps)
        return cls(H_cycles, L_cycles, tuple(flags))

    @classmethod
    def from_L_bp_cycles(cls, config: ModelConfig, L_bp_cycles: Sequence[int]) -> Depth:
        """transformers' rule: in cycle h the last L_bp_cycles[h] L calls, and every H call.

        A list shorter than H_cycles is padded with 1 on the left.

        Raises:
            ConfigError: more entries than H cycles, or an entry outside 0..L_cycles.
        """
        H_cycles, L_cycles = config.H_cycles, config.L_cycles
        padded = [1] * (H_cycles - len(L_bp_cycles)) + list(L_bp_cycles)
        if len(padded) > H_cycles or not all(0 <= entry <= L_cycles for entry in padded):
            raise ConfigError(
                f"L_bp_cycles is {list(L_bp_cycles)}, expected at most {H_cycles} entries (one "
                f"for each H cycle) from 0 to {L_cycles}"
            )
        flags = []
        for entry in padded:
            flags += [call >= L_cycles - entry for call in range(L_cycles)]
            flags.append(True)
        return cls(H_cycles, L_cycles, tuple(flags))

    @property
    def num_gradient_calls(self) -> int:
        """Stack calls that carry gradient."""
        return sum(self.carries_gradient)


def bp_steps_at(step: int, total_steps: int, *, first: int, last: int, warmup_ratio: float) -> int:
    """Backward steps at training step `step` (from 0): from `first` to `last` over the warmup.

    K = first + int(min(1, step / (warmup_ratio * total_steps)) * (last - first)).
    """
    warmup_steps = warmup_ratio * total_steps
    progress = 1.0 if warmup_steps <= 0 else min(1.0, step / warmup_steps)
    return first + int(progress * (last - first))
