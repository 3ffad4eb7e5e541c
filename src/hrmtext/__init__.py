"""HRM-Text: train, fine-tune, evaluate, convert and serve hierarchical recurrent language models."""

__version__ = "0.1.0"
