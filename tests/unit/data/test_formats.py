"""Tokenised and sampled folders: the public layout both ways, caps, order, damage."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from hrmtext.config.data import SamplingConfig, StratumRule
from hrmtext.data import tokenize as tokenize_module
from hrmtext.data.format import SampledData, read_stratum
from hrmtext.data.sample import sample
from hrmtext.data.tokenize import tokenize_files
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.data.workers import WorkerPool
from hrmtext.errors import DataError, StorageError
from hrmtext.runtime.io import exclusive, fingerprint

NAMES = ("inst_start", "inst_len", "resp_start", "resp_len")


def write_jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def cleaned(tmp_path, texts):
    root = tmp_path / "clean"
    rows = [
        {"condition": ("direct", "synth,cot", "noisy", "")[i % 4], "instruction": text,
         "response": f"{text[:i % 30]} {i}"}
        for i, text in enumerate(texts[:120])
    ]  # fmt: skip
    write_jsonl(root / "a.jsonl", rows[:40])
    write_jsonl(root / "sub" / "b.jsonl", rows[40:100])
    parquet.write_table(pyarrow.Table.from_pylist(rows[100:]), root / "c.parquet")
    return root, {"a.jsonl": rows[:40], "sub__b.jsonl": rows[40:100], "c.parquet": rows[100:]}


@pytest.fixture
def tokenized(cleaned, tokenizer, tmp_path):
    tokenize_files(cleaned[0], tmp_path / "tokenized", tokenizer)
    return tmp_path / "tokenized"


def read_public_tokenized(root):
    """An independent reader, from the description of the layout alone."""
    info = json.loads((root / "tokenizer_info.json").read_text())
    strata = {}
    for folder in root.iterdir():
        if not folder.is_dir():
            continue
        tokens = np.load(folder / "tokens.npy")
        arrays = [np.load(folder / f"{name}.npy") for name in NAMES]
        assert tokens.dtype == np.uint32
        assert all(array.dtype == np.uint64 for array in arrays)
        metadata = json.loads((folder / "metadata.json").read_text())
        assert set(metadata) == {"source_mtime", "source_size"}
        strata[folder.name] = [
            (tokens[int(a) : int(a + b)].tolist(), tokens[int(c) : int(c + d)].tolist())
            for a, b, c, d in zip(*arrays, strict=True)
        ]
    return info, strata


def write_public_tokenized(root, tokenizer, strata):
    """An independent writer of the same."""
    special = tokenizer.tokenizer.token_to_id
    for name, rows in strata.items():
        folder = root / name
        folder.mkdir(parents=True)
        tokens, index = [], []
        for row in rows:
            prompt = tokenizer.encode_prompt(row["instruction"], row["condition"])
            response = tokenizer.encode_response(row["response"])
            index.append((len(tokens), len(prompt), len(tokens) + len(prompt), len(response)))
            tokens += prompt + response
        np.save(folder / "tokens.npy", np.array(tokens, np.uint32))
        for name_, column in zip(NAMES, zip(*index, strict=True), strict=True):
            np.save(folder / f"{name_}.npy", np.array(column, np.uint64))
        (folder / "metadata.json").write_text('{"source_mtime":1,"source_size":2}')
    info = {
        "tokenizer_path": "somewhere/tokenizer.json",
        "boq": "<|im_start|>", "eoq": "<|im_end|>", "eoa": "<|box_end|>",
        "condition_mapping": {"direct": "<|object_ref_start|>", "cot": "<|object_ref_end|>",
                              "noisy": "<|quad_start|>", "synth": "<|quad_end|>"},
        "vocab_size": tokenizer.vocab_size,
    }  # fmt: skip
    (root / "tokenizer_info.json").write_text(json.dumps(info))
    assert special("<|box_end|>") == 11
    return info


def read_public_sampled(root):
    metadata = json.loads((root / "metadata.json").read_text())
    assert set(metadata) == {"tokenizer_info", "vocab_size", "max_seq_len", "total_length"}
    assert metadata["vocab_size"] is None
    tokens = np.load(root / "tokens.npy", mmap_mode="r")
    epochs = []
    while (root / f"epoch_{len(epochs)}").is_dir():
        folder = root / f"epoch_{len(epochs)}"
        arrays = [np.load(folder / f"{name}.npy", mmap_mode="r") for name in NAMES]
        epochs.append(
            [
                (tuple(tokens[a : a + b].tolist()), tuple(tokens[c : c + d].tolist()))
                for a, b, c, d in zip(*arrays, strict=True)
            ]
        )
    return metadata, tokens.dtype, epochs


def encoded(tokenizer, rows):
    return [
        (
            tuple(tokenizer.encode_prompt(row["instruction"], row["condition"])),
            tuple(tokenizer.encode_response(row["response"])),
        )
        for row in rows
    ]


def test_another_program_reads_what_we_tokenise(cleaned, tokenized, tokenizer, tmp_path):
    info, strata = read_public_tokenized(tokenized)
    assert set(info) == {
        "tokenizer_path", "boq", "eoq", "eoa", "condition_mapping", "vocab_size"
    }  # fmt: skip
    assert info["vocab_size"] == tokenizer.vocab_size
    assert set(strata) == set(cleaned[1])
    for name, rows in cleaned[1].items():
        assert [(tuple(p), tuple(r)) for p, r in strata[name]] == encoded(tokenizer, rows)
        # The public sampler copies whole token arrays, sized by the sum of the rows.
        assert sum(len(p) + len(r) for p, r in strata[name]) == len(
            np.load(tokenized / name / "tokens.npy")
        )


def test_another_program_reads_what_we_sample(cleaned, tokenized, tokenizer, tmp_path):
    report = sample(tokenized, tmp_path / "sampled", SamplingConfig(epochs=2, max_seq_len=300))
    metadata, dtype, epochs = read_public_sampled(tmp_path / "sampled")
    assert dtype == np.uint16
    assert metadata["max_seq_len"] == 301
    everything = sorted(pair for rows in cleaned[1].values() for pair in encoded(tokenizer, rows))
    assert len(epochs) == 2
    for epoch in epochs:
        assert sorted(epoch) == everything
    assert epochs[0] != epochs[1]
    assert metadata["total_length"] == sum(len(p) + len(r) for p, r in everything)
    assert report.rows_per_epoch == 120


def test_we_read_and_sample_what_another_program_tokenised(cleaned, tokenizer, tmp_path):
    write_public_tokenized(tmp_path / "public", tokenizer, cleaned[1])
    stratum = read_stratum(tmp_path / "public" / "a.jsonl")
    assert stratum.marker == {}
    assert stratum.index.num_rows == 40
    sample(tmp_path / "public", tmp_path / "sampled", SamplingConfig(epochs=1, max_seq_len=300))
    _, _, [epoch] = read_public_sampled(tmp_path / "sampled")
    assert len(epoch) == 120


def test_we_read_what_another_program_sampled(tmp_path):
    folder = tmp_path / "sampled"
    (folder / "epoch_0").mkdir(parents=True)
    np.save(folder / "tokens.npy", np.arange(100, dtype=np.int32))
    columns = {"inst_start": [0, 10], "inst_len": [4, 5], "resp_start": [4, 15], "resp_len": [6, 2]}
    for name, values in columns.items():
        np.save(folder / "epoch_0" / f"{name}.npy", np.array(values, np.int64))
    metadata = {
        "tokenizer_info": {"vocab_size": 70_001},
        "vocab_size": None,
        "max_seq_len": 4097,
        "total_length": 17,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata))
    data = SampledData.open(folder)
    assert (data.num_epochs, data.max_seq_len, data.total_length) == (1, 4096, 17)
    assert data.vocab_size == 70_144  # a multiple of 256
    assert data.epoch(0).input_lengths().tolist() == [9, 6]
    assert data.strata() == [] and data.stratum_ids(0) is None
    first = data.fingerprint
    np.save(folder / "epoch_0" / "resp_len.npy", np.array([6, 3], np.int64))
    assert SampledData.open(folder).fingerprint != first


def test_large_vocabularies_take_wider_tokens(tokenized, tmp_path):
    path = tokenized / "tokenizer_info.json"
    info = json.loads(path.read_text())
    for vocab_size, dtype in ((65_536, np.uint16), (65_537, np.int32)):
        path.write_text(json.dumps(info | {"vocab_size": vocab_size}))
        sample(tokenized, tmp_path / str(vocab_size), SamplingConfig(epochs=1, max_seq_len=300))
        assert np.load(tmp_path / str(vocab_size) / "tokens.npy").dtype == dtype


def test_tokenising_again_redoes_only_what_changed(cleaned, tokenized, tokenizer, texts):
    root, _ = cleaned
    before = {p: p.stat().st_mtime_ns for p in tokenized.rglob("tokens.npy")}
    assert tokenize_files(root, tokenized, tokenizer).num_redone == 0
    assert {p: p.stat().st_mtime_ns for p in tokenized.rglob("tokens.npy")} == before

    write_jsonl(root / "a.jsonl", [{"instruction": "new", "response": "new"}])
    report = tokenize_files(root, tokenized, tokenizer)
    assert (report.num_redone, report.num_strata, report.num_rows) == (1, 3, 81)

    (root / "a.jsonl").unlink()
    assert tokenize_files(root, tokenized, tokenizer).num_removed == 1
    assert not (tokenized / "a.jsonl").exists()

    other = PromptTokenizer(train_tokenizer(texts, 300))
    assert tokenize_files(root, tokenized, other).num_redone == 2


def test_a_change_of_equal_size_within_a_second_is_seen(cleaned, tokenized, tokenizer):
    root, _ = cleaned
    path = root / "a.jsonl"
    stat = path.stat()
    path.write_text(path.read_text().replace("0", "1"))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert path.stat().st_size == stat.st_size
    assert tokenize_files(root, tokenized, tokenizer).num_redone == 1


def test_an_interrupted_run_goes_on_where_it_stopped(cleaned, tokenizer, tmp_path, monkeypatch):
    root, _ = cleaned
    out = tmp_path / "out"
    original = tokenize_module.tokenize_file
    calls = []

    def fails_second(source, folder, tokenizer):
        calls.append(source)
        if len(calls) == 2:
            raise KeyboardInterrupt
        original(source, folder, tokenizer)

    monkeypatch.setattr(tokenize_module, "tokenize_file", fails_second)
    with pytest.raises(KeyboardInterrupt):
        tokenize_files(root, out, tokenizer)
    monkeypatch.undo()
    report = tokenize_files(root, out, tokenizer)
    assert (report.num_redone, report.num_strata) == (2, 3)


def test_a_worker_refuses_a_tokenizer_file_that_is_not_the_one_asked_for(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    file = tmp_path / "tokenizer.json"
    use = {"file": str(file), "content": fingerprint(file), "key": tokenizer.fingerprint}
    assert tokenize_module._load_tokenizer(**use).fingerprint == tokenizer.fingerprint
    assert PromptTokenizer.load(file).fingerprint == tokenizer.fingerprint
    tokenize_module._load_tokenizer.cache_clear()
    file.write_bytes(file.read_bytes().replace(b"<|box_end|>", b"<|box_out|>"))
    with pytest.raises(DataError, match=r"tokenizer\.json was changed while"):
        tokenize_module._load_tokenizer(**use)


def snapshot(folder):
    """Every file below a folder: path -> bytes."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def with_bad_lines(root):
    """Problems in the middle of the files, whose places must not depend on parts."""
    lines = (root / "a.jsonl").read_text().splitlines()
    lines[7:7] = ["", "{broken", '{"instruction": "a"}']
    lines[20:20] = ["{broken"] * 9
    (root / "a.jsonl").write_text("\n".join(lines))  # without a line end at the end of the file


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_and_parts_change_nothing(cleaned, tokenizer, tmp_path, workers):
    root, _ = cleaned
    with_bad_lines(root)
    table = parquet.read_table(root / "c.parquet")
    parquet.write_table(table, root / "c.parquet", row_group_size=3)
    report = tokenize_files(root, tmp_path / "whole", tokenizer, num_workers=1)
    assert report.num_rows == 120
    whole = snapshot(tmp_path / "whole")
    for part_bytes in (300, 2000) if workers == 1 else (2000,):
        out = tmp_path / f"parts{part_bytes}"
        tokenize_files(root, out, tokenizer, num_workers=workers, part_bytes=part_bytes)
        assert snapshot(out) == whole


def test_a_touched_file_is_not_redone(cleaned, tokenized, tokenizer):
    root, _ = cleaned
    before = snapshot(tokenized)
    stat = (root / "a.jsonl").stat()
    os.utime(root / "a.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**10))
    assert tokenize_files(root, tokenized, tokenizer).num_redone == 0
    after = snapshot(tokenized)
    changed = {name for name in before if before[name] != after[name]}
    # The new time is noted, for other programs too, and not compared by content again.
    assert changed == {"a.jsonl/metadata.json", "a.jsonl/COMPLETE.json"}
    assert json.loads(after["a.jsonl/metadata.json"])["source_mtime"] == (
        int((stat.st_mtime_ns + 10**10) / 10**9)
    )


def test_a_dead_worker_changes_nothing(cleaned, tokenized, tokenizer, tmp_path, monkeypatch):
    start = WorkerPool._start
    started = []

    def dies_once(pool):
        worker = start(pool)
        if not started:
            worker[0].kill()
        started.append(worker)
        return worker

    monkeypatch.setattr(WorkerPool, "_start", dies_once)
    tokenize_files(cleaned[0], tmp_path / "out", tokenizer, num_workers=2)
    assert len(started) == 2  # the other one took over
    assert snapshot(tmp_path / "out") == snapshot(tokenized)


def test_two_runs_do_not_write_one_folder(tokenized, cleaned, tokenizer):
    with exclusive(tokenized), pytest.raises(StorageError, match="another process is writing"):
        tokenize_files(cleaned[0], tokenized, tokenizer)
    tokenize_files(cleaned[0], tokenized, tokenizer)


def test_errors_of_workers_are_raised_as_they_are(cleaned, tokenizer, tmp_path):
    root, _ = cleaned
    path = root / "c.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match=r"^\S*c\.parquet is not a whole Parquet file"):
        tokenize_files(root, tmp_path / "out", tokenizer, num_workers=2)
    path.unlink()
    assert tokenize_files(root, tmp_path / "out", tokenizer, num_workers=2).num_rows == 100


def test_bad_rows_are_counted_while_tokenising(tmp_path, tokenizer):
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b'{"instruction": "a", "response": "b"}\n'
        b"{broken\n"
        b'{"instruction": "\xff", "response": "b"}\n'
        b'{"instruction": "a", "response": "b", "condition": "cto"}\n'
    )
    report = tokenize_files(path, tmp_path / "out", tokenizer)
    assert report.num_rows == 1
    assert report.dropped == {
        "x.jsonl": {
            "malformed JSON": {"rows": 1, "first": [f"{path}:2"]},
            "not UTF-8": {"rows": 1, "first": [f"{path}:3"]},
            "unknown condition": {"rows": 1, "first": [f"{path}:4"]},
        }
    }


def test_a_file_without_usable_rows_gives_an_empty_stratum(tmp_path, tokenizer):
    write_jsonl(tmp_path / "in" / "empty.jsonl", [])
    write_jsonl(tmp_path / "in" / "full.jsonl", [{"instruction": "a", "response": "b"}])
    tokenize_files(tmp_path / "in", tmp_path / "out", tokenizer)
    assert read_stratum(tmp_path / "out" / "empty.jsonl").index.num_rows == 0
    report = sample(tmp_path / "out", tmp_path / "s", SamplingConfig(epochs=1, max_seq_len=64))
    assert report.rows_per_epoch == 1


# Sampling


def test_caps_and_repeats_shape_each_epoch(tokenized, tmp_path):
    rules = (StratumRule(prefix="a", max_rows=15), StratumRule(prefix="sub__", repeat=2))
    config = SamplingConfig(epochs=3, max_seq_len=300, rules=rules)
    report = sample(tokenized, tmp_path / "s", config)
    counts = {name: stratum.rows_per_epoch for name, stratum in report.strata.items()}
    assert counts == {"a.jsonl": 15, "sub__b.jsonl": 120, "c.parquet": 20}
    data = SampledData.open(tmp_path / "s")
    assert data.strata() == ["a.jsonl", "c.parquet", "sub__b.jsonl"]
    seen = []
    for number in range(3):
        index, strata = data.epoch(number), data.stratum_ids(number)
        assert np.bincount(strata).tolist() == [15, 20, 120]
        starts = index.inst_start[strata == 0]
        seen += starts.tolist()
        _, repeats = np.unique(index.inst_start[strata == 2], return_counts=True)
        assert set(repeats.tolist()) == {2}
    # 40 rows, 15 an epoch: the third epoch uses up the first permutation before a new one.
    assert len(set(seen[:30])) == 30
    assert len(set(seen)) == 40
    assert report.strata["a.jsonl"].covered_rows == 40


def test_the_sample_depends_on_seed_and_config_only(tokenized, tmp_path):
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        sample(tokenized, tmp_path / name, SamplingConfig(epochs=2, max_seq_len=300, seed=seed))
    one, two, three = (SampledData.open(tmp_path / n) for n in ("one", "two", "three"))
    assert one.fingerprint == two.fingerprint != three.fingerprint
    for a, b in zip(one.epoch(1), two.epoch(1), strict=True):
        assert np.array_equal(a, b)
    assert not np.array_equal(one.epoch(1).inst_start, three.epoch(1).inst_start)


def length_rows(tokenizer, tmp_path, lengths):
    """A stratum of rows with exactly these (instruction, response) lengths in tokens."""
    folder = tmp_path / "lengths" / "x"
    folder.mkdir(parents=True)
    index, at = [], 0
    for prompt, response in lengths:
        index.append((at, prompt, at + prompt, response))
        at += prompt + response
    np.save(folder / "tokens.npy", (np.arange(at) % 300).astype(np.uint32))
    for name, column in zip(NAMES, zip(*index, strict=True), strict=True):
        np.save(folder / f"{name}.npy", np.array(column, np.uint64))
    (folder / "metadata.json").write_text('{"source_mtime":1,"source_size":2}')
    (tmp_path / "lengths" / "tokenizer_info.json").write_text('{"vocab_size": 300}')
    return tmp_path / "lengths"


def test_rows_beyond_the_context_are_cut_or_dropped_and_counted(tokenizer, tmp_path):
    # Context 10, so 11 tokens a row.
    lengths = [(5, 6), (5, 7), (9, 2), (9, 5), (10, 2), (11, 4), (12, 4), (5, 1), (3, 2)]
    root = length_rows(tokenizer, tmp_path, lengths)
    report = sample(root, tmp_path / "cut", SamplingConfig(epochs=1, max_seq_len=10))
    index = SampledData.open(tmp_path / "cut").epoch(0)
    found = sorted(zip(index.inst_len.tolist(), index.resp_len.tolist(), strict=True))
    # (10, 2) would keep one response token: the public pipeline keeps that row, we do not.
    assert found == [(3, 2), (5, 6), (5, 6), (9, 2), (9, 2)]
    stratum = report.strata["x"]
    assert stratum.truncated_rows == 2
    assert stratum.dropped == {
        "response too short": 1,
        "instruction leaves no room for a response": 2,
        "response too short after truncation": 1,
    }
    assert "dropped from x: 1 rows: response too short after truncation" in report.text()
    assert stratum.usable_rows + sum(stratum.dropped.values()) == stratum.rows == len(lengths)

    rules = (StratumRule(prefix="", long_rows="drop"),)
    config = SamplingConfig(epochs=1, max_seq_len=10, rules=rules)
    dropped = sample(root, tmp_path / "drop", config).strata["x"]
    assert dropped.usable_rows == 3 and dropped.truncated_rows == 0
    assert dropped.dropped["row too long"] == 3


def test_rules_that_fit_nothing_and_folders_without_rows_are_refused(
    tokenized, tmp_path, tokenizer
):
    rules = (StratumRule(prefix="flan__"),)
    with pytest.raises(DataError, match="rule 'flan__' fits no stratum"):
        sample(tokenized, tmp_path / "s", SamplingConfig(rules=rules))
    with pytest.raises(DataError, match="no stratum has a usable row"):
        sample(length_rows(tokenizer, tmp_path, [(9, 1)]), tmp_path / "s", SamplingConfig(epochs=1))
    assert not (tmp_path / "s").exists()


def test_an_existing_folder_is_not_overwritten_in_silence(tokenized, tmp_path):
    config = SamplingConfig(epochs=1, max_seq_len=300)
    sample(tokenized, tmp_path / "s", config)
    with pytest.raises(StorageError, match="exists already"):
        sample(tokenized, tmp_path / "s", config)
    sample(tokenized, tmp_path / "s", config, replace=True)


# Damage


def public_copy(tokenized, tmp_path):
    """The stratum without our marker, as another program leaves it: only checks can find damage."""
    copy = tmp_path / "copy"
    shutil.copytree(tokenized / "a.jsonl", copy)
    (copy / "COMPLETE.json").unlink()
    return copy


def test_truncated_tokens_are_found_with_and_without_marker(tokenized, tmp_path):
    for folder in (tokenized / "a.jsonl", public_copy(tokenized, tmp_path)):
        path = folder / "tokens.npy"
        path.write_bytes(path.read_bytes()[:-40])
        with pytest.raises(DataError, match=r"tokens\.npy"):
            read_stratum(folder)


@pytest.mark.parametrize("keep", [0, 5, 60])
def test_arrays_cut_within_their_header_are_found(tokenized, tmp_path, keep):
    copy = public_copy(tokenized, tmp_path)
    (copy / "inst_len.npy").write_bytes((copy / "inst_len.npy").read_bytes()[:keep])
    with pytest.raises(DataError, match=r"inst_len\.npy is truncated"):
        read_stratum(copy)


def test_rows_beyond_the_tokens_and_wrong_types_are_found(tokenized, tmp_path):
    copy = public_copy(tokenized, tmp_path)
    tokens = np.load(copy / "tokens.npy")
    np.save(copy / "tokens.npy", tokens[:-1])
    with pytest.raises(DataError, match=r"row 39: its resp range .* ends beyond"):
        read_stratum(copy)
    np.save(copy / "tokens.npy", tokens.astype(np.float32))
    with pytest.raises(DataError, match=r"tokens\.npy holds float32"):
        read_stratum(copy)
    np.save(copy / "tokens.npy", tokens)
    lengths = np.load(copy / "resp_len.npy")
    np.save(copy / "resp_len.npy", lengths[:-1])
    with pytest.raises(DataError, match=r"resp_len\.npy has 39 rows"):
        read_stratum(copy)
    lengths[3] = 0
    np.save(copy / "resp_len.npy", lengths)
    with pytest.raises(DataError, match=r"resp_len\.npy: row 3 is empty"):
        read_stratum(copy)
    lengths[3] = 2**63 + 5
    np.save(copy / "resp_len.npy", lengths)
    with pytest.raises(DataError, match="points beyond"):
        read_stratum(copy)
    (copy / "resp_len.npy").unlink()
    with pytest.raises(DataError, match=r"no such file: .*resp_len\.npy"):
        read_stratum(copy)


def test_tokens_of_another_tokenizer_are_found(tokenized, tmp_path):
    path = tokenized / "tokenizer_info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 300}))
    with pytest.raises(DataError, match="is from another tokenizer"):
        sample(tokenized, tmp_path / "s", SamplingConfig(epochs=1))


def test_damaged_sampled_folders_are_found(tokenized, tmp_path):
    folder = tmp_path / "s"
    sample(tokenized, folder, SamplingConfig(epochs=1, max_seq_len=300))
    path = folder / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"tokens\.npy: expected \d+ bytes"):
        SampledData.open(folder)
    (folder / "COMPLETE.json").unlink()
    with pytest.raises(DataError, match=r"tokens\.npy is truncated"):
        SampledData.open(folder)
    (folder / "metadata.json").write_text('{"tokenizer_info": {"vocab_size": 0}}')
    with pytest.raises(DataError, match="vocab_size of the tokenizer is 0"):
        SampledData.open(folder)
    (folder / "metadata.json").unlink()
    with pytest.raises(DataError, match="the folder is not whole"):
        SampledData.open(folder)
    with pytest.raises(DataError, match="no such folder"):
        SampledData.open(tmp_path / "nowhere")
