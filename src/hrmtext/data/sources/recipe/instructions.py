"""The large collections of tasks as instructions: FLAN and tasksource."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from hrmtext.data.example import Example
from hrmtext.data.sources.source import Origin, Outcome, Part, Row, Source, stratum_name

FLAN_FOLDERS = (
    *(f"{kind}_{shots}opt_data" for kind in ("cot", "dialog", "niv2") for shots in ("fs", "zs")),
    *(
        f"{kind}_{shots}{options}_data"
        for kind in ("flan", "t0")
        for shots in ("fs", "zs")
        for options in ("opt", "noopt")
    ),
)
TASKS_FILE = Path(__file__).with_name("tasksource_tasks.txt")


def flan_rule(row: Row, origin: Origin) -> Outcome:
    """Inputs -> targets; rows of the sub-folders `cot_*` cot, others direct."""
    condition = "cot" if origin.part.startswith("cot_") else "direct"
    yield Example(condition, row["inputs"], row["targets"])


def flan_stratum(row: Row, origin: Origin) -> str:
    """One stratum a sub-folder and task."""
    return stratum_name("flan", origin.part, row["_task_name"])


@lru_cache
def tasksource_tasks() -> frozenset[str]:
    """The tasks of tasksource that the recipe uses."""
    return frozenset(TASKS_FILE.read_text(encoding="utf-8").split())


def tasksource_rule(row: Row, origin: Origin) -> Outcome:
    """Inputs -> targets without a final ".", direct; only the tasks of the list."""
    if row["task"] in tasksource_tasks():
        yield Example("direct", row["inputs"], row["targets"].removesuffix("."))
    else:
        yield "task not in the list"


def tasksource_stratum(row: Row, origin: Origin) -> str:
    """One stratum a task."""
    return stratum_name("tasksource", row["task"])


FLAN = Source(
    name="flan",
    rule=flan_rule,
    columns={"inputs": str, "targets": str, "_task_name": str},
    parts=tuple(Part(name=folder, files=(f"{folder}/*.parquet",)) for folder in FLAN_FOLDERS),
    hub="Open-Orca/FLAN",
    by_file=True,
    conditions=("cot", "direct"),
    licence="CC-BY-4.0; each task has its own",
    citation=(
        "Longpre et al., The Flan Collection: Designing Data and Methods for Effective "
        "Instruction Tuning, 2023"
    ),
    max_rows=5_000,
    sampling_note="strata of cot_* whole",
    stratum=flan_stratum,
)
TASKSOURCE = Source(
    name="tasksource",
    rule=tasksource_rule,
    columns={"inputs": str, "targets": str, "task": str},
    parts=(Part(files=("data/train-*.parquet",)),),
    hub="tasksource/tasksource-instruct-v0",
    conditions=("direct",),
    licence="Apache-2.0; each task has its own",
    citation="Sileo, tasksource, 2023",
    max_rows=10_000,
    stratum=tasksource_stratum,
)
