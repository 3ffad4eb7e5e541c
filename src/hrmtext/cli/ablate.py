"""hrm-text ablate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def ablate(
    config: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="CONFIG")],
    overrides: Annotated[
        tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="KEY=VALUE ...")
    ] = (),
    /,
    *,
    data: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    out: Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")] = None,
    device: str = "auto",
    workers: int = 1,
    threads: Annotated[int | None, tyro.conf.arg(metavar="N")] = None,
    dry_run: bool = False,
) -> int:
    """Compare variants of a recipe at equal cost, with several seeds: a table with intervals.

    Every variant is trained once a seed and asked the held-out rows. Interrupted, the same command
    goes on; table.md and table.json are renewed after every round of seeds. The table shows means
    and differences from the first variant, seed by seed, with 95 % intervals.

    Args:
        config: a comparison, for example configs/train/ablate/paper.yaml.
        overrides: changes to it as key=value: seeds=[0,1] train.max_steps=500 ...
        data: folder made by `hrm-text data prepare`; needed but for a dry run.
        out: folder of the runs and the table; needed but for a dry run.
        device: auto, cpu, cuda or cuda:N.
        workers: runs at a time; a run's result does not depend on it at equal threads.
        threads: CPU threads of a run; the default shares the cores out over the workers.
        dry_run: show the runs, their parameters, steps and operations, then stop.
    """
    from rich.console import Console
    from rich.markdown import Markdown

    from hrmtext import ablate as work
    from hrmtext.config.ablate import AblationConfig
    from hrmtext.config.base import load
    from hrmtext.errors import ConfigError

    settings = load(AblationConfig, config, overrides)
    console = Console(highlight=False)
    if dry_run:
        runs = work.plan(settings, out or Path("OUT"))
        for run in runs:
            console.print(
                f"{run.variant}, seed {run.seed}: {run.parameters:,} parameters, "
                f"{run.recipe.max_steps:,} steps, {run.flops:.3g} FLOPs"
            )
        console.print(f"{len(runs)} runs, {sum(run.flops for run in runs):.3g} FLOPs in all")
        return 0
    if data is None or out is None:
        raise ConfigError("a comparison needs --data FOLDER and --out FOLDER, or --dry-run")
    work.ablate(
        settings, data, out, device=device, workers=workers, threads=threads, tell=console.print
    )
    console.print(Markdown((out / work.TABLE_FILE).read_text(encoding="utf-8")))
    console.print(f"written: {out / work.TABLE_FILE}, {out / work.JSON_FILE}")
    return 0
