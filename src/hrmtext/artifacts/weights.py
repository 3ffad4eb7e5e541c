"""Native model folders: model.yaml, model.safetensors, optionally ema.safetensors and a tokenizer.

A folder counts only with the completion marker of `hrmtext.runtime.io`; its weights are safetensors
files, so nothing in it is ever run as code.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from hrmtext.config.base import build, read_yaml, to_mapping
from hrmtext.config.model import ModelConfig
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.model import HrmLM, empty_model
from hrmtext.runtime.io import explain_storage_errors, require_complete, write_text

FORMAT_VERSION = 1
CONFIG_FILE = "model.yaml"
WEIGHTS_FILE = "model.safetensors"
EMA_FILE = "ema.safetensors"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
WHICH = ("auto", "raw", "ema")


def save_model(
    folder: str | Path,
    config: ModelConfig,
    weights: Mapping[str, torch.Tensor],
    *,
    ema: Mapping[str, torch.Tensor] | None = None,
    tokenizer_folder: str | Path | None = None,
) -> None:
    """Write the files of a native model folder into `folder`, which the caller makes atomic.

    Args:
        folder: an existing folder, normally the one that `runtime.io.atomic_folder` yields.
        weights: tensors by the names of `HrmLM.state_dict()`, in any floating dtype.
        ema: the same names; written as fp32. Parameters that it lacks are an error.
        tokenizer_folder: a folder with tokenizer.json and tokenizer_config.json to copy.

    Raises:
        CheckpointError: missing, extra or wrongly shaped tensors, or no tokenizer where it was
            said to be.
        StorageError: the disk is full or the folder not writable.
    """
    folder = Path(folder)
    _check_tensors(config, weights, f"weights for {folder.name}")
    write_description(folder, config, tokenizer_folder)
    write_tensors(folder / WEIGHTS_FILE, weights)
    if ema is not None:
        _check_tensors(config, ema, f"EMA weights for {folder.name}")
        write_tensors(folder / EMA_FILE, {name: tensor.float() for name, tensor in ema.items()})


def write_description(
    folder: Path, config: ModelConfig, tokenizer_folder: str | Path | None
) -> None:
    """Write what a native model folder holds beside its weights; raises as `save_model`."""
    write_text(folder / CONFIG_FILE, config_text(config))
    if tokenizer_folder is not None:
        with explain_storage_errors(folder):
            for name in TOKENIZER_FILES:
                source = Path(tokenizer_folder) / name
                if not source.is_file():
                    raise CheckpointError(f"no {name} in the tokenizer folder {tokenizer_folder}")
                shutil.copyfile(source, folder / name)


def config_text(config: ModelConfig) -> str:
    """The content of model.yaml."""
    fields = {name: to_mapping(config)[name] for name in ModelConfig.__dataclass_fields__}
    return yaml.safe_dump({"format_version": FORMAT_VERSION, "model": fields}, sort_keys=False)


def read_config(folder: str | Path) -> ModelConfig:
    """The model's shape, from model.yaml.

    Raises:
        CheckpointError: no model.yaml, another format version, or values that are no model.
    """
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(
            f"{folder} is not a native model folder: it has no {CONFIG_FILE}. Expected a folder "
            "such as RUN/checkpoints/step_0001000"
        )
    try:
        content = read_yaml(path)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version!r}, this program reads version {FORMAT_VERSION}; "
            "use the hrm-text that wrote it, or a newer one"
        )
    model = content.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(f"{path}: expected a section `model`, got {model!r}")
    try:
        return build(ModelConfig, model, where=str(path))
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def load_state(
    folder: str | Path, which: str = "auto", device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """The tensors of a complete native model folder by name, as stored.

    Args:
        which: `raw` weights, `ema` weights, or `auto`: EMA where there is one, because the EMA
            is what is evaluated and released.

    Raises:
        CheckpointError: no completion marker, a truncated file, no EMA although asked for by
            name, or tensors that do not fit model.yaml.
    """
    folder = Path(folder)
    if which not in WHICH:
        raise ConfigError(f"weights {which!r} are unknown; expected one of {', '.join(WHICH)}")
    require_complete(folder)
    has_ema = (folder / EMA_FILE).is_file()
    if which == "ema" and not has_ema:
        raise CheckpointError(f"{folder} has no {EMA_FILE}; ask for the raw weights instead")
    path = folder / (EMA_FILE if has_ema and which != "raw" else WEIGHTS_FILE)
    tensors = read_tensors(path, device)
    _check_tensors(read_config(folder), tensors, str(path))
    return tensors


def load_model(
    folder: str | Path,
    which: str = "auto",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HrmLM:
    """The model of a complete native model folder, in eval mode, its weights in `dtype`.

    Raises:
        CheckpointError: as `load_state` and `read_config`.
    """
    state = load_state(folder, which, device)
    model = empty_model(read_config(folder), device="meta", dtype=dtype)
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model.eval()


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write a safetensors file; StorageError where the disk is full."""
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with explain_storage_errors(path), _plain_storage_error():
        save_file(ready, path)


def read_tensors(path: Path, device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """Read a safetensors file; CheckpointError where it is missing, truncated or malformed."""
    if not path.is_file():
        raise CheckpointError(f"no such weights file: {path}")
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file ({error}); it was truncated or damaged, "
            "use an earlier checkpoint or copy the file again"
        ) from None


@contextlib.contextmanager
def _plain_storage_error() -> Iterator[None]:
    """Safetensors' own error type, as the RuntimeError that explain_storage_errors looks into."""
    try:
        yield
    except SafetensorError as error:
        raise RuntimeError(str(error)) from error


def _check_tensors(config: ModelConfig, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in empty_model(config, device="meta").state_dict().items()
    }
    problems = [f"missing {name}" for name in expected if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in expected]
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            got = tuple(tensors[name].shape)
            problems.append(f"{name} has shape {got}, the model's is {shape}")
    if problems:
        shown = "; ".join(problems[:8]) + (
            f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        )
        raise CheckpointError(f"{where} do not fit the model's shape: {shown}")
