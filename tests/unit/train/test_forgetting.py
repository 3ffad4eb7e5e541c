"""The forgetting check: what the base scored before the first step, beside what came of it."""

import json

import pytest
from memory_source import small_config

from hrmtext.artifacts import RunFolder
from hrmtext.cli.main import main
from hrmtext.config.base import build, to_mapping
from hrmtext.config.data import DataConfig
from hrmtext.config.train import TrainConfig
from hrmtext.data.prepare import prepare
from hrmtext.errors import ConfigError
from hrmtext.train import train
from hrmtext.train.forgetting import KIND, compare, describe
from hrmtext.train.metrics import read_metrics

SHAPE = {"preset": "test", "vocab_size": 384}


def prepared(folder, rows, tokenizer):
    file = folder.parent / f"{folder.name}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {
        "local": [{"path": str(file), "eval_size": 20}],
        "tokenizer": tokenizer,
        "sampling": {"epochs": 2, "max_seq_len": 64},
    }
    prepare(build(DataConfig, values, where="test"), folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Rows of an old and of a new task, and a run on the old one."""
    place = tmp_path_factory.mktemp("forgetting")
    letters = "abcdefgh"
    words = [a + b + c for a in letters for b in letters for c in letters][::3]
    old = prepared(
        place / "old",
        [{"instruction": f"copy {word}", "response": word} for word in words],
        {"vocab_size": 290},
    )
    new = prepared(
        place / "new",
        [{"instruction": f"last {word}", "response": word[-1]} for word in words],
        {"path": str(old / "tokenizer")},
    )
    config = small_config(model=SHAPE, epochs=2, max_steps=8, validate_every=0)
    base = train(config, data_folder=old, run_folder=place / "base", progress="none")
    return {"old": old, "new": new, "base": base}


def tuned(folders, folder, **changes):
    values = to_mapping(small_config(model=SHAPE, epochs=1, max_steps=6, validate_every=3))
    values |= {
        "init_from": str(folders["base"].checkpoint),
        "forgetting": {"data": str(folders["old"]), "rows": 15},
    }
    config = build(TrainConfig, {**values, **changes}, where="test")
    return train(config, data_folder=folders["new"], run_folder=folder, progress="lines")


def lines(folder):
    return [r for r in read_metrics(RunFolder(folder).metrics_file) if r["kind"] == KIND]


def test_before_and_after_are_logged_at_every_validation_and_over_interruptions(
    folders, tmp_path, capfd
):
    tuned(folders, tmp_path / "whole")
    shown = capfd.readouterr()
    whole = lines(tmp_path / "whole")
    assert [r["step"] for r in whole] == [0, 3, 6]
    assert whole[0]["after"] == whole[0]["before"] == whole[0]["after_raw"]
    assert all(r["before"] == whole[0]["before"] for r in whole)
    assert whole[-1]["after"]["loss"] != whole[0]["before"]["loss"]
    assert whole[0]["before"]["rows"] == 15
    assert describe(whole[-1]) in shown.out + shown.err
    assert " -> " in describe(whole[-1])
    tuned(folders, tmp_path / "parts", max_minutes=1e-9, checkpoint_every=1)
    tuned(folders, tmp_path / "parts", checkpoint_every=1)
    parts = lines(tmp_path / "parts")
    assert [r for r in parts if r["step"] in (0, 3, 6)] == whole


def test_two_models_are_compared_on_the_same_rows(folders, tmp_path, capsys):
    result = tuned(folders, tmp_path / "run", lora={"rank": 2}, forgetting=None)
    base = str(folders["base"].run_folder)
    same = compare(base, base, folders["old"], rows=10, device="cpu")
    assert same[0]["before"] == same[0]["after"] and same[0]["before"]["rows"] == 10
    assert len(same) == 2  # in total, and one stratum
    arguments = ["--data", str(folders["old"]), "--rows", "10", "--device", "cpu"]
    assert main(["forgetting", base, str(result.run_folder), *arguments]) == 0
    assert "all strata, 10 rows: loss" in capsys.readouterr().out


def test_rows_of_another_tokenizer_are_refused(folders, tmp_path):
    other = prepared(
        tmp_path / "other",
        [{"instruction": f"again {n}", "response": f"{n}"} for n in range(60)],
        {"vocab_size": 290},
    )
    with pytest.raises(ConfigError, match="made with another tokenizer"):
        tuned(folders, tmp_path / "run", forgetting={"data": str(other)})
    assert not (tmp_path / "run").exists()
