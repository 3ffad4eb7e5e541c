"""Endless packed batches of a sampled folder, in an order that ranks and restarts do not change."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections import deque
from collections.abc import Generator, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from hrmtext.batch import PackedBatch
from hrmtext.data.collate import pack_rows, padding_bin
from hrmtext.data.format import RowIndex, SampledData
from hrmtext.data.pack import Plan, plan_epoch
from hrmtext.data.turns import turns_of
from hrmtext.errors import CheckpointError, ConfigError, DataError
from hrmtext.runtime.rng import numpy_generator

STATE_VERSION = 1
PLAN_NEXT_AT = 0.5
"""Share of an epoch after which the next one is planned."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GlobalBatch:
    """One optimizer step's rows: this rank's bins, and counts over all ranks."""

    index: int
    """Number of the batch in its epoch, from 0."""
    epoch: int
    """Epoch, from 0; beyond the folder's epochs it goes on counting."""
    bins: list[PackedBatch]
    """This rank's bins; every rank has as many, filled up with `padding_bin`s."""
    num_supervised_tokens: int
    """Tokens that bear loss, over all ranks."""
    num_tokens: int
    """Input tokens without padding, over all ranks."""


@dataclasses.dataclass(frozen=True)
class _Epoch:
    number: int
    index: RowIndex
    """Rows in the order of the folder."""
    order: npt.NDArray[Any]
    """Plan row -> row of the folder."""
    plan: Plan


class Loader:
    """Iterates over global batches for ever, and can be stopped and restored exactly.

    Epoch e of the loader has the rows of the folder's epoch `e % num_epochs`, in an order that is a
    pure function of (seed, e, data fingerprint). The state is the next batch's place; it does not
    depend on the number of ranks, nor on prefetching.
    """

    def __init__(
        self,
        data: SampledData,
        *,
        batch_tokens: int,
        bin_tokens: int | None = None,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        pad_to: int | None = None,
        prefix_lm: bool = True,
        supervise_prompts: bool = False,
        prefetch: int = 0,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            batch_tokens: most input tokens of a global batch, over all ranks.
            bin_tokens: most input tokens of a bin; None: the whole batch is one bin.
            rank, world_size: bin b goes to rank b % world_size; ranks short of one get padding.
            pad_to: pad every bin to this many tokens; None: no padding.
            prefix_lm: False makes rows causal.
            supervise_prompts: prompt tokens bear loss too; for causal rows only.
            prefetch: batches that a background thread prepares ahead; 0: none.

        Raises:
            ConfigError: sizes that do not fit each other, or no such rank.
        """
        bin_tokens = batch_tokens if bin_tokens is None else bin_tokens
        if not 1 <= bin_tokens <= batch_tokens:
            raise ConfigError(
                f"bin_tokens is {bin_tokens}, expected 1 to batch_tokens = {batch_tokens}"
            )
        if not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank}, expected 0 to world_size - 1 = {world_size - 1}")
        if pad_to is not None and pad_to < bin_tokens:
            raise ConfigError(f"pad_to is {pad_to}, expected at least bin_tokens = {bin_tokens}")
        if prefetch < 0:
            raise ConfigError(f"prefetch is {prefetch}, expected 0 or more")
        self.data = data
        self.batch_tokens, self.bin_tokens = batch_tokens, bin_tokens
        self.seed = seed
        self.rank, self.world_size = rank, world_size
        self.pad_to, self.prefix_lm, self.prefetch = pad_to, prefix_lm, prefetch
        self.supervise_prompts = supervise_prompts
        self._next = (0, 0)
        self._planned: dict[int, _Epoch] = {}
        self._counts: dict[int, int] = {}
        self._lock = threading.Lock()

    def num_batches(self, epoch: int) -> int:
        """Global batches of an epoch; plans it (about a second for three million rows)."""
        if epoch not in self._counts:
            self._counts[epoch] = self._epoch(epoch).plan.num_batches
        return self._counts[epoch]

    def state(self) -> dict[str, Any]:
        """Where the next batch is; plain values for a checkpoint."""
        epoch, batch = self._next
        return {
            "version": STATE_VERSION,
            "epoch": epoch,
            "batch": batch,
            "seed": self.seed,
            "batch_tokens": self.batch_tokens,
            "bin_tokens": self.bin_tokens,
            "fingerprint": self.data.fingerprint,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken; iterators made before are not affected.

        Raises:
            CheckpointError: the state is of other data, another seed or other batch sizes, so that
                the batches to come would not be those of the interrupted run.
        """
        own = self.state()
        for key in ("version", "fingerprint", "seed", "batch_tokens", "bin_tokens"):
            if state.get(key) != own[key]:
                raise CheckpointError(
                    f"the checkpoint's data cursor has {key} {state.get(key)!r}, this run has "
                    f"{own[key]!r}; resume with the same data and batch sizes, or start a new run"
                )
        epoch, batch = state.get("epoch"), state.get("batch")
        if not (isinstance(epoch, int) and isinstance(batch, int) and epoch >= 0 and batch >= 0):
            raise CheckpointError(f"the checkpoint's data cursor is damaged: {state}")
        self._next = (epoch, batch)

    def __iter__(self) -> Iterator[GlobalBatch]:
        """Batches from the current place on, for ever.

        The place moves on when a batch is handed out, so `state()` then names the batch after it.
        """
        produced = self._produce(*self._next)
        for batch in _ahead(produced, self.prefetch) if self.prefetch else produced:
            self._next = (batch.epoch, batch.index + 1)
            yield batch

    def _produce(self, number: int, at: int) -> Generator[GlobalBatch]:
        planner: threading.Thread | None = None
        try:
            while True:
                epoch = self._epoch(number)
                # The next epoch is planned while this one is served, so that nobody waits for it.
                plan_at = max(at, int(epoch.plan.num_batches * PLAN_NEXT_AT))
                for index in range(at, epoch.plan.num_batches):
                    if index == plan_at:
                        planner = threading.Thread(
                            target=self._plan_ahead, args=(number + 1,),
                            name="hrmtext-planner", daemon=True,
                        )  # fmt: skip
                        planner.start()
                    yield self._batch(epoch, index)
                number, at = number + 1, 0
        finally:
            if planner is not None:
                planner.join()

    def _plan_ahead(self, number: int) -> None:
        with contextlib.suppress(Exception):  # raised where the epoch is asked for
            self._epoch(number)

    def _batch(self, epoch: _Epoch, index: int) -> GlobalBatch:
        plan = epoch.plan
        rows = epoch.index.take(epoch.order[plan.batch(index)])
        filled = plan.num_filled_bins(index)
        rounds = -(-filled // self.world_size)
        bins = []
        for step in range(rounds):
            number = step * self.world_size + self.rank
            which = epoch.order[plan.bin(index, number)] if number < filled else epoch.order[:0]
            if not len(which):  # this rank still takes part in the step
                bins.append(padding_bin(self.pad_to or 1))
                continue
            members = epoch.index.take(which)
            bins.append(
                pack_rows(
                    self.data.tokens,
                    members,
                    turns_of(members.extras, self.data.turns),
                    row_ids=which,
                    num_tokens=self.pad_to,
                    prefix_lm=self.prefix_lm,
                    supervise_prompts=self.supervise_prompts,
                )
            )
            _ = bins[-1].targets, bins[-1].layout.num_seen  # found ahead of the step that asks
        return GlobalBatch(
            index=index,
            epoch=epoch.number,
            bins=bins,
            num_supervised_tokens=self._num_supervised(rows),
            num_tokens=int(rows.input_lengths().sum()),
        )

    def _num_supervised(self, rows: RowIndex) -> int:
        """Tokens that bear loss: responses, but for answers of earlier turns that are marked."""
        turns = turns_of(rows.extras, self.data.turns)
        listed = None if turns is None else turns.listed()
        if self.supervise_prompts:
            spared = 0 if listed is None else int(listed.unsupervised_tokens(rows.num_rows).sum())
            return int(rows.input_lengths().sum()) - spared
        earlier = 0 if listed is None else int(listed.supervised_tokens(rows.num_rows).sum())
        return int(rows.resp_len.sum()) + earlier

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:
            if number not in self._planned:
                index = self.data.epoch(number % self.data.num_epochs)
                generator = numpy_generator(self.seed, "order", self.data.fingerprint, number)
                if not index.num_rows:
                    raise DataError(f"epoch {number} of {self.data.folder} has no rows")
                order = generator.permutation(index.num_rows)
                if index.num_rows < 1 << 31:
                    order = order.astype(np.int32)  # held for the whole epoch
                lengths = index.input_lengths().astype(np.int32)[order]
                plan = plan_epoch(lengths, self.batch_tokens, self.bin_tokens)
                if len(self._planned) > 1:  # the epoch being served and the next one
                    del self._planned[min(self._planned)]
                self._planned[number] = _Epoch(number, index, order, plan)
            return self._planned[number]


def _ahead(source: Generator[GlobalBatch], depth: int) -> Iterator[GlobalBatch]:
    """`source`, computed up to `depth` items ahead by a thread; its errors surface here.

    The thread goes on when half of them are used: of several in a row, each takes half the time of
    one whose code and data have left the caches.
    """
    items: deque[GlobalBatch | BaseException] = deque()
    changed, is_stopped = threading.Condition(), False

    def put(item: GlobalBatch | BaseException) -> bool:
        with changed:
            items.append(item)
            changed.notify()
            if len(items) >= depth:
                changed.wait_for(lambda: is_stopped or len(items) <= depth // 2)
            return not is_stopped

    def work() -> None:
        try:
            for batch in source:
                if not put(batch):
                    return
        except BaseException as error:  # handed over, and raised in the consumer's thread
            put(error)
        finally:
            source.close()

    thread = threading.Thread(target=work, name="hrmtext-prefetch", daemon=True)
    thread.start()
    try:
        while True:
            with changed:
                changed.wait_for(lambda: items)
                item = items.popleft()
                changed.notify()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        with changed:
            is_stopped = True
            changed.notify()
        thread.join()
