"""A data source over random rows in memory, with the interface of the prepared data folder."""

from __future__ import annotations

from pathlib import Path

from hrmtext.batch import PackedBatch
from hrmtext.data.heldout import ValidationBatch
from hrmtext.data.loader import GlobalBatch
from hrmtext.errors import DataError
from hrmtext.runtime.io import fingerprint
from hrmtext.runtime.rng import numpy_generator


def random_rows(count, seed=0, vocab_size=64, longest=12):
    """(prompt, response) pairs; the response repeats the prompt's first tokens."""
    generator = numpy_generator(seed, "rows")
    rows = []
    for _ in range(count):
        prompt = generator.integers(1, vocab_size, generator.integers(3, longest)).tolist()
        rows.append((prompt, [*prompt[: generator.integers(1, 4)], 0]))
    return rows


class MemorySource:
    """Rows in memory; a step takes `rows_per_step` of them in bins of `rows_per_bin`."""

    max_seq_len = 16
    tokenizer_folder: Path | None = None

    def __init__(self, rows, *, rows_per_step=8, rows_per_bin=4, vocab_size=64, heldout=()):
        self.rows = rows
        self.rows_per_step = rows_per_step
        self.rows_per_bin = rows_per_bin
        self.vocab_size = vocab_size
        self.heldout = list(heldout)

    @property
    def fingerprint(self):
        return fingerprint(self.rows, self.rows_per_step)

    @property
    def steps_per_epoch(self):
        return -(-len(self.rows) // self.rows_per_step)

    def num_steps(self, config):
        return config.epochs * self.steps_per_epoch

    def loader(self, config, rank, world_size):
        return MemoryLoader(self, config.seed, rank, world_size)

    def validation(self, config):
        rows = self.heldout[: config.validation_rows]
        batches = []
        for start in range(0, len(rows), 5):
            part = rows[start : start + 5]
            batches.append(
                ValidationBatch(
                    batch=PackedBatch.from_rows(part),
                    conditions=tuple("cot" if len(p) % 2 else "direct" for p, _ in part),
                    strata=tuple(f"length{len(r)}" for _, r in part),
                )
            )
        return batches


class MemoryLoader:
    def __init__(self, source, seed, rank, world_size):
        self.source, self.seed, self.rank, self.world_size = source, seed, rank, world_size
        self.epoch = self.index = 0
        self.served = []

    def __iter__(self):
        source = self.source
        while True:
            generator = numpy_generator(self.seed, "epoch", self.epoch)
            order = generator.permutation(len(source.rows))
            start = self.index * source.rows_per_step
            ids = order[start : start + source.rows_per_step].tolist()
            rows = [source.rows[i] for i in ids]
            size = source.rows_per_bin
            bins = [ids[at : at + size] for at in range(0, len(ids), size)]
            own = bins[self.rank :: self.world_size]
            self.served += [row for one in own for row in one]
            batch = GlobalBatch(
                index=self.index,
                epoch=self.epoch,
                bins=[
                    PackedBatch.from_rows([source.rows[i] for i in one], row_ids=one) for one in own
                ],
                num_supervised_tokens=sum(len(response) for _, response in rows),
                num_tokens=sum(len(prompt) + len(response) - 1 for prompt, response in rows),
            )
            self.index += 1
            if self.index == source.steps_per_epoch:
                self.epoch, self.index = self.epoch + 1, 0
            yield batch

    def state(self):
        return {"epoch": self.epoch, "index": self.index, "fingerprint": self.source.fingerprint}

    def restore(self, state):
        if state["fingerprint"] != self.source.fingerprint:
            raise DataError("other data")
        self.epoch, self.index = state["epoch"], state["index"]


def small_config(**changes):
    """A TrainConfig for the `test` preset; everything fast and short."""
    from hrmtext.config.base import build
    from hrmtext.config.train import TrainConfig

    values = {
        "model": {"preset": "test"},
        "epochs": 2,
        "batch_tokens": 256,
        "lr": 3e-3,
        "warmup_steps": 2,
        "ema_decay": 0.9,
        "precision": "fp32",
        "compile": False,
        "checkpoint_every": 5,
        "validate_every": 5,
        "log_every": 2,
        "tensorboard": False,
        **changes,
    }
    return build(TrainConfig, values, where="test")
