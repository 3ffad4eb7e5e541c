"""hrm-text train"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def train(
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = (),
    /,
    *,
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    run: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    resume: Literal["auto", "never", "must"] = "auto",
    device: str = "auto",
    dry_run: bool = False,
    measure: bool = False,
    gpus: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    gpu: Annotated[str, tyro.conf.arg(metavar="NAME")] = "H100",
    epoch_tokens: Annotated[float | None, tyro.conf.arg(metavar="N")] = None,
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
        gpus: with --dry-run, show memory and time on so many GPUs, which need not be here.
        gpu: their kind: H200, H100, H100 PCIe, A100, L40S or RTX 4090.
        epoch_tokens: with --dry-run, tokens of one epoch where there is no data yet (15e9: as
            many as the published run's).
    """
    from hrmtext.errors import ConfigError
    from hrmtext.train.start import load_config

    settings = load_config(config, overrides)
    if dry_run:
        from hrmtext.runtime.device import pick_device
        from hrmtext.train.estimate import Fleet, estimate
        from hrmtext.train.source import FolderSource

        source = FolderSource(data) if data is not None else None
        found = estimate(
            settings,
            source=source,
            device=pick_device(device),
            fleet=None if gpus is None else Fleet(count=gpus, gpu=gpu),
            epoch_tokens=epoch_tokens,
            measure=measure,
        )
        print(found.text())
        return 0
    only_dry = {"--measure": measure, "--gpus": gpus, "--epoch-tokens": epoch_tokens}
    asked = [name for name, value in only_dry.items() if value]
    if asked:
        raise ConfigError(f"{', '.join(asked)} belongs to --dry-run, which is not given")
    missing = [
        name for name, value in (("--data FOLDER", data), ("--run FOLDER", run)) if value is None
    ]
    if data is None or run is None:
        raise ConfigError(
            f"training needs {' and '.join(missing)}: the data is made by `hrm-text data prepare`, "
            "the run folder by the run; --dry-run needs neither"
        )
    from hrmtext.train.loop import train as run_training

    result = run_training(settings, data_folder=data, run_folder=run, resume=resume, device=device)
    print(f"checkpoint: {result.checkpoint}")
    print(f"report:     {result.run_folder / 'report.html'}")
    print(f"next:       hrm-text eval {run} --data {data}")
    return 0
