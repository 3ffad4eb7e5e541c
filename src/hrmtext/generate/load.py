"""Loading whatever holds a model: a run, a checkpoint, a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

import torch

from hrmtext.artifacts.hf_folder import (
    from_hf_config,
    is_hf_folder,
    load_hf_model,
    read_hf_values,
)
from hrmtext.artifacts.layout import RunFolder
from hrmtext.artifacts.weights import CONFIG_FILE, WHICH, load_model
from hrmtext.artifacts.weights import read_config as read_native_config
from hrmtext.config.model import ModelConfig
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.generate.runner import TextModel
from hrmtext.runtime.device import pick_device, pick_dtype


def load(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    weights: str = "auto",
) -> TextModel:
    """Load a model and its tokenizer; what `path` is follows from what it holds.

    Args:
        path: a run folder (its newest complete checkpoint is taken), a native model or checkpoint
            folder, or a Hugging Face folder (fused, split or sharded).
        device: `cpu`, `cuda`, `cuda:N`; None: CUDA where there is one.
        dtype: `fp32`, `bf16` or a torch dtype; None: bf16 on CUDA, fp32 on the CPU.
        weights: `raw`, `ema`, or `auto`: the EMA where there is one.

    Raises:
        CheckpointError: nothing to load at `path`, or it is incomplete or damaged.
        DataError: no tokenizer beside the weights.
        BackendError: the device was asked for by name and is not there.
    """
    if weights not in WHICH:
        raise ConfigError(f"weights {weights!r} are unknown; expected one of {', '.join(WHICH)}")
    place = pick_device(str(device) if device is not None else None)
    number_format = pick_dtype(dtype, place)
    folder = model_folder(path)
    if (folder / CONFIG_FILE).is_file():
        model = load_model(folder, weights, place, number_format)
    else:
        if weights == "ema":
            raise CheckpointError(
                f"{folder} is a Hugging Face folder with one set of weights; leave out weights=ema"
            )
        model = load_hf_model(folder, place, number_format)
    return TextModel(model, PromptTokenizer.load(folder))


def read_config(path: str | Path) -> ModelConfig:
    """The shape of the model that `load` would load from `path`, without its weights."""
    folder = model_folder(path)
    if (folder / CONFIG_FILE).is_file():
        return read_native_config(folder)
    return from_hf_config(read_hf_values(folder), str(folder))


def model_folder(path: str | Path) -> Path:
    """The folder that holds the weights `path` stands for.

    Raises:
        CheckpointError: nothing that can be loaded; the message says what was found instead.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"no such folder: {path}")
    if not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected the folder that holds it")
    if (path / CONFIG_FILE).is_file() or is_hf_folder(path):
        return path
    run = RunFolder(path)
    if run.exists or run.checkpoints_folder.is_dir():
        return run.latest()
    if (path / "config.json").is_file():
        kind = read_hf_values(path).get("model_type")
        raise CheckpointError(f"{path} holds a model of type {kind!r}, expected 'hrm_text'")
    raise CheckpointError(
        f"{path} holds no model: expected a run folder (config.yaml, checkpoints), a native model "
        "folder (model.yaml) or a Hugging Face folder (config.json of type hrm_text)"
    )
