"""Local files: every bad row counted with its place, every bad file named."""

from __future__ import annotations

import json

import pyarrow
import pytest
from pyarrow import parquet

from hrmtext.data.example import Example
from hrmtext.data.sources.local import (
    RowProblems,
    find_files,
    plain_condition,
    read_batches,
    stratum_label,
)
from hrmtext.errors import DataError

GOOD = {"condition": "synth, cot", "instruction": "a", "response": "b"}

BAD_LINES = {
    b'{"instruction": "a", "response": ': "malformed JSON",
    b'{"instruction": "a"} trailing': "malformed JSON",
    b"[" * 100_000: "malformed JSON",
    b'{"instruction": "a\xff", "response": "b"}': "not UTF-8",
    b'["a", "b"]': "not a JSON object",
    b'{"response": "b"}': "missing instruction",
    b'{"instruction": "a"}': "missing response",
    b'{"instruction": 5, "response": "b"}': "instruction is not a string",
    b'{"instruction": "a", "response": null}': "response is not a string",
    b'{"instruction": "a", "response": "b", "condition": ["cot"]}': "condition is not a string",
    b'{"instruction": "a", "response": "b", "condition": "cto"}': "unknown condition",
    b'{"instruction": "a", "response": "b", "condition": "cot,,synth"}': "unknown condition",
    b'{"instruction": "a", "response": ""}': "empty response",
    b'{"instruction": "a", "response": " \\n "}': "empty response",
    b'{"instruction": "a\\u0000", "response": "b"}': "NUL character",
    b'{"instruction": "a", "response": "b\\ud800"}': "lone surrogate (not valid Unicode)",
}


def read(path, **options):
    problems = RowProblems(**options)
    return [row for batch in read_batches(path, problems) for row in batch], problems


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=lambda value: str(value)[:40])
def test_a_bad_line_is_counted_with_its_place_and_the_rest_is_read(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(b"\n".join([good, line, b"", good]) + b"\n")
    rows, problems = read(path)
    assert rows == [Example("synth,cot", "a", "b")] * 2
    assert problems.to_mapping() == {reason: {"rows": 1, "first": [f"{path}:2"]}}
    with pytest.raises(DataError, match=r"rows\.jsonl:2: " + reason[:8]):
        read(path, strict=True)


def test_only_the_first_places_are_kept_but_all_are_counted(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n" * 2500)
    rows, problems = read(path)
    assert rows == []
    assert problems.total == 2500
    assert problems.places["malformed JSON"] == [f"{path}:{n}" for n in range(1, 6)]


def test_absent_and_null_conditions_mean_direct_and_empty_means_none(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{}, {"condition": None}, {"condition": ""}, {"condition": "noisy"}]
    text = "".join(json.dumps({"instruction": "ä", "response": "b"} | row) + "\n" for row in rows)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found, problems = read(path)
    assert [row.condition for row in found] == ["direct", "direct", "", "noisy"]
    assert problems.total == 0
    assert plain_condition("cot") == "cot" and plain_condition("direct,x") is None


@pytest.mark.parametrize("kind", [pyarrow.string(), pyarrow.large_string(), pyarrow.string_view()])
def test_parquet_rows_are_read_and_bad_ones_counted(tmp_path, kind):
    path = tmp_path / "rows.parquet"
    columns = {
        "instruction": ["a", None, "c", "d", "e\0"],
        "response": ["b", "b", "", "b", "b"],
        "condition": ["cot", "cot", "cot", "no", None],
        "extra": [1, 2, 3, 4, 5],
    }
    arrays = {
        name: pyarrow.array(values, kind if name != "extra" else pyarrow.int64())
        for name, values in columns.items()
    }
    parquet.write_table(pyarrow.table(arrays), path)
    rows, problems = read(path)
    assert rows == [Example("cot", "a", "b")]
    assert problems.to_mapping() == {
        "NUL character": {"rows": 1, "first": [f"{path}:5"]},
        "empty response": {"rows": 1, "first": [f"{path}:3"]},
        "instruction is not a string": {"rows": 1, "first": [f"{path}:2"]},
        "unknown condition": {"rows": 1, "first": [f"{path}:4"]},
    }


def test_parquet_bytes_that_are_not_utf8_are_counted(tmp_path):
    path = tmp_path / "rows.parquet"
    raw = pyarrow.array([b"fine", b"\xff\xfe", b"too"])
    text = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    parquet.write_table(pyarrow.table({"instruction": text, "response": ["x", "y", "z"]}), path)
    rows, problems = read(path)
    assert [row.instruction for row in rows] == ["fine", "too"]
    assert problems.to_mapping() == {"not UTF-8": {"rows": 1, "first": [f"{path}:2"]}}


def test_bad_parquet_files_are_named(tmp_path):
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"instruction": ["a"], "answer": ["b"]}), path)
    with pytest.raises(DataError, match=r"rows\.parquet has no column 'response'; it has instr"):
        read(path)
    parquet.write_table(pyarrow.table({"instruction": ["a"], "response": [5]}), path)
    with pytest.raises(DataError, match="column 'response' is int64, expected strings"):
        read(path)
    parquet.write_table(pyarrow.table({"instruction": ["a"], "response": ["b"]}), path)
    whole = path.read_bytes()
    for damaged in (whole[:-5], whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.parquet is not a whole Parquet file"):
            read(path)


def test_strata_are_named_by_their_path(tmp_path):
    for name in ("b.jsonl", "sub/deep/a.parquet", "note.txt", ".hidden.jsonl", ".git/x.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    files = find_files(tmp_path)
    assert list(files) == ["b.jsonl", "sub__deep__a.parquet"]
    assert [stratum_label(name) for name in files] == ["b", "sub__deep__a"]
    assert list(find_files(tmp_path / "b.jsonl")) == ["b.jsonl"]
    (tmp_path / "sub__deep__a.parquet").touch()
    with pytest.raises(DataError, match="both give the stratum sub__deep__a"):
        find_files(tmp_path)


def test_a_file_that_went_away_is_named(tmp_path):
    with pytest.raises(DataError, match=r"could not read .*gone\.jsonl: No such file"):
        read(tmp_path / "gone.jsonl")


def test_missing_and_wrong_paths_are_refused(tmp_path):
    with pytest.raises(DataError, match="no such file or folder"):
        find_files(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no \.jsonl or \.parquet file"):
        find_files(tmp_path)
    (tmp_path / "x.csv").touch()
    with pytest.raises(DataError, match=r"expected a file ending in \.jsonl or \.parquet"):
        find_files(tmp_path / "x.csv")
