"""Let transformers' automatic classes choose ours."""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from hrmtext.hf.configuration import HrmTextConfig
from hrmtext.hf.modeling import HrmTextForCausalLM, HrmTextModel


def register_auto_classes() -> None:
    """From now on, in this process, `AutoModelForCausalLM` and pipelines load our classes.

    Importing `hrmtext.hf` does not do this by itself: whoever names transformers' classes gets
    transformers' classes.
    """
    AutoConfig.register(HrmTextConfig.model_type, HrmTextConfig, exist_ok=True)
    AutoModel.register(HrmTextConfig, HrmTextModel, exist_ok=True)
    AutoModelForCausalLM.register(HrmTextConfig, HrmTextForCausalLM, exist_ok=True)
