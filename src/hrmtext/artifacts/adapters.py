"""Adapter folders: low-rank updates beside a reference to the base that they belong to.

adapter_config.json, adapter_model.safetensors   as PEFT reads them for transformers' classes: EMA
adapter_raw.safetensors                          the weights of the last step, in the same form
base.json                                        which base, and the fingerprint of its weights
model.yaml, tokenizer.json, ...                  as in any native model folder

Whoever opens such a folder gets the base with the updates added in, tensor by tensor.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.names import outside_names, place_of
from hrmtext.artifacts.safetensors_file import Entry
from hrmtext.artifacts.stored import StoredModel
from hrmtext.artifacts.weights import read_tensors, write_tensors
from hrmtext.config.base import build, to_mapping
from hrmtext.config.finetune import TARGETS, LoraConfig
from hrmtext.errors import CheckpointError, ConfigError
from hrmtext.runtime.io import write_json

FORMAT_VERSION = 1
CONFIG_FILE = "adapter_config.json"
EMA_FILE = "adapter_model.safetensors"
RAW_FILE = "adapter_raw.safetensors"
BASE_FILE = "base.json"
_PEFT_PREFIX = "base_model.model."
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseReference:
    """The base of adapters."""

    path: str
    """Where it was when the adapters were trained: a folder, a file or a Hub id."""
    weights: str
    """Which of its weights: `raw`, `ema`, or `only`."""
    fingerprint: str
    """`fingerprint_of` those weights."""


def fingerprint_of(stored: StoredModel) -> str:
    """32 hex digits of all weights as fp32; equal for every form that holds the same values.

    Reads the whole model once: about a second a GB.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name in stored.names():
        tensor = stored.tensor(name).float().contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\x1f".encode())
        digest.update(tensor.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def adapted_parts(linear: str, lora: LoraConfig) -> tuple[tuple[int, ...], int]:
    """Which of the equal parts of a projection's rows have an adapter, and how many parts it has.

    Args:
        linear: our name of the projection, as `model.H_module.layers.0.attn.gqkv_proj`.
    """
    parts = outside_names(f"{linear}.weight", "split")
    inside = {TARGETS[target] for target in lora.targets}
    chosen = [
        index
        for index, part in enumerate(parts)
        if any(part.endswith(f".{name}.weight") for name in inside)
    ]
    return tuple(chosen), len(parts)


def to_peft(
    adapters: Mapping[str, tuple[torch.Tensor, torch.Tensor]], lora: LoraConfig
) -> dict[str, torch.Tensor]:
    """Adapters by PEFT's names for transformers' class.

    Args:
        adapters: projection -> A (P, rank, in) and B (P, out, rank) of its P adapted parts.
    """
    tensors = {}
    for linear, (A, B) in adapters.items():
        chosen, _ = adapted_parts(linear, lora)
        parts = outside_names(f"{linear}.weight", "split")
        for place, index in enumerate(chosen):
            module = parts[index].removesuffix(".weight")
            tensors[f"{_PEFT_PREFIX}{module}.lora_A.weight"] = A[place]
            tensors[f"{_PEFT_PREFIX}{module}.lora_B.weight"] = B[place]
    return tensors


def from_peft(
    tensors: Mapping[str, torch.Tensor], where: str
) -> dict[str, dict[int, tuple[torch.Tensor, torch.Tensor, int]]]:
    """Our tensor -> part of its rows -> A (rank, in), B (out, rank) and the number of parts.

    Raises:
        CheckpointError: a name that is no adapter of this model, or an A without its B.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        match = _KEY.fullmatch(key)
        if match is None:
            raise CheckpointError(f"{where}: {key} is not an adapter of a projection")
        halves.setdefault(match[1], {})[match[2]] = tensor
    found: dict[str, dict[int, tuple[torch.Tensor, torch.Tensor, int]]] = {}
    for module, pair in halves.items():
        place = place_of(f"{module}.weight", "split")
        if place is None or len(pair) != 2:
            what = "is unknown" if place is None else "lacks its lora_A or lora_B"
            raise CheckpointError(f"{where}: the adapter of {module} {what}")
        found.setdefault(place.name, {})[place.index] = (pair["A"], pair["B"], place.num_parts)
    return found


def save_adapters(
    folder: Path,
    lora: LoraConfig,
    base: BaseReference,
    *,
    raw: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
    ema: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Write the adapter files into a folder that the caller makes atomic."""
    write_tensors(folder / RAW_FILE, to_peft(raw, lora))
    write_tensors(folder / EMA_FILE, to_peft(ema, lora))
    write_json(folder / CONFIG_FILE, peft_config(lora, base.path))
    record = {"format_version": FORMAT_VERSION, **dataclasses.asdict(base)}
    write_json(folder / BASE_FILE, {**record, "lora": to_mapping(lora)})


def peft_config(lora: LoraConfig, base: str) -> dict[str, Any]:
    """The values of adapter_config.json, for transformers' split projections."""
    stacks = "[HL]" if lora.stacks == "both" else lora.stacks
    inside = "|".join(TARGETS[target].replace(".", r"\.") for target in lora.targets)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": rf".*\.{stacks}_module\.layers\.\d+\.({inside})",
        "inference_mode": True,
    }


def is_adapter_folder(folder: Path) -> bool:
    """Whether `folder` holds adapters that we wrote."""
    return (folder / CONFIG_FILE).is_file() and (folder / BASE_FILE).is_file()


def read_base(folder: Path) -> tuple[BaseReference, LoraConfig]:
    """What base.json says; CheckpointError where it cannot be used."""
    file = folder / BASE_FILE
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        version = record.pop("format_version")
        lora = build(LoraConfig, record.pop("lora"), where=str(file))
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file} has format version {version!r}, this program reads version "
                f"{FORMAT_VERSION}; use the hrm-text that wrote it, or a newer one"
            )
        return BaseReference(**record), lora
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} does not name the base of the adapters: {error}") from None


def read_adapters(folder: Path, which: str) -> dict[str, torch.Tensor]:
    """The `raw` or `ema` adapters of a folder, by PEFT's names."""
    return read_tensors(folder / (RAW_FILE if which == "raw" else EMA_FILE))


class AdaptedStore:
    """A base's tensors with the updates added in: computed in fp64, rounded once to fp32.

    The base's fingerprint is checked when the first tensor is read.
    """

    def __init__(self, base: StoredModel, folder: Path, which: str) -> None:
        """Read the adapters; of the base, nothing yet.

        Raises:
            CheckpointError: adapters that do not fit the model's shape.
        """
        self.base, self.folder, self.which = base, folder, which
        self.reference, self.lora = read_base(folder)
        self.entries = {name: Entry(torch.float32, shape) for name, shape in base.shapes.items()}
        self.updates = from_peft(read_adapters(folder, which), str(folder))
        for name, parts in self.updates.items():
            rows, columns = base.shapes.get(name, (0, 0))
            for A, B, num_parts in parts.values():
                rank = self.lora.rank
                if A.shape != (rank, columns) or B.shape != (rows // num_parts, rank):
                    raise CheckpointError(
                        f"{folder}: the adapter of {name} has shapes {tuple(A.shape)} and "
                        f"{tuple(B.shape)}, which do not fit its {rows} x {columns} weights"
                    )

    def read(self, name: str, out: torch.Tensor | None = None) -> torch.Tensor:
        """One tensor of the adapted model."""
        self.require_base()
        tensor = self.base.tensor(name).float()
        for index, (A, B, num_parts) in self.updates.get(name, {}).items():
            rows = tensor.chunk(num_parts)[index]
            update = B.double() @ A.double() * self.lora.scale
            rows.copy_(rows.double() + update)
        return tensor if out is None else out.copy_(tensor)

    def require_base(self) -> None:
        """CheckpointError unless the base is the one that the adapters were trained on."""
        if self._fingerprint != self.reference.fingerprint:
            raise CheckpointError(
                f"{self.folder} holds adapters for other weights than those of {self.base.folder} "
                f"(fingerprint {self._fingerprint}, expected {self.reference.fingerprint}, which "
                f"lay at {self.reference.path}); name the right base (base=, or --base)"
            )

    @functools.cached_property
    def _fingerprint(self) -> str:
        return fingerprint_of(self.base)
