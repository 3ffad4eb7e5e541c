"""Cleaning rules: every reason counted with samples, every change counted, nothing by order."""

from __future__ import annotations

import random

import pytest
from snapshots import snapshot

from hrmtext.config import build
from hrmtext.config.data import CleaningConfig
from hrmtext.data import clean_parts
from hrmtext.data.clean import SourceStratum, clean
from hrmtext.data.clean_rows import tidy
from hrmtext.data.example import Example, Turn
from hrmtext.data.sources.local import RowProblems, find_files, read_batches
from hrmtext.errors import ConfigError, DataError

ROW = Example("synth,cot", "How many?", "four")


def config(**values):
    return build(CleaningConfig, values, where="test")


def rows_of(folder):
    return [
        row
        for path in find_files(folder).values()
        for batch in read_batches(path, RowProblems(strict=True))
        for row in batch
    ]


@pytest.mark.parametrize(("settings", "response", "result"), [
    ({"remove_thinking": True}, "<think>2+2</think>\nfour", "four"),
    ({"remove_thinking": True}, "<think>2+2", "thinking does not end"),
    ({"remove_thinking": True}, "<think>2+2</think>", "nothing but thinking"),
    ({}, "<think>2+2</think>\nfour", "<think>2+2</think>\nfour"),
    ({"boxed_answers": "require"}, r"so \boxed{4}", r"so \boxed{4}"),
    ({"boxed_answers": "extract"}, r"so \boxed{\frac{8}{2}}", r"\frac{8}{2}"),
    ({"boxed_answers": "extract"}, "so four", "no boxed answer"),
    ({"boxed_answers": "extract"}, r"so \boxed{ }", "no boxed answer"),
    ({"boxed_answers": "extract", "remove_thinking": True},
     r"<think>\boxed{5}</think> none", "no boxed answer"),
    ({"drop_code_fences": True}, "thus\n```\nx\n```", "code fence in the response"),
    ({"drop_code_fences": True, "remove_thinking": True}, "<think>\n```\n</think>four", "four"),
    ({"drop_python": True}, "in Python", "mentions python"),
    ({"scripts": ["LATIN"]}, "четыре, пять", "letters of another script"),
    ({"scripts": ["LATIN", "CYRILLIC"]}, "четыре", "четыре"),
    ({"scripts": ["LATIN"], "min_script_share": 0.4}, "четыре", "четыре"),
    ({"pii": "drop"}, "ask a@b.org", "personal data: email"),
    ({"pii": "mask"}, "ask a@b.org or 8.8.8.8", "ask [email] or [ip]"),
    ({"pii": "mask", "pii_kinds": ["ip"]}, "ask a@b.org or 8.8.8.8", "ask a@b.org or [ip]"),
])  # fmt: skip
def test_a_rule_changes_the_response_or_names_its_reason(settings, response, result):
    found = tidy(ROW._replace(response=response), config(**settings))
    assert (found if isinstance(found, str) else found.response) == result


def test_rules_look_at_instructions_too():
    assert tidy(ROW._replace(instruction="Write Python."), config(drop_python=True)) == (
        "mentions python"
    )
    masked = tidy(ROW._replace(instruction="Call (415) 555-2671."), config(pii="mask"))
    assert masked == ROW._replace(instruction="Call [phone].")


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_drops_and_changes_are_counted_with_samples(tmp_path, kind):
    rows = [
        ROW,
        ROW._replace(response="<think>a</think> four"),
        ROW._replace(response="<think>b</think> five, a@b.org, c@d.org"),
        *[ROW._replace(instruction=f"{i}?", response="<think>for ever") for i in range(5)],
    ]
    settings = config(remove_thinking=True, pii="mask", drop_duplicates=True, format=kind)
    report = clean([SourceStratum(name="s", batches=[rows])], tmp_path / "out", settings)
    stratum = report.strata["s"]
    assert report.dropped == {"exact duplicate": 1, "thinking does not end": 5}
    assert stratum.changed == {"thinking removed": 1, "email masked": 1}
    assert [sample["instruction"] for sample in stratum.samples["thinking does not end"]] == [
        "0?", "1?", "2?",
    ]  # fmt: skip
    assert rows_of(tmp_path / "out") == [ROW, ROW._replace(response="five, [email], [email]")]


def test_samples_of_dropped_rows_show_no_personal_data(tmp_path):
    rows = [ROW, ROW._replace(response="write to a@b.org"), ROW._replace(instruction="a@b.org ")]
    rows.append(ROW._replace(history=(Turn("I am a@b.org", "Hello"),)))
    report = clean([SourceStratum(name="s", batches=[rows])], tmp_path / "o", config(pii="drop"))
    assert report.dropped == {"personal data: email": 3}
    text = (tmp_path / "o" / "report.json").read_text()
    assert "a@b.org" not in text and "write to [email]" in text


def near_rows():
    generator = random.Random(0)
    words = [f"w{i}" for i in range(300)]
    rows = []
    for number in range(40):
        text = generator.choices(words, k=120)
        rows.append(Example("direct", " ".join(text), f"answer {number}"))
        text[60] = "other"
        rows.append(Example("direct", " ".join(text), f"answer {number}"))
    return rows


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_near_duplicates_are_dropped_alike_in_every_order_of_rows_and_files(tmp_path, kind):
    settings = config(near_duplicates=0.8, format=kind)
    results = []
    for seed in (0, 1, 2):
        rows = random.Random(seed).sample(near_rows(), 80)
        strata = [
            SourceStratum(name="a", batches=[rows[:10], rows[10:50]]),
            SourceStratum(name="b", batches=[rows[50:]]),
        ]
        out = tmp_path / str(seed)
        report = clean(strata[:: 1 - 2 * (seed == 2)], out, settings)
        assert report.kept == 40 and report.dropped == {"near duplicate": 40}
        assert all(s.samples["near duplicate"] for s in report.strata.values() if s.dropped)
        assert not list(out.glob(".*")), "no file is left over"
        results.append(sorted(rows_of(out)))
    assert results[0] == results[1] == results[2]


def test_duplicates_are_the_same_in_as_many_passes_as_memory_demands(tmp_path, monkeypatch):
    rows = [ROW._replace(instruction=f"{i % 700}") for i in range(1_000)]
    strata = [SourceStratum(name=name, batches=[rows]) for name in "ab"]
    one = clean(strata, tmp_path / "one", config(drop_duplicates=True))
    assert (one.kept, one.dropped) == (700, {"exact duplicate": 1_300})
    tables = []
    real = clean_parts.SeenRows
    monkeypatch.setattr(clean_parts, "SeenRows", lambda: tables.append(real()) or tables[-1])
    monkeypatch.setattr(clean_parts, "BYTES_PER_SEEN_ROW", 3_000_000)  # of a GiB for all rows
    many = clean(strata, tmp_path / "many", config(drop_duplicates=True))
    assert many.to_mapping() == one.to_mapping()
    assert snapshot(tmp_path / "many") == snapshot(tmp_path / "one")
    assert len(tables) == 6 and max(map(len, tables)) < 200


def test_a_file_without_rows_left_goes_and_all_gone_is_an_error(tmp_path):
    rows = near_rows()[:2]
    strata = [
        SourceStratum(name=name, batches=[[row]]) for name, row in zip("ab", rows, strict=True)
    ]
    clean(strata, tmp_path / "out", config(near_duplicates=0.8))
    assert len(list((tmp_path / "out").glob("*.parquet"))) == 1
    with pytest.raises(DataError, match="no row is left after cleaning"):
        clean([SourceStratum(name="a", batches=[rows])], tmp_path / "x", config(scripts=["GREEK"]))


@pytest.mark.parametrize(("values", "message"), [
    ({"scripts": ["latin"]}, "cleaning.scripts has 'latin'"),
    ({"near_duplicates": 0.2}, "cleaning.near_duplicates is 0.2, expected 0.5 to 1"),
    ({"min_script_share": 2}, "cleaning.min_script_share is 2.0"),
    ({"pii_kinds": ["name"]}, "pii_kinds"),
])  # fmt: skip
def test_settings_that_cannot_work_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        config(**values)
