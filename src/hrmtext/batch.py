"""Packed batches: rows of different length in one token stream, and who sees whom in it.

Letters: T tokens of the stream, R rows.

The mask rule of the whole project: query i sees key j of its own row if j <= i, or if both lie in
the same bidirectional block. It is held as one integer a token, `visible_end`: key j of the same
row is seen if and only if j < visible_end[i], both counted from the start of the row. A
pretraining row has one block, its prompt; a chat row has one per user turn.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from hrmtext.errors import DataError

IGNORE = -100
"""Label of a token that bears no loss."""


class TokenTurn(NamedTuple):
    """One turn of a row: what is asked, and the answer."""

    prompt: Sequence[int]
    """Ends with its end token."""
    response: Sequence[int]
    """Ends with its own end token, unless it was cut."""
    supervised: bool = True
    """Whether the answer bears loss."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowLayout:
    """What attention needs to know of a packed stream; lengths are plain ints, known on the host.

    `sum(lengths)` may be below T: the tokens behind the last row are padding that attends nothing.
    """

    num_tokens: int
    """T, padding behind the last row included."""
    lengths: tuple[int, ...]
    """(R) tokens of each row."""
    visible_end: torch.Tensor
    """(T) int64 on the CPU: from the row's start, the first position that token t does not see."""

    @classmethod
    def from_prefixes(
        cls, lengths: Sequence[int], prefix_lengths: Sequence[int], num_tokens: int | None = None
    ) -> RowLayout:
        """Rows with one bidirectional block each, at their start.

        Args:
            lengths: (R) tokens of each row.
            prefix_lengths: (R) tokens of each row's prompt; 0 makes the row causal.
            num_tokens: T, where the stream is padded; default: no padding.

        Raises:
            DataError: a prefix longer than its row, an empty row, or more tokens than T.
        """
        lengths, prefix_lengths = tuple(map(int, lengths)), tuple(map(int, prefix_lengths))
        if len(lengths) != len(prefix_lengths):
            raise DataError(f"{len(lengths)} row lengths but {len(prefix_lengths)} prefix lengths")
        for row, (length, prefix) in enumerate(zip(lengths, prefix_lengths, strict=True)):
            if length < 1 or not 0 <= prefix <= length:
                raise DataError(
                    f"row {row}: length {length} and prefix length {prefix}; expected "
                    "1 <= length and 0 <= prefix <= length"
                )
        return cls.from_blocks(lengths, [[(0, prefix)] for prefix in prefix_lengths], num_tokens)

    @classmethod
    def from_blocks(
        cls,
        lengths: Sequence[int],
        blocks: Sequence[Sequence[tuple[int, int]]],
        num_tokens: int | None = None,
    ) -> RowLayout:
        """Rows with any number of bidirectional blocks, as chat rows have one for each prompt.

        Every token of a block sees all tokens before the block's end; all others see up to
        themselves. What is before a block never sees into it, so a KV cache only ever grows.

        Args:
            lengths: (R) tokens of each row.
            blocks: for each row (start, end) of its blocks in order, counted from the row's start.
            num_tokens: T, where the stream is padded; default: no padding.

        Raises:
            DataError: blocks that overlap or leave their row, an empty row, more tokens than T.
        """
        lengths = tuple(map(int, lengths))
        used = sum(lengths)
        num_tokens = used if num_tokens is None else num_tokens
        if len(lengths) != len(blocks):
            raise DataError(f"{len(lengths)} row lengths but blocks of {len(blocks)} rows")
        if not lengths:
            raise DataError("a batch needs at least one row, got none")
        if used > num_tokens:
            raise DataError(f"rows have {used} tokens, but the stream only {num_tokens}")
        visible_end = torch.zeros(num_tokens, dtype=torch.int64)
        at = 0
        for row, (length, of_row) in enumerate(zip(lengths, blocks, strict=True)):
            if length < 1:
                raise DataError(f"row {row} has {length} tokens, expected at least one")
            ends = visible_end[at : at + length]
            ends.copy_(torch.arange(1, length + 1))
            before = 0
            for start, end in of_row:
                if not before <= start <= end <= length:
                    raise DataError(
                        f"row {row}: blocks {list(of_row)} in {length} tokens; expected each to "
                        "start where the one before has ended or later, and to end in the row"
                    )
                ends[start:end] = end
                before = end
            at += length
        return cls(num_tokens=num_tokens, lengths=lengths, visible_end=visible_end)

    @functools.cached_property
    def num_seen(self) -> int:
        """Pairs of a token and one that it sees, of all rows; found once."""
        return int(self.visible_end.sum())

    @property
    def num_padding(self) -> int:
        """Tokens behind the last row."""
        return self.num_tokens - sum(self.lengths)

    def starts(self) -> list[int]:
        """(R) stream index of each row's first token."""
        starts, at = [], 0
        for length in self.lengths:
            starts.append(at)
            at += length
        return starts


class Targets(NamedTuple):
    """The S tokens of a batch that bear loss."""

    select: torch.Tensor
    """(S) int64, their stream indices, ascending."""
    labels: torch.Tensor
    """(S) int64."""
    row_of: torch.Tensor
    """(S) int64, the row of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """Rows of different length in one token stream, for training and scoring.

    Rows hold the inputs only: a row of n tokens (prompt and response) gives n-1 inputs, and
    `labels[t]` is the token after `tokens[t]`, or IGNORE where that token is not supervised.
    """

    tokens: torch.Tensor
    """(T) int64."""
    labels: torch.Tensor
    """(T) int64; IGNORE on prompt tokens but the last, and on padding."""
    positions: torch.Tensor
    """(T) int64, restarting at 0 in every row."""
    layout: RowLayout
    row_ids: tuple[int, ...] = ()
    """(R) index of each row in its data set, where it came from one."""

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[tuple[Sequence[int], Sequence[int]]],
        *,
        num_tokens: int | None = None,
        pad_token: int = 0,
        prefix_lm: bool = True,
        row_ids: Sequence[int] = (),
    ) -> PackedBatch:
        """Pack (prompt tokens, response tokens) pairs.

        Args:
            rows: the prompt ends with its end token, the response with its own.
            num_tokens: T, to pad the stream to a fixed size; default: no padding.
            prefix_lm: False makes every row causal.

        Raises:
            DataError: an empty prompt or response, or more tokens than `num_tokens`.
        """
        return cls.from_turns(
            [[TokenTurn(prompt, response)] for prompt, response in rows],
            num_tokens=num_tokens,
            pad_token=pad_token,
            prefix_lm=prefix_lm,
            row_ids=row_ids,
        )

    @classmethod
    def from_turns(
        cls,
        rows: Sequence[Sequence[TokenTurn]],
        *,
        num_tokens: int | None = None,
        pad_token: int = 0,
        prefix_lm: bool = True,
        row_ids: Sequence[int] = (),
    ) -> PackedBatch:
        """Pack rows of one or several turns; the slow oracle of `hrmtext.data.collate`.

        Each prompt is one bidirectional block that sees all before it too. The responses of
        supervised turns bear loss, their first token at the prompt's last place; nothing predicts
        the start of a further prompt. Arguments as for `from_rows`.

        Raises:
            DataError: a row without turns, an empty prompt or response, or more tokens than
                `num_tokens`.
        """
        tokens: list[int] = []
        labels: list[int] = []
        lengths, blocks = [], []
        for index, turns in enumerate(rows):
            row: list[int] = []
            targets: list[int] = []
            of_row = []
            for prompt, response, supervised in turns:
                if not len(prompt) or not len(response):
                    raise DataError(
                        f"row {index}: {len(prompt)} prompt and {len(response)} response tokens; "
                        "expected at least one of each"
                    )
                of_row.append((len(row), len(row) + len(prompt)))
                row += [*prompt, *response]
                targets += [IGNORE] * len(prompt)
                targets += list(response) if supervised else [IGNORE] * len(response)
            if not row:
                raise DataError(f"row {index} has no turns")
            tokens += row[:-1]
            labels += targets[1:]
            lengths.append(len(row) - 1)
            blocks.append(of_row if prefix_lm else [])
        layout = RowLayout.from_blocks(lengths, blocks, num_tokens)
        padding = layout.num_padding
        positions = [torch.arange(length) for length in lengths] + [torch.arange(padding)]
        return cls(
            tokens=torch.tensor(tokens + [pad_token] * padding, dtype=torch.int64),
            labels=torch.tensor(labels + [IGNORE] * padding, dtype=torch.int64),
            positions=torch.cat(positions),
            layout=layout,
            row_ids=tuple(row_ids),
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The batch with its tensors on `device`; the layout stays on the host."""
        return dataclasses.replace(
            self,
            tokens=self.tokens.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            positions=self.positions.to(device, non_blocking=True),
        )

    def supervised(self) -> torch.Tensor:
        """(S) stream indices of the tokens that bear loss."""
        return self.targets.select.to(self.labels.device)

    @functools.cached_property
    def targets(self) -> Targets:
        """The tokens that bear loss, on the CPU; found once."""
        labels = self.labels.cpu().numpy()
        select = np.flatnonzero(labels != IGNORE)
        row_of = np.searchsorted(np.cumsum(self.layout.lengths), select, side="right")
        return Targets(*map(torch.from_numpy, (select, labels[select], row_of)))

    def validate(self, vocab_size: int) -> None:
        """Check shapes, ranges and the layout.

        Raises:
            DataError: anything a model would silently compute nonsense from.
        """
        count = self.layout.num_tokens
        for name in ("tokens", "labels", "positions"):
            tensor: torch.Tensor = getattr(self, name)
            if tensor.shape != (count,) or tensor.dtype != torch.int64:
                raise DataError(
                    f"batch.{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, "
                    f"expected torch.int64 of shape ({count},)"
                )
        if (
            self.tokens.numel()
            and not 0 <= int(self.tokens.min()) <= int(self.tokens.max()) < vocab_size
        ):
            raise DataError(
                f"batch.tokens range from {int(self.tokens.min())} to {int(self.tokens.max())}, "
                f"expected 0 to {vocab_size - 1}: was the data tokenised for another vocabulary?"
            )
        labels = self.labels[self.labels != IGNORE]
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < vocab_size:
            raise DataError(f"batch.labels leave the vocabulary 0 to {vocab_size - 1}")
        for start, length in zip(self.layout.starts(), self.layout.lengths, strict=True):
            if not torch.equal(self.positions[start : start + length].cpu(), torch.arange(length)):
                raise DataError(f"positions of the row at {start} do not count from 0")
            ends = self.layout.visible_end[start : start + length]
            if bool((ends <= torch.arange(length)).any()) or int(ends.max()) > length:
                raise DataError(
                    f"visible_end of the row at {start} leaves the row or hides a token from itself"
                )
