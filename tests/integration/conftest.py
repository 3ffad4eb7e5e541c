"""One tiny trained and exported model for all tests of transformers' ecosystem."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory) -> Path:
    """A Hugging Face folder; trained in a few seconds when the first test asks for it."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from hf_tiny_run import train_and_export

    return train_and_export(tmp_path_factory.mktemp("hf_tiny_run"))
