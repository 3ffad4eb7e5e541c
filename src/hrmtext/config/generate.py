"""How answers are generated."""

from __future__ import annotations

from typing import Literal

from hrmtext.config.base import config_class
from hrmtext.errors import ConfigError


@config_class
class GenerateConfig:
    """Decoding options; the defaults are greedy decoding, the paper's evaluation protocol."""

    max_new_tokens: int = 256
    """Tokens an answer may have, end token included; the model's max_seq_len bounds it too."""
    temperature: float = 0.0
    """Divisor of the logits before a token is drawn; 0: always the most probable token."""
    top_k: int | None = None
    """Draw from this many most probable tokens; None: from all."""
    top_p: float | None = None
    """Draw from the fewest most probable tokens that hold this probability; None: from all."""
    seed: int = 0
    """Seed of the draws; a draw depends on seed, prompt, sample number and position alone."""
    num_samples: int = 1
    """Answers for each prompt."""
    guidance: float = 0.0
    """Auto-guidance weight w: (1+w) * logits after the last H cycle - w * after the first."""
    step: Literal["auto", "eager", "compiled", "cpp"] = "auto"
    """What reads prompts and takes decode steps: torch operations one by one, or steps compiled
    into a graph (seconds for each new batch shape), or the C++ kernel for CPUs; auto: the kernel
    for small models on a CPU with a C++ compiler, else eager."""
    batch_tokens: int | None = None
    """Cache tokens of one batch, rows times their longest; None: from the memory at hand."""

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "temperature": (0 <= self.temperature < float("inf"), "0 or above"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1"),
            "num_samples": (self.num_samples >= 1, "at least 1"),
            "guidance": (abs(self.guidance) < float("inf"), "a finite number"),
            "batch_tokens": (self.batch_tokens is None or self.batch_tokens >= 1, "at least 1"),
        }
        for name, (good, expected) in checks.items():
            if not good:
                raise ConfigError(f"generate.{name} is {getattr(self, name)}, expected {expected}")
        if self.temperature == 0 and self.num_samples > 1:
            raise ConfigError(
                f"generate.num_samples is {self.num_samples} at temperature 0: all would be the "
                "same answer; set a temperature above 0"
            )
