"""The runs of a comparison: trained and asked, one after the other or several at a time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hrmtext.ablate.plan import PlannedRun, plan
from hrmtext.ablate.table import Row, read_json, tabulate, write
from hrmtext.artifacts.layout import RunFolder
from hrmtext.config.ablate import AblationConfig
from hrmtext.config.base import build, to_mapping
from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.heldout import read_held_out
from hrmtext.data.workers import WorkerPool
from hrmtext.errors import CheckpointError, ConfigError, DataError
from hrmtext.evaluate.report import EVALUATION_FILE
from hrmtext.evaluate.run import evaluate
from hrmtext.evaluate.score import majority_answers
from hrmtext.generate.load import load
from hrmtext.train.loop import train
from hrmtext.train.progress import format_time

WORKER = "hrmtext.ablate.worker"


def ablate(
    config: AblationConfig,
    data_folder: str | Path,
    out: str | Path,
    *,
    device: str | None = None,
    workers: int = 1,
    threads: int | None = None,
    progress: str = "auto",
    tell: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Train and evaluate every run that is not done yet; write table.md and table.json.

    The same call goes on where an interrupted one stopped. The table is written anew whenever
    another round of seeds is complete.

    Args:
        data_folder: what `hrm-text data prepare` made; its held-out rows are the test.
        out: folder of the runs and the table.
        workers: runs at a time, a process each where there are several. A run's result does not
            depend on it at equal `threads`.
        threads: CPU threads of a run; None: the cores shared out over the workers.
        progress: of a run in this process: auto, bar, lines or none.
        tell: called with a line before and after a run.

    Raises:
        CheckpointError: `out` holds runs of another comparison. DataError: no held-out rows, or a
            worker died.
    """
    if workers < 1 or (threads is not None and threads < 1):
        raise ConfigError(f"workers is {workers} and threads {threads}, expected at least 1")
    data_folder, out = Path(data_folder), Path(out)
    if not read_held_out(data_folder / "heldout"):
        raise DataError(f"{data_folder} has no held-out rows to compare the variants on")
    runs = plan(config, out)
    finished = [_is_done(run) for run in runs]
    for run, done in zip(runs, finished, strict=True):
        if done:
            _require_same_recipe(run)
    if any(finished):
        tell(f"{sum(finished)} of {len(runs)} runs are done already")
    table = _table_so_far(config, runs, finished, out)
    todo = [index for index, done in enumerate(finished) if not done]
    clock = _Clock(sum(runs[index].flops for index in todo))

    def is_done(place: int) -> None:
        nonlocal table
        run = runs[todo[place]]
        finished[todo[place]] = True
        _require_same_recipe(run)
        left = clock.left_s(run.flops)
        tell(
            f"run {sum(finished)} of {len(runs)} done: {run.variant}, seed {run.seed}, "
            f"exact match {100 * _score(run):.1f} %" + (f", {format_time(left)} left" * (left > 0))
        )
        table = _table_so_far(config, runs, finished, out)

    requests = [
        {
            "what": f"{runs[index].variant}, seed {runs[index].seed}",
            "recipe": to_mapping(runs[index].recipe),
            "evaluate": to_mapping(config.evaluate),
            "data": str(data_folder),
            "run": str(runs[index].folder),
            "device": device,
            "threads": threads,
        }
        for index in todo
    ]
    if workers == 1:
        for place, request in enumerate(requests):
            tell(f"training {request['what']}, {request['recipe']['max_steps']:,} steps")
            do_run(request, progress)
            is_done(place)
        return table
    share = threads or max(1, (os.cpu_count() or 1) // workers)
    tell(f"{len(todo)} runs, {workers} at a time, {share} threads each")
    with WorkerPool(WORKER, workers) as pool:
        pool.ask([{**request, "threads": share} for request in requests], is_done)
    return table


def do_run(request: dict[str, Any], progress: str = "none") -> None:
    """Train and evaluate one run, described by plain values; what is done of it is kept."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(request["threads"] or before)
    try:
        data = Path(request["data"])
        result = train(
            build(TrainConfig, request["recipe"], where=request["what"]),
            data_folder=data,
            run_folder=request["run"],
            device=request["device"],
            progress=progress,
        )
        report = evaluate(
            load(result.checkpoint, device=request["device"], dtype="fp32"),
            read_held_out(data / "heldout"),
            build(EvaluateConfig, request["evaluate"], where=request["what"]),
            train_majority=majority_answers(data / "clean"),
        )
        report.write(request["run"])
    finally:
        torch.set_num_threads(before)


class _Clock:
    """Time left, from the operations done in this session and those to do."""

    def __init__(self, flops: float) -> None:
        self.began = time.monotonic()
        self.total, self.done = flops, 0.0

    def left_s(self, flops: float) -> float:
        """Seconds left after another `flops` operations are done."""
        self.done += flops
        return (time.monotonic() - self.began) * max(0.0, self.total / self.done - 1)


def _is_done(run: PlannedRun) -> bool:
    return (run.folder / EVALUATION_FILE).is_file()


def _score(run: PlannedRun) -> float:
    return float(read_json(run.folder / EVALUATION_FILE)["mean"]["exact_match"])


def _table_so_far(
    config: AblationConfig, runs: list[PlannedRun], finished: list[bool], out: Path
) -> list[Row]:
    """The table over the seeds whose runs are all done, written; empty where there is none."""
    width = len(config.variants)
    rounds = [
        runs[start : start + width]
        for start in range(0, len(runs), width)
        if all(finished[start : start + width])
    ]
    if not rounds:
        return []
    table = tabulate([run for members in rounds for run in members])
    write(config, table, out)
    return table


def _require_same_recipe(run: PlannedRun) -> None:
    """A finished run may be left from another comparison in the same folder."""
    checkpoint = RunFolder(run.folder).latest()
    found = read_json(checkpoint / "training.json")
    steps, seed = found.get("total_steps"), found.get("config", {}).get("seed")
    if (steps, seed) != (run.recipe.max_steps, run.seed):
        raise CheckpointError(
            f"{run.folder} is a run of {steps} steps with seed {seed}, this comparison plans "
            f"{run.recipe.max_steps} with seed {run.seed}; name another output folder"
        )
