"""From transformers' masks, caches and attention functions to the attention plan of our model.

Letters: B rows of a padded batch, S its columns, C columns in the cache, N heads, K head width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import create_causal_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hrmtext.batch import RowLayout
from hrmtext.errors import DataError
from hrmtext.hf.cache_name import CACHE
from hrmtext.hf.configuration import VARLEN, HrmTextConfig
from hrmtext.model.attention import AttentionPlan, make_plan


def register_varlen() -> None:
    """Make transformers know our variable-length implementation by its name.

    What it is asked for beyond the first forward pass (one query a row over a cache) it does as
    `sdpa` does.
    """
    AttentionInterface.register(VARLEN, sdpa_attention_forward)
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


class Owner:
    """What transformers' attention functions ask of the module that calls them."""

    is_causal = True
    num_key_value_groups = 1
    layer_idx = 0

    def __init__(self, config: HrmTextConfig, stack: nn.Module, training: bool) -> None:
        self.config, self.stack, self.training = config, stack, training

    def modules(self) -> Iterator[nn.Module]:
        """The linear layers: FlashAttention casts fp32 queries to the format of their weights."""
        return self.stack.modules()


class DensePlan:
    """Attention of a padded batch through one of transformers' functions, cached or not."""

    def __init__(
        self,
        owner: Owner,
        mask: Any,
        cache: Cache | None = None,
        *,
        keep_weights: bool = False,
        options: dict[str, Any] | None = None,
    ) -> None:
        """`mask` is what `create_causal_mask` made for the implementation in `owner.config`."""
        name = owner.config._attn_implementation or "eager"
        self.function = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)
        self.owner, self.mask, self.cache = owner, mask, cache
        self.weights: list[torch.Tensor] | None = [] if keep_weights else None
        self.options = options or {}

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(B, S, N, K) each -> (B, S, N, K); keys and values go to the cache's `slot`."""
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, S, K)
        if self.cache is not None:
            k, v = self.cache.update(k, v, slot)  # (B, N, C, K)
        mask = self.mask.to(q.device) if isinstance(self.mask, torch.Tensor) else self.mask
        scaling = q.shape[-1] ** -0.5
        output, weights = self.function(
            self.owner, q, k, v, mask, dropout=0.0, scaling=scaling, **self.options
        )
        if self.weights is not None:
            self.weights.append(weights)
        return output  # (B, S, N, K)


class PaddedPlan:
    """Attention of a padded batch through a plan for its rows without the padding."""

    def __init__(
        self, plan: AttentionPlan, token_index: torch.Tensor, shape: tuple[int, int], cache: Any
    ) -> None:
        """`token_index`: (T) places of the real tokens in the flattened (B * S) batch."""
        self.plan, self.token_index, self.shape, self.cache = plan, token_index, shape, cache

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slot: int) -> torch.Tensor:
        """(B, S, N, K) each -> (B, S, N, K), zeros at padding."""
        if self.cache is not None:
            self.cache.update(k.transpose(1, 2), v.transpose(1, 2), slot)
        stream = [x.flatten(0, 1).index_select(0, self.token_index) for x in (q, k, v)]
        attended = self.plan.attend(stream[0], stream[1], stream[2], slot)  # (T, N, K)
        padded = q.new_zeros(q.shape).flatten(0, 1)
        return padded.index_copy(0, self.token_index, attended).unflatten(0, self.shape)


def varlen_plan(
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
    embedded: torch.Tensor,
    cache: Cache | None,
    config: HrmTextConfig,
    packed: torch.Tensor | None = None,
) -> PaddedPlan:
    """The plan of a first forward pass without the padding; one host sync for the whole pass.

    Args:
        attention_mask: (B, S), 1 on real tokens, which must be adjacent; None: all are real.
        token_type_ids: (B, S), 1 on the prompt, which must open the row; None: no prompt.
        packed: (B, S) from `packed_rows`: each of these rows has its own prompt.

    Raises:
        DataError: padding inside a row, a prompt that does not start its row, an empty row.
    """
    shape = (embedded.shape[0], embedded.shape[1])
    real = torch.ones(shape, dtype=torch.bool)
    if attention_mask is not None:
        real = attention_mask.bool().cpu()
    prompt = torch.zeros_like(real)
    if token_type_ids is not None and config.prefix_lm:
        prompt = (token_type_ids == 1).cpu() & real
    if bool((~real.any(1)).any()):
        raise DataError(f"row {int(real.any(1).int().argmin())} of the batch has no real token")
    row = torch.arange(shape[0])[:, None].expand(shape)  # (B, S)
    if packed is not None:
        row = row * shape[1] + packed.cpu()
    tokens = real.flatten().nonzero().squeeze(1)  # (T) places in the batch
    _, row_of, lengths = row.flatten()[tokens].unique_consecutive(
        return_inverse=True, return_counts=True
    )
    offsets = torch.arange(len(tokens)) - (lengths.cumsum(0) - lengths)[row_of]  # (T)
    is_prompt = prompt.flatten()[tokens]
    prefixes = torch.zeros_like(lengths).index_add_(0, row_of, is_prompt.long())
    adjacent = (tokens.diff() == 1) | (row_of.diff() == 1)
    for name, sound in (
        ("attention_mask", bool(adjacent.all())),
        ("prompt", torch.equal(is_prompt, offsets < prefixes[row_of])),
    ):
        if not sound:
            raise DataError(
                f"attn_implementation={VARLEN!r}: the {name} has a gap or does not open its row; "
                "expected padding at the sides only and one prompt at the start of each row "
                "(several blocks: use 'sdpa')"
            )
    layout = RowLayout.from_prefixes(lengths.tolist(), prefixes.tolist())
    plan = make_plan(layout, device=embedded.device, dtype=embedded.dtype, head_dim=config.head_dim)
    return PaddedPlan(plan, tokens.to(embedded.device), shape, cache)


def packed_rows(position_ids: torch.Tensor) -> torch.Tensor | None:
    """(B, S) number of the row that each token belongs to; None: one row each, nothing is packed.

    Rows lie behind one another where positions do not count on, as transformers reads them.
    """
    starts = torch.diff(position_ids, dim=-1) != 1  # (B, S - 1)
    # A compiled graph cannot branch on values: there, rows that are not packed are one each too.
    if not torch.compiler.is_compiling() and not bool(starts.any()):
        return None
    return torch.nn.functional.pad(starts.long().cumsum(-1), (1, 0))


def prefix_mask(
    config: HrmTextConfig,
    embedded: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor,
    cache: Cache | None,
    token_type_ids: torch.Tensor | None,
    packed: torch.Tensor | None = None,
) -> Any:
    """The mask that the configured implementation takes: causal, and the prompt bidirectional.

    All tokens of type 1 form one block, wherever they stand, as in transformers; in a batch of
    packed rows (`packed_rows`), all those of one row.
    """
    blocks: dict[str, Any] = {}
    if token_type_ids is not None and config.prefix_lm:
        block = torch.zeros_like(token_type_ids) if packed is None else packed
        blocks["block_sequence_ids"] = torch.where(token_type_ids == 1, block, -1)
    return create_causal_mask(
        config=config,
        inputs_embeds=embedded,
        attention_mask=attention_mask,
        **{CACHE: cache},
        position_ids=position_ids,
        **blocks,
    )


@functools.cache
def transformers_keeps_packed_prompts_apart() -> bool:
    """Whether transformers' own mask does for packed rows what `prefix_mask` does; looked at."""
    config = HrmTextConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1)
    config._attn_implementation = "eager"
    mask = create_causal_mask(
        config=config,
        inputs_embeds=torch.zeros(1, 4, 32),
        attention_mask=None,
        position_ids=torch.tensor([[0, 1, 0, 1]]),
        block_sequence_ids=torch.zeros(1, 4, dtype=torch.int64),
        **{CACHE: None},
    )
    return bool((mask[0, 0, 2:, :2] < 0).all()) and bool((mask[0, 0, :2, 2:] < 0).all())


def eager_attention(
    owner: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain products around a softmax in fp32 or better; gives the weights too.

    Args:
        query: (B, N, S, K). key, value: (B, N, C, K). attention_mask: (B, 1, S, C), additive.

    Returns:
        (B, S, N, K) and the weights (B, N, S, C).
    """
    del owner
    scores = query @ key.mT * scaling  # (B, N, S, C)
    if attention_mask is not None:
        scores = scores + attention_mask
    wide = torch.promote_types(scores.dtype, torch.float32)
    weights = scores.softmax(-1, dtype=wide).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights
