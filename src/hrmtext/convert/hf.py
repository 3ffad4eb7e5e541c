"""Export to a Hugging Face folder that plain transformers code loads and runs with the prefix mask.

The folder is written under a temporary name, loaded back with transformers' own classes and
compared with our model; it gets its name only if they agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.hf_folder import (
    CONFIG_FILE,
    LAYOUTS,
    WEIGHTS_FILE,
    to_hf_config,
    to_split,
)
from hrmtext.artifacts.opening import open_stored
from hrmtext.artifacts.safetensors_file import Entry, write_safetensors
from hrmtext.config.base import nearest
from hrmtext.convert.verify import Comparison, compare_with_transformers
from hrmtext.data.tokenizer import PromptTokenizer, export_tokenizer
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.generate.load import load
from hrmtext.generate.runner import TextModel
from hrmtext.runtime.device import pick_dtype
from hrmtext.runtime.io import MARKER, atomic_folder, write_json

GENERATION_CONFIG_FILE = "generation_config.json"
DEFAULT_NEW_TOKENS = 256
"""Written to generation_config.json: transformers would otherwise cut answers at 20 tokens."""


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
        L_bp_cycles: gradient routing for whoever trains on; None: transformers' default.
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
    if not isinstance(source, TextModel):
        source = load(source, device="cpu", dtype="fp32", weights=weights)
    number_format = source.dtype if dtype is None else pick_dtype(dtype, torch.device("cpu"))
    out = Path(out)
    state = {
        name: t.detach().cpu().to(number_format) for name, t in source.model.state_dict().items()
    }
    format_name = str(number_format).removeprefix("torch.")
    values = to_hf_config(source.config, dtype=format_name, L_bp_cycles=L_bp_cycles)
    with atomic_folder(out, replace=replace) as folder:
        write_json(folder / CONFIG_FILE, values | _token_ids(source.tokenizer))
        write_json(folder / GENERATION_CONFIG_FILE, _generation_values(source.tokenizer))
        chosen = to_split(state) if layout == "split" else state
        entries = {name: Entry(t.dtype, tuple(t.shape)) for name, t in chosen.items()}
        # transformers refuses a file that does not say which framework's tensors it holds.
        write_safetensors(
            folder / WEIGHTS_FILE, entries, chosen.__getitem__, metadata={"format": "pt"}
        )
        export_tokenizer(source.tokenizer, folder, source.config.max_seq_len)
        comparison = _verify(folder, state) if verify else None
    # The rename made the folder whole; people go on to edit and upload what is in it.
    (out / MARKER).unlink()
    size = sum(file.stat().st_size for file in out.iterdir())
    return ExportReport(out, layout, format_name, size, comparison)


def _verify(folder: Path, state: dict[str, torch.Tensor]) -> Comparison:
    ours = open_stored(folder).load_model(dtype=torch.float32)
    read = ours.state_dict()
    for name, tensor in state.items():
        if not torch.equal(read[name], tensor.float()):
            raise CheckpointError(f"{folder.name}: {name} read back differs from what was written")
    return compare_with_transformers(TextModel(ours, PromptTokenizer.load(folder)), folder)


def _token_ids(tokenizer: PromptTokenizer) -> dict[str, int]:
    return {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
        "pad_token_id": tokenizer.pad_id,
    }


def _generation_values(tokenizer: PromptTokenizer) -> dict[str, Any]:
    return {**_token_ids(tokenizer), "do_sample": False, "max_new_tokens": DEFAULT_NEW_TOKENS}
