"""Which rows are decoded together.

A step reads every weight and all keys and values of its rows. Where both stay in the processor's
last cache from one step to the next, a step takes about two thirds of the time that memory would
take: a small model on a CPU then decodes fewer rows at once, one batch after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_BATCH_TOKENS = 32_768
NEAR_SHARE = 0.5
"""Share of the last cache for weights, keys and values; the rest is for everything else."""
NEAR_ANSWER_TOKENS = 64
"""Tokens of an answer that are counted for it: limits are mostly far above what is said."""
MIN_NEAR_ROWS = 6
"""Fewer rows gain less from the cache than their steps cost in overhead."""


def plan_batches(
    prompt_lengths: Sequence[int],
    limits: Sequence[int],
    num_samples: int,
    max_tokens: int,
    near_tokens: int | None = None,
) -> list[list[int]]:
    """Rows by batch, longest prompts first; row i is sample i % num_samples of its prompt.

    Args:
        prompt_lengths, limits: tokens of each prompt, and at most of its answers.
        max_tokens: rows of a batch times its longest, prompt and limit; one row may exceed it.
        near_tokens: the same, that the last cache holds; None: unknown, or of no use.
    """
    order = sorted(range(len(prompt_lengths)), key=lambda i: -(prompt_lengths[i] + limits[i]))
    batches: list[list[int]] = []
    most_rows = 0
    for index in order:
        for sample in range(num_samples):
            row = index * num_samples + sample
            if batches and len(batches[-1]) < most_rows:
                batches[-1].append(row)
                continue
            batches.append([row])
            most_rows = max_tokens // (prompt_lengths[index] + limits[index])
            if near_tokens is not None:
                likely = prompt_lengths[index] + min(limits[index], NEAR_ANSWER_TOKENS)
                if near_tokens // likely >= MIN_NEAR_ROWS:
                    most_rows = min(most_rows, near_tokens // likely)
    return batches


def near_tokens(cache_bytes: int | None, weight_bytes: int, token_bytes: int) -> int | None:
    """Tokens of keys and values that a last cache of that size holds beside the weights.

    None: its size is not known, or the weights alone fill it, so that fewer rows a batch would
    read them from memory more often.
    """
    if cache_bytes is None:
        return None
    room = int(cache_bytes * NEAR_SHARE) - weight_bytes
    return room // token_bytes if room > 0 else None
