"""Comparisons like the paper's tables: variants at equal cost, several seeds, intervals."""

from hrmtext.ablate.plan import PlannedRun, plan
from hrmtext.ablate.run import ablate
from hrmtext.ablate.table import JSON_FILE, TABLE_FILE, Row, half_width, tabulate, write

__all__ = [
    "JSON_FILE", "TABLE_FILE", "PlannedRun", "Row", "ablate", "half_width", "plan", "tabulate",
    "write",
]  # fmt: skip
