"""A run that ends itself at a chosen moment, for a process of its own."""

import os
import signal
import sys

from memory_source import MemorySource, random_rows, small_config


def make_source():
    return MemorySource(random_rows(60), heldout=random_rows(20, seed=5))


def train_until(how, at, folder):
    """Train until step `at` gets the signal `how`, or (`write`) is half through the `at`-th file.

    Status 3: an error of ours ended the run.
    """
    from hrmtext.errors import HrmTextError
    from hrmtext.train import checkpoint, step, train_on

    calls = iter(range(1, 1_000_000))
    run_step, write_tensors = step.TrainStep.run, checkpoint.write_tensors

    def run(self, *args, **kwargs):
        result = run_step(self, *args, **kwargs)
        if next(calls) == at:
            os.kill(os.getpid(), getattr(signal, how))
        return result

    def write(path, tensors):
        # Half of the optimizer's file of a checkpoint, then the power is gone.
        write_tensors(path, tensors)
        if next(calls) == at:
            with path.open("r+b") as stream:
                stream.truncate(path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    if how == "write":
        checkpoint.write_tensors = write
    else:
        step.TrainStep.run = run
    try:
        train_on(small_config(), make_source(), run_folder=folder, progress="none")
    except HrmTextError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(3)
