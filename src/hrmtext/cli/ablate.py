"""hrm-text ablate"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro


def ablate(
    config: Annotated[Path, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    data: Path | None = None,
    out: Path | None = None,
    device: str = "auto",
    dry_run: bool = False,
) -> int:
    """Compare variants of a recipe at equal cost, with several seeds: a table with intervals.

    Every variant is trained once a seed and asked the held-out rows. Interrupted, the same command
    goes on; table.md and table.json are renewed after every round of seeds.

    Args:
        config: a comparison, for example configs/ablate/architecture.yaml.
        overrides: changes to it as key=value: seeds=[0,1] train.max_steps=500 ...
        data: folder made by `hrm-text data prepare`; needed but for a dry run.
        out: folder of the runs and the table; needed but for a dry run.
        device: auto, cpu, cuda or cuda:N.
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
        for run in work.plan(settings, out or Path("OUT")):
            console.print(
                f"{run.variant}, seed {run.seed}: {run.parameters:,} parameters, "
                f"{run.recipe.max_steps:,} steps, {run.flops:.3g} FLOPs"
            )
        return 0
    if data is None or out is None:
        raise ConfigError("a comparison needs --data FOLDER and --out FOLDER")
    work.ablate(settings, data, out, device=device, tell=console.print)
    console.print(Markdown((out / work.TABLE_FILE).read_text(encoding="utf-8")))
    console.print(f"written: {out / work.TABLE_FILE}, {out / work.JSON_FILE}")
    return 0
