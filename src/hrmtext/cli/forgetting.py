"""hrm-text forgetting"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def forgetting(
    base: Annotated[str, tyro.conf.Positional],
    tuned: Annotated[str, tyro.conf.Positional],
    /,
    *,
    data: Path,
    rows: int = 500,
    weights: Literal["auto", "ema", "raw"] = "auto",
    device: str = "auto",
) -> int:
    """Compare two models on held-out rows of the mixture that the first was trained on.

    Prints loss, tokens right and answers right (given the right tokens before), before -> after,
    in total and by stratum.

    Args:
        base: the model before fine-tuning: run, checkpoint, Hugging Face folder or Hub id.
        tuned: the model after it; a run of adapters is taken with its base.
        data: prepared data folder of the base's mixture.
        rows: held-out rows, spread over the strata.
        weights: which weights of both: averaged where present (auto), ema, or raw.
        device: auto, cpu, cuda or cuda:N.
    """
    from hrmtext.train.forgetting import compare, describe

    found = compare(base, tuned, data, rows=rows, weights=weights, device=device)
    for record in found:
        print(describe(record, record["name"]))
    return 0
