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
    """Fast cycles: calls of the L stack before each call of the H stack; 0: H alone, on z_H."""
    shared_stack: bool = False
    """One stack plays both roles, H and L: half the weights, or twice the depth for as many."""
    H_injection: bool = True
    """The H stack is called on z_H + z_L; False: on z_L alone."""
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
            "H_cycles", "max_seq_len", "rope_theta", "rms_norm_eps", "expansion",
        )  # fmt: skip
        for name in positive:
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name} is {getattr(self, name)}, expected above 0")
        if self.L_cycles < 0 or (self.L_cycles == 0 and not self.shared_stack):
            raise ConfigError(
                f"model.L_cycles is {self.L_cycles}, expected above 0; 0 is for a model of one "
                "stack (shared_stack: true), as the L stack would never be called"
            )
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
    def stacks(self) -> str:
        """The stacks that have weights: `HL`, or `H` where one plays both roles."""
        return "H" if self.shared_stack else "HL"

    def require_hrm(self, form: str) -> None:
        """ConfigError where this is a baseline, which no format but our own can hold."""
        if self.shared_stack or not self.H_injection:
            raise ConfigError(
                f"{form} can only hold the HRM, and this model is a baseline (shared_stack: "
                f"{self.shared_stack}, H_injection: {self.H_injection}); keep it in the native form"
            )

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


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "hrm": {"shared_stack": False, "H_injection": True},
    "transformer": {"shared_stack": True, "H_cycles": 1, "L_cycles": 0},
    # Four calls of one stack, z = S(z + x): the last of them is the H call, as z_H is still x.
    "ut": {"shared_stack": True, "H_cycles": 1, "L_cycles": 3},
    "rins": {"shared_stack": False, "H_injection": False, "H_cycles": 1, "L_cycles": 7},
    "trm": {"shared_stack": True, "H_cycles": 2, "L_cycles": 1},
    "trm_match_recurrence": {"shared_stack": True, "H_cycles": 2, "L_cycles": 3},
}
"""HRM-Text and the architectures that its paper compares it with, as settings of the recurrence.

The paper gives `transformer`, `ut` and `trm` one stack of as many blocks as both of HRM's together
(num_layers_per_stack twice as large), the others HRM's number. Their fixed backward depth, as
bp_first and bp_last: ut 2, rins 5, trm 2, trm_match_recurrence 5, transformer 1 (its only call).
"""


def preset(name: str, **changes: Any) -> ModelConfig:
    """Preset `name` with some fields replaced; ConfigError with the nearest match if unknown."""
    if name not in PRESETS:
        raise ConfigError(f"unknown model preset {name!r}{nearest(name, list(PRESETS))}")
    return PRESETS[name].with_changes(**changes)
