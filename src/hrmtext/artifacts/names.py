"""One table of tensor names: ours, transformers', the public training code's, llama.cpp's.

Ours are those of the released checkpoint.

A tensor of ours is one tensor elsewhere, or several of equal size that hold its rows in order.
`outside_names` goes from ours to a format, `place_of` comes back.
"""

from __future__ import annotations

import dataclasses
import re

from hrmtext.config.model import ModelConfig

FORMATS = ("fused", "split", "upstream", "gguf")
"""Ours and the released file's; transformers' own; the public training code's; llama.cpp's."""

_MODEL: dict[str, dict[str, str]] = {
    "model.embed_tokens.weight": {
        "split": "model.embed_tokens.weight",
        "upstream": "embed_tokens.embedding_weight",
        "gguf": "token_embd.weight",
    },
    "model.z_L_init": {
        "split": "model.z_L_init",
        "upstream": "model.zL_init",
        "gguf": "hrm.z_l_init",
    },
    "lm_head.weight": {
        "split": "lm_head.weight",
        "upstream": "lm_head.weight",
        "gguf": "output.weight",
    },
}
"""Tensors outside the layers."""

_LAYER: dict[str, dict[str, tuple[str, ...]]] = {
    "attn.gqkv_proj.weight": {
        "split": tuple(f"self_attn.{part}_proj.weight" for part in ("gate", "q", "k", "v")),
        "upstream": ("attn.gqkv_proj.weight",),
        "gguf": tuple(f"attn_{part}.weight" for part in ("gate", "q", "k", "v")),
    },
    "attn.o_proj.weight": {
        "split": ("self_attn.o_proj.weight",),
        "upstream": ("attn.o_proj.weight",),
        "gguf": ("attn_output.weight",),
    },
    "mlp.gate_up_proj.weight": {
        "split": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "upstream": ("mlp.gate_up_proj.weight",),
        "gguf": ("ffn_gate.weight", "ffn_up.weight"),
    },
    "mlp.down_proj.weight": {
        "split": ("mlp.down_proj.weight",),
        "upstream": ("mlp.down_proj.weight",),
        "gguf": ("ffn_down.weight",),
    },
}
"""Tensors inside a layer: the parts that hold our rows, in their order."""

SPLIT_PARTS: dict[str, tuple[str, ...]] = {name: row["split"] for name, row in _LAYER.items()}
"""Fused name inside a layer -> transformers' names, in the order of their rows."""

_PREFIX = {
    "fused": re.compile(r"model\.([HL])_module\.layers\.(\d+)\.(.+)"),
    "split": re.compile(r"model\.([HL])_module\.layers\.(\d+)\.(.+)"),
    "upstream": re.compile(r"model\.([HL])_level\.core\.layers\.(\d+)\.(.+)"),
    "gguf": re.compile(r"blk\.()(\d+)\.(.+)"),
}


@dataclasses.dataclass(frozen=True)
class Place:
    """Where an outside tensor's rows belong: part `index` of `num_parts` equal ones of `name`."""

    name: str
    index: int = 0
    num_parts: int = 1


def tensor_names(config: ModelConfig) -> list[str]:
    """Names of all tensors of a model, in the order of `HrmLM.state_dict()`."""
    layers = [
        f"model.{stack}_module.layers.{layer}.{name}"
        for stack in config.stacks
        for layer in range(config.num_layers_per_stack)
        for name in _LAYER
    ]
    return ["model.z_L_init", "model.embed_tokens.weight", *layers, "lm_head.weight"]


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors of a model by name, from its config alone."""
    width, inner = config.hidden_size, config.attention_size
    inside = {
        "attn.gqkv_proj.weight": (4 * inner, width),
        "attn.o_proj.weight": (width, inner),
        "mlp.gate_up_proj.weight": (2 * config.mlp_size, width),
        "mlp.down_proj.weight": (width, config.mlp_size),
    }
    outside: dict[str, tuple[int, ...]] = {
        "model.z_L_init": (width,),
        "model.embed_tokens.weight": (config.vocab_size, width),
        "lm_head.weight": (config.vocab_size, width),
    }
    found = {}
    for name in tensor_names(config):
        layer = _PREFIX["fused"].fullmatch(name)
        found[name] = outside[name] if layer is None else inside[layer[3]]
    return found


def outside_names(name: str, to: str, layers_per_stack: int | None = None) -> tuple[str, ...]:
    """Names that our tensor `name` has in a format: one, or its parts in the order of their rows.

    A name that the table does not know stays as it is.

    Args:
        to: one of `FORMATS`.
        layers_per_stack: needed for gguf, which numbers the layers of both stacks through.
    """
    if to == "fused":
        return (name,)
    if name in _MODEL:
        return (_MODEL[name][to],)
    layer = _PREFIX["fused"].fullmatch(name)
    if layer is None or layer[3] not in _LAYER:
        return (name,)
    stack, number, inside = layer[1], int(layer[2]), layer[3]
    if to == "gguf":
        assert layers_per_stack is not None, "gguf numbers layers through both stacks"
        prefix = f"blk.{number + (layers_per_stack if stack == 'H' else 0)}"
    elif to == "upstream":
        prefix = f"model.{stack}_level.core.layers.{number}"
    else:
        prefix = f"model.{stack}_module.layers.{number}"
    return tuple(f"{prefix}.{part}" for part in _LAYER[inside][to])


def place_of(outside: str, source: str, layers_per_stack: int | None = None) -> Place | None:
    """Where a tensor of a format belongs among ours; None where the table does not know it."""
    if source == "fused":
        layer = _PREFIX["fused"].fullmatch(outside)
        known = outside in _MODEL or (layer is not None and layer[3] in _LAYER)
        return Place(outside) if known else None
    for name, columns in _MODEL.items():
        if columns[source] == outside:
            return Place(name)
    layer = _PREFIX[source].fullmatch(outside)
    if layer is None:
        return None
    stack, number = layer[1], int(layer[2])
    if source == "gguf":
        assert layers_per_stack is not None, "gguf numbers layers through both stacks"
        stack = "L" if number < layers_per_stack else "H"
        number %= layers_per_stack
    for inside, columns in _LAYER.items():
        parts = columns[source]
        if layer[3] in parts:
            name = f"model.{stack}_module.layers.{number}.{inside}"
            return Place(name, parts.index(layer[3]), len(parts))
    return None
