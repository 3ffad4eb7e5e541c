"""The transformers config of HRM-Text: transformers' own fields, and the checks of our model."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import HrmTextConfig as TransformersHrmTextConfig

from hrmtext.artifacts.hf_folder import from_hf_config
from hrmtext.config.model import ModelConfig
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.hf.parallel import PACKED_OF_4
from hrmtext.model.depth import Depth

VARLEN = "prefix_varlen"
"""Our own attention implementation: padding is left out, the prompt and the answer are two passes
of variable-length attention. The name may not hold "flash": transformers would take it for its own
FlashAttention, which cannot express PrefixLM."""

# Fused projections are cut so that every rank holds the same heads (columns) of each part.
_BLOCK_PLAN = {
    "attn.gqkv_proj": PACKED_OF_4,
    "attn.o_proj": "rowwise",
    "mlp.gate_up_proj": "packed_colwise",
    "mlp.down_proj": "rowwise",
}


def require_prefix_attention(name: str | None, prefix_lm: bool) -> None:
    """Refuse an attention implementation that would drop the PrefixLM mask.

    Raises:
        ConfigError: (a ValueError) a FlashAttention or paged form while `prefix_lm` is on.
    """
    if prefix_lm and name is not None and ("flash" in name or name.startswith("paged|")):
        raise ConfigError(
            f"attn_implementation={name!r} cannot express the PrefixLM mask and would make the "
            "model causal without a word. Use 'sdpa' (the default), 'flex_attention', 'eager' or "
            f"{VARLEN!r} (FlashAttention under PrefixLM); or set prefix_lm=False in the config if "
            "the model was trained causally"
        )


@strict
class HrmTextConfig(TransformersHrmTextConfig):
    """transformers' `HrmTextConfig` with the same fields, defaults and derived values.

    Besides it reads `L_bp_steps`, an older spelling of `L_bp_cycles`, and refuses what the model
    does not have: another rotary type, biases, attention dropout, another activation.
    `to_model_config` gives the shape in our own terms.

    Raises:
        ConfigError: (a ValueError) an option that the model does not have, or an attention
            implementation that loses the PrefixLM mask.
    """

    base_model_tp_plan = {  # noqa: RUF012 (transformers reads it as a class attribute)
        f"{stack}.layers.*.{name}": style
        for stack in ("H_module", "L_module")
        for name, style in _BLOCK_PLAN.items()
    }

    def __post_init__(self, **kwargs: Any) -> None:
        older = kwargs.pop("L_bp_steps", None)
        if self.L_bp_cycles is None and older is not None:
            self.L_bp_cycles = [older] if isinstance(older, int) else list(older)
        super().__post_init__(**kwargs)
        if self.attention_dropout:
            raise ConfigError(
                f"attention_dropout is {self.attention_dropout}, but HRM-Text has none: set it to 0"
            )
        self.to_model_config()

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        for name in value.values() if isinstance(value, dict) else [value]:
            require_prefix_attention(name, self.prefix_lm)
        # The parent's check comes second, and its setter stores the name.
        super(HrmTextConfig, type(self))._attn_implementation.__set__(self, value)  # pyrefly: ignore

    def to_model_config(self) -> ModelConfig:
        """The shape in our own terms; ConfigError (a ValueError) where the model has none such."""
        # Whether the head shares the embedding's weights is a matter of this class alone.
        values = self.to_dict() | {"model_type": self.model_type, "tie_word_embeddings": False}
        try:
            return from_hf_config(values, where="HrmTextConfig")
        except CheckpointError as error:
            raise ConfigError(str(error)) from None

    def to_depth(self) -> Depth:
        """All cycles; gradient through the L calls that `L_bp_cycles` names and every H call.

        As in transformers, an entry above `L_cycles` means all of the cycle's L calls.
        """
        given = [min(entry, self.L_cycles) for entry in self.L_bp_cycles or [2]]
        return Depth.from_L_bp_cycles(self.to_model_config(), given[: self.H_cycles])


__all__ = ["VARLEN", "HrmTextConfig"]
