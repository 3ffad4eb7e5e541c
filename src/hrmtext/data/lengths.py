"""Which rows fit the context, and where those that do not are cut; every dropped row counted."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from hrmtext.config.data import LongRows, SamplingConfig
from hrmtext.data.arrays import Array
from hrmtext.data.format import INDEX_NAMES, RowIndex
from hrmtext.data.turns import TURN_COUNT, turns_of

TOO_SHORT = "response too short"
NO_ROOM = "instruction leaves no room for a response"
TOO_SHORT_TRUNCATED = "response too short after truncation"
TOO_LONG = "row too long"


class LengthCheck:
    """Leaves rows that fit the context, with their responses cut where they must be; counts."""

    def __init__(
        self, config: SamplingConfig, long_rows: LongRows, turns: Array | None = None
    ) -> None:
        """`long_rows`: what happens to rows beyond the context; `turns`: of the stratum."""
        self.turns = turns
        self.limit = config.max_seq_len + 1  # the last token is only predicted
        self.shortest = config.min_response_tokens
        self.long_rows = long_rows
        self.num_rows = self.num_truncated = 0
        """Rows seen; rows left with a cut response, or without their last turns."""
        self.dropped: dict[str, int] = {}
        """Rows not left, by reason."""
        self.also: Callable[[RowIndex], RowIndex] | None = None
        """A further filter, which sees rows before they are cut and counts for itself."""

    def __call__(self, index: RowIndex) -> RowIndex:
        """The rows that fit."""
        self.num_rows += index.num_rows
        if self.also is not None:
            index = self.also(index)
        found = index
        if self.long_rows == "truncate":
            found = self._end_at_a_turn_that_fits(index)
        shortened = found.inst_len < index.inst_len
        index = found
        room = self.limit - index.inst_len
        response = np.minimum(index.resp_len, np.maximum(room, 0))
        # Lengths are checked after the cut: a cut response can be too short as well.
        reasons = {TOO_SHORT: index.resp_len < self.shortest, NO_ROOM: room < 1}
        if self.long_rows == "drop":
            reasons[TOO_LONG] = index.resp_len > room
        else:
            reasons[TOO_SHORT_TRUNCATED] = response < self.shortest
        keep = np.ones(index.num_rows, dtype=bool)
        for reason, mask in reasons.items():
            count = int((mask & keep).sum())
            if count:
                self.dropped[reason] = self.dropped.get(reason, 0) + count
            keep &= ~mask
        self.num_truncated += int((keep & (shortened | (response < index.resp_len))).sum())
        return dataclasses.replace(index, resp_len=response).take(keep)

    def _end_at_a_turn_that_fits(self, index: RowIndex) -> RowIndex:
        """Chat rows whose last answer has no room end with an earlier one that bears loss."""
        turns = turns_of(index.extras, self.turns)
        if turns is None:
            return index
        listed = turns.listed()
        whole = index.inst_len + index.resp_len
        has_room = np.minimum(whole, self.limit) - index.inst_len >= self.shortest
        fits = np.minimum(listed.response_end, self.limit) - listed.prompt_end >= self.shortest
        (fitting,) = (fits & listed.supervised).nonzero()
        last = np.full(index.num_rows, -1)
        np.maximum.at(last, listed.row[fitting], fitting)
        (rows,) = (~has_room & (last >= 0)).nonzero()
        turn = last[rows]
        arrays = {name: np.array(array) for name, array in zip(INDEX_NAMES, index, strict=True)}
        arrays["inst_len"][rows] = listed.prompt_end[turn]
        arrays["resp_start"][rows] = index.inst_start[rows] + listed.prompt_end[turn]
        arrays["resp_len"][rows] = listed.response_end[turn] - listed.prompt_end[turn]
        counts = np.array(turns.count)
        counts[rows] = turn - np.searchsorted(listed.row, rows)
        return RowIndex(**arrays, extras={**index.extras, TURN_COUNT: counts})
