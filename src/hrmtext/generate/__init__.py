"""Answers from a model: sampling, stopping, batched decoding over a KV cache."""

from hrmtext.generate.runner import Generated, TextModel

__all__ = ["Generated", "TextModel"]
