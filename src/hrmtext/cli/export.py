"""hrm-text export"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro


def export(
    model: Annotated[Path, tyro.conf.Positional],
    out: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    layout: Literal["fused", "split"] = "fused",
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32",
    weights: Literal["auto", "ema", "raw"] = "auto",
) -> int:
    """Write a Hugging Face folder whose tokenizer carries the prefix mask, and check it.

    The folder is loaded again with transformers and its logits compared before it counts.

    Args:
        model: run folder, checkpoint or Hugging Face folder.
        out: folder to write; must not exist.
        layout: fused as the released checkpoint, or split as transformers' own parameters.
        dtype: number format of the written weights.
        weights: averaged weights where present (auto), ema, or raw.
    """
    from hrmtext.api import load
    from hrmtext.convert import export_hf

    report = export_hf(load(model, device="cpu", dtype="fp32", weights=weights), out,
                       layout=layout, dtype=dtype)  # fmt: skip
    print(report)
    print(f"written: {out}")
    return 0
