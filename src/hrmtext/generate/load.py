"""Loading whatever holds a model: a run, a checkpoint, a Hugging Face folder, a Hub id."""

from __future__ import annotations

from pathlib import Path

import torch

from hrmtext.artifacts.gguf_file import GgufFile
from hrmtext.artifacts.hub import local_path
from hrmtext.artifacts.opening import model_folder, open_stored
from hrmtext.artifacts.stored import StoredModel
from hrmtext.config.model import ModelConfig
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.generate.gguf_tokenizer import tokenizer_of
from hrmtext.generate.runner import TextModel
from hrmtext.runtime.device import pick_device, pick_dtype

__all__ = ["load", "model_folder", "read_config", "read_tokenizer"]


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str = "auto",
    base: str | Path | None = None,
) -> TextModel:
    """Load a model and its tokenizer; what `path` is follows from what it holds.

    Args:
        path: a run folder (its newest complete checkpoint is taken, as with `RUN/last`; `RUN/best`
            is the one with the lowest validation loss), a native model or checkpoint folder, a
            Hugging Face folder (fused, split or sharded), a checkpoint folder of the public
            training code, a GGUF file (run by our own engine), or a Hub id (`owner/name`). A
            run that trained adapters is run on its base, which must be the same.
        device: `cpu`, `cuda`, `cuda:N`; None: CUDA where there is one.
        dtype: `fp32`, `bf16` or a torch dtype; None: bf16 on CUDA, fp32 on the CPU.
        weights: `raw`, `ema`, or `auto`: the EMA where there is one.
        base: where the base of adapters lies now; None: where it was when they were trained.

    Raises:
        CheckpointError: nothing to load at `path`, or it is incomplete or damaged.
        DataError: no tokenizer beside the weights.
        BackendError: the device was asked for by name and is not there.
    """
    place = pick_device(str(device) if device is not None else None)
    number_format = pick_dtype(dtype, place)
    stored = open_stored(local_path(path), weights, base)
    tokenizer = read_tokenizer(stored) or PromptTokenizer.load(stored.folder)
    return TextModel(stored.load_model(place, number_format), tokenizer)


def read_tokenizer(stored: StoredModel) -> PromptTokenizer | None:
    """The tokenizer of an opened model: beside its weights, or inside a GGUF file; None: none."""
    if stored.kind == "gguf":
        return tokenizer_of(GgufFile(stored.folder).values, str(stored.folder))
    if stored.tokenizer_folder is None:
        return None
    return PromptTokenizer.load(stored.tokenizer_folder)


def read_config(path: str | Path) -> ModelConfig:
    """The shape of the model that `load` would load from `path`, without its weights."""
    return open_stored(local_path(path)).config
