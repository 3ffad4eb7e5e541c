"""Rows of a token array to packed batches, by whole-array operations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hrmtext.batch import IGNORE, PackedBatch, RowLayout
from hrmtext.data.format import RowIndex, row_tokens
from hrmtext.data.turns import ListedTurns, RowTurns, ranges
from hrmtext.errors import DataError


def pack_rows(
    tokens: npt.NDArray[Any],
    index: RowIndex,
    turns: RowTurns | None = None,
    *,
    row_ids: npt.NDArray[Any] | None = None,
    num_tokens: int | None = None,
    pad_token: int = 0,
    prefix_lm: bool = True,
    supervise_prompts: bool = False,
) -> PackedBatch:
    """What `PackedBatch.from_turns` gives for the rows of `index`, at the speed of numpy.

    Args:
        tokens: the token array that `index` points into.
        index: R rows, at least one, checked before (`read_index`).
        turns: the earlier turns of chat rows; None: all rows have one turn.
        row_ids: (R) numbers to carry along.
        num_tokens: T, to pad the stream to a fixed size; default: no padding.
        prefix_lm: False makes every row causal.
        supervise_prompts: prompt tokens bear loss too; for causal rows only, as prompt tokens that
            see one another would be read off. Answers that are marked as bearing none do not.

    Raises:
        DataError: no row, or more tokens than `num_tokens`.
    """
    prompt = index.inst_len.astype(np.int64)  # (R)
    whole = prompt + index.resp_len.astype(np.int64)  # (R)
    inputs = whole - 1  # (R)
    used = int(inputs.sum())
    size = used if num_tokens is None else num_tokens
    if not len(whole) or used > size:
        raise DataError(f"{len(whole)} rows have {used} tokens, but the stream {size}")

    assert not (supervise_prompts and prefix_lm), "a prompt that sees itself cannot be predicted"
    source = np.asarray(tokens)  # slices of a plain array are cheaper than of a mapped one
    starts = index.inst_start.astype(np.int64)
    if not np.array_equal(starts + prompt, index.resp_start):
        source = row_tokens(source, index)
        starts = np.cumsum(whole) - whole
    stops = starts + inputs
    stream = np.full(size, pad_token, np.int64)  # (T)
    rows = [source[a:b] for a, b in zip(starts.tolist(), stops.tolist(), strict=True)]
    np.concatenate(rows, out=stream[:used])

    row_ends = np.cumsum(inputs)
    positions = np.arange(size, dtype=np.int64)  # (T)
    positions[:used] -= np.repeat(row_ends - inputs, inputs)
    positions[used:] -= used  # padding counts from 0
    after = positions[:used] + 1  # the place of the token that each input predicts
    prompt_of = np.repeat(prompt, inputs)
    labels = np.full(size, IGNORE, np.int64)  # (T)
    labels[: used - 1] = stream[1:used]
    labels[row_ends - 1] = source[stops]
    if not supervise_prompts:
        np.putmask(labels[:used], after < prompt_of, IGNORE)
    visible_end = np.zeros(size, np.int64)  # (T)
    if prefix_lm:
        np.maximum(after, prompt_of, out=visible_end[:used])
    else:
        visible_end[:used] = after
    if turns is not None:
        listed = turns.listed()
        row_starts = row_ends - inputs  # (R)
        _learn_answers(labels, stream, listed, row_starts)
        if prefix_lm:
            _show_prompts(visible_end, after, listed, row_starts)
    layout = RowLayout(
        num_tokens=size,
        lengths=tuple(inputs.tolist()),
        visible_end=torch.from_numpy(visible_end),
    )
    return PackedBatch(
        tokens=torch.from_numpy(stream),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        layout=layout,
        row_ids=() if row_ids is None else tuple(np.asarray(row_ids).tolist()),
    )


def _learn_answers(
    labels: npt.NDArray[Any],
    stream: npt.NDArray[Any],
    listed: ListedTurns,
    row_starts: npt.NDArray[Any],
) -> None:
    """Set the labels (T) of the earlier turns' answers: their tokens, or none where marked."""
    lengths = listed.response_end - listed.prompt_end
    answers = ranges(row_starts[listed.row] + listed.prompt_end, lengths)
    learnt = np.repeat(listed.supervised, lengths)
    labels[answers - 1] = np.where(learnt, stream[answers], IGNORE)


def _show_prompts(
    visible_end: npt.NDArray[Any],
    after: npt.NDArray[Any],
    listed: ListedTurns,
    row_starts: npt.NDArray[Any],
) -> None:
    """Let each prompt of an earlier turn see itself, to its end, and answers what is behind."""
    starts = row_starts[listed.row]
    prompts = listed.prompt_end - listed.begin
    visible_end[ranges(starts + listed.begin, prompts)] = np.repeat(listed.prompt_end, prompts)
    answers = ranges(starts + listed.prompt_end, listed.response_end - listed.prompt_end)
    visible_end[answers] = after[answers]


def padding_bin(num_tokens: int, pad_token: int = 0) -> PackedBatch:
    """A bin that bears no loss: one row of one padding token, then padding; no row ids.

    It holds a row, so that nothing behind it needs a case for streams without rows.
    """
    visible_end = torch.zeros(num_tokens, dtype=torch.int64)
    visible_end[0] = 1
    positions = torch.arange(num_tokens) - 1
    positions[0] = 0
    return PackedBatch(
        tokens=torch.full((num_tokens,), pad_token, dtype=torch.int64),
        labels=torch.full((num_tokens,), IGNORE, dtype=torch.int64),
        positions=positions,
        layout=RowLayout(num_tokens=num_tokens, lengths=(1,), visible_end=visible_end),
    )
