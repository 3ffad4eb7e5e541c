"""HRM-Text as transformers classes, over the same blocks and the same recurrence as `HrmLM`.

Letters: B rows, S columns of a padded batch, C columns of the cache, D hidden size, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any, cast

import torch
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.core_model_loading import Concatenate, WeightConverter, WeightRenaming
from transformers.masking_utils import create_masks_for_generate
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from hrmtext.artifacts.names import outside_names, tensor_names
from hrmtext.config.model import ModelConfig
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.hf.answer_types import AnswerTypes
from hrmtext.hf.attention import (
    DensePlan,
    Owner,
    packed_rows,
    prefix_mask,
    register_varlen,
    varlen_plan,
)
from hrmtext.hf.cache_name import CACHE, one_cache
from hrmtext.hf.configuration import VARLEN, HrmTextConfig, require_prefix_attention
from hrmtext.hf.parallel import register_parallel_styles
from hrmtext.model.hrm import Recurrence, recur
from hrmtext.model.init import CUT, CUT_STD
from hrmtext.model.layers import Block

logger = logging.get_logger(__name__)
# transformers finds attention functions and parallel styles by name, so they must be known by now.
register_varlen()
register_parallel_styles()


class HrmTextPreTrainedModel(PreTrainedModel):
    """What both classes share: initial weights, loading, what transformers may do with them."""

    config_class = HrmTextConfig
    config: HrmTextConfig  # pyrefly: ignore
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' attributes are lists)
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": Block}  # noqa: RUF012

    def _check_and_adjust_attn_implementation(
        self, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        require_prefix_attention(attn_implementation, self.config.prefix_lm)
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The recipe's initial weights: see `hrmtext.model.init`."""
        if isinstance(module, nn.Linear):
            _draw(module.weight, module.in_features**-0.5)
        elif isinstance(module, nn.Embedding):
            _draw(module.weight, self.config.initializer_range)
        elif isinstance(module, HrmTextModel):
            _draw(module.z_L_init, 1.0)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """transformers' `from_pretrained`; reads fused, split and sharded files.

        Raises:
            CheckpointError: a tensor is missing or has another shape (transformers would leave
                random weights in its place), or is none of the model's.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        resizes = kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # so that the error below can name them
            **kwargs,
        )
        model, info = loaded
        problems = [f"missing {name}" for name in sorted(info["missing_keys"])]
        problems += [f"unexpected {name}" for name in sorted(info["unexpected_keys"])]
        if not resizes:
            problems += [
                f"{name} has shape {tuple(found)}, the config says {tuple(wanted)}"
                for name, found, wanted in sorted(info["mismatched_keys"])
            ]
        if problems:
            more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
            raise CheckpointError(
                f"{pretrained_model_name_or_path}: the weights are not those of this "
                f"{cls.__name__}: {'; '.join(problems[:6])}{more}"
            )
        return (model, info) if wants_info else model

    @staticmethod
    def _load_pretrained_model(
        model: PreTrainedModel,
        state_dict: Any,
        checkpoint_files: Any,
        load_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        """Let transformers' loader fuse the files of its split layout on the way."""
        core = cast(HrmTextModel, getattr(model, model.base_model_prefix, model))
        mapping = [*(load_config.weight_mapping or []), *fusing_rules(core.shape)]
        load_config = dataclasses.replace(load_config, weight_mapping=mapping)
        return PreTrainedModel._load_pretrained_model(
            model, state_dict, checkpoint_files, load_config, *args, **kwargs
        )


class HrmTextModel(HrmTextPreTrainedModel):
    """The recurrence without the head: transformers' `HrmTextModel` over fused projections."""

    # A checkpoint of the whole model holds the head too.
    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]  # noqa: RUF012

    def __init__(self, config: HrmTextConfig) -> None:
        super().__init__(config)
        self.shape = config.to_model_config()
        self.depth = config.to_depth()
        core = Recurrence(self.shape)
        self.embed_tokens = core.embed_tokens
        self.H_module = core.H_module
        self.L_module = core.L_module
        self.register_buffer("z_L_init", core.z_L_init)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """The last z_H of every token.

        Args:
            input_ids: (B, S) int64, or inputs_embeds: (B, S, D), not yet scaled; one of the two.
            attention_mask: (B, C) with 1 on real tokens, (B, 1, S, C) ready-made, or None.
            position_ids: (B, S); None: from the number of tokens in the cache on. Without
                attention_mask and cache, positions that start again pack several rows in one; no
                row sees another, and no cache is made.
            cache: a cache with a slot for each (stack call, layer); `past_key_values` is its name
                up to transformers 5.23. Either is taken.
            token_type_ids: (B, S), 1 on the tokens of the prompt, which see one another. They
                count in the first forward pass only, as in transformers; all ones of a row are one
                block, even where they stand apart.
            use_cache: make a cache where none is given; None: as configured.
            kwargs: `output_hidden_states` (one (B, S, D) a KV slot and one for the embedding),
                `output_attentions` (one (B, N, S, C) a KV slot; `eager` only), and what
                transformers' attention functions take.

        Raises:
            ValueError: both or none of input_ids and inputs_embeds, or attention weights asked of
                an implementation that does not give them.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("expected exactly one of input_ids and inputs_embeds")
        cache = one_cache(cache, past_key_values)
        embedded = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        packed = None
        if position_ids is not None and attention_mask is None and cache is None:
            packed = packed_rows(position_ids.expand(embedded.shape[:2]))
        if use_cache and cache is None and packed is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(embedded.shape[1], device=embedded.device)[None] + seen
        wanted = kwargs.pop("output_attentions", None)
        keep_weights = bool(self.config.output_attentions if wanted is None else wanted)
        if keep_weights and self.config._attn_implementation != "eager":
            raise ValueError(
                f"attn_implementation={self.config._attn_implementation!r} gives no attention "
                "weights: call model.set_attn_implementation('eager') for output_attentions=True"
            )
        kwargs.pop("output_hidden_states", None)  # recorded by the decorator
        is_first = cache is None or not cache.is_initialized
        has_mask = attention_mask is not None and attention_mask.dim() == 4
        if is_first and not has_mask:
            check_token_types(self.config, token_type_ids)
        if is_first and not has_mask and self.config._attn_implementation == VARLEN:
            plan: Any = varlen_plan(
                attention_mask, token_type_ids, embedded, cache, self.config, packed
            )
        else:
            types = token_type_ids if is_first else None
            mask = prefix_mask(
                self.config, embedded, attention_mask, position_ids, cache, types, packed
            )
            plan = DensePlan(
                Owner(self.config, self.H_module, self.training),
                mask,
                cache,
                keep_weights=keep_weights,
                options={"position_ids": position_ids, **kwargs},
            )
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        call_block = self._checkpointed if checkpointing else None
        states = recur(
            self, self.shape, embedded, position_ids, plan, self.depth, call_block=call_block
        )
        return BaseModelOutputWithPast(
            last_hidden_state=cast(Any, states[-1]),
            **cast(Any, {CACHE: cache}),
            attentions=tuple(plan.weights or ()) if keep_weights else None,
        )

    def _checkpointed(self, block: nn.Module, *arguments: Any) -> torch.Tensor:
        # Stack calls that carry no gradient have nothing to recompute, and a norm too little.
        if not torch.is_grad_enabled() or not isinstance(block, Block):
            return block(*arguments)
        return self._gradient_checkpointing_func(block.__call__, *arguments)


class HrmTextForCausalLM(HrmTextPreTrainedModel, AnswerTypes, GenerationMixin):
    """HRM-Text with its head: transformers' `HrmTextForCausalLM` over fused projections."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012

    def __init__(self, config: HrmTextConfig) -> None:
        super().__init__(config)
        self.model = HrmTextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        token_type_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits, and the loss where there are labels.

        Args:
            labels: (B, S), -100 where a token bears no loss; shifted inside: label t is compared
                with the logits of token t-1.
            logits_to_keep: logits of the last so many columns only, 0 for all; or the indices of
                the columns, (K) for all rows or (B, K) by row.

        The other arguments are those of `HrmTextModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=one_cache(cache, past_key_values),
            token_type_ids=token_type_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        state = _columns(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(state)  # (B, S or K, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs
            )
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            **cast(Any, {CACHE: outputs.get(CACHE)}),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' `generate`.

        Raises:
            ConfigError: (a ValueError) prefill in chunks, which would cut the prompt's block.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        chunk = kwargs.get("prefill_chunk_size", getattr(settings, "prefill_chunk_size", None))
        if chunk is not None and self.config.prefix_lm:
            raise ConfigError(
                f"prefill_chunk_size={chunk} would run the prompt in pieces that do not see one "
                "another; under PrefixLM the whole prompt is one block: leave it out"
            )
        return cast(Any, super()).generate(*args, **kwargs)

    @staticmethod
    def create_masks_for_generate(
        config: HrmTextConfig,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> Any:
        """The mask that `generate` prepares ahead for a compiled forward pass."""
        blocks: dict[str, Any] = {}
        if is_first_iteration:
            check_token_types(config, token_type_ids)
            if token_type_ids is not None and config.prefix_lm:
                blocks["block_sequence_ids"] = torch.where(token_type_ids == 1, 0, -1)
        return create_masks_for_generate(
            config=config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            **cast(Any, {CACHE: one_cache(cache, past_key_values)}),
            position_ids=position_ids,
            **blocks,
        )


def check_token_types(config: HrmTextConfig, token_type_ids: torch.Tensor | None) -> None:
    """Warn once where the PrefixLM mask is lost, or given to a model that does not use it."""
    if token_type_ids is None and config.prefix_lm:
        logger.warning_once(
            "token_type_ids are missing, so the prompt is read causally: this model was trained "
            "with prompt tokens that see one another, and its answers get much worse without. Pass "
            "token_type_ids with 1 on the prompt's tokens; tokenizers exported by hrm-text return "
            "them by themselves: model.generate(**tokenizer(text, return_tensors='pt'))."
        )
    elif token_type_ids is not None and not config.prefix_lm:
        logger.warning_once("token_type_ids have no effect: the config says prefix_lm=False.")


def fusing_rules(shape: ModelConfig) -> list[Any]:
    """How transformers' loader makes fused tensors of split ones."""
    prefix = "model.H_module.layers.0."
    rules: list[Any] = []
    for name in tensor_names(shape):
        if not name.startswith(prefix):
            continue
        fused = name.removeprefix(prefix)
        parts = [part.removeprefix(prefix) for part in outside_names(name, "split")]
        if len(parts) > 1:
            rules.append(WeightConverter(parts, fused, operations=[Concatenate(dim=0)]))
        elif parts[0] != fused:
            rules.append(WeightRenaming(rf"\.{re.escape(parts[0])}$", f".{fused}"))
    return rules


def _columns(state: torch.Tensor, keep: int | torch.Tensor) -> torch.Tensor:
    """(B, S, D) -> (B, K, D), see `logits_to_keep`."""
    if isinstance(keep, int):
        return state[:, -keep:] if keep else state
    if keep.dim() == 2:
        return state.gather(1, keep[..., None].expand(-1, -1, state.shape[-1]))
    return state[:, keep]


def _draw(weight: torch.Tensor, std: float) -> None:
    """A normal cut at three sigma, of the given std after the cut."""
    wide = std / CUT_STD
    init.trunc_normal_(weight, mean=0.0, std=wide, a=-CUT * wide, b=CUT * wide)


__all__ = ["HrmTextForCausalLM", "HrmTextModel", "HrmTextPreTrainedModel", "fusing_rules"]
