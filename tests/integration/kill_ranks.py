"""Ranks of a run as real processes that can be killed, forked from a server that has torch loaded.

What a fault does is done by the rank to itself, at a place that can't be hit from outside for sure:
before the n-th operation of the storage (fsync, rename, removal), or with a file half written.
"""

import dataclasses
import multiprocessing
import os
import resource
import signal
import socket
from pathlib import Path

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
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["hrmtext.train"])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = []
    for rank in range(num_ranks):
        group = {
            "WORLD_SIZE": num_ranks, "RANK": rank, "LOCAL_RANK": rank,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        }  # fmt: skip
        place = (str(run), config, str(data), f"{log}.{rank}")
        own = fault if rank == 0 else NO_FAULT
        ranks.append(context.Process(target=run_rank, args=(group, *place, own), daemon=True))
    for process in ranks:
        process.start()
    return ranks


def run_rank(group, run, config, data, log, fault):
    """The life of one rank; its exit status says how it ended."""
    import torch

    from hrmtext.errors import HrmTextError, RankError, StorageError, TrainingInterrupted
    from hrmtext.train import train

    os.environ.update({name: str(value) for name, value in group.items()})
    with Path(log).open("w") as stream:
        os.dup2(stream.fileno(), 2)
    torch.set_num_threads(1)
    plant(fault)
    kinds = {StorageError: STORED, TrainingInterrupted: INTERRUPTED, RankError: LOST}
    status = 0
    try:
        train(config, data_folder=data, run_folder=run, device="cpu", progress="none")
    except HrmTextError as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        status = kinds.get(type(error), REFUSED)
    os._exit(status)


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
