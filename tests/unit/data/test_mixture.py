"""Walks and mixtures: random orders without end, budgets of tokens, shuffles larger than memory."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from hrmtext.config import build
from hrmtext.config.data import SamplingConfig, StratumRule
from hrmtext.data import gather
from hrmtext.data.format import RowIndex, SampledData
from hrmtext.data.mixture import RowHasher, Walk
from hrmtext.data.sample import sample
from hrmtext.data.shuffle import Shuffle
from hrmtext.errors import ConfigError, DataError
from hrmtext.runtime.rng import keyed_seed, mix64

NAMES = ("inst_start", "inst_len", "resp_start", "resp_len")


@dataclasses.dataclass
class Piece:
    """Rows in memory."""

    ids: np.ndarray
    units: np.ndarray
    first: int

    def identities(self):
        return self.ids

    def sizes(self):
        return self.units


def pieces_of(ids, units, cuts):
    parts = zip(np.split(ids, cuts), np.split(units, cuts), strict=True)
    at = 0
    for part, sizes in parts:
        yield Piece(part.astype(np.uint64), sizes, at)
        at += len(part)


def slow_walk(seed, name, ids, units, stop):
    """Rows in the order of the walk with where each begins, by sorting every lap whole."""
    at, lap, rows = 0, 0, []
    while at < stop:
        salt = np.uint64(keyed_seed(seed, "walk", name, lap))
        for row in np.argsort(mix64(ids.astype(np.uint64) ^ salt), kind="stable"):
            rows.append((at, lap, int(row)))
            at += int(units[row])
        lap += 1
    return rows


@pytest.mark.parametrize("unit_sizes", [False, True])
def test_stretches_of_a_walk_are_those_of_sorting_every_lap(unit_sizes):
    generator = np.random.default_rng(0)
    for count, step in ((1, 3), (2, 1), (10, 4), (10, 10), (10, 25), (700, 90), (5000, 3777)):
        # A third of the rows share identities (equal rows), which then share sizes too.
        ids = np.arange(count)
        ids[generator.random(count) < 0.3] = 0
        units = np.ones(count, int) if unit_sizes else 1 + ids * 7919 % 30
        cuts = np.sort(generator.integers(0, count + 1, size=3))
        walk = Walk(5, "s", lambda c=cuts, i=ids, u=units: pieces_of(i, u, c), int(units.sum()))
        expected = slow_walk(5, "s", ids, units, 4 * step)
        for epoch in range(4):
            start, stop = walk.cut(epoch * step), walk.cut((epoch + 1) * step)
            found = []
            for piece, lap, which in walk.between(start, stop):
                which = range(len(piece.ids)) if which is None else which.tolist()
                found += [(lap, piece.first + row) for row in which]
            wanted = [
                (lap, row) for at, lap, row in expected if epoch * step <= at < (epoch + 1) * step
            ]
            assert sorted(found) == sorted(wanted)


def test_each_lap_has_every_row_once_in_an_order_of_its_own():
    ids, units = np.arange(50), np.ones(50, int)
    walk = Walk(3, "s", lambda: pieces_of(ids, units, [20]), 50)
    firsts = []
    for lap in range(3):
        rows = [
            piece.first + row
            for start in range(0, 50, 10)
            for piece, _, which in walk.between(
                walk.cut(lap * 50 + start), walk.cut(lap * 50 + start + 10)
            )
            for row in which.tolist()
        ]
        assert sorted(rows) == list(range(50))
        firsts.append(sorted(rows[:10]))
    assert len({tuple(first) for first in firsts}) == 3


def test_equal_rows_have_equal_hashes_wherever_they_lie():
    generator = np.random.default_rng(1)
    tokens = generator.integers(0, 300, 3000).astype(np.uint32)
    lengths = generator.integers(1, 20, size=(100, 2))
    starts = np.cumsum(lengths).reshape(-1, 2) - lengths
    index = RowIndex(starts[:, 0], lengths[:, 0], starts[:, 1], lengths[:, 1])
    hasher = RowHasher(300)
    hashes = hasher(tokens, index)
    assert len(set(hashes.tolist())) == 100
    order = generator.permutation(100)
    assert np.array_equal(hasher(tokens, index.take(order)), hashes[order])
    moved = np.concatenate([np.zeros(7, np.uint32), tokens])
    shifted = RowIndex(index.inst_start + 7, index.inst_len, index.resp_start + 7, index.resp_len)
    assert np.array_equal(hasher(moved, shifted), hashes)
    # The same tokens with the edge between prompt and response elsewhere are another row.
    row = index.take(slice(0, 1))
    other = RowIndex(row.inst_start, row.inst_len + 1, row.resp_start + 1, row.resp_len - 1)
    assert hasher(tokens, other)[0] != hashes[0]
    for at in range(int(row.inst_len[0])):
        changed = tokens.copy()
        changed[at] += 1
        assert hasher(changed, row)[0] != hashes[0]


def test_a_row_longer_than_a_hash_chunk_has_a_hash_of_all_its_tokens(monkeypatch):
    tokens = np.random.default_rng(2).integers(0, 9, 2500).astype(np.uint16)
    index = RowIndex(*(np.array([value]) for value in (0, 30, 30, 2470)))
    whole = RowHasher(9)(tokens, index)
    monkeypatch.setattr("hrmtext.data.mixture.TOKENS_PER_HASH", 1000)
    assert np.array_equal(RowHasher(9)(tokens, index), whole)


@pytest.mark.parametrize("rows_per_bucket", [1000, 64])
def test_a_shuffle_on_disk_keeps_every_row_and_does_not_depend_on_portions(
    tmp_path, monkeypatch, rows_per_bucket
):
    monkeypatch.setattr("hrmtext.data.shuffle.ROWS_PER_FLUSH", 50)
    rows = np.array([(i, -i) for i in range(700)], dtype=[("a", "<i8"), ("b", "<i4")])

    def shuffled(seed, portion):
        options = {"rows_per_bucket": rows_per_bucket}
        with Shuffle(tmp_path, rows.dtype, 700, seed, "epoch", 1, **options) as shuffle:
            for at in range(0, 700, portion):
                shuffle.add(rows[at : at + portion])
            found = np.concatenate(list(shuffle))
        assert not list(tmp_path.iterdir())
        return found

    one = shuffled(1, 13)
    assert np.array_equal(np.sort(one, order="a"), rows) and not np.array_equal(one, rows)
    assert np.array_equal(one, shuffled(1, 700))
    assert not np.array_equal(one, shuffled(2, 700))


def test_every_place_of_a_shuffle_is_as_likely_for_every_row(tmp_path, monkeypatch):
    monkeypatch.setattr("hrmtext.data.shuffle.ROWS_PER_FLUSH", 3)
    counts = np.zeros((8, 8))
    for seed in range(400):
        with Shuffle(tmp_path, np.int64, 8, seed, "e", rows_per_bucket=2) as shuffle:
            shuffle.add(np.arange(8))
            counts[np.concatenate(list(shuffle)), np.arange(8)] += 1
    # Chi-square with 49 degrees of freedom: 85.4 is its 99.9th percentile.
    assert ((counts - 50) ** 2 / 50).sum() < 85.4


def write_strata(root, rows, names, generator=None):
    """A tokenised folder with `rows` (prompt, response) dealt to the strata `names`."""
    root.mkdir(parents=True)
    dealt = {name: [] for name in names}
    for number, row in enumerate(rows):
        which = number % len(names) if generator is None else generator.integers(len(names))
        dealt[names[which]].append(row)
    for name, own in dealt.items():
        (root / name).mkdir()
        flat = [token for row in own for part in row for token in part]
        lengths = np.array([len(part) for row in own for part in row], dtype=np.uint64)
        starts = np.cumsum(lengths, dtype=np.uint64) - lengths
        np.save(root / name / "tokens.npy", np.array(flat, np.uint32))
        columns = (starts[0::2], lengths[0::2], starts[1::2], lengths[1::2])
        for column, values in zip(NAMES, columns, strict=True):
            np.save(root / name / f"{column}.npy", values)
        (root / name / "metadata.json").write_text('{"source_mtime": 1, "source_size": 2}')
    (root / "tokenizer_info.json").write_text('{"vocab_size": 500}')
    return root


def random_rows(count, seed=0):
    generator = np.random.default_rng(seed)
    lengths = np.exp(generator.normal(2.5, 0.8, size=(count, 2))).astype(int).clip(2, 120)
    return [
        (generator.integers(0, 500, a).tolist(), generator.integers(0, 500, b).tolist())
        for a, b in lengths.tolist()
    ]


def rows_of(folder, epoch, number=None):
    data = SampledData.open(folder)
    index = data.epoch(epoch)
    if number is not None:
        index = index.take(np.isin(data.stratum_ids(epoch), number))
    return sorted(
        (tuple(data.tokens[a : a + b].tolist()), tuple(data.tokens[c : c + d].tolist()))
        for a, b, c, d in zip(*index, strict=True)
    )


def test_a_budget_takes_the_same_rows_from_one_file_or_a_thousand(tmp_path):
    rows = random_rows(6000)
    rows += rows[:500] + rows[:1] * 50  # equal rows too
    other = random_rows(300, seed=1)
    tokens = sum(len(a) + len(b) for a, b in rows)
    rules = (
        StratumRule(prefix="big", share=3.0),
        StratumRule(prefix="small", share=1.0),
    )
    config = SamplingConfig(
        rules=rules, total_tokens=tokens, epochs=3, max_seq_len=180, min_response_tokens=2
    )
    one = write_strata(tmp_path / "one", rows, ["big"])
    write_strata(tmp_path / "one" / "x", other, ["small"])
    (tmp_path / "one" / "x" / "small").rename(tmp_path / "one" / "small")
    (tmp_path / "one" / "x" / "tokenizer_info.json").unlink()
    (tmp_path / "one" / "x").rmdir()
    many = write_strata(
        tmp_path / "many", rows, [f"big__{i:03}" for i in range(993)], np.random.default_rng(3)
    )
    write_strata(tmp_path / "m", other, [f"small__{i}" for i in range(7)])
    for folder in (tmp_path / "m").glob("small*"):
        folder.rename(many / folder.name)

    single = sample(one, tmp_path / "s1", config)
    spread = sample(many, tmp_path / "s1000", config)
    names = SampledData.open(tmp_path / "s1000").strata()
    for prefix, share in (("big", 0.75), ("small", 0.25)):
        a, b = single.sources[prefix], spread.sources[prefix]
        assert a == b and a.planned_tokens == round(tokens * share)
        for realised in a.epoch_tokens:
            assert abs(realised - a.planned_tokens) <= 181  # a row's length
        assert abs(sum(a.epoch_tokens) - 3 * a.planned_tokens) <= 181  # and it does not add up
        assert max(a.epoch_tokens) / min(b.epoch_tokens) < 1.001 or prefix == "small"
        which = [i for i, name in enumerate(names) if name.startswith(prefix)]
        for epoch in range(3):
            here = rows_of(tmp_path / "s1", epoch, ["big", "small"].index(prefix))
            assert here == rows_of(tmp_path / "s1000", epoch, which)
    # 75 % of all its tokens an epoch: the second epoch first takes the quarter that is left.
    first = rows_of(tmp_path / "s1", 0, 0)
    second = rows_of(tmp_path / "s1", 1, 0)
    assert len(set(first) | set(second)) == len({(tuple(a), tuple(b)) for a, b in rows})


def test_a_budget_larger_than_the_source_repeats_it_evenly(tmp_path):
    rows = random_rows(40)
    tokens = sum(len(a) + len(b) for a, b in rows)
    root = write_strata(tmp_path / "t", rows, ["a", "b"])
    rules = (StratumRule(prefix="", tokens=5 * tokens // 2),)
    report = sample(root, tmp_path / "s", SamplingConfig(rules=rules, epochs=2, max_seq_len=300))
    for epoch in range(2):
        found = rows_of(tmp_path / "s", epoch)
        counts = [len(list(group)) for _, group in itertools.groupby(found)]
        assert set(counts) == {2, 3} and len(counts) == 40
    assert sum(report.epoch_tokens) == 5 * tokens


def test_memory_limits_change_nothing(tmp_path, monkeypatch):
    root = write_strata(tmp_path / "t", random_rows(900), ["a", "b", "c"])
    rules = (StratumRule(prefix="a", max_rows=70), StratumRule(prefix="b", tokens=3000))
    config = SamplingConfig(rules=rules, epochs=3, max_seq_len=300)
    whole = sample(root, tmp_path / "whole", config)
    monkeypatch.setattr(gather, "ROWS_PER_PIECE", 37)
    monkeypatch.setattr(gather, "TOKENS_PER_COPY", 100)
    monkeypatch.setattr("hrmtext.data.mixture.TOKENS_PER_HASH", 256)
    assert sample(root, tmp_path / "pieces", config) == whole
    for path in (tmp_path / "whole").rglob("*"):
        twin = tmp_path / "pieces" / path.relative_to(tmp_path / "whole")
        assert path.is_dir() or path.read_bytes() == twin.read_bytes()


PUBLISHED_RULES = (
    # The published caps and repeats of an epoch, file by file.
    {"prefix": "flan__cot_"},
    {"prefix": "flan__", "max_rows": 5_000},
    {"prefix": "tasksource__", "max_rows": 10_000},
    {"prefix": "synth__", "max_rows": 20_000},
    {"prefix": "amps__mathematica__", "max_rows": 10_000},
    {"prefix": "dm_mathematics__", "max_rows": 100_000},
    {"prefix": "sudoku_extreme", "max_rows": 1_000_000},
    {"prefix": "acereason", "max_rows": 2_000_000},
    {"prefix": "openthoughts2", "max_rows": 500_000},
    {"prefix": "openmathinstruct2", "max_rows": 2_000_000},
    {"prefix": "platypus", "repeat": 10},
    {"prefix": "gsm8k", "repeat": 10},
)


def test_published_caps_give_the_published_counts(tmp_path):
    scale = 1_000  # caps and strata a thousandth of the published size
    sizes = {
        "flan__cot_gsm8k": 7_000, "flan__niv2_task1": 9_000, "flan__t0_task2": 4_000,
        "tasksource__anli": 25_000, "synth__000": 40_000, "synth__001": 12_000,
        "amps__mathematica__algebra": 11_000, "amps__khan": 11_000, "dm_mathematics__add": 210_000,
        "sudoku_extreme": 1_100_000, "acereason": 2_600_000, "openthoughts2": 400_000,
        "openmathinstruct2__0": 2_500_000, "platypus": 24_000, "gsm8k": 7_000, "numina": 30_000,
    }  # fmt: skip
    expected = {
        "flan__cot_gsm8k": 7_000, "flan__niv2_task1": 5_000, "flan__t0_task2": 4_000,
        "tasksource__anli": 10_000, "synth__000": 20_000, "synth__001": 12_000,
        "amps__mathematica__algebra": 10_000, "amps__khan": 11_000, "dm_mathematics__add": 100_000,
        "sudoku_extreme": 1_000_000, "acereason": 2_000_000, "openthoughts2": 400_000,
        "openmathinstruct2__0": 2_000_000, "platypus": 240_000, "gsm8k": 70_000, "numina": 30_000,
    }  # fmt: skip
    for name, size in sizes.items():
        write_strata(tmp_path / name, [([1, 2], [3, 4])] * (size // scale), [name])
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / name / name).rename(tmp_path / "t" / name)
    (tmp_path / "t" / "tokenizer_info.json").write_text('{"vocab_size": 500}')
    rules = [
        rule | {"max_rows": rule["max_rows"] // scale} if "max_rows" in rule else rule
        for rule in PUBLISHED_RULES
    ]
    config = build(SamplingConfig, {"rules": rules, "epochs": 4}, where="test")
    report = sample(tmp_path / "t", tmp_path / "s", config)
    data = SampledData.open(tmp_path / "s")
    for epoch in range(4):
        counts = np.bincount(data.stratum_ids(epoch), minlength=len(sizes))
        assert dict(zip(data.strata(), (counts * scale).tolist(), strict=True)) == expected
        # A row comes twice in a capped epoch only where a lap ends within it.
        index, ids = data.epoch(epoch), data.stratum_ids(epoch)
        for number, name in enumerate(data.strata()):
            _, times = np.unique(index.inst_start[ids == number], return_counts=True)
            whole = {10} if name in ("platypus", "gsm8k") else {1}
            ends_within = sizes[name] > expected[name] and epoch > 0
            assert set(times.tolist()) <= (whole | {2} if ends_within else whole)
    # Four epochs of 5 of 9 rows: all rows are seen, and none a third time before.
    assert report.strata["flan__niv2_task1"].covered_rows == 9


def test_budgets_that_make_no_sense_are_refused(tmp_path):
    cases = {
        "total_tokens": {"rules": [{"prefix": "", "share": 1}]},
        "no rule states a share": {"total_tokens": 5},
        "state one of them": {"rules": [{"prefix": "", "tokens": 5, "max_rows": 5}]},
        "tokens and share": {"rules": [{"prefix": "", "tokens": 5, "share": 1}], "total_tokens": 5},
        "expected above 0": {"rules": [{"prefix": "", "share": 0}], "total_tokens": 5},
    }
    for message, values in cases.items():
        with pytest.raises(ConfigError, match=message):
            build(SamplingConfig, values, where="test")
    root = write_strata(tmp_path / "t", [([1, 2], [3]), ([1], [2, 3])], ["a", "b"])
    rules = (StratumRule(prefix="a", tokens=10),)
    with pytest.raises(DataError, match="source 'a' has a budget of tokens, but no usable row"):
        sample(root, tmp_path / "s", SamplingConfig(rules=rules))
