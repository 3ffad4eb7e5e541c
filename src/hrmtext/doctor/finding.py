"""What a check found: one line of the doctor's table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

Status = Literal["ok", "warning", "problem"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One fact and how good it is."""

    area: str
    what: str
    status: Status
    found: str
    advice: str = ""
    """What to do; given with every warning and problem."""

    def __post_init__(self) -> None:
        assert self.status == "ok" or self.advice, f"{self.what}: a {self.status} without advice"


def guarded(area: str, check: Callable[[], list[Finding]]) -> list[Finding]:
    """The findings of a check; one that fails itself is a problem, and the others still run."""
    try:
        return check()
    except Exception as error:  # whatever a broken machine makes of it, it goes into the table
        said = str(error).strip().splitlines() or [""]
        return [
            Finding(
                area, "check", "problem", f"{type(error).__name__}: {said[0]}",
                "this check could not be made: mend what the message names, then try again",
            )
        ]  # fmt: skip


def size(num_bytes: float) -> str:
    """Bytes for people: `3.2 GiB`, `640 MiB`."""
    if num_bytes >= 2**30:
        return f"{num_bytes / 2**30:,.1f} GiB"
    return f"{num_bytes / 2**20:,.0f} MiB"
