"""A process that does runs of a comparison, one after the other."""

from __future__ import annotations

from typing import Any

from hrmtext.ablate.run import do_run
from hrmtext.data.workers import serve


def answer(request: dict[str, Any]) -> bool:
    """True when the run is trained and evaluated; its folder holds the rest."""
    do_run(request)
    return True


if __name__ == "__main__":
    serve(answer)
