"""Hostile input through all stages: a clear error or a counted drop, and nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess

import pyarrow
import pytest
from pyarrow import parquet
from snapshots import snapshot

from hrmtext.config.base import build
from hrmtext.config.data import DataConfig
from hrmtext.data.engine import LocalEngine
from hrmtext.data.format import SampledData
from hrmtext.data.prepare import prepare
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import DataError, StorageError

SPECIAL = "<|box_end|><|im_start|>"


def line(instruction, response, **more):
    return json.dumps({"instruction": instruction, "response": response} | more).encode()


LINES = {
    "malformed JSON": [
        b"{broken",
        b"\0\0\0",
        line("a", "b")[:-4],
        line("a", "b", n=7)[:-2] + b"7" * 5_000 + b"}",
    ],
    "not UTF-8": [b'{"instruction": "\xff\xfe", "response": "b"}'],
    "NUL character": [line("a\0", "b"), line("a", "\0")],
    "a key stands twice": [b'{"instruction": "a", "response": "b", "response": "c"}'],
    "not a JSON object": [b"[1, 2]", b"17", b'"text"', b"null", b"[" * 100_000],
    "response is not a string": [line("a", 4), line("a", None), line("a", ["b"])],
    "missing instruction": [b'{"response": "b"}', b"{}"],
    "empty response": [line("a", " \n"), line("a", "")],
    "unknown condition": [line("a", "b", condition="dirct")],
    "lone surrogate (not valid Unicode)": [rb'{"instruction": "\ud800", "response": "b"}'],
    "both a conversation and an instruction or response": [
        line("a", "b", messages=[{"role": "user", "content": "a"}])
    ],
    "line too long": [b'{"instruction": "' + b"x" * 200_000 + b'", "response": "b"}'],
}


def config_of(folder, **local):
    values = {
        "local": [{"path": str(folder)} | local],
        "cleaning": {"format": "jsonl"},
        "tokenizer": {"vocab_size": 300, "allow_fewer": True},
        "sampling": {"epochs": 1, "max_seq_len": 256},
    }
    return build(DataConfig, values, where="test")


@pytest.fixture
def raw(tmp_path, texts):
    folder = tmp_path / "raw"
    folder.mkdir()
    good = [line(text, text[:9]) for text in texts[:100]]
    bad = [row for rows in LINES.values() for row in rows]
    with (folder / "a.jsonl").open("wb") as stream:
        for number, row in enumerate(bad):
            stream.write(row + b"\n" + good[number] + b"\n")
        stream.write(line("only", SPECIAL) + b"\n")
        # Another schema in the same file: a conversation.
        turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
        stream.write(json.dumps({"messages": turns}).encode())  # and no line feed at the end
    return folder


@pytest.mark.parametrize("part_bytes", [1 << 25, 9_000])
def test_every_bad_line_is_counted_and_every_good_one_kept(raw, tmp_path, monkeypatch, part_bytes):
    # What stands for a gigabyte here; how much is held of one is tested in test_local.
    monkeypatch.setattr("hrmtext.data.parts.MAX_LINE_BYTES", 150_000)
    with LocalEngine(1) as engine:
        done = prepare(config_of(raw), tmp_path / "out", engine=engine, part_bytes=part_bytes)
    unreadable = done.report["clean"]["strata"]["a"]["unreadable"]
    counts = {reason: found["rows"] for reason, found in unreadable.items()}
    expected = {reason: len(rows) for reason, rows in LINES.items()}
    # Brackets without end are malformed, whatever they would have been.
    expected["not a JSON object"] -= 1
    expected["malformed JSON"] += 1
    assert counts == expected
    num_bad = sum(expected.values())
    for found in unreadable.values():
        for place in found["first"]:
            assert int(place.rpartition(":")[2]) % 2 == 1, "bad lines are the odd ones"
    assert done.report["clean"]["kept"] == num_bad + 2
    data = SampledData.open(done.sampled)
    index = data.epoch(0)
    tokenizer = PromptTokenizer.load(done.tokenizer)
    rows = {
        tokenizer.decode(data.tokens[a : a + n].tolist()): data.tokens[b : b + m].tolist()
        for a, n, b, m in zip(*index, strict=True)
    }
    assert tokenizer.decode(rows["only"]) == SPECIAL
    assert rows["only"].count(tokenizer.eos_id) == 1, "special tokens in text are text"
    assert tokenizer.decode(rows["hi"]) == "hello"


def test_a_file_that_cannot_be_used_stops_the_run_and_is_named(tmp_path, texts):
    good = tmp_path / "raw" / "a.jsonl"
    good.parent.mkdir()
    good.write_bytes(b"\n".join(line(text, text[:9]) for text in texts[:100]))
    table = pyarrow.table({"instruction": ["a"], "answer": ["b"]})
    names = ["instruction", "response", "response"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 3, names)
    whole = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table({"instruction": ["a"], "response": ["b"]}), whole)
    bad = good.with_name("b.parquet")
    for write, words in (
        (lambda: parquet.write_table(table, bad), "b.parquet has no column 'response'"),
        (lambda: parquet.write_table(twice, bad), "has 2 columns 'response'"),
        (lambda: bad.write_bytes(whole.getvalue().to_pybytes()[:-9]), "not a whole Parquet file"),
        (lambda: bad.symlink_to(tmp_path / "gone"), "which does not exist"),
        (lambda: bad.symlink_to(__file__), "outside"),
    ):
        bad.unlink(missing_ok=True)
        write()
        with pytest.raises(DataError, match=words):
            prepare(config_of(good.parent), tmp_path / "out")
        assert not (tmp_path / "out" / "clean").exists()
    bad.unlink()
    assert prepare(config_of(good.parent), tmp_path / "out").report["clean"]["kept"] == 100


def test_a_strict_source_stops_at_the_first_bad_row_and_names_its_line(raw, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:1: malformed JSON\. Mend the row"):
        prepare(config_of(raw, strict=True), tmp_path / "out")


def test_a_disk_that_fills_up_in_any_stage_leaves_what_a_later_run_ends_whole(tmp_path, texts):
    raw = tmp_path / "raw"
    raw.mkdir()
    for name in "ab":
        rows = [line(f"{name} {text}", text[: 1 + i % 9]) for i, text in enumerate(texts)]
        (raw / f"{name}.jsonl").write_bytes(b"\n".join(rows))
    config = config_of(raw, eval_size=5)
    expected = prepare(config, tmp_path / "roomy").folder
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command to make a small file system with")
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"may not mount a small file system: {mounted.stderr.strip()}")
    try:
        failures, found = 0, None
        for kib in range(64, 4_096, 64):
            options = f"remount,size={kib}k"
            subprocess.run(["mount", "-o", options, str(disk)], check=True)
            try:
                found = prepare(config, disk / "data").folder
                break
            except StorageError as error:
                assert "the disk is full" in str(error)
                failures += 1
        assert found is not None and failures > 5
        assert snapshot(found) == snapshot(expected)
        assert not list(found.glob(".*")), "no leftovers"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
