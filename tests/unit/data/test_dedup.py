"""Exact and near duplicates: found, bounded in memory, the same in every order."""

from __future__ import annotations

import random

import numpy as np
import pytest

from hrmtext.data.dedup import SeenRows, bands, near_duplicates, shingles


def test_texts_seen_are_those_of_a_set_whatever_the_batches():
    generator = random.Random(0)
    texts = [str(generator.randrange(8_000)) for _ in range(20_000)]
    seen, known = SeenRows(), set()
    expected = []
    for text in texts:
        expected.append(text not in known)
        known.add(text)
    found, at = [], 0
    for size in [1, 2, 997, 5_000, 1_000, 13_000]:
        found += seen.add(texts[at : at + size]).tolist()
        at += size
    assert found == expected
    assert len(seen) == len(known)
    assert 21 * len(seen) < seen.nbytes < 50 * len(seen)
    assert seen.add([]).tolist() == []


WORDS = [f"w{i}" for i in range(500)]


def document(generator, length=200):
    return generator.choices(WORDS, k=length)


def changed(words, generator, count):
    words = list(words)
    for at in generator.sample(range(len(words)), count):
        words[at] = "changed"
    return words


def dropped(batches, folder, threshold=0.8):
    return near_duplicates([(texts, texts) for texts in batches], threshold, folder)


def jaccard(a, b):
    a, b = set(shingles(a)), set(shingles(b))
    return len(a & b) / len(a | b)


@pytest.fixture(scope="module")
def documents():
    """300 texts: 100 different ones, 100 with 1 word in 200 changed, 100 with 40 changed."""
    generator = random.Random(1)
    originals = [document(generator) for _ in range(100)]
    near = [changed(words, generator, 1) for words in originals]
    far = [changed(words, generator, 40) for words in originals]
    return [" ".join(words) for words in originals + near + far]


def test_rows_alike_are_dropped_but_one_and_others_stay(documents, tmp_path):
    drop = dropped([documents[:250], documents[250:]], tmp_path)
    assert jaccard(documents[0], documents[100]) > 0.9
    assert max(jaccard(documents[i], documents[200 + i]) for i in range(100)) < 0.7
    assert (drop[:100] ^ drop[100:200]).all(), "one of each pair"
    assert not drop[200:].any()
    assert list(tmp_path.iterdir()) == []


def test_the_rows_kept_do_not_depend_on_the_order_or_the_batches(documents, tmp_path):
    def kept(texts, size):
        batches = [texts[at : at + size] for at in range(0, len(texts), size)]
        drop = dropped(batches, tmp_path)
        return sorted(text for text, gone in zip(texts, drop, strict=True) if not gone)

    expected = kept(documents, 300)
    for seed in range(3):
        shuffled = random.Random(seed).sample(documents, len(documents))
        assert kept(shuffled, 7 + 50 * seed) == expected


def test_a_chain_of_rows_alike_is_one_group_and_equal_rows_are_one(tmp_path):
    assert dropped([["a b c", "A  b c", "a b d"]], tmp_path).sum() == 1
    assert dropped([["same"] * 5], tmp_path).tolist() == [False] + [True] * 4
    assert dropped([], tmp_path).tolist() == []
    keys = ["direct", "synth", "cot"]
    kept = {
        tuple(key for key, gone in zip(order, drop, strict=True) if not gone)
        for order in (keys, keys[::-1], keys[1:] + keys[:1])
        for drop in [near_duplicates([(["same"] * 3, order)], 0.8, tmp_path)]
    }
    assert len(kept) == 1, "which of equal texts stays is no matter of order either"


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.99])
def test_bands_let_hardly_a_pair_at_the_threshold_pass_unseen(threshold):
    count, width = bands(threshold)
    assert count * width <= 128
    assert 1 - (1 - threshold**width) ** count >= 0.99


def test_short_texts_are_one_shingle():
    assert shingles("One  two\nTHREE") == ["one two three"]
    assert shingles("1 2 3 4 5 6") == ["1 2 3 4 5", "2 3 4 5 6"]
    assert np.unique(shingles("")).tolist() == [""]
