"""Hugging Face folders: config.json both ways, and tensors in both layouts that are in the wild.

Fused (the released file; our own parameter names) keeps gate, q, k, v in one matrix, and gate and
up in another; split (transformers' own parameters) keeps each apart.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hrmtext.artifacts.names import SPLIT_PARTS, outside_names, place_of
from hrmtext.config.base import build
from hrmtext.config.model import ModelConfig
from hrmtext.errors import CheckpointError, ConfigError

MODEL_TYPE = "hrm_text"
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
LAYOUTS = ("fused", "split")
PARTS = SPLIT_PARTS

# transformers' defaults for keys that a config.json may leave out.
_DEFAULTS: dict[str, Any] = {
    "vocab_size": 151_808,
    "hidden_size": 1_536,
    "intermediate_size": 4_096,
    "num_hidden_layers": 16,
    "num_attention_heads": 12,
    "head_dim": 128,
    "H_cycles": 2,
    "L_cycles": 3,
    "max_position_embeddings": 2_048,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
    "prefix_lm": True,
}


def is_hf_folder(path: str | Path) -> bool:
    """Whether `path` holds a config.json of model type hrm_text."""
    try:
        values = json.loads((Path(path) / CONFIG_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(values, dict) and values.get("model_type") == MODEL_TYPE


def to_hf_config(
    config: ModelConfig, *, dtype: str = "float32", L_bp_cycles: Sequence[int] | None = None
) -> dict[str, Any]:
    """The values of a config.json that transformers, vLLM and we read alike.

    Args:
        dtype: number format of the weights beside it, by torch's name.
        L_bp_cycles: transformers' training-time gradient routing; None: its default.

    Raises:
        ConfigError: a shape that transformers cannot express.
    """
    config.require_hrm("a Hugging Face folder")
    if config.hidden_size % config.num_heads:
        raise ConfigError(
            f"hidden_size {config.hidden_size} is no multiple of num_heads {config.num_heads}; "
            "transformers refuses such a model, so it cannot be exported"
        )
    if L_bp_cycles is None:
        L_bp_cycles = default_routing(config)
    return {
        "architectures": ["HrmTextForCausalLM"],
        "model_type": MODEL_TYPE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.mlp_size,
        # transformers' count of KV slots; num_layers_per_stack is the real number of layers.
        "num_hidden_layers": config.num_slots,
        "num_layers_per_stack": config.num_layers_per_stack,
        "num_attention_heads": config.num_heads,
        "head_dim": config.head_dim,
        "H_cycles": config.H_cycles,
        "L_cycles": config.L_cycles,
        "L_bp_cycles": list(L_bp_cycles),
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "initializer_range": config.hidden_size**-0.5,
        "embedding_scale": config.scale,
        "prefix_lm": config.prefix_lm,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "dtype": dtype,
    }


def default_routing(config: ModelConfig) -> list[int]:
    """transformers' `L_bp_cycles` where nothing else is known."""
    return [min(2, config.L_cycles)]


def from_hf_config(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The ModelConfig of a config.json, transformers' defaults filled in.

    `num_hidden_layers` without `num_layers_per_stack` counts the layers of one stack.

    Raises:
        CheckpointError: another model type, or a feature that HRM-Text as built here has not
            (another rotary type, biases, another activation, tied or grouped weights).
    """
    _refuse_unsupported(values, where)
    get = {**_DEFAULTS, **{key: value for key, value in values.items() if value is not None}}
    layers = get.get("num_layers_per_stack")
    if layers is None:
        layers = get["num_hidden_layers"]
    else:
        slots = layers * get["H_cycles"] * (get["L_cycles"] + 1)
        if get["num_hidden_layers"] != slots and "num_hidden_layers" in values:
            raise CheckpointError(
                f"{where}: num_layers_per_stack {layers} at {get['H_cycles']} x "
                f"({get['L_cycles']} + 1) stack calls gives {slots} slots, but num_hidden_layers "
                f"says {get['num_hidden_layers']}"
            )
    scale = get.get("embedding_scale")
    fields = {
        "vocab_size": get["vocab_size"],
        "hidden_size": get["hidden_size"],
        "num_layers_per_stack": layers,
        "num_heads": get["num_attention_heads"],
        "head_dim": get["head_dim"],
        "intermediate_size": get["intermediate_size"],
        "H_cycles": get["H_cycles"],
        "L_cycles": get["L_cycles"],
        "max_seq_len": get["max_position_embeddings"],
        "rope_theta": float(_rope_theta(values)),
        "rms_norm_eps": get["rms_norm_eps"],
        "embedding_scale": 1.0 / get["initializer_range"] if scale is None else scale,
        "prefix_lm": get["prefix_lm"],
    }
    try:
        return build(ModelConfig, fields, where=where).canonical()
    except ConfigError as error:
        raise CheckpointError(str(error)) from None


def gradient_routing(values: Mapping[str, Any]) -> list[int] | None:
    """`L_bp_cycles` of a config.json (`L_bp_steps` in older files); None where it has neither."""
    found = values.get("L_bp_cycles", values.get("L_bp_steps"))
    if found is None:
        return None
    return [int(found)] if isinstance(found, int) else [int(entry) for entry in found]


def to_split(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Fused tensors by their split names; views of the same memory."""
    split = {}
    for name, tensor in state.items():
        parts = outside_names(name, "split")
        split.update(zip(parts, tensor.chunk(len(parts)) if parts[1:] else [tensor], strict=True))
    return split


def to_fused(state: Mapping[str, torch.Tensor], where: str = "weights") -> dict[str, torch.Tensor]:
    """Split, fused or mixed tensors by their fused names, which are those of `HrmLM`.

    Raises:
        CheckpointError: a fused matrix of which only some parts are there.
    """
    fused: dict[str, torch.Tensor] = {}
    parts_of: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        place = place_of(name, "split")
        if place is None or place.num_parts == 1:
            fused[name if place is None else place.name] = tensor
        else:
            parts_of.setdefault(place.name, {})[name] = tensor
    for target, found in parts_of.items():
        wanted = outside_names(target, "split")
        missing = [part for part in wanted if part not in found]
        if missing:
            raise CheckpointError(f"{where}: {target} lacks its part {', '.join(missing)}")
        fused[target] = torch.cat([found[part] for part in wanted])
    return fused


def read_hf_values(folder: str | Path) -> dict[str, Any]:
    """The content of config.json; CheckpointError where it is missing or no JSON mapping."""
    path = Path(folder) / CONFIG_FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG_FILE}; expected a model folder") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a mapping, got {type(values).__name__}")
    return values


def _rope_theta(values: Mapping[str, Any]) -> float:
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    return parameters.get("rope_theta", values.get("rope_theta") or 10_000.0)


def _refuse_unsupported(values: Mapping[str, Any], where: str) -> None:
    if values.get("model_type") != MODEL_TYPE:
        raise CheckpointError(
            f"{where}: model_type is {values.get('model_type')!r}, expected {MODEL_TYPE!r}"
        )
    for key in ("rope_parameters", "rope_scaling"):
        rope = values.get(key) or {}
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"{where}: rotary type {kind!r} is not supported, only 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"{where}: partial rotary embedding is not supported")
    plain = {
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "num_key_value_heads": values.get("num_attention_heads", _DEFAULTS["num_attention_heads"]),
    }
    for key, only in plain.items():
        found = values.get(key)
        if found is not None and found != only:
            raise CheckpointError(f"{where}: {key} is {found!r}, only {only!r} is supported")
