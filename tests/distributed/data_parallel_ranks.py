"""What a rank of the tests of data parallelism does."""

import json
import os
import signal
from pathlib import Path

from memory_source import MemorySource, random_rows, small_config


class Recording(MemorySource):
    """Keeps the loader that was made, which knows what it served."""

    def loader(self, config, rank, world_size):
        self.rank = rank
        self.made = super().loader(config, rank, world_size)
        return self.made


def train_and_record(run, stop_at=0):
    """A run; the rows that this rank read are left beside it. Rank 1 is stopped at a step."""
    from hrmtext.train import step, train_on

    # 7 rows a step in bins of 2: four bins, the last one short; 15 rows: a last step of one bin,
    # of which the second rank gets nothing.
    rows, heldout = random_rows(15), random_rows(12, seed=5)
    source = Recording(rows, rows_per_step=7, rows_per_bin=2, heldout=heldout)
    original = step.TrainStep.run

    def run_step(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if kwargs["step"] + 1 == stop_at and source.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return result

    step.TrainStep.run = run_step
    result = train_on(small_config(epochs=4), source, run_folder=run, progress="none")
    record = {"served": source.made.served, "step": result.step}
    Path(f"{run}-rows-{source.rank}.json").write_text(json.dumps(record))


def train_adapters(run, base):
    """A run of adapters on the model at `base`."""
    from hrmtext.train import train_on

    source = MemorySource(random_rows(15), rows_per_step=7, rows_per_bin=2)
    config = small_config(init_from=base, lora={"rank": 2}, bp_first=5, validate_every=0)
    train_on(config, source, run_folder=run, progress="none")
