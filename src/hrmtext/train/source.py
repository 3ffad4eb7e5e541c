"""Where training gets its rows: a protocol, and the prepared data folder that answers it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from hrmtext.config.train import TrainConfig
from hrmtext.data.format import SampledData
from hrmtext.data.heldout import TokenRow, ValidationBatch, read_held_out, validation_batches
from hrmtext.data.loader import GlobalBatch, Loader
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import ConfigError, DataError
from hrmtext.runtime.log import logger

PREFETCH_BATCHES = 8


class BatchLoader(Protocol):
    """Endless steps in an order that does not depend on the number of ranks."""

    def __iter__(self) -> Iterator[GlobalBatch]:
        """Steps from the cursor on."""
        ...

    def state(self) -> dict[str, Any]:
        """The cursor after the last step that was taken; plain values."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at a cursor; an error where it is of other data."""
        ...


class DataSource(Protocol):
    """Rows for training and validation."""

    @property
    def fingerprint(self) -> str:
        """Changes when any training row or their number changes."""
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


class FolderSource:
    """A prepared data folder: `sampled/` and `tokenizer/`, and `heldout/` where rows were held out.

    A sampled folder alone (with metadata.json at its top) will do too; it has no validation.
    """

    def __init__(self, folder: str | Path) -> None:
        """Open and check the sampled rows.

        Raises:
            DataError: neither a prepared nor a sampled folder, or damaged files.
        """
        self.folder = Path(folder)
        if (self.folder / "sampled").is_dir():
            self.data = SampledData.open(self.folder / "sampled")
        elif (self.folder / "metadata.json").is_file():
            self.data = SampledData.open(self.folder)
        else:
            raise DataError(
                f"{self.folder} is not a prepared data folder: it has no `sampled` inside. Make "
                "one with `hrm-text data prepare`"
            )
        self._validation: list[ValidationBatch] | None = None

    @property
    def fingerprint(self) -> str:
        """That of the sampled rows."""
        return self.data.fingerprint

    @property
    def vocab_size(self) -> int:
        """The tokenizer's, unpadded."""
        return int(self.data.info["vocab_size"])

    @property
    def max_seq_len(self) -> int:
        """Input tokens of the longest row that the sampling allowed."""
        return self.data.max_seq_len

    @property
    def tokenizer_folder(self) -> Path | None:
        """`tokenizer/`, where the folder has one."""
        folder = self.folder / "tokenizer"
        return folder if (folder / "tokenizer.json").is_file() else None

    def num_steps(self, config: TrainConfig) -> int:
        """Global batches in `config.epochs` epochs; plans each of them."""
        loader = self._loader(config, 0, 1)
        return sum(loader.num_batches(epoch) for epoch in range(config.epochs))

    def loader(self, config: TrainConfig, rank: int, world_size: int) -> Loader:
        """Packed batches of this rank, prepared ahead by a thread."""
        return self._loader(config, rank, world_size)

    def validation(self, config: TrainConfig) -> list[ValidationBatch]:
        """Held-out rows, spread over the strata; a warning counts those beyond the context."""
        if self._validation is None:
            self._validation = self._read_validation(config) if config.validation_rows else []
        return self._validation

    def _loader(self, config: TrainConfig, rank: int, world_size: int) -> Loader:
        return Loader(
            self.data,
            batch_tokens=config.batch_tokens,
            bin_tokens=config.bin_tokens,
            seed=config.seed,
            rank=rank,
            world_size=world_size,
            pad_to=config.bin_size if config.pad_bins else None,
            prefix_lm=config.model.prefix_lm,
            supervise_prompts=config.objective == "all",
            prefetch=PREFETCH_BATCHES,
        )

    def _read_validation(self, config: TrainConfig) -> list[ValidationBatch]:
        folder = self.folder / "heldout"
        if self.tokenizer_folder is None or not any(folder.glob("*.jsonl")):
            logger.warning("%s holds no held-out rows: training without validation", self.folder)
            return []
        tokenizer = PromptTokenizer.load(self.tokenizer_folder)
        rows = _spread(read_held_out(folder), config.validation_rows)
        packed: list[TokenRow] = []
        for row in rows:
            prompt, blocks = tokenizer.encode_question(row.history, row.instruction, row.condition)
            response = tokenizer.encode_response(row.response)
            if len(prompt) + len(response) - 1 <= config.model.max_seq_len:
                packed.append(
                    TokenRow(
                        prompt=prompt,
                        response=response,
                        condition=row.condition,
                        stratum=row.stratum,
                        blocks=tuple(blocks),
                    )
                )
        if len(packed) < len(rows):
            logger.warning(
                "validation leaves out %d of %d held-out rows that are longer than %d tokens",
                len(rows) - len(packed), len(rows), config.model.max_seq_len,
            )  # fmt: skip
        if not packed:
            return []
        return validation_batches(
            packed,
            config.bin_size,
            pad_to=config.bin_size if config.pad_bins else None,
            prefix_lm=config.model.prefix_lm,
        )


def check_data(config: TrainConfig, source: DataSource) -> None:
    """Refuse data that the model cannot hold."""
    model = config.model
    if source.vocab_size > model.vocab_size:
        raise ConfigError(
            f"the data's tokenizer has {source.vocab_size} tokens, but model.vocab_size is "
            f"{model.vocab_size}; set it to at least that"
        )
    if source.max_seq_len > model.max_seq_len:
        raise ConfigError(
            f"the data has rows of up to {source.max_seq_len} tokens, but model.max_seq_len is "
            f"{model.max_seq_len}; raise it, or sample the data with a shorter context"
        )
    if source.max_seq_len > config.bin_size:
        raise ConfigError(
            f"the data has rows of up to {source.max_seq_len} tokens, but a bin holds "
            f"{config.bin_size}; raise bin_tokens (or batch_tokens)"
        )


def _spread(rows: list[Any], limit: int) -> list[Any]:
    """At most `limit` rows, taken in turn from every stratum, in the order of the file."""
    places: dict[str, int] = {}
    ranked = []
    for index, row in enumerate(rows):
        turn = places[row.stratum] = places.get(row.stratum, -1) + 1
        ranked.append((turn, index))
    return [rows[index] for _, index in sorted(sorted(ranked)[:limit], key=lambda pair: pair[1])]
