"""Chat rows through cleaning, tokenising, sampling and loading: masks and losses stay theirs."""

import json
import random

import numpy as np
import pytest
import torch
from pyarrow import parquet

from hrmtext.batch import PackedBatch
from hrmtext.config.base import build
from hrmtext.config.data import CleaningConfig, DataConfig, SamplingConfig, StratumRule
from hrmtext.data.clean import SourceStratum, clean
from hrmtext.data.example import Example, Turn
from hrmtext.data.format import SampledData, read_stratum
from hrmtext.data.heldout import load_rows, read_held_out, validation_batches
from hrmtext.data.inspect import inspect
from hrmtext.data.lengths import NO_ROOM
from hrmtext.data.loader import Loader
from hrmtext.data.prepare import prepare
from hrmtext.data.sample import sample
from hrmtext.data.sources.local import RowProblems, read_batches
from hrmtext.data.tokenize import tokenize_files
from hrmtext.data.turns import turns_of
from hrmtext.errors import DataError


def conversations(texts, count=60, seed=0):
    """Rows of one to four turns, some answers without loss."""
    generator = random.Random(seed)
    rows = []
    for number in range(count):
        turns = [
            Turn(*generator.sample(texts, 2), generator.random() < 0.7)
            for _ in range(generator.randrange(4))
        ]
        rows.append(Example(("direct", "synth,cot")[number % 2], *generator.sample(texts, 2),
                            tuple(turns)))  # fmt: skip
    return rows


def write(path, rows):
    path.write_text("".join(json.dumps(row.to_mapping()) + "\n" for row in rows))


@pytest.fixture(scope="module")
def rows(texts):
    return conversations(texts)


@pytest.fixture(scope="module")
def tokenized(tmp_path_factory, tokenizer, texts, rows):
    root = tmp_path_factory.mktemp("chat")
    (root / "clean").mkdir()
    write(root / "clean" / "b_chat.jsonl", rows)
    write(root / "clean" / "c_more.jsonl", conversations(texts, 20, 1))
    write(root / "clean" / "a_pairs.jsonl", [Example("direct", *texts[:2])] * 3)
    tokenize_files(root / "clean", root / "tokenized", tokenizer)
    return root / "tokenized"


def test_a_public_reader_sees_the_last_answer_and_ours_every_turn(tokenized, tokenizer, rows):
    stratum = read_stratum(tokenized / "b_chat.jsonl")
    loaded = [row for row in load_rows(tokenized) if row.stratum == "b_chat"]
    for place, row in enumerate(rows):
        turns = tokenizer.encode_turns(row.turns(), row.condition)
        a, b, c, d = (int(array[place]) for array in stratum.index)
        everything = [token for turn in turns for token in (*turn.prompt, *turn.response)]
        assert stratum.tokens[c : c + d].tolist() == list(turns[-1].response) and c == a + b
        assert stratum.tokens[a : c + d].tolist() == everything
        kept = loaded[place].turns()
        assert [turn[:2] for turn in kept] == [(list(p), list(r)) for p, r, _ in turns]
    assert not (tokenized / "a_pairs.jsonl" / "turn_count.npy").exists()
    assert not (tokenized / "a_pairs.jsonl" / "turns.npy").exists()


@pytest.mark.parametrize("part_bytes", [2_000, 9_000])
def test_turns_do_not_depend_on_the_parts_a_file_is_cut_into(
    tokenizer, texts, tmp_path, part_bytes
):
    (tmp_path / "clean").mkdir()
    pair = Example("direct", *texts[:2])
    rows = [*[pair] * 9, *conversations(texts, 20), *[pair] * 9, *conversations(texts, 9, 1)]
    write(tmp_path / "clean" / "chat.jsonl", rows)
    write(tmp_path / "clean" / "pairs.jsonl", [pair] * 30)
    tokenize_files(tmp_path / "clean", tmp_path / "whole", tokenizer, num_workers=1)
    tokenize_files(tmp_path / "clean", tmp_path / "parts", tokenizer, part_bytes=part_bytes)
    for name in ("chat.jsonl", "pairs.jsonl"):
        files = sorted(p.name for p in (tmp_path / "whole" / name).glob("*.npy"))
        assert ("turns.npy" in files) == (name == "chat.jsonl")
        assert files == sorted(p.name for p in (tmp_path / "parts" / name).glob("*.npy"))
        for file in files:
            whole, parts = (np.load(tmp_path / kind / name / file) for kind in ("whole", "parts"))
            assert whole.dtype == parts.dtype and np.array_equal(whole, parts), file
    assert [len(row.history) for row in rows] == np.load(
        tmp_path / "parts" / "chat.jsonl" / "turn_count.npy"
    ).tolist()


def test_a_budget_tells_rows_apart_that_learn_other_answers(tokenizer, texts, tmp_path):
    """Rows of the same tokens: which of them a budget takes does not depend on the files."""
    marks = [(a, b) for a in (True, False) for b in (True, False)]
    rows = [
        Example("direct", *texts[:2], (Turn(*texts[2:4], a), Turn(*texts[4:6], b)))
        for a, b in marks
    ]
    taken = []
    for order in (rows, rows[::-1]):
        root = tmp_path / str(len(taken))
        (root / "clean").mkdir(parents=True)
        write(root / "clean" / "chat.jsonl", order)
        tokenize_files(root / "clean", root / "tokenized", tokenizer)
        length = read_stratum(root / "tokenized" / "chat.jsonl").index.num_tokens // 4
        config = SamplingConfig(
            epochs=4, max_seq_len=4096, rules=(StratumRule(prefix="", tokens=length),)
        )
        sample(root / "tokenized", root / "sampled", config)
        data = SampledData.open(root / "sampled")
        epochs = [data.epoch(number) for number in range(4)]
        flags = [turns_of(epoch.extras, data.turns).of_row(0) for epoch in epochs]
        assert [epoch.num_rows for epoch in epochs] == [1] * 4
        taken.append([(first[2], second[2]) for first, second in flags])
    assert taken[0] == taken[1] and sorted(taken[0]) == sorted(marks)


def test_inspection_counts_turns(tokenized, texts, rows):
    root = tokenized.parent
    turns = sum(len(row.turns()) for row in [*rows, *conversations(texts, 20, 1)]) + 3
    for folder in (root / "clean", root / "tokenized"):
        found = inspect(folder)
        assert found.rows == 83 and found.facts["turns"].startswith(f"{turns:,} "), folder
    sample(root / "tokenized", root / "inspected", SamplingConfig(epochs=1, max_seq_len=1 << 15))
    assert inspect(root / "inspected").facts["turns"] == inspect(tokenized).facts["turns"]
    (root / "few").mkdir()
    write(root / "few" / "pairs.jsonl", [Example("direct", *texts[:2])])
    assert "turns" not in inspect(root / "few").facts


def turns_by_prompt(tokenizer, rows):
    """Token turns of rows, by all that comes before the last response."""
    found = {}
    for row in rows:
        turns = tokenizer.encode_turns(row.turns(), row.condition)
        found[tuple(t for turn in turns[:-1] for t in (*turn[0], *turn[1])) + tuple(turns[-1][0]),
              tuple(turns[-1][1])] = turns  # fmt: skip
    return found


@pytest.mark.parametrize("rule", [{}, {"tokens": 20_000}])
def test_the_loader_serves_what_the_slow_oracle_packs(
    tokenized, tokenizer, texts, rows, tmp_path, rule
):
    rules = (StratumRule(prefix="", **rule),) if rule else ()
    config = SamplingConfig(epochs=2, max_seq_len=1024, rules=rules)
    sample(tokenized, tmp_path / "sampled", config)
    data = SampledData.open(tmp_path / "sampled")
    every = [*rows, *conversations(texts, 20, 1), Example("direct", *texts[:2])]
    known = turns_by_prompt(tokenizer, every)
    loader = Loader(data, batch_tokens=4096, bin_tokens=1024, seed=0)
    several = 0
    for batch in (next(iter(loader)) for _ in range(4)):
        supervised = 0
        for packed in batch.bins:
            index = data.epoch(batch.epoch).take(np.array(packed.row_ids))
            members = [
                known[
                    tuple(data.tokens[a : a + b].tolist()), tuple(data.tokens[c : c + d].tolist())
                ]
                for a, b, c, d in zip(*index, strict=True)
            ]
            slow = PackedBatch.from_turns(members)
            assert torch.equal(packed.tokens, slow.tokens)
            assert torch.equal(packed.labels, slow.labels)
            assert torch.equal(packed.layout.visible_end, slow.layout.visible_end)
            supervised += len(packed.supervised())
            several += sum(len(turns) > 1 for turns in members)
        assert supervised == batch.num_supervised_tokens
    assert several > 20


def sampled_rows(tokenizer, tmp_path, rows, context, **settings):
    (tmp_path / "clean").mkdir()
    write(tmp_path / "clean" / "chat.jsonl", rows)
    tokenize_files(tmp_path / "clean", tmp_path / "tokenized", tokenizer)
    config = SamplingConfig(epochs=1, max_seq_len=context, **settings)
    report = sample(tmp_path / "tokenized", tmp_path / "sampled", config)
    return report.strata["chat.jsonl"], load_rows(tmp_path / "sampled")


def test_a_row_that_is_cut_in_a_later_prompt_ends_with_the_answer_before(tokenizer, tmp_path):
    turns = [Turn("what is", "the sum"), Turn("count", "the list", False), Turn("sort", "two")]
    row = Example("direct", "please " * 40, "last", tuple(turns))
    whole = tokenizer.encode_turns(row.turns(), "direct")
    ends = np.cumsum([len(part) for turn in whole for part in turn[:2]])
    fits, cut = int(ends[5]) + 3, int(ends[4]) + 1  # in the last prompt; in the third answer
    report, (loaded,) = sampled_rows(tokenizer, tmp_path, [row], fits)
    assert loaded.turns() == [(t[0], t[1], n == 2) for n, t in enumerate(whole[:3])]
    assert report.truncated_rows == 1
    # One token of the third answer is too few, and the second bears no loss: the first is left.
    (tmp_path / "again").mkdir()
    report, (loaded,) = sampled_rows(tokenizer, tmp_path / "again", [row], cut - 1)
    assert loaded.turns() == [(whole[0][0], whole[0][1], True)]


def test_rows_without_any_answer_that_fits_are_counted(tokenizer, tmp_path):
    rows = [
        Example("direct", "please " * 40, "last", (Turn("what", "is", False),)),
        Example("direct", "what", "is"),
    ]
    report, loaded = sampled_rows(tokenizer, tmp_path, rows, 20)
    assert report.dropped == {NO_ROOM: 1} and len(loaded) == 1


def test_with_long_rows_dropped_no_turn_is_cut(tokenizer, tmp_path):
    rows = [
        Example("direct", "please " * 40, "last", (Turn("what", "is"),)),
        Example("direct", "what", "is"),
    ]
    report, loaded = sampled_rows(tokenizer, tmp_path, rows, 20, long_rows="drop")
    assert sum(report.dropped.values()) == 1 and len(loaded) == 1


@pytest.mark.parametrize("name", ["turns", "turn_start", "turn_count"])
def test_a_folder_that_lost_its_turns_is_refused(tokenizer, tmp_path, rows, name):
    (tmp_path / "clean").mkdir()
    write(tmp_path / "clean" / "chat.jsonl", rows)
    tokenize_files(tmp_path / "clean", tmp_path / "tokenized", tokenizer)
    folder = tmp_path / "tokenized" / "chat.jsonl"
    (folder / "COMPLETE.json").unlink()
    values = np.load(folder / f"{name}.npy")
    (folder / f"{name}.npy").unlink()
    with pytest.raises(DataError, match="the folder is not whole"):
        read_stratum(folder)
    np.save(folder / f"{name}.npy", values + 1_000_000)
    with pytest.raises(DataError, match=r"turns\.npy"):
        read_stratum(folder)


@pytest.mark.parametrize("form", ["parquet", "jsonl"])
def test_cleaned_files_hold_a_history_only_where_a_row_has_one(tmp_path, texts, form):
    pairs = [Example("direct", text, "answer") for text in texts]
    chats = conversations(texts)
    many = [*pairs * 40, *chats]  # the first with a history comes behind a whole row group
    strata = [
        SourceStratum(name="pairs", batches=[pairs]),
        SourceStratum(name="chat", batches=[many[:11_000], many[11_000:]]),
    ]
    clean(strata, tmp_path / "clean", CleaningConfig(format=form))
    path = tmp_path / "clean" / f"pairs.{form}"
    if form == "parquet":
        assert parquet.read_schema(path).names == ["condition", "instruction", "response"]
    else:
        assert "history" not in path.read_text()
    back = list(read_batches(tmp_path / "clean" / f"chat.{form}", RowProblems(strict=True)))
    assert [row for batch in back for row in batch] == many
    assert sorted(p.name for p in (tmp_path / "clean").iterdir()) == [
        "COMPLETE.json", f"chat.{form}", f"pairs.{form}", "report.json",
    ]  # fmt: skip


def test_held_out_conversations_are_not_trained_on_nor_are_longer_ones(tmp_path, texts):
    chats = [row for row in conversations(texts, 80) if row.history]
    longer = [
        row._replace(history=(*row.history, Turn(row.instruction, row.response)),
                     instruction="and then?", response="nothing")
        for row in chats
    ]  # fmt: skip
    write(tmp_path / "chat.jsonl", chats)
    write(tmp_path / "longer.jsonl", longer)
    values = {
        "local": [
            {"path": str(tmp_path / "chat.jsonl"), "eval_size": 10},
            {"path": str(tmp_path / "longer.jsonl")},
        ],
        "tokenizer": {"vocab_size": 300},
        "sampling": {"epochs": 1, "max_seq_len": 512},
    }
    done = prepare(build(DataConfig, values, where="test"), tmp_path / "out")
    assert done.report["sources"]["train_rows_dropped_for_a_held_out_prompt"] == 20
    held_out = read_held_out(done.heldout)
    assert len(held_out) == 10 and all(row.history for row in held_out)
    rows = load_rows(done.heldout_tokenized)
    assert {len(row.blocks) for row in rows} == {len(row.history) + 1 for row in held_out}
    # Validation scores the last answer only, under the mask of all turns.
    for batch in validation_batches(rows, 1024):
        expected = sum(len(rows[i].response) for i in batch.batch.row_ids)
        assert len(batch.batch.supervised()) == expected
        ends = [end for i in batch.batch.row_ids for _, end in rows[i].blocks]
        assert set(ends) <= set(batch.batch.layout.visible_end.tolist())
