"""The model of a run with its initial weights, on this rank's device or spread over the ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from hrmtext.config.train import TrainConfig
from hrmtext.errors import ConfigError
from hrmtext.model import HrmLM, build_model
from hrmtext.train.lora import add_adapters
from hrmtext.train.parallel import choose_layout
from hrmtext.train.precision import ComputeModel

if TYPE_CHECKING:
    from hrmtext.train.parallel.sharded import ShardedModel


def build_compute(
    config: TrainConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    master_dtype: torch.dtype = torch.float32,
) -> ComputeModel | ShardedModel:
    """Freshly initialised master weights, identical for any number of ranks, and what computes.

    Args:
        dtype: number format of forward and backward.
        master_dtype: fp32; fp64 in tests.

    Raises:
        ConfigError: `parallel` does not fit the number of ranks; adapters on fresh weights.
    """
    layout = choose_layout(config, device)
    shape = config.model.resolve()
    if not layout.is_sharded:
        model = build_model(shape, seed=config.seed, device=device, dtype=master_dtype)
        _adapt(config, model)
        return ComputeModel(model, dtype)
    from hrmtext.train.parallel.sharded import ShardedModel

    sharded = ShardedModel(shape, dtype, layout, device, master_dtype=master_dtype)
    sharded.draw(config.seed)
    return sharded


def _adapt(config: TrainConfig, model: HrmLM) -> None:
    """Put the adapters of `config.lora` on a model; nothing to do without them."""
    if config.lora is None:
        return
    if config.init_from is None:
        raise ConfigError(
            "lora trains adapters on the weights of a trained model, and init_from names none; "
            "set init_from=MODEL, or leave out lora to train all weights"
        )
    add_adapters(model, config.lora, config.seed)
