"""hrm-text export"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from hrmtext.convert import ExportReport


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
    from hrmtext.convert import export_hf

    print(describe_export(export_hf(model, out, layout=layout, dtype=dtype, weights=weights)))
    return 0


def describe_export(report: ExportReport) -> str:
    """What was written and how it compared, in a few lines."""
    text = (
        f"written: {report.folder} ({report.layout} layout, {report.dtype}, "
        f"{report.size_bytes / 1e6:,.1f} MB)"
    )
    found = report.comparison
    if found is None:
        return text
    return (
        f"{text}\nchecked against transformers on {found.num_positions} positions: logits differ "
        f"by at most {found.max_difference:.1e} under the prefix mask and "
        f"{found.max_difference_causal:.1e} causally; same most probable token at "
        f"{100 * found.argmax_agreement:.1f} %"
    )
