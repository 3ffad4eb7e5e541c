"""The engines: the same bytes from every one, lost workers' tasks run again, clear refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hrmtext.cli.main import main
from hrmtext.config.base import build
from hrmtext.config.data import EngineConfig
from hrmtext.data.engine import LocalEngine, open_engine
from hrmtext.errors import BackendError, ConfigError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_workers": 0}, "num_workers is 0, expected at least 1"),
        ({"address": "auto"}, "address 'auto' is of a Ray cluster, but the engine is 'local'"),
        ({"name": "ray", "address": "auto", "num_workers": 2}, "leave num_workers out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        build(EngineConfig, values, where="test")


def test_a_missing_engine_says_what_to_install(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    tokenizer.save(tmp_path / "tokenizer")
    command = ["data", "tokenize", tmp_path / "rows.jsonl", tmp_path / "tokenizer", tmp_path / "out"]
    assert main([*map(str, command), "--engine", "ray"]) == 2
    assert "pip install 'hrm-text[distributed]'" in capsys.readouterr().err
