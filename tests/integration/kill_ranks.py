"""Ranks of a run as real processes that can be killed.

What a fault does is done by the rank to itself, at a place that can't be hit from outside for sure:
before the n-th operation of the storage (fsync, rename, removal), or with a file half written.
"""

import dataclasses
import os
import resource
import signal
from pathlib import Path

import processes

STORED, INTERRUPTED, LOST, REFUSED = 11, 12, 13, 14
"""Exit status of a rank: StorageError, TrainingInterrupted, RankError, another of our errors."""


@dataclasses.dataclass(frozen=True)
class Fault:
    """What goes wrong in rank 0, by itself."""

    kind: str = "none"
    """none; storage: SIGKILL before operation `at`; half: SIGKILL with half a tensor file, the
    `at`-th; limit: no file may grow beyond `at` bytes; nan: the gradient of step `at`."""
    at: int = 0


NO_FAULT = Fault()


def start_ranks(num_ranks, run, config, data, log, fault=NO_FAULT):
    """Start the ranks of a run; their stderr goes to `log`.0, `log`.1, ..."""
    place = (str(run), config, str(data), fault)
    return processes.start_ranks(num_ranks, run_rank, *place, log=log)


def run_rank(run, config, data, fault):
    """The life of one rank; its exit status says how it ended."""
    from hrmtext.errors import HrmTextError, RankError, StorageError, TrainingInterrupted
    from hrmtext.train import train

    if os.environ["RANK"] == "0":
        plant(fault)
    kinds = {StorageError: STORED, TrainingInterrupted: INTERRUPTED, RankError: LOST}
    try:
        train(config, data_folder=data, run_folder=run, device="cpu", progress="none")
    except HrmTextError as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(kinds.get(type(error), REFUSED))


def plant(fault):
    """Let the fault happen when its time comes."""
    if fault.kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.at, resource.RLIM_INFINITY))
    elif fault.kind == "storage":
        import shutil

        counter = iter(range(1, 1_000_000))

        def counted(original):
            def call(*args, **kwargs):
                if next(counter) == fault.at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return original(*args, **kwargs)

            return call

        os.fsync = counted(os.fsync)
        Path.replace = counted(Path.replace)
        shutil.rmtree = counted(shutil.rmtree)
    elif fault.kind == "half":
        from hrmtext.artifacts import weights
        from hrmtext.train import checkpoint

        original, calls = weights.write_tensors, iter(range(1, 1_000_000))

        def write(path, tensors):
            original(path, tensors)
            if next(calls) == fault.at:
                with path.open("r+b") as stream:
                    stream.truncate(path.stat().st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        weights.write_tensors = checkpoint.write_tensors = write
    elif fault.kind == "nan":
        from hrmtext.train.step import TrainStep

        accumulate, steps = TrainStep.accumulate, iter(range(1, 1_000_000))

        def poisoned(self, *args):
            sums = accumulate(self, *args)
            if next(steps) == fault.at:
                self.compute.master.lm_head.weight.grad[0, 0] = float("nan")
            return sums

        TrainStep.accumulate = poisoned
