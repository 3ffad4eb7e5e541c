"""What training asks of data, as protocols, and the prepared data folder that answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from hrmtext.batch import PackedBatch
from hrmtext.config.train import TrainConfig


class StepBatch(Protocol):
    """One optimizer step's data: `hrmtext.data.loader.GlobalBatch`."""

    @property
    def index(self) -> int:
        """Global batch of its epoch."""
        ...

    @property
    def epoch(self) -> int:
        """Epoch, from 0."""
        ...

    @property
    def bins(self) -> Sequence[PackedBatch]:
        """This rank's microbatches, on the CPU; may be empty."""
        ...

    @property
    def num_supervised_tokens(self) -> int:
        """Of all ranks."""
        ...

    @property
    def num_tokens(self) -> int:
        """Of all ranks."""
        ...


class BatchLoader(Protocol):
    """Endless steps in an order that does not depend on the number of ranks."""

    def __iter__(self) -> Iterator[StepBatch]:
        """Steps from the cursor on."""
        ...

    def state(self) -> dict[str, Any]:
        """The cursor after the last step that was taken; plain values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a cursor; DataError where it is of other data."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class ValidationBatch:
    """Held-out rows in one packed batch, with the names they are reported under."""

    batch: PackedBatch
    conditions: tuple[str, ...]
    """(R) condition of each row; empty string: none."""
    strata: tuple[str, ...]
    """(R) stratum or family of each row."""


class DataSource(Protocol):
    """Rows for training and validation."""

    @property
    def fingerprint(self) -> str:
        """Changes when any row or their number changes."""
        ...

    @property
    def vocab_size(self) -> int:
        """Tokens are below this."""
        ...

    @property
    def max_seq_len(self) -> int:
        """No row has more input tokens."""
        ...

    @property
    def tokenizer_folder(self) -> Path | None:
        """Copied into every checkpoint."""
        ...

    def num_steps(self, config: TrainConfig) -> int:
        """Global batches in `config.epochs` epochs."""
        ...

    def loader(self, config: TrainConfig, rank: int, world_size: int) -> BatchLoader:
        """A loader at the start of the data."""
        ...

    def validation(self, config: TrainConfig) -> list[ValidationBatch]:
        """At most `validation_rows` held-out rows, always the same; empty where there are none."""
        ...
