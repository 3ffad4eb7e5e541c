"""Evaluating a model that has really learnt a few rows by heart."""

import io
import json

import pytest
import torch
from rich.console import Console

from hrmtext.batch import PackedBatch
from hrmtext.config import build, preset
from hrmtext.config.evaluate import EvaluateConfig
from hrmtext.data.example import HeldOutRow
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.errors import ConfigError, DataError
from hrmtext.evaluate import evaluate
from hrmtext.generate import TextModel
from hrmtext.model import build_model, make_plan

KNOWN = {
    "animals": [("cat", "cat cat"), ("dog", "wolf"), ("cow", "wolf")],
    "numbers": [("7", "8"), ("1 2", "3")],
}


def rows_of(pairs_by_family, **changes):
    return [
        HeldOutRow(
            **{"stratum": family, "condition": "direct", "instruction": q, "response": a} | changes
        )
        for family, pairs in pairs_by_family.items()
        for q, a in pairs
    ]


@pytest.fixture(scope="module")
def model():
    """Knows KNOWN by heart, and answers `long` without ever ending."""
    tokenizer = PromptTokenizer(train_tokenizer(["cat dog cow wolf 1 2 3 7 8 long aaaa"], 290))
    lm = build_model(preset("test", vocab_size=320, max_seq_len=48), seed=0)
    pairs = [
        (tokenizer.encode_prompt(row.instruction), tokenizer.encode_response(row.response))
        for row in rows_of(KNOWN)
    ]
    pairs.append((tokenizer.encode_prompt("long"), tokenizer.encode_texts(["a" * 30])[0]))
    batch = PackedBatch.from_rows(pairs)
    plan, select = make_plan(batch.layout), batch.supervised()
    optimizer = torch.optim.Adam(lm.parameters(), lr=3e-3)
    for _ in range(150):
        logits = lm(batch.tokens, batch.positions, plan, select=select).logits
        loss = torch.nn.functional.cross_entropy(logits, batch.labels[select])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss < 0.01:
            break
    return TextModel(lm, tokenizer)


def test_what_the_model_knows_is_right_and_the_rest_is_wrong(model):
    asked = {
        "animals": KNOWN["animals"],
        "numbers": [*KNOWN["numbers"], ("7", "9"), ("long", "aaaa")],
    }
    report = evaluate(model, rows_of(asked), EvaluateConfig(max_new_tokens=12))
    animals, numbers = report.families
    assert (animals.name, animals.rows, animals.exact_match) == ("animals", 3, 1.0)
    assert (animals.majority_answer, animals.majority) == ("wolf", pytest.approx(2 / 3))
    assert (animals.low, animals.high) == pytest.approx((0.4385, 1.0), abs=1e-4)
    assert (numbers.rows, numbers.exact_match, numbers.invalid) == (4, 0.5, 0.25)
    assert report.mean["exact_match"] == 0.75
    assert report.mean["invalid"] == pytest.approx(0.125)
    assert report.mean["score"] is None
    assert report.majority_source == "held-out rows"
    assert [p.right for p in report.predictions] == [True] * 5 + [False] * 2
    assert report.predictions[-1].answer.startswith("aaaa") and not report.predictions[-1].valid


def test_the_baseline_can_come_from_training_rows(model):
    rows = rows_of(KNOWN)
    report = evaluate(model, rows, train_majority={"animals": "wolf", "numbers": "5", "more": "x"})
    assert [family.majority for family in report.families] == [pytest.approx(2 / 3), 0.0]
    assert report.majority_source == "training rows"
    with pytest.raises(DataError, match="no training answers are given for: numbers"):
        evaluate(model, rows, train_majority={"animals": "wolf"})


def test_a_cut_off_answer_is_never_right(model):
    [cut] = model.generate("long", max_new_tokens=4)
    report = evaluate(model, rows_of({"a": [("long", cut)]}), EvaluateConfig(max_new_tokens=4))
    assert report.predictions[0].answer == report.predictions[0].expected == cut
    assert (report.families[0].exact_match, report.families[0].invalid) == (0.0, 1.0)


def test_prompts_that_do_not_fit_count_as_wrong_and_are_reported(model, caplog):
    rows = rows_of({"animals": [*KNOWN["animals"], ("cat " * 40, "cat cat")]})
    report = evaluate(model, rows)
    [family] = report.families
    assert (family.rows, family.too_long, family.exact_match, family.invalid) == (4, 1, 0.75, 0.25)


def test_limits_conditions_and_depth_are_honoured(model):
    rows = rows_of(KNOWN)
    calls = []
    first = evaluate(
        model, rows, EvaluateConfig(limit=1, batch_tokens=10, max_new_tokens=8),
        progress=lambda done, total: calls.append((done, total)),
    )  # fmt: skip
    assert [family.rows for family in first.families] == [1, 1]
    assert calls == [(1, 2), (2, 2)]
    cot = evaluate(model, rows, EvaluateConfig(condition="cot", max_new_tokens=8))
    assert {p.condition for p in cot.predictions} == {"cot"}
    shallow = evaluate(model, rows, EvaluateConfig(H_cycles=1, L_cycles=1, max_new_tokens=8))
    full = evaluate(model, rows, EvaluateConfig(max_new_tokens=8))
    assert full.mean["exact_match"] == 1.0 > shallow.mean["exact_match"]
    with pytest.raises(DataError, match="unknown condition"):
        evaluate(model, rows, EvaluateConfig(condition="curt"))
    with pytest.raises(DataError, match="no held-out rows"):
        evaluate(model, [])
    with pytest.raises(ConfigError, match="limit is 0"):
        build(EvaluateConfig, {"limit": 0}, where="test")


def test_the_family_scorer_judges_rows_that_carry_its_metadata(model):
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is an optional package")
    import reasoning_gym

    entry = reasoning_gym.create_dataset("chain_sum", size=1, seed=0)[0]
    rows = rows_of({"sums": [("7", "8"), ("long", "8"), ("1 2", "3")]}, family="chain_sum")
    metadata = json.loads(json.dumps(entry["metadata"]))
    rows = [HeldOutRow(**{**vars(row), "metadata": metadata}) for row in rows[:2]] + rows[2:]
    report = evaluate(model, rows, EvaluateConfig(max_new_tokens=12))
    assert [p.score for p in report.predictions] == [1.0, 0.0, None]
    assert (report.families[0].score, report.families[0].scored_rows) == (0.5, 2)


def test_the_report_is_written_and_printed(model, tmp_path):
    report = evaluate(model, rows_of(KNOWN))
    path = report.write(tmp_path, predictions=True)
    values = json.loads(path.read_text())
    assert path.name == "evaluation.json" and values["format_version"] == 1
    keys = {"name", "exact_match", "low", "high", "majority", "rows", "invalid"}
    assert keys <= values["families"][0].keys()
    assert values["mean"]["exact_match"] == 1.0
    assert values["settings"]["interval"] == "Wilson, 95 %"
    lines = (tmp_path / "predictions.jsonl").read_text().splitlines()
    assert [json.loads(line)["expected"] for line in lines] == [
        row.response for row in rows_of(KNOWN)
    ]
    stream = io.StringIO()
    report.show(Console(file=stream, width=80))
    shown = stream.getvalue()
    for part in ("43.9-100.0", "mean of families", "family's held-out rows"):
        assert part in shown
    line = next(line for line in shown.splitlines() if "animals" in line)
    assert line.split() == ["animals", "100.0", "43.9-100.0", "66.7", "0.0", "3"]
