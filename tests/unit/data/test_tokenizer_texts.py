"""The sample that a tokenizer is trained on: seeded, capped, of no order and no cut."""

from __future__ import annotations

import json

import numpy as np
import pytest

from hrmtext.data import tokenizer_texts
from hrmtext.data.example import Example
from hrmtext.data.tokenizer import train_tokenizer
from hrmtext.data.tokenizer_texts import TextSample, row_keys, training_texts


def write(folder, files):
    folder.mkdir(parents=True)
    for name, texts in files.items():
        with (folder / f"{name}.jsonl").open("w") as stream:
            for text in texts:
                stream.write(json.dumps({"instruction": text, "response": "r" + text}) + "\n")
    return folder


def sampled(folder, **settings):
    settings = {"max_chars": 100} | settings
    return list(training_texts(folder, TextSample(**settings)))[0::2]


TEXTS = [f"row {i} of many, {'x' * (i % 7)}" for i in range(3_000)]


def test_each_stratum_gives_its_cap_and_the_seed_decides_which(tmp_path):
    folder = write(tmp_path / "a", {"few": TEXTS[:20], "many": TEXTS[20:]})
    found = sampled(folder, max_rows_per_stratum=100)
    assert found[:20] == TEXTS[:20] and len(found) == 120 and len(set(found)) == 120
    assert found == sampled(folder, max_rows_per_stratum=100)
    other = sampled(folder, max_rows_per_stratum=100, seed=1)
    assert len(other) == 120 and len(set(other) & set(found)) < 60
    # A random sample: its mean place is that of a uniform draw, to four standard errors.
    places = np.array([TEXTS.index(text) for text in found[20:]])
    assert abs(places.mean() - 1510) < 4 * 860 / np.sqrt(100)
    assert len(sampled(folder)) == 3_000
    assert all(len(text) <= 5 for text in sampled(folder, max_chars=5))


def test_the_sample_does_not_depend_on_order_and_with_a_total_not_on_files(tmp_path):
    one = write(tmp_path / "one", {"a": TEXTS})
    turned = write(tmp_path / "turned", {"a": TEXTS[::-1]})
    split = write(tmp_path / "split", {f"f{i:02}": TEXTS[i::40] for i in range(40)})
    by_stratum = {"max_rows_per_stratum": 200}
    assert sorted(sampled(one, **by_stratum)) == sorted(sampled(turned, **by_stratum))
    expected = sorted(sampled(one, max_rows=200))
    assert len(expected) == 200
    for folder in (turned, split):
        assert sorted(sampled(folder, max_rows=200)) == expected
    assert len(sampled(split, max_rows=200, max_rows_per_stratum=3)) == 120


def test_equal_rows_count_as_often_as_they_are_drawn(tmp_path):
    folder = write(tmp_path / "a", {"a": ["same"] * 50, "b": ["same"] * 50, "c": TEXTS[:5]})
    for count in (1, 30, 60, 103):
        assert len(sampled(folder, max_rows=count)) == count
    assert len(sampled(folder, max_rows_per_stratum=7)) == 7 + 7 + 5


def test_the_sample_is_that_of_all_rows_sorted_by_their_keys(tmp_path):
    folder = write(tmp_path / "a", {"a": TEXTS[:700], "b": TEXTS[400:]})
    rows = {name: [Example("direct", t, "r" + t) for t in texts]
            for name, texts in (("a", TEXTS[:700]), ("b", TEXTS[400:]))}  # fmt: skip
    expected = []
    for texts in rows.values():
        keys = row_keys(texts, 9)
        expected += sorted(zip(keys.tolist(), texts, strict=True))[:90]
    expected = sorted(row.instruction for _, row in sorted(expected)[:120])
    settings = {"max_rows_per_stratum": 90, "max_rows": 120, "seed": 9}
    assert sorted(sampled(folder, **settings)) == expected
    parts = training_texts(folder, TextSample(max_chars=100, **settings), part_bytes=3_000)
    assert sorted(list(parts)[0::2]) == expected


def test_the_tokenizer_is_the_same_for_rows_in_another_order(tmp_path):
    one = write(tmp_path / "one", {"a": TEXTS})
    turned = write(tmp_path / "turned", {"a": TEXTS[::-1]})
    trained = [
        train_tokenizer(training_texts(f, TextSample(max_rows=900, max_chars=99)), 300).to_str()
        for f in (one, turned)
    ]
    assert trained[0] == trained[1]


@pytest.mark.parametrize("limit", [1, 10])
def test_keys_held_do_not_grow_with_the_rows(tmp_path, monkeypatch, limit):
    folder = write(tmp_path / "a", {"a": TEXTS})
    monkeypatch.setattr("hrmtext.data.sources.local.ROWS_PER_BATCH", 50)
    held = []
    first = tokenizer_texts._first
    monkeypatch.setattr(
        tokenizer_texts, "_first", lambda keys, count: held.append(len(keys)) or first(keys, count)
    )
    assert len(sampled(folder, max_rows_per_stratum=limit)) == limit
    assert max(held) <= 2 * limit + 50
