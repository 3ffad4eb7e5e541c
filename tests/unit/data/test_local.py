"""Local files: every bad row counted with its place, every bad file named."""

from __future__ import annotations

import json
import random
import tracemalloc

import pyarrow
import pytest
from pyarrow import parquet

from hrmtext.data.example import Example
from hrmtext.data.parts import plan_parts, read_lines
from hrmtext.data.sources import local
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
    b'{"instruction": "a", "response": "b", "n": ' + b"1" * 5_000 + b"}": "malformed JSON",
    b'{"instruction": "a", "response": "b"}}': "malformed JSON",
    b'{"instruction": "a", "response": }': "malformed JSON",
    b'{"instruction": "a\xff", "response": "b"}': "not UTF-8",
    b'["a", "b"]': "not a JSON object",
    b'{"response": "b"}': "missing instruction",
    b'{"instruction": "a"}': "missing response",
    b'{"instruction": 5, "response": "b"}': "instruction is not a string",
    b'{"instruction": "a", "response": null}': "response is not a string",
    b'{"instruction": "a", "response": "b", "condition": ["cot"]}': "condition is not a string",
    b'{"instruction": "a", "response": "b", "condition": "cto"}': "unknown condition",
    b'{"instruction": "a", "response": "b", "condition": "cot,,synth"}': "unknown condition",
    b'{"instruction": "a", "response": "b", "response": "c"}': "a key stands twice",
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


def odd_lines(count):
    """Lines of JSON, and what is nearly that."""
    generator = random.Random(0)
    texts = [
        '"a"', '"b\\n"', '""', '" "', '"\\u00a0"', '"\\u0000"', '"\\ud800"', '"\\ud83d\\ude42"',
        '"é"', '"\u2028"', '"\t"', "null", "true", "4", "-0.5e3", "NaN", "-Infinity", "1" * 4_400,
        "[]", '["a"]', "{}", '{"x": 1, "x": 2}', '{"x": [{"y": 1, "y": 1}]}', "[[" * 9, '"open',
        '[{"instruction": "c", "response": "d"}]', '"[]"', '"[1"', "",
        '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]',
    ]  # fmt: skip
    names = [
        "instruction", "response", "condition", "history", "messages", "system", "other",
        "instruct\\u0069on", "Response",
    ]  # fmt: skip
    for _ in range(count):
        chosen = ["instruction", "response"] if generator.random() < 0.8 else []
        chosen += generator.choices(names, k=generator.choice((0, 0, 1, 2)))
        generator.shuffle(chosen)
        values = []
        for name in chosen:
            value = generator.choice(texts) if generator.random() < 0.4 else '"text"'
            if name == "condition" and generator.random() < 0.6:
                value = generator.choice(('"cot"', '" synth , cot"', '""', '"cto"', '"cot,"'))
            values.append(f'"{name}": {value}')
        line = "{" + ", ".join(values) + "}" + generator.choice(("",) * 8 + ("}", " ", "{}", ","))
        line = generator.choice(("",) * 12 + (" ", "\ufeff", "[")) + line
        if generator.random() < 0.1:
            at = generator.randrange(len(line))
            line = line[:at] + generator.choice(("", "\0", '"', "\\", "\v")) + line[at + 1 :]
        raw = line.encode()
        if generator.random() < 0.05:
            raw = raw[: generator.randrange(len(raw))] + b"\xff" + raw[-3:]
        yield raw + generator.choice((b"\n",) * 6 + (b"", b"\r\n", b" \n"))


def by_definition(line):
    """What a line means, the slow way."""
    try:
        text = line.decode()
    except UnicodeDecodeError:
        return "not UTF-8"
    if not text or text.isspace():
        return None
    try:
        row = json.loads(text, object_pairs_hook=local._object)
    except local._DoubledKey:
        return "a key stands twice"
    except (ValueError, RecursionError):
        return "malformed JSON"
    return local._check_carefully(row)


def test_the_fast_way_to_read_a_line_gives_what_the_slow_way_does(tmp_path):
    path = tmp_path / "rows.jsonl"
    # A blank line before and behind, lest a mark at the start or a missing line feed be special.
    lines = [line if line.endswith(b"\n") else line + b"\n" for line in odd_lines(6_000)]
    path.write_bytes(b"\n" + b"".join(lines))
    expected = [by_definition(line) for line in lines]
    rows, problems = read(path)
    assert rows == [row for row in expected if isinstance(row, Example)]
    counts = {}
    for number, found in enumerate(expected, start=2):
        if isinstance(found, str):
            counts.setdefault(found, []).append(f"{path}:{number}")
    assert problems.counts == {reason: len(places) for reason, places in counts.items()}
    assert problems.places == {reason: places[:5] for reason, places in counts.items()}
    assert len(rows) > 500 and len(counts) > 12, "all kinds are among them"
    for line in odd_lines(300):  # each as the only line, at both ends of a file
        path.write_bytes(line)
        rows, problems = read(path)
        found = by_definition(line.removeprefix(b"\xef\xbb\xbf"))
        assert rows == ([found] if isinstance(found, Example) else [])
        assert list(problems.counts) == ([found] if isinstance(found, str) else [])


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


def test_a_line_too_long_to_be_a_row_is_counted_without_being_held(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    good = json.dumps(GOOD).encode() + b"\n"
    with path.open("wb") as stream:
        stream.write(good + b'{"instruction": "')
        stream.seek(1 << 30, 1)  # a gigabyte that takes no room on disk
        stream.write(b'", "response": "b"}\n' + good)
    tracemalloc.start()
    rows, problems = read(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert rows == [Example("synth,cot", "a", "b")] * 2
    assert problems.to_mapping() == {"line too long": {"rows": 1, "first": [f"{path}:2"]}}
    assert peak < 50_000_000

    monkeypatch.setattr("hrmtext.data.parts.MAX_LINE_BYTES", len(good))
    path.write_bytes(good + b" " + good + good)
    rows, problems = read(path)
    assert len(rows) == 2 and problems.places == {"line too long": [f"{path}:2"]}


def test_parts_hold_every_line_once_wherever_they_are_cut(tmp_path, monkeypatch):
    monkeypatch.setattr("hrmtext.data.parts.MAX_LINE_BYTES", 30)
    monkeypatch.setattr("hrmtext.data.parts.SKIP_BYTES", 7)
    path = tmp_path / "rows.jsonl"
    for text in (b"a\nbb\n\nccc\n", b"", b"\n", b"x" * 100 + b"\nshort\n" + b"y" * 31, b"end"):
        path.write_bytes(text)
        whole = list(read_lines(path))
        assert len(whole) == text.count(b"\n") + bool(text and not text.endswith(b"\n"))
        for part_bytes in range(1, len(text) + 2):
            parts = plan_parts(path, part_bytes)
            assert [line for part in parts for line in read_lines(path, part)] == whole


def test_parquet_parts_hold_every_row_once(tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"instruction": [f"{i}" for i in range(50)], "response": ["r"] * 50})
    for group in (1, 7, 50):
        parquet.write_table(table, path, row_group_size=group)
        for part_bytes in (1, 300, 1 << 20):
            parts = plan_parts(path, part_bytes)
            rows = [
                row.instruction
                for part in parts
                for batch in read_batches(path, RowProblems(strict=True), part)
                for row in batch
            ]
            assert rows == [f"{i}" for i in range(50)]
            assert part_bytes > 1 or len(parts) == -(-50 // group)
    parquet.write_table(table.slice(0, 0), path)
    assert len(plan_parts(path)) == 1


def test_links_out_of_the_folder_and_to_nothing_are_refused(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.jsonl").write_text(json.dumps(GOOD))
    inner = tmp_path / "in" / "a.jsonl"
    inner.write_text(json.dumps(GOOD))
    link = tmp_path / "in" / "b.jsonl"
    link.symlink_to(inner)
    assert list(find_files(tmp_path / "in")) == ["a.jsonl", "b.jsonl"]
    link.unlink()
    link.symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is a symbolic link to .*, outside"):
        find_files(tmp_path / "in")
    link.unlink()
    link.symlink_to(tmp_path / "gone.jsonl")
    with pytest.raises(DataError, match=r"b\.jsonl is a symbolic link .* does not exist"):
        find_files(tmp_path / "in")


def test_a_doubled_parquet_column_is_refused(tmp_path):
    path = tmp_path / "rows.parquet"
    arrays = [pyarrow.array(["a"])] * 3
    table = pyarrow.Table.from_arrays(arrays, names=["instruction", "response", "response"])
    parquet.write_table(table, path)
    with pytest.raises(DataError, match="has 2 columns 'response'"):
        read(path)
