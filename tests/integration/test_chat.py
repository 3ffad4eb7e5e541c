"""Two commands from chat logs to a model that remembers what was said a turn ago."""

import io
import json
import random
from pathlib import Path

import pytest
import torch

import hrmtext
from hrmtext.cli.main import main
from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.config.generate import GenerateConfig
from hrmtext.data.heldout import read_held_out
from hrmtext.evaluate.run import evaluate
from hrmtext.generate import Conversation
from hrmtext.train.metrics import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
LETTERS = "abcdefgh"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def write_logs(path, count):
    """The second answer repeats the letter of the first question; half of the rows a shape."""
    generator = random.Random(3)
    with path.open("w") as stream:
        for number in range(count):
            letter = generator.choice(LETTERS)
            said = [f"{letter}{generator.randrange(1000)}", "ok", "say", letter]
            if number % 2:
                speakers = ("user", "assistant") * 2
                row = {
                    "messages": [
                        {"role": a, "content": b} for a, b in zip(speakers, said, strict=True)
                    ]
                }
            else:
                speakers = ("human", "gpt") * 2
                listed = [{"from": a, "value": b} for a, b in zip(speakers, said, strict=True)]
                row = {"conversations": listed}
            stream.write(json.dumps(row) + "\n")
        stream.write(json.dumps({"messages": [{"role": "user", "content": "unanswered"}]}) + "\n")


def test_a_tiny_model_learns_to_recall_a_word_of_an_earlier_turn(tmp_path, capsys, monkeypatch):
    write_logs(tmp_path / "logs.jsonl", 700)
    data, run = tmp_path / "data", tmp_path / "run"
    source = f"local=[{{path: {tmp_path / 'logs.jsonl'}, eval_size: 40}}]"
    prepare = ["data", "prepare", str(CONFIGS / "data" / "chat.yaml"), str(data), source]
    sizes = ["tokenizer.vocab_size=287", "sampling.max_seq_len=64"]
    assert main([*prepare, *sizes]) == 0
    report = json.loads((data / "report.json").read_text())
    assert report["clean"]["dropped"]["conversation ends without an answer"] == 1
    recipe = str(CONFIGS / "train" / "cpu_smoke.yaml")
    train = ["train", recipe, "--data", str(data), "--run", str(run)]
    overrides = ["model.preset=test", "max_steps=120", "batch_tokens=512", "lr=4e-3"]
    often = ["checkpoint_every=120", "validate_every=120", "validation_rows=40"]
    assert main([*train, *overrides, *often]) == 0
    capsys.readouterr()

    model = hrmtext.load(run, device="cpu")
    rows = read_held_out(data / "heldout")
    assert len(rows) == 40 and all(len(row.history) == 1 for row in rows)
    found = evaluate(model, rows, EvaluateConfig(max_new_tokens=4)).families[0]
    assert found.exact_match >= 0.9 and found.majority < 0.4
    validation = [line for line in read_metrics(run / "metrics.jsonl") if "ema" in line][-1]
    assert validation["ema"]["exact_answer"] >= 0.9
    assert validation["ema"]["tokens"] == 2 * 40  # the letter and its end, of the last turn only

    # The session answers as the batch does, and the answer follows from the turn before.
    for letter in "cf":
        talk = Conversation(model)
        assert talk.ask(f"{letter}512", GenerateConfig(max_new_tokens=4)).text == "ok"
        assert talk.ask("say", GenerateConfig(max_new_tokens=4)).text == letter

    command = ["chat", str(run), "--max-new-tokens", "4", "--device", "cpu"]
    monkeypatch.setattr("sys.stdin", io.StringIO("c512\nsay\n\nf512\nsay\n"))
    assert main(command) == 0
    assert capsys.readouterr().out.split() == ["ok", "c", "ok", "f"]
    speakers = ("user", "assistant", "user")
    said = [{"role": a, "content": b} for a, b in zip(speakers, ("h7", "ok", "say"), strict=True)]
    (tmp_path / "ask.jsonl").write_text(json.dumps({"messages": said}) + "\n")
    assert main([*command, "--file", str(tmp_path / "ask.jsonl")]) == 0
    assert capsys.readouterr().out.split() == ["h"]
    (tmp_path / "ask.jsonl").write_text(json.dumps({"messages": said[:2]}) + "\n")
    assert main([*command, "--file", str(tmp_path / "ask.jsonl")]) == 2
    assert "the last message is not the user's" in capsys.readouterr().err
