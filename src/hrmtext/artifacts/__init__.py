"""Run folders, checkpoint layout, reading and writing weights."""

from hrmtext.artifacts.layout import RunFolder, describe_versions
from hrmtext.artifacts.weights import (
    load_model,
    load_state,
    read_config,
    read_tensors,
    save_model,
    write_tensors,
)

__all__ = [
    "RunFolder",
    "describe_versions",
    "load_model",
    "load_state",
    "read_config",
    "read_tensors",
    "save_model",
    "write_tensors",
]
