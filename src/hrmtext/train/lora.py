"""Low-rank adapters on the stacks of a model, put on and read off from outside.

Letters: P adapted parts of a fused projection, R rank, O rows of a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from hrmtext.artifacts.adapters import adapted_parts, from_peft
from hrmtext.config.finetune import LoraConfig
from hrmtext.config.model import ModelConfig
from hrmtext.errors import CheckpointError
from hrmtext.model import HrmLM
from hrmtext.runtime.rng import torch_generator

_LINEARS = ("attn.gqkv_proj", "attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


class LoraLinear(nn.Linear):
    """A projection whose weight is frozen, plus scale * B @ A on chosen parts of its rows.

    The weight keeps its name, so that the base's tensors fit the adapted model as they are.
    """

    def __init__(
        self, linear: nn.Linear, parts: tuple[int, ...], num_parts: int, lora: LoraConfig
    ) -> None:
        """Take over `linear`'s weight; A is not set yet, B is zero."""
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.register_parameter("bias", None)
        self.parts, self.num_parts, self.scale = parts, num_parts, lora.scale
        rows = linear.out_features // num_parts
        like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        self.lora_A = nn.Parameter(torch.empty(len(parts), lora.rank, self.in_features, **like))
        self.lora_B = nn.Parameter(torch.zeros(len(parts), rows, lora.rank, **like))

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)."""
        y = F.linear(input, self.weight)
        low = F.linear(input, self.lora_A.flatten(0, 1)) * self.scale  # (..., P * R)
        low = low.unflatten(-1, self.lora_A.shape[:2])  # (..., P, R)
        update = torch.einsum("...pr,por->...po", low, self.lora_B)  # (..., P, O)
        if len(self.parts) == self.num_parts:
            return y + update.flatten(-2)
        pieces = list(y.chunk(self.num_parts, dim=-1))
        for place, part in enumerate(self.parts):
            pieces[part] = pieces[part] + update.select(-2, place)
        return torch.cat(pieces, dim=-1)


def add_adapters(model: HrmLM, lora: LoraConfig, seed: int) -> None:
    """Freeze every weight of `model` and put fresh adapters on its stacks, in place.

    A is uniform in +-1/sqrt(in_features), drawn by (seed, name); B is zero: at first the model
    computes what it did.
    """
    model.requires_grad_(False)
    for stack in model.config.stacks:
        if lora.stacks not in ("both", stack):
            continue
        for number, block in enumerate(
            model.get_submodule(f"model.{stack}_module.layers").children()
        ):
            for inside in _LINEARS:
                name = f"model.{stack}_module.layers.{number}.{inside}"
                parts, num_parts = adapted_parts(name, lora)
                if not parts:
                    continue
                linear = block.get_submodule(inside)
                assert isinstance(linear, nn.Linear), name
                adapted = LoraLinear(linear, parts, num_parts, lora)
                _draw(adapted.lora_A, seed, name)
                block.set_submodule(inside, adapted)


@torch.no_grad()
def _draw(A: torch.Tensor, seed: int, name: str) -> None:
    if A.is_meta:
        return
    bound = A.shape[-1] ** -0.5
    drawn = torch.empty(A.shape, dtype=torch.float32)
    drawn.uniform_(-bound, bound, generator=torch_generator(seed, "lora", name))
    A.copy_(drawn)


def parameter_groups(model: HrmLM, lora: LoraConfig) -> list[dict[str, Any]]:
    """What the optimizer trains: the adapters of each stack at its own rate."""
    groups = []
    for stack in model.config.stacks:
        module = model.get_submodule(f"model.{stack}_module")
        trained = [p for p in module.parameters() if p.requires_grad]
        if trained:
            groups.append({"params": trained, "lr_scale": rate_scale(model.config, lora, stack)})
    return groups


def rate_scale(config: ModelConfig, lora: LoraConfig, stack: str) -> float:
    """Factor on the learning rate of a stack's adapters, see `LoraConfig.lr_scale`.

    Adam-atan2 moves a weight by about lr whatever the size of its gradient, and the output moves
    by that times the calls in which the weight acts, with gradient or without.
    """
    if lora.lr_scale != "auto":
        return lora.lr_scale
    H_calls, L_calls = config.H_cycles, config.H_cycles * config.L_cycles
    if config.shared_stack:
        return 1.0 / (H_calls + L_calls)
    return 1.0 / (H_calls if stack == "H" else L_calls)


def read_off(
    named: Mapping[str, torch.Tensor],
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Projection -> A (P, R, in) and B (P, O, R), from tensors by their names in the model."""
    linears = [name.removesuffix(".lora_A") for name in named if name.endswith(".lora_A")]
    return {name: (named[f"{name}.lora_A"], named[f"{name}.lora_B"]) for name in linears}


def from_file(
    tensors: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor], where: str
) -> dict[str, torch.Tensor]:
    """Adapters of a file by the names and in the shapes of the model's own, `wanted`.

    Raises:
        CheckpointError: one is missing, or is there and not wanted, or has another shape.
    """
    by_part = from_peft(tensors, where)
    found: dict[str, torch.Tensor] = {}
    for name, parts in by_part.items():
        linear = name.removesuffix(".weight")
        in_order = [parts[index] for index in sorted(parts)]
        found[f"{linear}.lora_A"] = torch.stack([A for A, _, _ in in_order])
        found[f"{linear}.lora_B"] = torch.stack([B for _, B, _ in in_order])
    shapes = {name: tensor.shape for name, tensor in found.items()}
    if shapes != {name: tensor.shape for name, tensor in wanted.items()}:
        different = sorted({*shapes} ^ {*wanted}) or [
            name for name in shapes if shapes[name] != wanted[name].shape
        ]
        raise CheckpointError(f"{where} does not fit the adapters of this run: {different[:4]}")
    return found


def count_adapters(config: ModelConfig, lora: LoraConfig) -> int:
    """Trained weights of the adapters, from the shape alone."""
    from hrmtext.model import empty_model

    model = empty_model(config, device="meta")
    add_adapters(model, lora, seed=0)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
