"""Overlap of benchmarks with training rows: what is found, what is not, and the statistic."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from hrmtext.config import build
from hrmtext.config.data import SamplingConfig
from hrmtext.data.contamination import (
    CONTAMINATED,
    Benchmark,
    audit,
    audit_text,
    read_benchmark,
    subset_statistics,
)
from hrmtext.data.format import read_stratum
from hrmtext.data.ngrams import Ngrams, rolling_hash, row_segments
from hrmtext.data.sample import sample
from hrmtext.data.tokenize import tokenize_files
from hrmtext.errors import ConfigError, DataError


def write_rows(path, rows):
    lines = [json.dumps({"instruction": a, "response": b}) + "\n" for a, b in rows]
    path.write_text("".join(lines))
    return path


def question(seed, words=60):
    """A question of rare words, each a few tokens long."""
    generator = random.Random(seed)
    letters = [
        "".join(generator.choices("bcdfghjklmnpqrstvwxz", k=generator.randint(3, 6)))
        for _ in range(words)
    ]
    return " ".join(letters)


@pytest.fixture
def corpus(tmp_path, tokenizer, texts):
    """Row 50 of `b` is question 0; row 20 of `a` holds 1 inside a longer answer; 2 is cut by an
    edge of rows: 12 tokens end a prompt, 12 begin the answer; of 3 all but the second half; 4 not.
    """
    questions = [question(seed) for seed in range(5)]
    rows = [(text, text[::-1]) for text in texts]
    a, b = rows[:100], rows[100:200]
    b[50] = (questions[0], "answer")
    a[20] = ("Hear this:", f"they asked: {questions[1]} And went on.")
    tail, head = tokens_of(tokenizer, questions[2], 12)
    a[30], a[31] = ("So: " + tail, head), (head, "x")
    words = questions[3].split()
    a[40] = (" ".join(words[:30]), "answer")
    folder = tmp_path / "rows"
    folder.mkdir()
    write_rows(folder / "a.jsonl", a)
    write_rows(folder / "b.jsonl", b)
    tokenize_files(folder, tmp_path / "tokenized", tokenizer)
    return tmp_path / "tokenized", questions


def tokens_of(tokenizer, text, count):
    """Two texts of `count` tokens that follow each other in the middle of a text."""
    ids = tokenizer.encode_texts([text])[0]
    middle = len(ids) // 2
    return (
        tokenizer.decode(ids[middle - count : middle]),
        tokenizer.decode(ids[middle : middle + count]),
    )


def slow_share(tokens, index, question_ids, size):
    """Oracle: sets of tuples, one prompt or response at a time."""
    held = set()
    for start, length in [
        *zip(index.inst_start, index.inst_len, strict=True),
        *zip(index.resp_start, index.resp_len, strict=True),
    ]:
        values = tokens[start : start + length].tolist()
        held |= {tuple(values[i : i + size]) for i in range(len(values) - size + 1)}
    covered = set()
    for i in range(len(question_ids) - size + 1):
        if tuple(question_ids[i : i + size]) in held:
            covered |= set(range(i, i + size))
    return len(covered) / len(question_ids)


def test_planted_overlaps_are_found_and_those_over_a_rows_edge_are_not(corpus, tokenizer):
    folder, questions = corpus
    result = audit(folder, [Benchmark(name="b", questions=tuple(questions))])
    assert result["corpus"]["rows"] == 200
    for size in (13, 20):
        found = result["benchmarks"]["b"]["ngrams"][str(size)]
        share = found["contamination"]
        assert share[0] == 1.0
        assert share[1] > 0.98, "its first token differs, as a space stands before it"
        assert share[2] == 0.0 and share[4] == 0.0
        assert 0.4 < share[3] < 0.6
        assert found["corpus_rows_matched"] == {"a": 2, "b": 1}
        assert found["questions_matched"] == 3 and found["questions_shorter"] == 0
        counts = {name: subset["questions"] for name, subset in found["subsets"].items()}
        assert counts == {"clean": 2, "not clean": 3, "not dirty": 3, "dirty": 2}
        places = [(q["question"], q["stratum"], q["row"]) for q in found["most_contaminated"]]
        assert places == [(0, "b", 50), (1, "a", 20), (3, "a", 40)]
    assert "3 of 5 questions overlap" in audit_text(result)


def test_the_audit_agrees_with_sets_of_tuples_on_text_that_repeats_itself(
    tmp_path, tokenizer, texts
):
    write_rows(tmp_path / "rows.jsonl", [(text, text[5:40]) for text in texts[:80]])
    tokenize_files(tmp_path / "rows.jsonl", tmp_path / "t", tokenizer)
    stratum = read_stratum(tmp_path / "t" / "rows.jsonl")
    questions = [" ".join(texts[i : i + 2]) for i in range(70, 90)] + ["short", texts[0][3:]]
    ids = tokenizer.encode_texts(questions)
    result = audit(
        tmp_path / "t", [Benchmark(name="b", questions=tuple(questions))], sizes=(2, 5, 13)
    )
    for size in (2, 5, 13):
        slow = [slow_share(stratum.tokens, stratum.index, q, size) for q in ids]
        found = result["benchmarks"]["b"]["ngrams"][str(size)]
        assert found["contamination"] == pytest.approx(slow, abs=1e-6)
        assert 0 < sum(slow) < len(slow)
        assert found["questions_shorter"] == sum(len(q) < size for q in ids)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 13, 20, 32])
def test_the_rolling_hash_is_the_polynomial_in_its_base(size):
    tokens = np.random.default_rng(0).integers(0, 1 << 32, 50, dtype=np.uint64)
    base = 0x9E3779B97F4A7C15
    expected = [
        sum(int(t) * base ** (size - 1 - j) for j, t in enumerate(tokens[i : i + size])) % (1 << 64)
        for i in range(len(tokens) - size + 1)
    ]
    assert rolling_hash(tokens, size, np.uint64(base)).tolist() == expected
    assert len(rolling_hash(tokens[: size - 1], size, np.uint64(base))) == 0


def test_a_hash_alone_is_no_match(monkeypatch):
    # With base 1 the hash is the sum: every order of the same tokens has the same one.
    monkeypatch.setattr("hrmtext.data.ngrams.keyed_seed", lambda *key: 0)
    ngrams = Ngrams([[1, 2, 3]], 3)
    places, numbers = ngrams.find(np.array([3, 2, 1, 2, 3], np.uint64), np.array([5]))
    assert places.tolist() == [2] and numbers.tolist() == [0]
    with pytest.raises(AssertionError, match="two n-grams one hash"):
        Ngrams([[1, 2, 3], [3, 2, 1]], 3)


def test_a_match_never_crosses_the_end_of_a_segment():
    ngrams = Ngrams([[7, 1, 2, 3, 9]], 3)
    tokens = np.array([1, 2, 3, 0, 1, 2, 3, 9, 7, 1, 2], np.uint64)
    assert ngrams.find(tokens, np.array([11]))[0].tolist() == [0, 4, 5, 8]
    assert ngrams.find(tokens, np.array([2, 8, 11]))[0].tolist() == [4, 5, 8]
    assert ngrams.find(tokens, np.array([3, 6, 7, 10, 11]))[0].tolist() == [0]


def test_pieces_of_the_corpus_hold_whole_rows_in_order(corpus):
    stratum = read_stratum(corpus[0] / "a.jsonl")
    whole = list(row_segments(stratum.tokens, stratum.index))
    pieces = list(row_segments(stratum.tokens, stratum.index, chunk=50))
    assert len(whole) == 1 and len(pieces) > 20
    assert np.array_equal(np.concatenate([piece[0] for piece in pieces]), whole[0][0])
    assert sum(len(piece[1]) for piece in pieces) == 200
    assert [first for _, _, first in pieces] == sorted({first for _, _, first in pieces})


def test_the_statistic_of_a_case_worked_out_by_hand():
    # Ten questions; S = sqrt(0.6 * 0.4). Subset of 4: sigma = sqrt(0.24 / 4 * 6 / 9) = 0.2;
    # of 6: sqrt(0.24 / 6 * 4 / 9) = 0.4 / 3. Means: all 0.6, clean 1/4, not clean 5/6,
    # not dirty 2/6, dirty 1.
    share = np.array([0, 0.1, 0.19, 0.1999, 0.2, 0.7999, 0.8, 0.9, 1.0, 1.0])
    scores = [1, 0, 0, 0, 1, 0, 1, 1, 1, 1]
    result = subset_statistics(share, scores)
    by_hand = {
        "clean": (4, 1 / 4, -0.35 / 0.2, -0.35 / np.sqrt(0.06)),
        "not clean": (6, 5 / 6, (5 / 6 - 0.6) / (0.4 / 3), (5 / 6 - 0.6) / 0.2),
        "not dirty": (6, 2 / 6, -2.0, (2 / 6 - 0.6) / 0.2),
        "dirty": (4, 1.0, 2.0, 0.4 / np.sqrt(0.06)),
    }
    for name, (count, mean, z, plain) in by_hand.items():
        subset = result["subsets"][name]
        assert subset["questions"] == count
        assert subset["mean_score"] == pytest.approx(mean)
        assert subset["z"] == pytest.approx(z)
        assert subset["z_uncorrected"] == pytest.approx(plain)
    assert result["mean_score"] == pytest.approx(0.6)
    assert result["significant"] is False, "clean stands out by 1.75 only"


def test_contamination_is_significant_only_if_all_four_subsets_stand_out():
    share = np.repeat([0.0, 0.5, 0.9], [16, 8, 16])
    scores = np.repeat([1, 0, 1, 0, 1], [4, 12, 4, 4, 16])
    result = subset_statistics(share, scores.tolist())
    assert result["significant"] is True
    assert result["subsets"]["clean"]["z"] == pytest.approx(-0.35 / np.sqrt(0.015 * 24 / 39))
    same = subset_statistics(share, [1.0] * 40)
    assert same["significant"] is None and same["subsets"]["dirty"]["z"] is None
    clean = subset_statistics(np.zeros(3), [1.0, 0.0, 1.0])
    assert clean["subsets"]["dirty"] == {
        "questions": 0, "mean_score": None, "z": None, "z_uncorrected": None,
    }  # fmt: skip
    assert clean["significant"] is None
    assert "significant" not in subset_statistics(share, None)


def test_training_rows_that_hold_a_question_are_left_out_and_counted(corpus, tmp_path):
    folder, questions = corpus
    file = tmp_path / "bench.jsonl"
    file.write_text("".join(json.dumps({"question": q}) + "\n" for q in questions))
    values = {"epochs": 1, "max_seq_len": 512, "decontaminate": {"files": [str(file)]}}
    report = sample(folder, tmp_path / "s", build(SamplingConfig, values, where="test"))
    dropped = {name: stratum.dropped for name, stratum in report.strata.items()}
    assert dropped == {"a.jsonl": {CONTAMINATED: 2}, "b.jsonl": {CONTAMINATED: 1}}
    assert report.rows_per_epoch == 197
    assert all(stratum.rows == 100 for stratum in report.strata.values())
    with pytest.raises(ConfigError, match="ngram_tokens is 2"):
        build(SamplingConfig, {"decontaminate": {"files": ["x"], "ngram_tokens": 2}}, where="t")


@pytest.mark.parametrize(("lines", "message"), [
    (["{"], "1 is not a line of JSON"),
    (['{"question": "a"}', '{"prompt": "b"}'], ":2: expected an object with a string `question`"),
    (['{"question": "a", "score": "high"}'], "score is 'high'"),
    (['{"question": "a", "score": 1}', '{"question": "b"}'], ":2: some lines have a score"),
    (["", "  "], "holds no question"),
])  # fmt: skip
def test_a_malformed_benchmark_file_is_refused(tmp_path, lines, message):
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=message):
        read_benchmark(path)
    with pytest.raises(DataError, match="no such benchmark file"):
        read_benchmark(tmp_path / "none.jsonl")
