"""Validation: equal to counting by hand over dense logits, however the rows are packed."""

import os
import signal

import pytest
import torch
import torch.nn.functional as F
from memory_source import MemorySource, random_rows, small_config

from hrmtext.batch import PackedBatch
from hrmtext.config import preset
from hrmtext.data.heldout import ValidationBatch
from hrmtext.model import build_model, make_plan
from hrmtext.runtime.native import compiler
from hrmtext.train.build import build_compute
from hrmtext.train.cpp import CppBlocks
from hrmtext.train.signals import StopRequest
from hrmtext.train.source import _spread
from hrmtext.train.validate import validate, validate_both

CPU = torch.device("cpu")
CONFIG = preset("test")


@torch.no_grad()
def by_hand(model, rows, conditions):
    """Sums over single rows through the dense reference backend."""
    results = {}
    cycles = torch.zeros(CONFIG.H_cycles, dtype=torch.float64)
    num_tokens = 0
    for (prompt, response), condition in zip(rows, conditions, strict=True):
        batch = PackedBatch.from_rows([(prompt, response)])
        plan = make_plan(batch.layout, dtype=torch.float64, backend="reference")
        states = model(batch.tokens, batch.positions, plan).states
        labels = torch.tensor(response)
        for cycle, state in enumerate(states):
            logits = model.head(state)[len(prompt) - 1 :]
            cycles[cycle] += F.cross_entropy(logits, labels, reduction="sum")
        right = logits.argmax(-1) == labels
        loss = F.cross_entropy(logits, labels, reduction="sum")
        sums = results.setdefault(condition, [0, 0, 0.0, 0, 0])
        for index, value in enumerate((1, len(labels), loss, right.sum(), right.all())):
            sums[index] += float(value)
        num_tokens += len(labels)
    return results, (cycles / num_tokens).tolist()


def packed(rows, conditions, rows_per_batch):
    return [
        ValidationBatch(
            batch=PackedBatch.from_rows(rows[at : at + rows_per_batch]),
            conditions=tuple(conditions[at : at + rows_per_batch]),
            strata=tuple(["all"] * len(rows[at : at + rows_per_batch])),
        )
        for at in range(0, len(rows), rows_per_batch)
    ]


@pytest.mark.parametrize("rows_per_batch", [1, 4, 30])
def test_every_number_equals_the_count_by_hand(rows_per_batch):
    model = build_model(CONFIG, seed=0, dtype=torch.float64)
    rows = random_rows(30)
    with torch.no_grad():  # so that some answers are right: the head prefers token 0
        model.lm_head.weight[0] *= 3
    rows += [([5, 6], [0]), ([7, 8, 9], [0]), ([3, 4], [0])]
    conditions = ["cot" if len(p) % 2 else "direct" for p, _ in rows]
    expected, cycles = by_hand(model, rows, conditions)
    found = validate(
        model, packed(rows, conditions, rows_per_batch), device=CPU, dtype=torch.float64
    )
    assert found["by_condition"].keys() == expected.keys() == {"cot", "direct"}
    for name, (num_rows, tokens, loss, right, exact) in expected.items():
        part = found["by_condition"][name]
        assert (part["rows"], part["tokens"]) == (num_rows, tokens)
        assert part["loss"] == pytest.approx(loss / tokens, rel=1e-9)
        assert part["token_accuracy"] == pytest.approx(right / tokens)
        assert part["exact_answer"] == pytest.approx(exact / num_rows)
    assert found["loss_by_cycle"] == pytest.approx(cycles, rel=1e-9)
    assert found["loss_by_cycle"][-1] == pytest.approx(found["loss"])
    assert found["by_stratum"]["all"]["rows"] == found["rows"] == 33
    assert found["token_accuracy"] > 0


@pytest.mark.skipif(compiler() is None, reason="needs a C++ compiler")
def test_the_blocks_of_training_give_the_same_numbers_for_weights_and_averages():
    config = small_config(model={"preset": "test", "head_dim": 32})
    compute = build_compute(config, torch.float32, CPU)
    blocks = CppBlocks(compute.master)
    rows = random_rows(30)
    batches = packed(rows, ["direct"] * len(rows), 7)
    draw = torch.Generator().manual_seed(2)
    averages = [
        p.detach() + 0.05 * torch.randn(p.shape, generator=draw)
        for p in compute.master.parameters()
    ]
    found, expected = (
        validate_both(compute, averages, batches, config, CPU, used) for used in (blocks, None)
    )
    assert found["raw"]["loss"] != pytest.approx(found["ema"]["loss"], rel=1e-3)
    for name in ("raw", "ema"):
        assert found[name]["exact_answer"] == expected[name]["exact_answer"]
        for key in ("loss", "loss_by_cycle"):
            assert found[name][key] == pytest.approx(expected[name][key], rel=1e-5)


def test_validation_leaves_no_gradient_and_no_change():
    model = build_model(CONFIG, seed=0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    source = MemorySource([], heldout=random_rows(7))
    validate(model, source.validation(small_config()), device=CPU, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


def test_a_limit_takes_rows_from_every_stratum_in_turn():
    class Row:
        def __init__(self, stratum, number):
            self.stratum, self.number = stratum, number

    rows = [Row("a", i) for i in range(10)] + [Row("b", i) for i in range(2)]
    taken = [(row.stratum, row.number) for row in _spread(rows, 6)]
    assert taken == [("a", 0), ("a", 1), ("a", 2), ("a", 3), ("b", 0), ("b", 1)]
    assert len(_spread(rows, 100)) == 12


def test_the_first_signal_asks_and_the_second_leaves_at_once():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        assert stop.signal_name is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal_name == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before
