"""Fine-tuning: low-rank adapters, and the check of what is forgotten meanwhile."""

from __future__ import annotations

from typing import Literal

from hrmtext.config.base import config_class
from hrmtext.errors import ConfigError

Target = Literal["gate", "q", "k", "v", "o", "mlp_gate", "up", "down"]

TARGETS: dict[Target, str] = {
    "gate": "self_attn.gate_proj",
    "q": "self_attn.q_proj",
    "k": "self_attn.k_proj",
    "v": "self_attn.v_proj",
    "o": "self_attn.o_proj",
    "mlp_gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
"""What an adapter can sit on -> its name inside a layer in transformers' split layout."""


@config_class
class LoraConfig:
    """Low-rank adapters on the stacks' projections; all other weights stay as they are.

    A projection W becomes W + alpha / rank * B @ A in every call of its stack.
    """

    rank: int = 8
    """Rows of A, columns of B."""
    alpha: float = 16.0
    """The update is multiplied by alpha / rank."""
    targets: tuple[Target, ...] = tuple(TARGETS)
    """Projections with adapters; the parts of a fused one are chosen one by one."""
    stacks: Literal["both", "H", "L"] = "both"
    """Stacks with adapters; a model with one shared stack has an H stack only."""
    lr_scale: float | Literal["auto"] = "auto"
    """Factor on `lr`; auto: one over the calls of the stack in a forward pass, because an adapter
    acts in each of them (H_cycles for H, H_cycles * L_cycles for L)."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ConfigError(f"lora.rank is {self.rank}, expected at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"lora.alpha is {self.alpha}, expected above 0")
        if not self.targets or len(set(self.targets)) < len(self.targets):
            raise ConfigError(
                f"lora.targets is {list(self.targets)}, expected some of {', '.join(TARGETS)}, "
                "each once"
            )
        if self.lr_scale != "auto" and not self.lr_scale > 0:
            raise ConfigError(f"lora.lr_scale is {self.lr_scale}, expected above 0, or auto")

    @property
    def scale(self) -> float:
        """Factor on B @ A."""
        return self.alpha / self.rank


@config_class
class ForgettingConfig:
    """Held-out rows of what the model knew, scored before the first step and at validations."""

    data: str
    """Prepared data folder of the base's own mixture, made with the same tokenizer."""
    rows: int = 500
    """Held-out rows, spread over its strata, the same each time."""

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ConfigError(f"forgetting.rows is {self.rows}, expected at least 1")
