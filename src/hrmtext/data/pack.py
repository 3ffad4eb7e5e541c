"""Which rows form which batch: bins filled longest row first, every row exactly once.

A global batch has a fixed number of bins; ranks take whole bins, so the rows of a batch do not
depend on how many ranks there are.
"""

from __future__ import annotations

import array
import dataclasses
import heapq
from typing import Any

import numpy as np
import numpy.typing as npt

from hrmtext.errors import DataError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Rows of every bin of every global batch of an epoch."""

    bin_tokens: int
    """Most input tokens of a bin."""
    bins_per_batch: int
    rows: npt.NDArray[np.integer[Any]]
    """(N) row numbers, bin after bin; int32 where they fit."""
    offsets: npt.NDArray[np.int64]
    """(num_batches * bins_per_batch + 1) where each bin starts in `rows`."""

    @property
    def num_batches(self) -> int:
        """Global batches; the last may be part-filled."""
        return (len(self.offsets) - 1) // self.bins_per_batch

    @property
    def batch_tokens(self) -> int:
        """Most input tokens of a global batch."""
        return self.bin_tokens * self.bins_per_batch

    def bin(self, batch: int, number: int) -> npt.NDArray[np.integer[Any]]:
        """Rows of bin `number` of a batch."""
        at = batch * self.bins_per_batch + number
        return self.rows[self.offsets[at] : self.offsets[at + 1]]

    def batch(self, batch: int) -> npt.NDArray[np.integer[Any]]:
        """Rows of all bins of a batch."""
        at = batch * self.bins_per_batch
        return self.rows[self.offsets[at] : self.offsets[at + self.bins_per_batch]]

    def num_filled_bins(self, batch: int) -> int:
        """Bins of a batch that hold rows; they come first."""
        at = batch * self.bins_per_batch
        return int((np.diff(self.offsets[at : at + self.bins_per_batch + 1]) > 0).sum())

    def utilization(self, lengths: npt.ArrayLike) -> float:
        """Share of all token slots that hold a token, the last batch included."""
        slots = self.num_batches * self.batch_tokens
        return float(np.asarray(lengths).sum()) / slots if slots else 1.0


def plan_epoch(lengths: npt.ArrayLike, batch_tokens: int, bin_tokens: int | None = None) -> Plan:
    """Distribute rows over global batches of `batch_tokens // bin_tokens` bins.

    Rows are taken in the given order until a batch is full, then laid into its bins, longest first
    to the least loaded bin. A row that fits no bin is carried to the next batch, where it comes
    first. Deterministic; the caller shuffles.

    Args:
        lengths: (N) input tokens of each row, in the order of the epoch.
        batch_tokens: most tokens of a global batch.
        bin_tokens: most tokens of a bin; None: a batch is one bin.

    Raises:
        DataError: a row longer than a bin, an empty row, or a bin larger than the batch.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    bin_tokens = batch_tokens if bin_tokens is None else bin_tokens
    if not 1 <= bin_tokens <= batch_tokens:
        raise DataError(f"bin_tokens is {bin_tokens}, expected 1 to batch_tokens = {batch_tokens}")
    if sizes.ndim != 1:
        raise DataError(f"lengths have shape {sizes.shape}, expected one dimension")
    if len(sizes) and int(sizes.max()) > bin_tokens:
        row = int(sizes.argmax())
        raise DataError(
            f"row {row} has {int(sizes[row])} input tokens, but a bin holds only {bin_tokens}; "
            "raise bin_tokens, or sample with a smaller max_seq_len"
        )
    if len(sizes) and int(sizes.min()) < 1:
        raise DataError(f"row {int(sizes.argmin())} has no input token")
    bins_per_batch = batch_tokens // bin_tokens
    if bins_per_batch == 1:
        rows, offsets = _fill_single_bins(sizes, bin_tokens)
    else:
        rows, offsets = _fill_batches(sizes, bin_tokens, bins_per_batch)
    return Plan(bin_tokens=bin_tokens, bins_per_batch=bins_per_batch, rows=rows, offsets=offsets)


def _fill_single_bins(sizes: npt.NDArray[np.int64], capacity: int) -> tuple[Any, Any]:
    ends = np.cumsum(sizes)
    offsets = [0]
    used = 0
    while offsets[-1] < len(sizes):
        at = int(np.searchsorted(ends, used + capacity, side="right"))
        used = int(ends[at - 1])
        offsets.append(at)
    return np.arange(len(sizes)), np.array(offsets, dtype=np.int64)


def _fill_batches(
    sizes: npt.NDArray[np.int64], bin_tokens: int, bins_per_batch: int
) -> tuple[Any, Any]:
    ends = np.cumsum(sizes)
    capacity = bin_tokens * bins_per_batch
    # Arrays: as lists, the numbers of a hundred million rows would take many times the room.
    rows = np.empty(len(sizes), dtype=np.int32 if len(sizes) < 1 << 31 else np.int64)
    offsets = array.array("q", [0])
    placed = 0
    carried: list[int] = []
    at = 0
    while at < len(sizes) or carried:
        # As many new rows as the batch has room for beside the carried ones.
        room = capacity - int(sizes[carried].sum())
        before = int(ends[at - 1]) if at else 0
        stop = max(at, int(np.searchsorted(ends, before + room, side="right")))
        order = np.array([*carried, *(at + np.argsort(-sizes[at:stop], kind="stable"))], np.int64)
        bins: list[list[int]] = [[] for _ in range(bins_per_batch)]
        heap = [(0, number) for number in range(bins_per_batch)]
        left_over: list[int] = []
        for row, length in zip(order.tolist(), sizes[order].tolist(), strict=True):
            load, number = heap[0]
            load += length
            if load > bin_tokens:
                left_over.append(row)  # the least loaded bin has no room, so none has
                continue
            heapq.heapreplace(heap, (load, number))
            bins[number].append(row)
        for members in bins:
            rows[placed : placed + len(members)] = members
            placed += len(members)
            offsets.append(placed)
        carried, at = left_over, stop
    return rows, np.frombuffer(offsets, dtype=np.int64)
