"""One batch from prompts to tokens: packed prefill, then a token a row and step over a KV cache.

Letters: B rows still decoding, R rows of the batch, S tokens that an answer may have, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from hrmtext.batch import RowLayout
from hrmtext.errors import NonFiniteError
from hrmtext.generate.sampling import Sampler
from hrmtext.generate.step import StepFunction, compiled_width
from hrmtext.generate.stop import answer_lengths
from hrmtext.model import Depth, HrmLM, KVCache

Blocks = Sequence[tuple[int, int]]
"""(start, end) of each bidirectional block of a prompt, in order."""
SHRINK_BELOW = 0.75
"""Rows leave the cache once this share or less is unfinished: the copy costs about two steps."""
GROWTH = 1.5
CAPACITY_LIMIT = 1 << 30
MIN_GROWTH_TOKENS = 64
STEPS_PER_CHECK = {"cpu": 1, "cuda": 8}
"""How often the host asks which rows are finished: on CUDA each answer stops the pipeline."""


@dataclasses.dataclass(frozen=True)
class DecodeSettings:
    """What all rows of a batch share."""

    stop: torch.Tensor
    """(V) bool, see `stop_table`."""
    depth: Depth | None = None
    guidance: float = 0.0
    with_logprobs: bool = False


@dataclasses.dataclass(frozen=True)
class DecodedRow:
    """Tokens of one answer, its stop token included."""

    tokens: list[int]
    stopped: bool
    """False: the limit came first."""
    logprobs: list[float] | None
    """Log-probability of each token in the model's own distribution (temperature 1, no cut)."""


@torch.inference_mode()
def decode_batch(
    step_model: StepFunction,
    prompts: Sequence[Sequence[int]],
    owners: Sequence[int],
    limits: Sequence[int],
    sampler: Sampler,
    settings: DecodeSettings,
    blocks: Sequence[Blocks] | None = None,
) -> list[DecodedRow]:
    """Decode one answer a row; every prompt is read once, however many rows it has.

    Args:
        step_model: the model, and how it takes a step.
        owners: (R) index in `prompts` of the prompt that row r answers.
        limits: (R) tokens that an answer may have; prompt and limit fit max_seq_len.
        blocks: as for `prefill`.

    Raises:
        NonFiniteError: the logits of the prompts are NaN or infinite.
    """
    model = step_model.model
    device = model.lm_head.weight.device
    lengths = np.asarray([len(prompts[owner]) for owner in owners])  # (R)
    row_limits = np.asarray(limits)  # (R)
    most = int(row_limits.max())
    is_fixed = step_model.is_compiled  # compiled steps are for one number of rows and capacity
    if is_fixed:
        # Finished rows go on for nothing, past their own limits.
        final_capacity = compiled_width(int(lengths.max()) + most, CAPACITY_LIMIT)
        capacity = final_capacity
    else:
        final_capacity = int((lengths + row_limits).max())
        capacity = min(final_capacity, int(lengths.max()) + MIN_GROWTH_TOKENS)
    cache = KVCache(model.config, len(prompts), capacity, device=device, dtype=cache_dtype(model))
    logits = prefill(step_model, cache, prompts, settings, blocks)
    if not bool(logits.isfinite().all()):
        raise NonFiniteError("the model's logits are NaN or infinite; are its weights damaged?")
    if list(owners) != list(range(len(prompts))):
        copies = torch.tensor(owners, device=device)
        cache.keep(copies)
        logits = logits.index_select(0, copies)

    num_rows = len(lengths)
    tokens = torch.zeros(num_rows, most, dtype=torch.int64, device=device)  # (R, S)
    logprobs = torch.zeros(num_rows, most, device=device) if settings.with_logprobs else None
    rows = torch.arange(num_rows, device=device)  # (B) row that each cache row decodes
    host_rows = np.arange(num_rows)
    done = torch.zeros(num_rows, dtype=torch.bool, device=device)  # (B)
    ends = set(row_limits.tolist())
    steps_per_check = STEPS_PER_CHECK.get(device.type, 1)
    for step in range(1, most + 1):
        chosen = sampler(logits, step - 1)  # (B)
        tokens[rows, step - 1] = chosen
        if logprobs is not None:
            logprobs[rows, step - 1] = _logprob(logits, chosen)
        done |= settings.stop[chosen]
        if step in ends or step % steps_per_check == 0:
            at_limit = row_limits[host_rows] <= step
            live = ~(done.cpu().numpy() | at_limit)
            if not live.any():
                break
            if not is_fixed and (at_limit.any() or live.mean() <= SHRINK_BELOW):
                host_rows = host_rows[live]
                kept = torch.from_numpy(np.flatnonzero(live)).to(device)
                rows, done, chosen = (t.index_select(0, kept) for t in (rows, done, chosen))
                sampler.keep(kept)
                cache.keep(kept)
                cache.longest = int(lengths[host_rows].max()) + step - 1
        if cache.longest >= cache.capacity:
            grow(cache, final_capacity)
        logits = step_model(chosen, cache, settings.depth, settings.guidance)
    return _collect(tokens, logprobs, torch.from_numpy(row_limits), settings.stop)


def prefill(
    step_model: StepFunction,
    cache: KVCache,
    prompts: Sequence[Sequence[int]],
    settings: DecodeSettings,
    blocks: Sequence[Blocks] | None = None,
) -> torch.Tensor:
    """Fill the cache with the prompts, packed without padding; (prompts, V) logits behind each.

    Args:
        blocks: for each prompt (start, end) of what sees itself bidirectionally, one for each user
            turn of a conversation; None: each prompt is one block. A causal model has none.
    """
    lengths = [len(prompt) for prompt in prompts]
    prefix_lm = step_model.model.config.prefix_lm
    if blocks is None:
        layout = RowLayout.from_prefixes(lengths, lengths if prefix_lm else [0] * len(lengths))
    else:
        layout = RowLayout.from_blocks(lengths, blocks if prefix_lm else [[] for _ in lengths])
    packed = np.concatenate([np.asarray(prompt, dtype=np.int64) for prompt in prompts])
    tokens = torch.from_numpy(packed).to(cache.device)
    return step_model.read(tokens, layout, cache, settings.depth, settings.guidance)


def cache_dtype(model: HrmLM) -> torch.dtype:
    """Number format of keys and values: the model's, on a CPU fp32 or better.

    There torch's batched bf16 products of one row take three times as long as those in fp32.
    """
    weight = model.lm_head.weight
    if weight.device.type == "cpu":
        return torch.promote_types(weight.dtype, torch.float32)
    return weight.dtype


def grow(cache: KVCache, final_capacity: int) -> None:
    """Enlarge a full cache, by half its size or more, to at most `final_capacity`."""
    wanted = max(int(cache.capacity * GROWTH), cache.capacity + MIN_GROWTH_TOKENS)
    cache.grow(min(wanted, final_capacity))


def _logprob(logits: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    wide = logits.float()
    return wide.gather(1, chosen[:, None]).squeeze(1) - wide.logsumexp(-1)


def _collect(
    tokens: torch.Tensor, logprobs: torch.Tensor | None, limits: torch.Tensor, stop: torch.Tensor
) -> list[DecodedRow]:
    counts, stopped = answer_lengths(stop[tokens].cpu(), limits)
    listed = tokens.cpu().numpy()
    values = None if logprobs is None else logprobs.cpu().numpy()
    return [
        DecodedRow(
            tokens=listed[row, :count].tolist(),
            stopped=ended,
            logprobs=None if values is None else values[row, :count].tolist(),
        )
        for row, (count, ended) in enumerate(zip(counts.tolist(), stopped.tolist(), strict=True))
    ]
