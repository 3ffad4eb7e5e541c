"""Where a conversion reads from: config, tensors one at a time, tokenizer, whatever the form."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import torch

from hrmtext.artifacts.hub import local_path
from hrmtext.artifacts.opening import open_stored
from hrmtext.artifacts.safetensors_file import Entry
from hrmtext.artifacts.stored import StoredModel, fit
from hrmtext.artifacts.upstream import upstream_root
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.generate.load import read_tokenizer
from hrmtext.generate.runner import TextModel


@dataclasses.dataclass
class Source(StoredModel):
    """An opened model with its tokenizer."""

    held_tokenizer: PromptTokenizer | None = None
    """Of a model that lies in memory."""

    @property
    def root(self) -> Path:
        """The folder that a user names: of public training checkpoints, that around the epoch."""
        return upstream_root(self.folder) if self.kind == "upstream" else self.folder

    def tokenizer(self) -> PromptTokenizer | None:
        """The tokenizer beside the weights; None where there is none."""
        if self.held_tokenizer is not None:
            return self.held_tokenizer
        if self.kind == "gguf" and self.tokenizer_folder is not None:
            return PromptTokenizer.load(self.tokenizer_folder)
        return read_tokenizer(self)

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


class _InMemory:
    """The tensors of a loaded model, as a store."""

    def __init__(self, state: Mapping[str, torch.Tensor]) -> None:
        self.state = state
        self.entries = {n: Entry(t.dtype, tuple(t.shape)) for n, t in state.items()}

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        tensor = self.state[name].detach().cpu()
        return tensor if out is None else out.copy_(tensor)


def source_of(model: TextModel) -> Source:
    """A loaded model as a source."""
    store = _InMemory(model.model.state_dict())
    return Source(
        kind="memory",
        folder=Path("(memory)"),
        config=model.config,
        weights="only",
        alternatives=("only",),
        tokenizer_folder=None,
        gradient_routing=None,
        token_ids={},
        parts=fit(model.config, [store], ("fused",), "the model"),
        held_tokenizer=model.tokenizer,
    )


def open_source(
    path: str | Path,
    weights: str = "auto",
    tokenizer_folder: str | Path | None = None,
    base: str | Path | None = None,
) -> Source:
    """Open whatever holds a model, recognised by its content; no tensor is read yet.

    Args:
        path: a native folder, run folder, Hugging Face folder (fused, split, mixed, sharded),
            checkpoint folder of the public training code, GGUF file, or Hub id.
        weights: `raw`, `ema`, or `auto`: the EMA where there is one.
        tokenizer_folder: a folder with tokenizer.json, where the model's own has none.
        base: where the base of adapters lies; None: where it was when they were trained.

    Raises:
        CheckpointError: nothing to open, or it is incomplete, damaged or does not fit its config.
    """
    stored = open_stored(local_path(path), weights, base)
    source = Source(**{f.name: getattr(stored, f.name) for f in dataclasses.fields(stored)})
    if tokenizer_folder is not None:
        source.tokenizer_folder = Path(tokenizer_folder)
    return source
