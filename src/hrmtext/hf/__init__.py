"""HRM-Text for transformers: its classes over the project's own model, and what feeds them."""

from hrmtext.hf.auto import register_auto_classes
from hrmtext.hf.collator import PrefixLMCollator
from hrmtext.hf.configuration import HrmTextConfig
from hrmtext.hf.modeling import HrmTextForCausalLM, HrmTextModel, HrmTextPreTrainedModel
from hrmtext.hf.pipeline import PrefixLMPipeline
from hrmtext.hf.prompts import encode_prompts, format_prompt

__all__ = [
    "HrmTextConfig",
    "HrmTextForCausalLM",
    "HrmTextModel",
    "HrmTextPreTrainedModel",
    "PrefixLMCollator",
    "PrefixLMPipeline",
    "encode_prompts",
    "format_prompt",
    "register_auto_classes",
]
