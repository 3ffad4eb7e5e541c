"""One conversion: open, write under a temporary name, prove, and only then give it its name."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.opening import open_stored
from hrmtext.config.base import nearest
from hrmtext.convert.gguf import write_gguf
from hrmtext.convert.gguf_verify import GgufComparison
from hrmtext.convert.source import Source, open_source
from hrmtext.convert.verify import (
    Comparison,
    Logits,
    Probe,
    compare,
    forget,
    our_logits,
    probes,
    require_equal_content,
    require_same_tokenizer,
    require_within_budget,
    transformers_logits,
)
from hrmtext.convert.write import (
    CastReader,
    Progress,
    check_expressible,
    write_hf,
    write_native,
    write_upstream,
)
from hrmtext.errors import CheckpointError, ConfigError, StorageError
from hrmtext.runtime.device import DTYPES
from hrmtext.runtime.io import MARKER, atomic_folder, mark_complete

FORMS = ("native", "hf", "hf-split", "gguf", "upstream")
KEEP = "keep"
DEFAULT_FILE_TYPE = "bf16"
SPARE_BYTES = 16 << 20
"""For configs, tokenizer and headers, when free disk space is checked."""


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What a conversion read and wrote, and how it compared."""

    source: str
    source_kind: str
    weights: str
    """Which set was taken: `raw`, `ema`, or `only` where the source has one."""
    to: str
    out: str
    dtype: str
    size_bytes: int
    num_tensors: int
    is_bit_equal: bool
    """Every tensor was read back and equals the source's, bit by bit."""
    comparison: Comparison | None
    """Logits of the target's own reader against the source's; None without verification."""
    rounding: Comparison | None
    """What the narrower number format costs against the source's own; None where it is kept."""
    notes: list[str]
    gguf: GgufComparison | None = None
    """Of a GGUF file instead of `comparison`: llama.cpp's logits against ours."""


def convert(
    source: Source | str | Path,
    out: str | Path,
    to: str,
    *,
    dtype: str | torch.dtype = KEEP,
    file_type: str | None = None,
    weights: str = "auto",
    tokenizer_folder: str | Path | None = None,
    max_shard_bytes: int | None = None,
    L_bp_cycles: Sequence[int] | None = None,
    verify: bool = True,
    replace: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Convert a model into another form.

    Args:
        source: an opened source, a path (see `open_source`), or a Hub id.
        to: `native`, `hf` (the released layout), `hf-split` (transformers' own names), `upstream`
            (the public training code) or `gguf` (llama.cpp; one file).
        dtype: `keep`, or the number format of all written tensors.
        file_type: number format of a GGUF file, see `write_gguf`; None: bf16.
        weights: `raw`, `ema` or `auto`, where the source holds both.
        tokenizer_folder: a tokenizer for a source that has none.
        max_shard_bytes: largest weights file of a Hugging Face folder; None: one file.
        L_bp_cycles: gradient routing for config.json; None: the source's, else the default.
        verify: read every tensor back, and compare logits with the target's own reader.
        replace: allow `out` to exist.

    Raises:
        ConfigError: an unknown form or dtype, source = out, a shape that the form cannot say.
        CheckpointError: the source is incomplete, or the result over its budget: nothing is left.
        StorageError: `out` exists, or the disk is too full.
    """
    if to not in FORMS:
        raise ConfigError(f"unknown target {to!r}{nearest(to, FORMS)}")
    number_format = _parse_dtype(dtype)
    _require_options_of(to, number_format, file_type, max_shard_bytes)
    out = Path(out)
    if not isinstance(source, Source):
        source = open_source(source, weights, tokenizer_folder)
    if out.resolve() in (source.folder.resolve(), source.root.resolve()):
        raise ConfigError(f"source and destination are the same folder: {out}")
    if out.exists() and not replace:
        raise StorageError(f"{out} exists already; name another folder or remove it first")
    if to == "gguf":
        return _to_gguf(source, out, file_type or DEFAULT_FILE_TYPE, verify, replace, progress)
    check_expressible(source.config, to)
    reader = CastReader(source, number_format, progress)
    require_disk_space(out, reader.nbytes())
    with atomic_folder(out, replace=replace) as folder:
        notes = _notes(source)
        if to == "native":
            write_native(reader, folder)
        elif to == "upstream":
            notes += write_upstream(reader, folder, str(out))
        else:
            layout = "fused" if to == "hf" else "split"
            write_hf(
                reader,
                folder,
                layout,
                max_shard_bytes=max_shard_bytes,
                L_bp_cycles=L_bp_cycles,
            )
        comparison = rounding = None
        if verify:
            mark_complete(folder)
            comparison, rounding = _prove(reader, folder, to)
    if to != "native":
        # The rename made the folder whole; people go on to edit and upload what is in it.
        (out / MARKER).unlink()
    kept = all(reader.entry(n).dtype == source.entry(n).dtype for n in source.names())
    return ConvertReport(
        source=str(source.folder),
        source_kind=source.kind,
        weights=source.weights,
        to=to,
        out=str(out),
        dtype=str(reader.entry("lm_head.weight").dtype).removeprefix("torch."),
        size_bytes=sum(file.stat().st_size for file in out.rglob("*") if file.is_file()),
        num_tensors=len(source.names()),
        is_bit_equal=verify and kept,
        comparison=comparison,
        rounding=rounding,
        notes=notes,
    )


def _to_gguf(
    source: Source,
    out: Path,
    file_type: str,
    verify: bool,
    replace: bool,
    progress: Progress | None,
) -> ConvertReport:
    shapes = source.shapes.values()
    wide = {"f32": 4.0, "f16": 2.0, "bf16": 2.0}
    num_values = sum(math.prod(shape) for shape in shapes)
    # A quantised file has at most 8 bits a value and a 16-bit scale for every 32.
    require_disk_space(out, int(num_values * wide.get(file_type, 1.07)))
    report = write_gguf(
        source,
        out,
        file_type=file_type,
        tokenizer=source.tokenizer(),
        verify=verify,
        replace=replace,
        progress=None if progress is None else lambda done, all: progress("writing", done, all),
    )
    return ConvertReport(
        source=str(source.folder),
        source_kind=source.kind,
        weights=source.weights,
        to="gguf",
        out=str(out),
        dtype=report.file_type,
        size_bytes=report.size_bytes,
        num_tensors=len(source.names()),
        is_bit_equal=False,
        comparison=None,
        rounding=None,
        notes=_notes(source),
        gguf=report.comparison,
    )


def require_disk_space(out: Path, num_bytes: int) -> None:
    """StorageError where the disk of `out` has less than `num_bytes` and a little more free."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    needed = num_bytes + SPARE_BYTES
    if free < needed:
        raise StorageError(
            f"not enough disk space for {out}: {needed / 1e9:.2f} GB are needed, "
            f"{free / 1e9:.2f} GB are free; nothing was written"
        )


def _prove(reader: CastReader, folder: Path, to: str) -> tuple[Comparison, Comparison | None]:
    require_equal_content(reader, folder)
    source = reader.source
    tokenizer = source.tokenizer()
    if to in ("hf", "hf-split") and tokenizer is not None:
        require_same_tokenizer(tokenizer, folder)
    rows = probes(tokenizer, source.config.vocab_size, source.config.max_seq_len)
    head = reader.entry("lm_head.weight").dtype
    _tell(reader, 0)
    expected, rounding = _expected_logits(reader, rows)
    _tell(reader, 1)
    if to in ("hf", "hf-split"):
        found, name = transformers_logits(folder, rows, head), "transformers'"
    else:
        found, name = our_logits(open_stored(folder).load_model(dtype=head), rows), "our reader's"
    forget()
    _tell(reader, 2)
    comparison = compare(expected, found)
    require_within_budget(comparison, name)
    return comparison, rounding


def _expected_logits(reader: CastReader, rows: list[Probe]) -> tuple[Logits, Comparison | None]:
    """Logits of the source in the number format that is written, and what that costs."""
    source, head = reader.source, reader.entry("lm_head.weight").dtype
    own = our_logits(source.load_model(dtype=source.dtype), rows)
    forget()
    if not bool(own.prefix.isfinite().all() and own.causal.isfinite().all()):
        raise CheckpointError(f"{source.folder}: the source's own logits are NaN or infinite")
    if head == source.dtype or torch.promote_types(head, source.dtype) == head:
        return own, None
    rounded = our_logits(source.load_model(dtype=head), rows)
    forget()
    return rounded, compare(own, rounded)


def _tell(reader: CastReader, done: int) -> None:
    if reader.progress is not None:
        reader.progress("comparing logits", done, 2)


def _notes(source: Source) -> list[str]:
    notes = []
    if len(source.alternatives) > 1:
        notes.append(
            f"the source holds {' and '.join(source.alternatives)} weights: {source.weights} taken"
        )
    if source.tokenizer() is None:
        notes.append("the source has no tokenizer, so none was written; give one with --tokenizer")
    return notes


def _require_options_of(
    to: str, dtype: torch.dtype | None, file_type: str | None, max_shard_bytes: int | None
) -> None:
    if to == "gguf" and dtype is not None:
        raise ConfigError("a GGUF file's number format is its file_type, not dtype")
    if to != "gguf" and file_type is not None:
        raise ConfigError(f"file_type is for GGUF files; the number format of {to} is dtype")
    if max_shard_bytes is not None and to not in ("hf", "hf-split"):
        raise ConfigError(f"only Hugging Face folders are written in shards, not {to}")


def _parse_dtype(dtype: Any) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == KEEP:
        return None
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}{nearest(str(dtype), [KEEP, *DTYPES])}")
    return DTYPES[dtype]
