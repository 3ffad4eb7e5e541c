"""Parameters and floating-point operations of a model, by counting, not by measuring.

Convention of the paper: 2 operations a weight in the forward pass, 4 in the backward pass, each
times the stack calls of that pass. Attention scores depend on the context and are counted apart.
"""

from __future__ import annotations

import dataclasses

from hrmtext.config.model import ModelConfig
from hrmtext.model.depth import Depth


@dataclasses.dataclass(frozen=True)
class Counts:
    """Parameters of a model."""

    stack: int
    """Of one stack."""
    embedding: int
    head: int
    stored: int
    """All weights that a checkpoint holds and training updates."""
    unfolded: int
    """As if every stack call had its own weights: what a plain transformer of equal work holds."""


def count_parameters(config: ModelConfig) -> Counts:
    """Parameters, z_L_init (which is not trained) left out."""
    attention = config.hidden_size * config.attention_size * 5
    mlp = config.hidden_size * config.mlp_size * 3
    stack = config.num_layers_per_stack * (attention + mlp)
    table = config.vocab_size * config.hidden_size
    return Counts(
        stack=stack,
        embedding=table,
        head=table,
        stored=len(config.stacks) * stack + 2 * table,
        unfolded=config.num_stack_calls * stack + 2 * table,
    )


def attention_flops(config: ModelConfig, context_tokens: float) -> float:
    """Forward operations a token for scores and weighted values, seeing `context_tokens` keys."""
    return 4.0 * config.attention_size * context_tokens * config.num_slots


def forward_flops(
    config: ModelConfig, *, context_tokens: float = 0.0, head_share: float = 1.0
) -> float:
    """Operations a token of one forward pass; also those of one decoded token.

    Args:
        context_tokens: keys that a token sees on average; 0 leaves attention scores out.
        head_share: share of the tokens whose logits are computed.
    """
    counts = count_parameters(config)
    stacks = 2.0 * config.num_stack_calls * counts.stack
    return stacks + 2.0 * counts.head * head_share + attention_flops(config, context_tokens)


def training_flops(
    config: ModelConfig,
    depth: Depth,
    *,
    context_tokens: float = 0.0,
    head_share: float = 1.0,
    losses: int = 1,
    frozen: bool = False,
) -> float:
    """Operations a token of a training step, forward and backward at `depth`.

    Args:
        losses: states that go through the head, the last one's and those of earlier cycles.
        frozen: the weights get no gradient, only what flows through them; adapters, which are a
            few thousandths of them, are not counted.
    """
    counts = count_parameters(config)
    # A product by a weight costs as much again for each of the two gradients that are wanted.
    per_weight = 1 if frozen else 2
    weights = 2.0 * counts.stack
    scores = attention_flops(config, context_tokens) / config.num_stack_calls
    forward = (weights + scores) * len(depth.carries_gradient)
    backward = (per_weight * weights + 2 * scores) * depth.num_gradient_calls
    return forward + backward + 2.0 * (1 + per_weight) * counts.head * head_share * losses


def kv_bytes_per_token(config: ModelConfig, bytes_per_value: int) -> int:
    """Bytes of keys and values that one token adds to a cache."""
    return 2 * config.num_slots * config.attention_size * bytes_per_value


def decode_bytes(config: ModelConfig, bytes_per_value: int, context_tokens: int = 0) -> int:
    """Bytes read to decode one token of one row: every stack call reads its weights anew."""
    counts = count_parameters(config)
    weights = (config.num_stack_calls * counts.stack + counts.head) * bytes_per_value
    return weights + context_tokens * kv_bytes_per_token(config, bytes_per_value)
