"""What `generate` appends is no part of the prompt, whatever transformers calls it."""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
from transformers import GenerationMixin


class AnswerTypes(GenerationMixin):
    """`generate` whose new and drafted tokens have type 0.

    transformers repeats the last type, 1 behind a prompt: an answer without a cache, and the drafts
    of assisted decoding, would become part of the bidirectional block.
    """

    _prompt_width: int | None = None
    """Columns of the prompt while drafts stand behind it."""

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        types = model_kwargs.get("token_type_ids")
        updated = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, *args, **kwargs
        )
        if types is not None and updated.get("token_type_ids") is not None:
            updated["token_type_ids"][:, types.shape[1] :] = 0
        return updated

    def _assisted_decoding(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._prompt_width = input_ids.shape[1]
        try:
            return cast(Any, super())._assisted_decoding(input_ids, *args, **kwargs)
        finally:
            self._prompt_width = None

    # `generate` reads this method's signature to see what the model takes.
    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs = cast(Any, super()).prepare_inputs_for_generation(*args, **kwargs)
        types = inputs.get("token_type_ids")
        if self._prompt_width is not None and types is not None:
            inputs["token_type_ids"] = types.clone()
            inputs["token_type_ids"][:, self._prompt_width :] = 0
        return inputs
