"""The parts of a block: RMSNorm, rotary embedding, gated attention, SwiGLU.

Letters: T tokens of a packed stream, D hidden size, N heads, K head width, M SwiGLU width. T may
also stand for several leading dimensions, as (rows, columns) of a padded batch: nothing here mixes
tokens but the attention plan.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hrmtext.config.model import ModelConfig
from hrmtext.model.attention import AttentionPlan


def rms_norm(x: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm without a learnable scale over the last dimension, fp32 or better inside."""
    return F.rms_norm(x, x.shape[-1:], eps=eps)


def rotary_tables(
    positions: torch.Tensor, head_dim: int, theta: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and signed sines of every position, computed in fp32, cast to `dtype`: (T, K) each.

    Half-split convention: dimension i turns together with dimension i + K/2. The sines of the
    first half are negated, so that `rotate` needs no negation.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions.device)
    frequencies = 1.0 / theta ** (exponents / head_dim)  # (K/2)
    angles = positions.float()[..., None] * frequencies  # (T, K/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotary position embedding of (T, ..., N, K) by the (T, K) tables of `rotary_tables`."""
    shape = (*cos.shape[:-1], *[1] * (x.dim() - cos.dim()), cos.shape[-1])
    swapped = x.roll(x.shape[-1] // 2, dims=-1)
    return torch.addcmul(x * cos.view(shape), swapped, sin.view(shape))


class GatedAttention(nn.Module):
    """Multi-head attention whose output is gated: o_proj(sigmoid(gate) * attention)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        # Rows in the order gate, queries, keys, values: one product instead of four.
        self.gqkv_proj = nn.Linear(config.hidden_size, 4 * config.attention_size, bias=False)
        self.o_proj = nn.Linear(config.attention_size, config.hidden_size, bias=False)

    def project(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """(T, D) -> gate, rotated queries, rotated keys, values: (T, N, K) each."""
        # N is counted, not configured: under tensor parallelism a rank holds some of the heads.
        gqkv = self.gqkv_proj(x).unflatten(-1, (4, -1, self.head_dim))  # (T, 4, N, K)
        gate, qk, v = gqkv.split((1, 2, 1), dim=-3)  # one split: its backward is one concatenation
        q, k = rotate(qk, cos, sin).unbind(-3)
        return gate.squeeze(-3), q, k, v.squeeze(-3)

    def output(self, gate: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """(T, N, K) each -> (T, D)."""
        return self.o_proj((torch.sigmoid(gate) * attended).flatten(-2))


class SwiGLU(nn.Module):
    """down_proj(silu(gate) * up), gate and up in one product."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)  # (T, M) each
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """PreNorm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.attn = GatedAttention(config)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: AttentionPlan,
        slot: int,
        select: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(T, D) -> (T, D), or (S, D) of the selected tokens; `slot` is the KV slot's number."""
        gate, q, k, v = self.attn.project(rms_norm(x, self.eps), cos, sin)
        attended = plan.attend(q, k, v, slot)
        if select is not None:
            x, gate, attended = (y.index_select(0, select) for y in (x, gate, attended))
        x = x + self.attn.output(gate, attended)
        return x + self.mlp(rms_norm(x, self.eps))


class ExitNorm(nn.Module):
    """The RMSNorm behind the blocks of a stack; it has no weights."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(T, D) -> (T, D)."""
        return rms_norm(x, self.eps)


BlockCall = Callable[..., torch.Tensor]
"""Calls a block or the norm at the exit with its arguments: recomputed, by another kernel ..."""


class Stack(nn.Module):
    """Blocks and one RMSNorm at the exit, re-applied at every call (the paper's MagicNorm)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_layers_per_stack))
        self.exit_norm = ExitNorm(config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        plan: AttentionPlan,
        first_slot: int,
        select: torch.Tensor | None = None,
        call_block: BlockCall | None = None,
    ) -> torch.Tensor:
        """(T, D) -> (T, D), or (S, D) of the selected tokens.

        Layer i uses KV slot `first_slot + i`. Tokens that are not selected still serve as keys and
        values of the last layer; only what follows its attention is left out for them.
        """
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            chosen = select if index == last else None
            arguments = (x, cos, sin, plan, first_slot + index, chosen)
            x = layer(*arguments) if call_block is None else call_block(layer, *arguments)
        return self.exit_norm(x) if call_block is None else call_block(self.exit_norm, x)
