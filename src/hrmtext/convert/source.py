"""Where a conversion reads from: config, tensors one at a time, tokenizer, whatever the form."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from hrmtext.artifacts.hub import local_path
from hrmtext.artifacts.opening import open_stored
from hrmtext.artifacts.stored import StoredModel
from hrmtext.data.tokenizer import PromptTokenizer


@dataclasses.dataclass
class Source(StoredModel):
    """An opened model with its tokenizer."""

    def tokenizer(self) -> PromptTokenizer | None:
        """The tokenizer beside the weights; None where there is none."""
        if self.tokenizer_folder is None:
            return None
        return PromptTokenizer.load(self.tokenizer_folder)

    def special_ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id, pad_token_id: the tokenizer's, else as the files say."""
        tokenizer = self.tokenizer()
        if tokenizer is None:
            return dict(self.token_ids)
        return {
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
            "pad_token_id": tokenizer.pad_id,
        }


def open_source(
    path: str | Path, weights: str = "auto", tokenizer_folder: str | Path | None = None
) -> Source:
    """Open whatever holds a model, recognised by its content; no tensor is read yet.

    Args:
        path: a native folder, run folder, Hugging Face folder (fused, split, mixed, sharded),
            checkpoint folder of the public training code, or Hub id.
        weights: `raw`, `ema`, or `auto`: the EMA where there is one.
        tokenizer_folder: a folder with tokenizer.json, where the model's own has none.

    Raises:
        CheckpointError: nothing to open, or it is incomplete, damaged or does not fit its config.
    """
    stored = open_stored(local_path(path), weights)
    source = Source(**{f.name: getattr(stored, f.name) for f in dataclasses.fields(stored)})
    if tokenizer_folder is not None:
        source.tokenizer_folder = Path(tokenizer_folder)
    return source
