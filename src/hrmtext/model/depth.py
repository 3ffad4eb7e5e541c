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
    def from_bp_steps(
        cls, config: ModelConfig, bp_steps: int, H_cycles: int | None = None
    ) -> Depth:
        """The last min(H_cycles, bp_steps - 1) H calls and the last remaining L calls.

        L calls are counted over all cycles. Source: the paper's warmup deep credit assignment.

        Args:
            H_cycles: cycles to run; None: the model's. The calls are counted back from the last
                one that runs.

        Raises:
            ConfigError: bp_steps below 2 or above the number of stack calls.
        """
        H_cycles = config.H_cycles if H_cycles is None else H_cycles
        L_cycles = config.L_cycles
        calls = H_cycles * (L_cycles + 1)
        fewest = min(2, calls)
        if not fewest <= bp_steps <= calls:
            raise ConfigError(
                f"bp_steps is {bp_steps}, expected {fewest} to {calls}, the number of stack calls "
                f"at H_cycles={H_cycles}, L_cycles={L_cycles}"
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
    def from_L_bp_cycles(
        cls, config: ModelConfig, L_bp_cycles: Sequence[int], H_cycles: int | None = None
    ) -> Depth:
        """transformers' rule: in cycle h the last L_bp_cycles[h] L calls, and every H call.

        A list shorter than the model's H_cycles is padded with 1 on the left.

        Args:
            H_cycles: cycles to run; None: the model's. At fewer, the last entries count.

        Raises:
            ConfigError: more entries than H cycles, or an entry outside 0..L_cycles.
        """
        L_cycles = config.L_cycles
        padded = [1] * (config.H_cycles - len(L_bp_cycles)) + list(L_bp_cycles)
        if len(padded) > config.H_cycles or not all(0 <= entry <= L_cycles for entry in padded):
            raise ConfigError(
                f"L_bp_cycles is {list(L_bp_cycles)}, expected at most {config.H_cycles} entries "
                f"(one for each H cycle) from 0 to {L_cycles}"
            )
        H_cycles = config.H_cycles if H_cycles is None else H_cycles
        flags = []
        for entry in padded[config.H_cycles - H_cycles :]:
            flags += [call >= L_cycles - entry for call in range(L_cycles)]
            flags.append(True)
        return cls(H_cycles, L_cycles, tuple(flags))

    def joined(self, shallower: Depth) -> Depth:
        """This depth, with gradient also through the calls that carry it in `shallower`.

        One forward pass then serves a loss behind the last cycle and one behind an earlier cycle:
        a call carries the gradient of every loss behind it, or of none.
        """
        assert shallower.L_cycles == self.L_cycles, "both run the same L cycles"
        assert shallower.H_cycles <= self.H_cycles, "only an earlier cycle can be joined"
        mine, theirs = self.carries_gradient, shallower.carries_gradient
        early = (a or b for a, b in zip(mine, theirs, strict=False))
        return dataclasses.replace(self, carries_gradient=(*early, *mine[len(theirs) :]))

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
