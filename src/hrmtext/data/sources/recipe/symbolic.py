"""Generated symbolic problems: DM Mathematics and Sudoku-Extreme."""

from __future__ import annotations

from hrmtext.data.example import Example
from hrmtext.data.sources.source import Origin, Outcome, Part, Row, Source, stratum_name

DM_FOLDERS = ("train-easy", "train-medium", "train-hard")


def dm_mathematics_rule(row: Row, origin: Origin) -> Outcome:
    """Alternate lines: question -> answer, direct."""
    yield Example("direct", row["question"], row["answer"])


def dm_mathematics_stratum(row: Row, origin: Origin) -> str:
    """One stratum a file, the difficulty's folder in front."""
    return stratum_name("dm_mathematics", origin.path.parent.name, origin.path.stem)


def sudoku_extreme_rule(row: Row, origin: Origin) -> Outcome:
    """`Solve the Sudoku` and the grid, 0 for blanks -> solution, direct.

    The grid is one line of 81 characters below the request.
    """
    grid = row["question"].replace(".", "0")
    yield Example("direct", f"Solve the Sudoku\n{grid}", row["answer"])


DM_MATHEMATICS = Source(
    name="dm_mathematics",
    rule=dm_mathematics_rule,
    columns={"question": str, "answer": str},
    parts=tuple(Part(name=folder, files=(f"{folder}/*.txt",)) for folder in DM_FOLDERS),
    hub=None,
    where="mathematics_dataset-v1.0 (txt files in train-easy, -medium, -hard), or its tar",
    conditions=("direct",),
    licence="Apache-2.0",
    citation="Saxton et al., Analysing Mathematical Reasoning Abilities of Neural Models, 2019",
    max_rows=100_000,
    text="line pairs",
    stratum=dm_mathematics_stratum,
)
SUDOKU_EXTREME = Source(
    name="sudoku_extreme",
    rule=sudoku_extreme_rule,
    columns={"question": str, "answer": str},
    parts=(Part(files=("train.csv",)),),
    hub="sapientinc/sudoku-extreme",
    by_file=True,
    conditions=("direct",),
    licence="see the data set's page",
    citation="sapientinc/sudoku-extreme (Wang et al., Hierarchical Reasoning Model, 2025)",
    max_rows=1_000_000,
)
