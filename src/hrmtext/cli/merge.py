"""hrm-text merge"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def merge(
    adapters: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    to: Literal["hf", "hf-split", "native"] = "hf",
    base: str | None = None,
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    weights: Literal["auto", "ema", "raw"] = "auto",
) -> int:
    """Write the model that a run of adapters and its base make together, and check it.

    `export` and `convert` do the same where the base still lies where it was.

    Args:
        adapters: a run that trained adapters, or one of its checkpoints.
        out: folder to write; must not exist.
        to: a Hugging Face folder (released layout, or transformers' own names), or our own form.
        base: where the base lies now, if it was moved; another base is refused.
        dtype: number format of the written weights.
        weights: averaged adapters (auto, ema), or raw.
    """
    from rich.console import Console

    from hrmtext.cli.convert import show_report
    from hrmtext.convert import convert, open_source
    from hrmtext.errors import ConfigError

    source = open_source(adapters, weights, base=base)
    if source.kind != "adapters":
        raise ConfigError(f"{adapters} holds a whole model, not adapters: use `hrm-text convert`")
    show_report(Console(), convert(source, out, to, dtype=dtype))
    return 0
