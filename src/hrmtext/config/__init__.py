"""Configuration classes; no torch below this package."""

from hrmtext.config.base import build, config_class, dump_yaml, load, nearest, to_mapping
from hrmtext.config.model import PRESETS, ModelConfig, preset

__all__ = [
    "PRESETS",
    "ModelConfig",
    "build",
    "config_class",
    "dump_yaml",
    "load",
    "nearest",
    "preset",
    "to_mapping",
]
