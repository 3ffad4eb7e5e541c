"""transformers' text generation pipeline, with the prefix mask."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, TextGenerationPipeline


class PrefixLMPipeline(TextGenerationPipeline):
    """`pipeline("text-generation", model=..., pipeline_class=PrefixLMPipeline)`.

    transformers' own pipeline hands only ids and attention mask to `generate`: it drops the
    `token_type_ids` of the tokenizer, and the prompt is read causally. This one marks every prompt
    whole, batched or not, for our classes and transformers', and is greedy unless the call or
    generation_config.json asks to sample.
    """

    _default_generation_config = GenerationConfig(max_new_tokens=256)

    def _forward(self, model_inputs: dict[str, Any], **generate_kwargs: Any) -> Any:
        mask = model_inputs["attention_mask"]
        if mask.shape[1]:
            generate_kwargs = {"token_type_ids": mask, **generate_kwargs}
        return super()._forward(model_inputs, **generate_kwargs)
