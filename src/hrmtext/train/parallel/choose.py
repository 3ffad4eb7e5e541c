"""Which form of parallelism a run takes, and how many ranks share one copy of the weights."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

import torch

from hrmtext.config.train import TrainConfig
from hrmtext.errors import ConfigError
from hrmtext.runtime import dist
from hrmtext.runtime.log import logger

Strategy = Literal["none", "ddp", "fsdp", "hsdp"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """The ranks as a grid: `replicas` groups of `shard_size` ranks that share one copy."""

    strategy: Strategy
    replicas: int
    shard_size: int

    @property
    def is_sharded(self) -> bool:
        """Whether weights, gradients and optimizer state are spread over ranks."""
        return self.strategy in ("fsdp", "hsdp")


def choose_layout(config: TrainConfig, device: torch.device) -> Layout:
    """What `config.parallel` comes to with the ranks that are there; logs `auto`'s choice.

    Raises:
        ConfigError: the form that was asked for by name does not fit the number of ranks.
    """
    ranks = dist.world_size()
    wanted = config.parallel
    if wanted == "auto":
        if ranks == 1:
            wanted, why = "none", "there is one rank"
        elif config.lora is not None:
            wanted, why = "ddp", "adapters are small, and every rank holds the frozen weights"
        elif config.shard_size is not None and config.shard_size < ranks:
            wanted, why = "hsdp", f"shard_size={config.shard_size} of {ranks} ranks"
        elif device.type == "cuda":
            wanted, why = "fsdp", f"{ranks} ranks on CUDA"
        else:
            wanted, why = "ddp", f"{ranks} ranks on {device.type}"
        logger.info("parallel=auto: %s (%s)", wanted, why)
    if wanted == "none" and ranks > 1:
        raise ConfigError(
            f"parallel is none, but there are {ranks} ranks, which would each train a model of "
            "their own; use auto, ddp, fsdp or hsdp, or start one process"
        )
    if wanted in ("fsdp", "hsdp") and ranks == 1:
        raise ConfigError(
            f"parallel is {wanted}, but there is one rank and nothing to share; start several "
            "with torchrun --nproc-per-node N, or use parallel=auto"
        )
    if wanted == "fsdp":
        if config.shard_size not in (None, ranks):
            raise ConfigError(
                f"parallel is fsdp and shard_size {config.shard_size}, but fsdp shares the weights "
                f"over all {ranks} ranks; use parallel=hsdp, or leave shard_size out"
            )
        return Layout(strategy="fsdp", replicas=1, shard_size=ranks)
    if wanted == "hsdp":
        size = config.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", ranks))
        if ranks % size:
            raise ConfigError(
                f"shard_size is {size}, expected a divisor of the {ranks} ranks: every copy of the "
                "weights lies on as many"
            )
        return Layout(strategy="hsdp", replicas=ranks // size, shard_size=size)
    return Layout(strategy=wanted, replicas=ranks, shard_size=1)
