"""hrm-text train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def train(
    config: Annotated[Path, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    data: Path | None = None,
    run: Path | None = None,
    resume: Literal["auto", "never", "must"] = "auto",
    device: str = "auto",
    dry_run: bool = False,
    measure: bool = False,
) -> int:
    """Pretrain or fine-tune a model on a prepared data folder.

    Writes checkpoints, metrics.jsonl, TensorBoard files and report.html into the run folder. Run
    the same command again after Ctrl-C, a kill or a crash: it goes on exactly where it was.

    Args:
        config: a YAML recipe, for example configs/train/cpu_smoke.yaml.
        overrides: changes to the recipe as key=value, for example lr=1e-3 model.preset=L.
        data: folder made by `hrm-text data prepare`; needed but for a dry run.
        run: run folder; made if absent, never overwritten; needed but for a dry run.
        resume: continue the run that is there, refuse to (never), or insist on it (must).
        device: auto, cpu, cuda or cuda:N.
        dry_run: print config, parameters, FLOPs, memory and expected time, then stop.
        measure: with --dry-run, time a few real steps on this machine.
    """
    from hrmtext.errors import ConfigError
    from hrmtext.train.start import load_config

    settings = load_config(config, overrides)
    if dry_run:
        from hrmtext.runtime.device import pick_device
        from hrmtext.train.estimate import estimate
        from hrmtext.train.source import FolderSource

        source = FolderSource(data) if data is not None else None
        where = pick_device(device)
        print(estimate(settings, source=source, device=where, measure=measure).text())
        return 0
    if data is None or run is None:
        raise ConfigError("training needs --data FOLDER and --run FOLDER")
    from hrmtext.train.loop import train as run_training

    result = run_training(settings, data_folder=data, run_folder=run, resume=resume, device=device)
    print(f"checkpoint: {result.checkpoint}")
    print(f"report:     {result.run_folder / 'report.html'}")
    print(f"next:       hrm-text eval {run} --data {data}")
    return 0
