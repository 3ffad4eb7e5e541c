"""Prepared folders as training reads them."""

import json

import pytest

from hrmtext.config.base import build
from hrmtext.config.data import DataConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.prepare import prepare
from hrmtext.train.source import FolderSource


@pytest.mark.parametrize("eval_size", [0, 5])
def test_a_folder_without_held_out_rows_trains_without_validation_and_says_so(
    tmp_path, caplog, eval_size
):
    rows = [{"instruction": f"add {i} and {i}", "response": str(2 * i)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "local": [{"path": str(tmp_path / "rows.jsonl"), "eval_size": eval_size}],
        "tokenizer": {"vocab_size": 287},
        "sampling": {"epochs": 1, "max_seq_len": 64},
    }
    prepare(build(DataConfig, values, where="test"), tmp_path / "out")
    config = build(
        TrainConfig, {"model": {"preset": "test", "vocab_size": 512}, "batch_tokens": 256},
        where="test",
    )  # fmt: skip
    batches = FolderSource(tmp_path / "out").validation(config)
    assert sum(len(batch.batch.row_ids) for batch in batches) == eval_size
    assert ("no held-out rows" in caplog.text) == (eval_size == 0)
