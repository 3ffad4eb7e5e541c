"""Export to a Hugging Face folder that plain transformers code loads and runs with the prefix mask.

The simple form of `convert`: from a loaded model or a path, with defaults for publishing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from hrmtext.artifacts.hf_folder import LAYOUTS
from hrmtext.config.base import nearest
from hrmtext.convert.run import convert
from hrmtext.convert.source import open_source, source_of
from hrmtext.convert.verify import Comparison
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.generate.runner import TextModel
from hrmtext.runtime.device import pick_dtype


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote, and how it compared."""

    folder: Path
    layout: str
    dtype: str
    size_bytes: int
    comparison: Comparison | None
    """None where `verify` was false."""


def export_hf(
    source: TextModel | str | Path,
    out: str | Path,
    *,
    layout: str = "fused",
    dtype: str | torch.dtype | None = None,
    weights: str = "auto",
    L_bp_cycles: Sequence[int] | None = None,
    verify: bool = True,
    replace: bool = False,
) -> ExportReport:
    """Write config.json, generation_config.json, model.safetensors and the tokenizer to `out`.

    Args:
        source: a loaded model, or anything that `load` takes.
        layout: `fused` (as the released file; vLLM packs so too) or `split` (transformers' names).
        dtype: number format of the file; None: fp32, or that of a loaded `source`.
        weights: which weights to take from a folder, see `load`.
        L_bp_cycles: gradient routing for whoever trains on; None: the source's, else transformers'
            default.
        verify: load the result with transformers and compare logits.
        replace: allow `out` to exist.

    Raises:
        CheckpointError: what transformers computes from the folder is not what we compute;
            nothing is left behind.
        ConfigError: an unknown layout, or a shape that transformers cannot express.
        StorageError: `out` exists, or the disk is full.
    """
    if layout not in LAYOUTS:
        raise ConfigError(f"unknown layout {layout!r}{nearest(layout, LAYOUTS)}")
    if isinstance(source, TextModel):
        opened, own = source_of(source), source.dtype
    else:
        opened, own = open_source(source, weights), torch.float32
        if opened.tokenizer() is None:
            raise CheckpointError(f"{source} has no tokenizer, which an export needs")
    number_format = own if dtype is None else pick_dtype(dtype, torch.device("cpu"))
    report = convert(
        opened,
        out,
        "hf" if layout == "fused" else "hf-split",
        dtype=number_format,
        L_bp_cycles=L_bp_cycles,
        verify=verify,
        replace=replace,
    )
    return ExportReport(
        Path(report.out), layout, report.dtype, report.size_bytes, report.comparison
    )
