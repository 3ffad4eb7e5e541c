"""hrm-text convert"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from hrmtext.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from hrmtext.convert import ConvertReport

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def convert(
    source: Annotated[str, tyro.conf.Positional],
    destination: Annotated[Path, tyro.conf.Positional],
    /,
    *,
    to: Annotated[str, tyro.conf.arg(metavar="{native,hf,hf-split,gguf,upstream}")],
    dtype: Literal["keep", "fp32", "bf16", "fp16"] = "keep",
    weights: Literal["auto", "ema", "raw"] = "auto",
    max_shard_size: str | None = None,
    tokenizer: Path | None = None,
    file_type: str | None = None,
    verify: bool = True,
    json: bool = False,
) -> int:
    """Convert a model into another form, and prove that it computes the same.

    What was written is read back bit by bit, loaded with the target's own reader, and its logits
    are compared with the source's on fixed prompts, under the prefix mask and causally. Over the
    budget the command fails and leaves nothing behind.

    Args:
        source: run folder, native, Hugging Face or public training checkpoint, GGUF file, Hub id.
        destination: folder (for gguf: file) to write; must not exist.
        to: native; hf (released layout); hf-split (transformers' names); gguf; upstream (public
            training code).
        dtype: number format of the written weights; keep leaves each as it is.
        weights: averaged weights where present (auto), ema, or raw.
        max_shard_size: split a Hugging Face folder's weights into files of at most this size (5GB).
        tokenizer: folder with tokenizer.json, for a source that has none.
        file_type: number format of a GGUF file (f32, f16, q8_0, q4_k_m, ...); bf16 if not said.
        verify: read back and compare logits.
        json: print the report as JSON.
    """
    import dataclasses
    import json as json_module

    from rich.console import Console

    from hrmtext.cli.progress import stage_progress
    from hrmtext.convert import convert as run

    limit = None if max_shard_size is None else parse_size(max_shard_size)
    with stage_progress() as progress:
        report = run(
            source,
            destination,
            to,
            dtype=dtype,
            file_type=file_type,
            weights=weights,
            tokenizer_folder=tokenizer,
            max_shard_bytes=limit,
            verify=verify,
            progress=progress,
        )
    if json:
        print(json_module.dumps(dataclasses.asdict(report), indent=2))
    else:
        show_report(Console(), report)
    return 0


def parse_size(text: str) -> int:
    """Bytes of `5GB`, `500MB`, `2GiB` or a plain number; ConfigError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmg]i?)?b?\s*", text.lower())
    size = 0 if match is None else int(float(match[1]) * UNITS[match[2] or ""])
    if size < 1:
        raise ConfigError(f"size {text!r} is not understood; write 5GB, 500MB, 2GiB or bytes")
    return size


def show_report(console: Console, report: ConvertReport) -> None:
    """A small table: what was read and written, and how both compare."""
    from rich.table import Table

    table = Table(show_header=False, box=None)
    which = "" if report.weights == "only" else f", {report.weights} weights"
    table.add_row("read", f"{report.source} ({report.source_kind}{which})")
    table.add_row(
        "written",
        f"{report.out} ({report.to}, {report.dtype}, {report.size_bytes / 1e6:,.1f} MB)",
    )
    if report.is_bit_equal:
        table.add_row("weights", f"{report.num_tensors} tensors read back, equal bit by bit")
    found = report.comparison
    if report.gguf is not None:
        for what, distance in (
            ("llama.cpp", report.gguf.against_file),
            ("with rounding", report.gguf.against_source),
        ):
            table.add_row(
                what,
                f"largest difference of logits {distance.max_difference:.1e}, same most probable "
                f"token {100 * distance.argmax_agreement:.1f} %, KL {distance.kl:.1e}",
            )
    elif found is None:
        table.add_row("checked", "no: --no-verify was given")
    else:
        for mask, difference, agreement, kl in (
            ("prefix mask", found.max_difference, found.argmax_agreement, found.kl),
            (
                "causal",
                found.max_difference_causal,
                found.argmax_agreement_causal,
                found.kl_causal,
            ),
        ):
            table.add_row(
                mask,
                f"largest difference of logits {difference:.1e} (largest logit "
                f"{found.largest_logit:.1f}), same most probable token "
                f"{100 * agreement:.1f} %, KL {kl:.1e}",
            )
    if report.rounding is not None:
        table.add_row(
            "rounding",
            f"{report.dtype} against the source's own format: largest difference "
            f"{report.rounding.max_difference:.1e}, same most probable token "
            f"{100 * report.rounding.argmax_agreement:.1f} %, KL {report.rounding.kl:.1e}",
        )
    for note in report.notes:
        table.add_row("note", note)
    console.print(table, markup=False, highlight=False)
