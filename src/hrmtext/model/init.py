"""Building a model and its initial weights: identical for any device and any world size."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from hrmtext.config.model import ModelConfig
from hrmtext.errors import ConfigError
from hrmtext.model.hrm import HrmLM
from hrmtext.runtime.rng import torch_generator

CUT = 3.0
"""Normals are cut at this many sigma and rescaled to keep their std."""
_DENSITY = math.exp(-0.5 * CUT**2) / math.sqrt(2 * math.pi)
CUT_STD = math.sqrt(1 - 2 * CUT * _DENSITY / math.erf(CUT / math.sqrt(2)))
"""Std of a standard normal that is cut at CUT."""


def build_model(
    config: ModelConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> HrmLM:
    """A freshly initialised model: built without memory, materialised on `device`, then drawn."""
    model = empty_model(config, device=device, dtype=dtype)
    init_weights(model, seed)
    return model


def empty_model(
    config: ModelConfig, *, device: torch.device | str, dtype: torch.dtype = torch.float32
) -> HrmLM:
    """A model whose weights are allocated on `device` ("meta": not even that) but not set."""
    with torch.device("meta"):
        model = HrmLM(config).to(dtype)
    if str(device) == "meta":
        return model
    # What `to_empty` does, whose `empty_like` of a meta tensor imports sympy, a second.
    return model._apply(lambda t: torch.empty(t.shape, dtype=t.dtype, device=device))


@torch.no_grad()
def init_weights(model: HrmLM, seed: int) -> None:
    """Draw every weight by its own generator, keyed by (seed, name), in fp32 on the CPU.

    | weight                     | truncated normal, std  |
    | embed_tokens, lm_head      | 1/sqrt(hidden_size)    |
    | gqkv_proj, gate_up_proj    | 1/sqrt(hidden_size)    |
    | o_proj                     | 1/sqrt(num_heads * head_dim) |
    | down_proj                  | 1/sqrt(intermediate_size) |
    | z_L_init                   | 1                      |

    All but the embedding are 1/sqrt(fan_in). Source: paper and public training code.
    """
    for (_, drawn), weight in zip(
        initial_weights(model, seed), model.state_dict().values(), strict=True
    ):
        weight.copy_(drawn)


@torch.no_grad()
def initial_weights(model: HrmLM, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and whole tensors of `init_weights`, one after the other, fp32 on the CPU.

    Only the shapes of `model` matter; it may lie on meta, or be spread over ranks.
    """
    for name, weight in model.state_dict().items():
        generator = torch_generator(seed, "init", name)
        drawn = torch.empty(weight.shape, dtype=torch.float32)
        torch.nn.init.trunc_normal_(drawn, 0.0, 1.0, -CUT, CUT, generator=generator)
        yield name, drawn.mul_(_std(name, weight) / CUT_STD)


def _std(name: str, weight: torch.Tensor) -> float:
    if name.endswith("z_L_init"):
        return 1.0
    if weight.dim() != 2:
        raise ConfigError(f"no initialisation is defined for {name} of shape {tuple(weight.shape)}")
    return weight.shape[1] ** -0.5  # fan-in of a projection, width of the embedding
