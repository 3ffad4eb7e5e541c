"""Answers from a model: loading, sampling, stopping, batched decoding over a KV cache."""

from hrmtext.generate.conversation import Conversation
from hrmtext.generate.load import load, model_folder
from hrmtext.generate.runner import Generated, TextModel

__all__ = ["Conversation", "Generated", "TextModel", "load", "model_folder"]
