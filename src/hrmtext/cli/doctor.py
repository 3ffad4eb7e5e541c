"""hrm-text doctor"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

if TYPE_CHECKING:
    from hrmtext.doctor import Finding


def doctor(
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    data: Path | None = None,
    run: Path | None = None,
    recipe: Path | None = None,
    device: str = "auto",
    as_json: Annotated[bool, tyro.conf.arg(name="json")] = False,
) -> int:
    """Check this machine, and what a run needs, before it starts; every check is a real probe.

    Packages, devices, memory, number formats, attention backends against the reference, compiler,
    disk; under torchrun the exchange between ranks. Exit status 1 where there is a problem.

    Args:
        overrides: changes to the recipe as key=value.
        data: prepared data folder: is it whole?
        run: run folder, present or planned: room, speed, checkpoints, would it go on?
        recipe: a training recipe that memory, disk and data are held against.
        device: auto, cpu, cuda or cuda:N.
        as_json: print the findings as JSON.
    """
    from hrmtext.doctor import examine
    from hrmtext.errors import ConfigError
    from hrmtext.runtime import dist
    from hrmtext.runtime.device import pick_device
    from hrmtext.train.parallel import process_group
    from hrmtext.train.start import load_config

    if overrides and recipe is None:
        raise ConfigError(f"{overrides[0]!r} changes a recipe, and none is given: --recipe FILE")
    settings = load_config(recipe, overrides) if recipe is not None else None
    with process_group(pick_device(device), timeout_s=120) as own_device:
        findings = examine(own_device, data=data, run=run, recipe=settings)
        rank = dist.rank()
    if rank:  # rank 0 prints the table; of the others only what is wrong with them
        for finding in findings:
            if finding.status == "problem":
                where = f"rank {rank}: {finding.area}, {finding.what}"
                print(f"problem: {where}: {finding.found}; {finding.advice}", file=sys.stderr)
    else:
        if as_json:
            print(json.dumps([dataclasses.asdict(finding) for finding in findings], indent=2))
        else:
            show(findings)
    return 1 if any(finding.status == "problem" for finding in findings) else 0


def show(findings: list[Finding]) -> None:
    """The table, and what to do below it."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table("area", "check", "", "found", show_lines=False)
    colours = {"ok": "green", "warning": "yellow", "problem": "red"}
    area = ""
    for finding in findings:
        status = Text(finding.status, style=colours[finding.status])
        shown = finding.area if finding.area != area else ""
        table.add_row(shown, finding.what, status, Text(finding.found))
        area = finding.area
    console.print(table)
    for finding in findings:
        if finding.status != "ok":
            line = f"{finding.status}: {finding.area}, {finding.what}: {finding.advice}"
            console.print(Text(line, style=colours[finding.status]))
    counts = {name: sum(f.status == name for f in findings) for name in colours}
    console.print(", ".join(f"{count} {name}" for name, count in counts.items()))
