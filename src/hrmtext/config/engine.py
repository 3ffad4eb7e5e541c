"""Where the tasks of the data pipeline run."""

from __future__ import annotations

from typing import Literal

from hrmtext.config.base import config_class
from hrmtext.errors import ConfigError


@config_class
class EngineConfig:
    """Where the tasks of cleaning and tokenising run; the result does not depend on it."""

    name: Literal["local", "ray"] = "local"
    """local: processes of this machine; ray: a cluster, all of whose nodes see the folders."""
    address: str | None = None
    """ray: address of a running cluster, `auto` on one of its nodes; None: start one here."""
    num_workers: int | None = None
    """Processes on this machine; None: one a core, where there is enough to do."""

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 1:
            raise ConfigError(f"num_workers is {self.num_workers}, expected at least 1")
        if self.address is not None:
            if self.name != "ray":
                raise ConfigError(
                    f"address {self.address!r} is of a Ray cluster, but the engine is "
                    f"{self.name!r}; set the engine to ray, or leave the address out"
                )
            if self.num_workers is not None:
                raise ConfigError(
                    f"the Ray cluster at {self.address!r} has its own number of workers; leave "
                    "num_workers out, or the address"
                )
