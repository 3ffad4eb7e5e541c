"""The public Python interface: `hrmtext.load(path)` gives a `TextModel`."""

from hrmtext.generate.load import load, read_config
from hrmtext.generate.runner import Generated, TextModel

__all__ = ["Generated", "TextModel", "load", "read_config"]
