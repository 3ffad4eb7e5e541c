"""How a model is evaluated on held-out rows."""

from __future__ import annotations

from hrmtext.config.base import config_class
from hrmtext.errors import ConfigError


@config_class
class EvaluateConfig:
    """Greedy answers, exact match; the paper evaluates at temperature 0 with EMA weights."""

    max_new_tokens: int = 256
    """Tokens an answer may have; one that has not ended by then is invalid."""
    condition: str | None = None
    """Condition of every prompt; None: each row's own."""
    limit: int | None = None
    """Rows of each family, the first ones; None: all."""
    guidance: float = 0.0
    """Auto-guidance weight, see `GenerateConfig`."""
    H_cycles: int | None = None
    """Slow cycles to run; None: the model's. Fewer ruin a model that was not
    trained for them (`TrainConfig.elastic`)."""
    L_cycles: int | None = None
    """Fast cycles to run; None: the model's."""
    batch_tokens: int | None = None
    """Cache tokens of one batch; None: from the memory at hand."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "limit", "H_cycles", "L_cycles", "batch_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluate.{name} is {value}, expected at least 1")
