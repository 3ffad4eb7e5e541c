"""HRM-Text for transformers: its classes over the project's own model, and what feeds them."""

from hrmtext.hf.auto import register_auto_classes
from hrmtext.hf.configuration import HrmTextConfig
from hrmtext.hf.modeling import HrmTextForCausalLM, HrmTextModel, HrmTextPreTrainedModel

__all__ = [
    "HrmTextConfig",
    "HrmTextForCausalLM",
    "HrmTextModel",
    "HrmTextPreTrainedModel",
    "register_auto_classes",
]
