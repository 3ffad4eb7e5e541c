"""`hrm-text quickstart` runs through all five stages, and goes on where it stopped."""

import json

import pytest
from rich.console import Console

from hrmtext.cli import quickstart, recipes
from hrmtext.cli.main import main
from hrmtext.train import estimate

pytest.importorskip("reasoning_gym", reason="the data extra is not installed")

DATA = """
reasoning_gym:
  eval_size: 6
  num_workers: 1
  families:
    - {name: chain_sum, size: 300}
    - {name: gcd, size: 200}
tokenizer: {vocab_size: 330}
sampling: {epochs: 1, max_seq_len: 160}
"""
TRAIN = """
model: {preset: test, vocab_size: 330, max_seq_len: 160}
epochs: 1
batch_tokens: 1024
precision: fp32
warmup_steps: 2
ema_decay: 0.5
validate_every: 0
validation_rows: 12
"""


@pytest.fixture
def small_recipes(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "train").mkdir()
    (tmp_path / "data" / "quickstart.yaml").write_text(DATA)
    (tmp_path / "train" / "quickstart.yaml").write_text(TRAIN)
    monkeypatch.setattr(recipes, "recipe", lambda name: tmp_path / name)


def test_it_trains_evaluates_exports_and_answers_and_repeats_nothing(
    small_recipes, tmp_path, capsys
):
    out = tmp_path / "out"
    assert main(["quickstart", "--out", str(out), "--device", "cpu"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "prompts that training and held-out rows share: 0" in printed
    assert "parameters in fp32; this machine needs about" in printed
    assert "checked against transformers" in printed
    assert "5/5 answers" in printed
    found = json.loads((out / "run" / "evaluation.json").read_text())
    assert {family["name"]: family["rows"] for family in found["families"]} == {
        "chain_sum": 6,
        "gcd": 6,
    }
    assert found["majority_source"] == "training rows"

    metrics = (out / "run" / "metrics.jsonl").read_text()
    assert main(["quickstart", "--out", str(out), "--device", "cpu"]) == 0
    again = " ".join(capsys.readouterr().out.split())
    assert "up to date, not repeated: clean, heldout, tokenizer, tokenized, sampled" in again
    assert (out / "run" / "metrics.jsonl").read_text() == metrics


def test_a_slow_machine_takes_fewer_steps_and_is_told_so(
    small_recipes, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    assert main(["quickstart", "--out", str(out), "--device", "cpu", "--max-minutes", "1e-5"]) == 0
    assert "shortened to 100 steps" in " ".join(capsys.readouterr().out.split())

    (tmp_path / "train" / "quickstart.yaml").write_text(f"{TRAIN}max_steps: 4000\n")
    monkeypatch.setattr(estimate, "measure_speed", lambda *_: 10_000.0)
    seconds = 4_000 * 1_024 / 10_000  # at full depth; the first fifth is shallower
    config = quickstart._train_config(Console(), out / "data", tmp_path / "run", "cpu", 3.0)
    fitting = quickstart.SAFE_SHARE * 180 / seconds * 4_000
    assert fitting <= config.max_steps <= 1.1 * fitting
    assert config.max_minutes == 3.0, "the limit holds all the same"
    config = quickstart._train_config(Console(), out / "data", tmp_path / "run", "cpu", 10.0)
    assert config.max_steps == 4_000
