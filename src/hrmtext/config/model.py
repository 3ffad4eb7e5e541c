"""Shape of a model: sizes, recurrence, rotary base. Presets are the sizes of the HRM-Text paper."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from hrmtext.config.base import build, config_class, nearest
from hrmtext.errors import ConfigError


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@config_class
class ModelConfig:
    """An HRM: two transformer stacks, H and L, called again and again on the same input."""

    vocab_size: int = 65_536
    """Rows of the embedding and the head, padding of the vocabulary included."""
    hidden_size: int = 1_536
    """Width of the residual stream."""
    num_layers_per_stack: int = 16
    """Blocks in each of the two stacks; a published size counts both (XL: 32)."""
    num_heads: int = 12
    """Attention heads; keys and values have as many."""
    head_dim: int = 128
    """Width of one head, even."""
    expansion: float = 4.0
    """SwiGLU expansion; width = round_up(round(expansion * hidden_size * 2/3), 256)."""
    intermediate_size: int | None = None
    """SwiGLU width where a checkpoint states it; None: from `expansion`."""
    H_cycles: int = 2
    """Slow cycles: calls of the H stack."""
    L_cycles: int = 3
    """Fast cycles: calls of the L stack before each call of the H stack."""
    max_seq_len: int = 4_096
    """Longest row in tokens."""
    rope_theta: float = 10_000.0
    """Base of the rotary position embedding."""
    rms_norm_eps: float = 1e-6
    """Epsilon of the RMSNorms, which have no learnable scale."""
    embedding_scale: float | None = None
    """Factor on the token embedding; None: sqrt(hidden_size), the inverse of its initial std."""
    prefix_lm: bool = True
    """Prompt tokens see the whole prompt; False: everything is causal."""

    def __post_init__(self) -> None:
        positive = (
            "vocab_size", "hidden_size", "num_layers_per_stack", "num_heads", "head_dim",
            "H_cycles", "L_cycles", "max_seq_len", "rope_theta", "rms_norm_eps", "expansion",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)}, expected above 0")
        if self.head_dim % 2:
            raise ConfigError(
                f"model.head_dim is {self.head_dim}, expected an even number: rotary position "
                "embedding turns pairs of dimensions"
            )

    @property
    def mlp_size(self) -> int:
        """Width of the SwiGLU."""
        if self.intermediate_size is not None:
            return self.intermediate_size
        return round_up(round(self.expansion * self.hidden_size * 2 / 3), 256)

    @property
    def attention_size(self) -> int:
        """Width of all heads together."""
        return self.num_heads * self.head_dim

    @property
    def scale(self) -> float:
        """Factor on the token embedding."""
        if self.embedding_scale is not None:
            return self.embedding_scale
        return math.sqrt(self.hidden_size)

    @property
    def num_stack_calls(self) -> int:
        """Stack calls of one forward pass: H_cycles * (L_cycles + 1)."""
        return self.H_cycles * (self.L_cycles + 1)

    @property
    def num_slots(self) -> int:
        """Key/value slots of one forward pass, one for each (stack call, layer)."""
        return self.num_stack_calls * self.num_layers_per_stack

    def slot(self, h: int, call: int, layer: int) -> int:
        """KV slot of `layer` in H cycle `h`; `call` 0..L_cycles-1 is that L call, else the H call.

        The order is that of transformers' `hrm_text` cache.
        """
        return (h * (self.L_cycles + 1) + call) * self.num_layers_per_stack + layer

    def canonical(self) -> ModelConfig:
        """The same shape in its shortest statement: widths and scales that follow are left out.

        Two configs describe the same model exactly where their canonical forms are equal.
        """
        default = ModelConfig.expansion
        follows = self.mlp_size == round_up(round(default * self.hidden_size * 2 / 3), 256)
        width = None if follows else self.mlp_size
        scale: float | None = self.scale
        # Files hold 1 / (1 / sqrt(hidden_size)) too, which may differ in the last bit.
        if math.isclose(self.scale, math.sqrt(self.hidden_size), rel_tol=1e-15):
            scale = None
        return self.with_changes(expansion=default, intermediate_size=width, embedding_scale=scale)

    def with_changes(self, **changes: Any) -> ModelConfig:
        """A copy with some fields replaced, validated anew."""
        return build(ModelConfig, {**dataclasses.asdict(self), **changes}, where="model")


def _published(total_layers: int, hidden_size: int, num_heads: int) -> ModelConfig:
    return ModelConfig(
        hidden_size=hidden_size, num_layers_per_stack=total_layers // 2, num_heads=num_heads
    )


PRESETS: dict[str, ModelConfig] = {
    "B": _published(12, 1_024, 8),
    "L": _published(24, 1_280, 10),
    "XL": _published(32, 1_536, 12),
    "XXL": _published(72, 1_792, 14),
    "XXL_wide": _published(32, 2_560, 20),
    # Ours: for a laptop and for tests.
    "mini": ModelConfig(
        vocab_size=8_192, hidden_size=256, num_layers_per_stack=2, num_heads=4, head_dim=64,
        max_seq_len=1_024,
    ),
    "micro": ModelConfig(
        vocab_size=512, hidden_size=128, num_layers_per_stack=1, num_heads=2, head_dim=64,
        max_seq_len=256,
    ),
    "test": ModelConfig(
        vocab_size=64, hidden_size=32, num_layers_per_stack=2, num_heads=2, head_dim=16,
        intermediate_size=64, max_seq_len=128,
    ),
}  # fmt: skip
"""Published sizes (B to XXL_wide) and small ones (mini, micro, test)."""


def preset(name: str, **changes: Any) -> ModelConfig:
    """Preset `name` with some fields replaced; ConfigError with the nearest match if unknown."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}{nearest(name, list(PRESETS))}")
    return PRESETS[name].with_changes(**changes)
