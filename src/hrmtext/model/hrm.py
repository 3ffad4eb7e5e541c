"""The hierarchical recurrence and the language model around it.

Letters: T tokens of a packed stream, D hidden size, V vocabulary, S selected tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from hrmtext.config.model import ModelConfig
from hrmtext.errors import ConfigError
from hrmtext.model.attention import AttentionPlan
from hrmtext.model.depth import Depth
from hrmtext.model.layers import BlockCall, Stack, rotary_tables


class Recurrence(nn.Module):
    """Embedding, the two stacks, and their calls: L_cycles times L, then H, H_cycles times over.

    With one shared stack and other settings of the config it is one of the baselines.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # Not drawn here: `init_weights` does, and torch's own draw on meta imports torch._dynamo.
        table = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(table, freeze=False)
        self.H_module = Stack(config)
        if not config.shared_stack:
            self.L_module = Stack(config)
        # The start of z_L: drawn once, never trained, saved with the weights.
        self.register_buffer("z_L_init", torch.zeros(config.hidden_size))

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        plan: AttentionPlan,
        depth: Depth | None = None,
        select: torch.Tensor | None = None,
        call_block: BlockCall | None = None,
    ) -> list[torch.Tensor]:
        """z_H after every H cycle.

        Args:
            tokens: (T) int64. positions: (T) int64, from 0 in every row.
            depth: cycles to run and which calls carry gradient; None: as configured, all of them.
            select: (S) stream indices whose output is wanted; None: all.
            call_block: calls blocks and norms at the exits otherwise than plainly (recomputed in
                the backward pass, by another kernel); None: plainly.

        Returns:
            One (T, D) tensor a cycle, the last being the output: (S, D) of the selected tokens.
        """
        embedded = self.embed_tokens(tokens)
        return recur(self, self.config, embedded, positions, plan, depth, select, call_block)


class Stacks(Protocol):
    """What holds the two stacks and the start of z_L; a shared stack is `H_module`."""

    H_module: Stack
    L_module: Stack
    z_L_init: torch.Tensor


@runtime_checkable
class RecurrenceCall(Protocol):
    """A `BlockCall` that, given to `recur`, computes all calls of the stacks at once."""

    def recur(
        self,
        depth: Depth,
        z_H: torch.Tensor,
        z_L: torch.Tensor,
        positions: torch.Tensor,
        plan: AttentionPlan,
        select: torch.Tensor | None,
    ) -> list[torch.Tensor]:
        """What `recur` returns; `z_H`, `z_L`: (T, D), the states at the start."""


def recur(
    stacks: Stacks,
    config: ModelConfig,
    embedded: torch.Tensor,
    positions: torch.Tensor,
    plan: AttentionPlan,
    depth: Depth | None = None,
    select: torch.Tensor | None = None,
    call_block: BlockCall | None = None,
) -> list[torch.Tensor]:
    """The recurrence over token embeddings: z_H after every H cycle.

    Args:
        embedded: (T, D), not yet scaled. positions: (T) int64.
        depth, select, call_block: as in `Recurrence.forward`; `select` needs a packed stream.

    Raises:
        ConfigError: more cycles than the model has KV slots for.
    """
    depth = depth or Depth.full(config)
    if depth.H_cycles > config.H_cycles or depth.L_cycles > config.L_cycles:
        raise ConfigError(
            f"depth asks for {depth.H_cycles} x {depth.L_cycles} cycles, but the KV slots of "
            f"this model are for at most {config.H_cycles} x {config.L_cycles}"
        )
    z_H = embedded * config.scale  # (T, D)
    z_L = stacks.z_L_init.to(z_H).expand_as(z_H)  # (T, D)
    L_module = stacks.H_module if config.shared_stack else stacks.L_module
    if isinstance(call_block, RecurrenceCall):
        return call_block.recur(depth, z_H, z_L, positions, plan, select)
    cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta, z_H.dtype)
    flags = iter(depth.carries_gradient)
    grad_enabled = torch.is_grad_enabled()
    states = []
    for h in range(depth.H_cycles):
        for call in range(depth.L_cycles):
            with torch.set_grad_enabled(grad_enabled and next(flags)):
                slot = config.slot(h, call, 0)
                # The stacks may lie on two devices: the sum is taken where z_H is.
                z = z_L.to(z_H.device) + z_H
                z_L = L_module(z, cos, sin, plan, slot, None, call_block)
        with torch.set_grad_enabled(grad_enabled and next(flags)):
            slot = config.slot(h, config.L_cycles, 0)
            chosen = select if h == depth.H_cycles - 1 else None
            z = z_L.to(z_H.device) if depth.L_cycles else z_H
            if depth.L_cycles and config.H_injection:
                z = z_H + z
            z_H = stacks.H_module(z, cos, sin, plan, slot, chosen, call_block)
        states.append(z_H)
    return states


@dataclasses.dataclass(frozen=True)
class LMOutput:
    """What a forward pass gives."""

    logits: torch.Tensor
    """(S, V) of the selected tokens, (T, V) where none were selected; in the weights' dtype."""
    states: list[torch.Tensor]
    """z_H after every H cycle: (T, D) each, but the last (S, D) of the selected tokens."""


class HrmLM(nn.Module):
    """HRM-Text: recurrence and untied head. A plain single-device module over packed rows.

    Parameter names and shapes are those of the released checkpoint (its fused layout).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Recurrence(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        plan: AttentionPlan,
        *,
        depth: Depth | None = None,
        select: torch.Tensor | None = None,
    ) -> LMOutput:
        """Logits of a packed stream.

        Args:
            tokens: (T) int64. positions: (T) int64, from 0 in every row.
            plan: who sees whom, from `make_plan` (packed rows) or a KV cache.
            depth: cycles and gradient routing; None: as configured, full backpropagation.
            select: (S) stream indices whose logits are wanted; None: all.
        """
        states = self.model(tokens, positions, plan, depth, select)
        return LMOutput(logits=self.head(states[-1]), states=states)

    def head(self, state: torch.Tensor, select: torch.Tensor | None = None) -> torch.Tensor:
        """(T, D) state of any H cycle -> logits of the selected tokens, (S, V)."""
        return self.lm_head(state if select is None else state.index_select(0, select))
