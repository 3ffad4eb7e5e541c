"""The loader: equal to the slow path, every row once, ranks and restarts change nothing."""

from __future__ import annotations

import dataclasses
import itertools
import json
import threading

import numpy as np
import pytest
import torch

from hrmtext.batch import IGNORE, PackedBatch
from hrmtext.config.data import SamplingConfig, StratumRule
from hrmtext.data.collate import pack_rows, padding_bin
from hrmtext.data.format import RowIndex, SampledData
from hrmtext.data.heldout import load_rows, validation_batches
from hrmtext.data.loader import Loader
from hrmtext.data.sample import sample
from hrmtext.data.tokenize import tokenize_files
from hrmtext.errors import CheckpointError, ConfigError, DataError

SIZES = {"batch_tokens": 1600, "bin_tokens": 400}


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tokenizer, texts):
    root = tmp_path_factory.mktemp("loader")
    (root / "clean").mkdir()
    for name, part in (("a", texts[:100]), ("b", texts[100:])):
        with (root / "clean" / f"{name}.jsonl").open("w") as stream:
            for i, text in enumerate(part):
                row = {"instruction": text, "response": text[: 1 + i % 50]}
                row["condition"] = ("direct", "synth,cot")[i % 2]
                stream.write(json.dumps(row) + "\n")
    tokenize_files(root / "clean", root / "tokenized", tokenizer)
    sample(root / "tokenized", root / "sampled", SamplingConfig(epochs=2, max_seq_len=256))
    return root


@pytest.fixture(scope="module")
def data(folders):
    return SampledData.open(folders / "sampled")


def take(loader, count):
    return list(itertools.islice(iter(loader), count))


def plain(batch):
    """Everything in a global batch, comparable."""
    return (
        batch.index, batch.epoch, batch.num_supervised_tokens, batch.num_tokens,
        [
            (b.tokens.tolist(), b.labels.tolist(), b.positions.tolist(), b.layout.lengths,
             b.layout.visible_end.tolist(), b.layout.num_tokens, b.row_ids)
            for b in batch.bins
        ],
    )  # fmt: skip


def same_batch(one: PackedBatch, two: PackedBatch) -> bool:
    return (
        torch.equal(one.tokens, two.tokens)
        and torch.equal(one.labels, two.labels)
        and torch.equal(one.positions, two.positions)
        and torch.equal(one.layout.visible_end, two.layout.visible_end)
        and one.layout.lengths == two.layout.lengths
        and one.layout.num_tokens == two.layout.num_tokens
        and one.row_ids == two.row_ids
        and {t.dtype for t in (one.tokens, one.labels, one.positions)} == {torch.int64}
    )


def slow_rows(data, index):
    return [
        (data.tokens[a : a + b].tolist(), data.tokens[c : c + d].tolist())
        for a, b, c, d in zip(*index, strict=True)
    ]


@pytest.mark.parametrize("prefix_lm", [True, False])
@pytest.mark.parametrize("padding", [None, 0, 37])
def test_the_fast_path_equals_from_rows(data, prefix_lm, padding):
    index = data.epoch(0)
    generator = np.random.default_rng(0)
    for count in (1, 2, 17, 200):
        which = generator.permutation(index.num_rows)[:count]
        rows = index.take(which)
        size = None if padding is None else int(rows.input_lengths().sum()) + padding
        fast = pack_rows(
            data.tokens, rows, row_ids=which, num_tokens=size, pad_token=5, prefix_lm=prefix_lm
        )
        slow = PackedBatch.from_rows(
            slow_rows(data, rows),
            num_tokens=size,
            pad_token=5,
            prefix_lm=prefix_lm,
            row_ids=tuple(which.tolist()),
        )
        assert same_batch(fast, slow)
        fast.validate(data.vocab_size)


def test_rows_whose_parts_lie_apart_are_packed_alike(data):
    index = data.epoch(0)
    # Prompts at one end of the tokens, responses at the other, as another program may lay them.
    rows = slow_rows(data, index)
    prompts = [token for prompt, _ in rows for token in prompt]
    tokens = np.array(prompts + [t for _, response in rows for t in response], np.uint16)
    apart = RowIndex(
        np.cumsum(index.inst_len) - index.inst_len,
        index.inst_len,
        len(prompts) + np.cumsum(index.resp_len) - index.resp_len,
        index.resp_len,
    )
    assert same_batch(pack_rows(tokens, apart), pack_rows(data.tokens, index))


def test_the_next_epoch_is_planned_before_this_one_ends(data, monkeypatch):
    loader = Loader(data, **SIZES, seed=1)
    planned = []
    original = loader._epoch

    def noted(number):
        planned.append((number, threading.current_thread().name))
        return original(number)

    monkeypatch.setattr(loader, "_epoch", noted)
    iterator = iter(loader)
    count = loader.num_batches(0)
    for _ in range(count):
        next(iterator)
    [thread] = [t for t in threading.enumerate() if t.name == "hrmtext-planner"] or [None]
    if thread is not None:
        thread.join()
    assert (1, "hrmtext-planner") in planned
    assert 1 in loader._planned
    assert next(iterator).epoch == 1
    iterator.close()
    assert len(loader._planned) <= 2


@pytest.mark.parametrize("size", [1, 7])
def test_a_padding_bin_bears_no_loss_and_has_one_row(data, size):
    batch = padding_bin(size)
    batch.validate(data.vocab_size)
    assert batch.labels.tolist() == [IGNORE] * size and batch.row_ids == ()
    alike = PackedBatch.from_rows([([0], [0])], num_tokens=size)
    assert same_batch(batch, dataclasses.replace(alike, labels=batch.labels))


def test_no_rows_and_too_many_are_refused(data):
    index = data.epoch(0)
    with pytest.raises(DataError, match="0 rows have 0 tokens"):
        pack_rows(data.tokens, index.take(np.empty(0, np.int64)), num_tokens=7)
    with pytest.raises(DataError, match="but the stream 7"):
        pack_rows(data.tokens, index, num_tokens=7)


def test_every_row_is_served_once_an_epoch(data):
    loader = Loader(data, **SIZES, seed=1)
    counts = [loader.num_batches(epoch) for epoch in range(3)]
    batches = take(loader, sum(counts))
    for epoch in range(3):
        own = [batch for batch in batches if batch.epoch == epoch]
        assert [batch.index for batch in own] == list(range(counts[epoch]))
        rows = [row for batch in own for packed in batch.bins for row in packed.row_ids]
        assert sorted(rows) == list(range(300))
        # And the rows are what the folder says, not only their numbers.
        index = data.epoch(epoch % 2)
        for packed in own[0].bins:
            expected = slow_rows(data, index.take(np.array(packed.row_ids)))
            inputs = [[*prompt, *response[:-1]] for prompt, response in expected]
            assert packed.tokens.tolist() == list(itertools.chain.from_iterable(inputs))
    for batch in batches:
        labels = torch.cat([packed.labels for packed in batch.bins])
        assert batch.num_supervised_tokens == int((labels != IGNORE).sum())
        assert batch.num_tokens == sum(sum(packed.layout.lengths) for packed in batch.bins)
        assert all(sum(packed.layout.lengths) <= 400 for packed in batch.bins)


def test_epochs_beyond_the_folder_cycle_with_a_new_shuffle(data):
    loader = Loader(data, **SIZES, seed=1)
    count = sum(loader.num_batches(epoch) for epoch in range(2))
    batches = take(loader, count + 1)
    assert batches[-1].epoch == 2
    assert batches[-1].bins[0].row_ids != batches[0].bins[0].row_ids


@pytest.mark.parametrize("world_size", [2, 3, 4, 5])
def test_the_order_does_not_depend_on_the_number_of_ranks(data, world_size):
    single = Loader(data, **SIZES, seed=3)
    count = single.num_batches(0) + 2
    ranks = [
        take(Loader(data, **SIZES, seed=3, rank=rank, world_size=world_size), count)
        for rank in range(world_size)
    ]
    for number, expected in enumerate(take(single, count)):
        shares = [batches[number] for batches in ranks]
        assert len({len(share.bins) for share in shares}) == 1  # every rank steps as often
        merged = [b for group in zip(*(share.bins for share in shares), strict=True) for b in group]
        filled = [packed for packed in merged if packed.row_ids]
        assert len(filled) == len(expected.bins)
        assert all(same_batch(a, b) for a, b in zip(filled, expected.bins, strict=True))
        for share in shares:
            assert share.num_supervised_tokens == expected.num_supervised_tokens
            assert (share.epoch, share.index) == (expected.epoch, expected.index)


def test_ranks_without_a_filled_bin_step_with_padding(folders, tmp_path):
    rules = (StratumRule(prefix="", max_rows=1),)  # two strata: two rows, in four bins
    config = SamplingConfig(epochs=1, max_seq_len=256, rules=rules)
    sample(folders / "tokenized", tmp_path / "two", config)
    data = SampledData.open(tmp_path / "two")
    assert len(take(Loader(data, **SIZES, seed=1), 1)[0].bins) == 2
    for pad_to, size in ((None, 1), (400, 400)):
        rows = []
        for rank in range(4):
            loader = Loader(data, **SIZES, seed=1, rank=rank, world_size=4, pad_to=pad_to)
            [packed] = take(loader, 1)[0].bins
            packed.validate(data.vocab_size)
            rows.append(packed.row_ids)
            if not packed.row_ids:
                assert packed.layout.num_tokens == size
                assert (packed.labels == IGNORE).all()
        assert sorted(map(len, rows)) == [0, 0, 1, 1]


def test_prompts_bear_loss_where_that_is_the_objective(data):
    responses, everything = (
        Loader(data, **SIZES, seed=1, prefix_lm=False, supervise_prompts=which)
        for which in (False, True)
    )
    for of_responses, of_all in zip(
        itertools.islice(responses, 3), itertools.islice(everything, 3), strict=True
    ):
        assert of_all.num_supervised_tokens == of_all.num_tokens == of_responses.num_tokens
        assert of_responses.num_supervised_tokens < of_all.num_supervised_tokens
        for some, every in zip(of_responses.bins, of_all.bins, strict=True):
            assert bool((every.labels != IGNORE).all())
            kept = some.labels != IGNORE
            assert torch.equal(every.labels[kept], some.labels[kept])
            # Every label is the row's next input token, but for its last.
            ends = torch.tensor(every.layout.lengths).cumsum(0) - 1
            inner = torch.ones(len(every.tokens) - 1, dtype=torch.bool)
            inner[ends[:-1]] = False
            assert torch.equal(every.labels[:-1][inner], every.tokens[1:][inner])


def test_order_depends_on_seed_and_epoch(data):
    first = {seed: plain(take(Loader(data, **SIZES, seed=seed), 1)[0]) for seed in (1, 2)}
    assert first[1] != first[2]
    assert first[1] == plain(take(Loader(data, **SIZES, seed=1), 1)[0])


@pytest.mark.parametrize("prefetch", [0, 3])
def test_resume_is_exact_at_every_point(data, prefetch):
    total = Loader(data, **SIZES, seed=5).num_batches(0) * 2 + 3
    whole = [plain(batch) for batch in take(Loader(data, **SIZES, seed=5), total)]
    for stop in range(0, total, 3):
        loader = Loader(data, **SIZES, seed=5, prefetch=prefetch)
        iterator = iter(loader)
        for _ in range(stop):
            next(iterator)
        state = json.loads(json.dumps(loader.state()))
        resumed = Loader(data, **SIZES, seed=5, prefetch=prefetch)
        resumed.restore(state)
        rest = [plain(batch) for batch in itertools.islice(iter(resumed), total - stop)]
        assert rest == whole[stop:]


def test_a_state_serves_any_number_of_ranks(data):
    one = Loader(data, **SIZES, seed=5)
    take(one, 4)
    two = Loader(data, **SIZES, seed=5, rank=1, world_size=2)
    two.restore(one.state())
    batch, expected = take(two, 1)[0], take(one, 1)[0]
    assert (batch.epoch, batch.index) == (expected.epoch, expected.index) == (0, 4)
    assert same_batch(batch.bins[0], expected.bins[1])


def test_states_of_other_runs_are_refused(data):
    state = Loader(data, **SIZES, seed=5).state()
    cases = {
        "fingerprint": state | {"fingerprint": "0" * 16},
        "seed": state | {"seed": 6},
        "bin_tokens": state | {"bin_tokens": 800},
        "version": {},
        "is damaged": state | {"batch": -1},
    }
    for message, bad in cases.items():
        with pytest.raises(CheckpointError, match=message):
            Loader(data, **SIZES, seed=5).restore(bad)


def test_padding_gives_every_bin_one_shape_and_the_same_rows(data):
    bare = take(Loader(data, **SIZES, seed=1), 9)
    padded = take(Loader(data, **SIZES, seed=1, pad_to=416, prefix_lm=False), 9)
    for one, two in zip(bare, padded, strict=True):
        assert [b.row_ids for b in one.bins] == [b.row_ids for b in two.bins]
        assert {b.layout.num_tokens for b in two.bins} == {416}
        for b in two.bins:
            used = sum(b.layout.lengths)
            assert (b.labels[used:] == IGNORE).all()
            assert torch.equal(b.layout.visible_end[:used], b.positions[:used] + 1)


def test_prefetching_changes_nothing_and_its_thread_ends(data):
    expected = [plain(batch) for batch in take(Loader(data, **SIZES, seed=2), 30)]
    iterator = iter(Loader(data, **SIZES, seed=2, prefetch=4))
    assert [plain(batch) for batch in itertools.islice(iterator, 30)] == expected
    iterator.close()
    assert not [t for t in threading.enumerate() if t.name == "hrmtext-prefetch"]


def test_errors_of_the_prefetch_thread_reach_the_consumer(data, monkeypatch):
    loader = Loader(data, **SIZES, seed=2, prefetch=2)
    original = loader._batch

    def breaks(epoch, index):
        if index == 3:
            raise DataError("the disk is gone")
        return original(epoch, index)

    monkeypatch.setattr(loader, "_batch", breaks)
    iterator = iter(loader)
    for _ in range(3):
        next(iterator)
    with pytest.raises(DataError, match="the disk is gone"):
        next(iterator)
    assert loader.state()["batch"] == 3


def test_sizes_that_do_not_fit_are_refused(data):
    with pytest.raises(ConfigError, match="rank is 2"):
        Loader(data, **SIZES, seed=1, rank=2, world_size=2)
    with pytest.raises(ConfigError, match="pad_to is 10"):
        Loader(data, **SIZES, seed=1, pad_to=10)
    with pytest.raises(DataError, match="a bin holds only 10"):
        take(Loader(data, batch_tokens=10, seed=1), 1)


def test_rows_for_evaluation_come_back_with_condition_and_stratum(folders, tokenizer):
    rows = load_rows(folders / "tokenized")
    assert len(rows) == 300
    assert {row.stratum for row in rows} == {"a", "b"}
    assert [row.condition for row in rows[:4]] == ["direct", "synth,cot"] * 2
    assert all(row.prompt[-1] == 7 and row.response[-1] == 11 for row in rows)
    assert len(load_rows(folders / "tokenized", limit=7)) == 14

    sampled = load_rows(folders / "sampled", limit=50)
    assert len(sampled) == 50
    known = {(tuple(row.prompt), tuple(row.response)): (row.condition, row.stratum) for row in rows}
    for row in sampled:
        assert known[tuple(row.prompt), tuple(row.response)] == (row.condition, row.stratum)
    with pytest.raises(DataError, match="no such"):
        load_rows(folders / "nowhere")


def test_validation_batches_hold_every_row_once_with_its_groups(folders):
    rows = load_rows(folders / "tokenized", limit=60)
    batches = validation_batches(rows, 500, pad_to=512)
    ids = [row for item in batches for row in item.batch.row_ids]
    assert sorted(ids) == list(range(120))
    for item in batches:
        assert item.batch.layout.num_tokens == 512
        for row, condition, stratum in zip(
            item.batch.row_ids, item.conditions, item.strata, strict=True
        ):
            assert (rows[row].condition, rows[row].stratum) == (condition, stratum)
    again = validation_batches(rows, 500, pad_to=512)
    assert all(same_batch(a.batch, b.batch) for a, b in zip(batches, again, strict=True))
