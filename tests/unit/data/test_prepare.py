"""Cleaning, preparing and inspecting: counted drops, skipped stages, held-out rows, a full disk."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import numpy as np
import pytest

from hrmtext.config import build, load
from hrmtext.config.data import CleaningConfig, DataConfig, SamplingConfig
from hrmtext.data.clean import SourceStratum, clean
from hrmtext.data.example import Example, normalize_prompt
from hrmtext.data.format import SampledData
from hrmtext.data.heldout import fitting_rows, load_rows, read_held_out
from hrmtext.data.inspect import inspect
from hrmtext.data.prepare import prepare
from hrmtext.data.sample import sample
from hrmtext.data.sources.local import RowProblems, find_files, read_batches
from hrmtext.data.tokenize import tokenize_files
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import ConfigError, DataError, StorageError

ROW = Example("direct", "question", "answer")

BAD_ROWS = {
    "unknown condition": ROW._replace(condition="dirct"),
    "empty response": ROW._replace(response="  "),
    "empty instruction": ROW._replace(instruction="\n"),
    "NUL character": ROW._replace(response="a\0"),
    "lone surrogate (not valid Unicode)": ROW._replace(instruction="\udc80"),
    "control character": ROW._replace(response="a\x07"),
    "instruction too long": ROW._replace(instruction="x" * 101),
    "response too long": ROW._replace(response="x" * 51),
    "exact duplicate": ROW,
    "prompt is held out": ROW._replace(instruction="  Secret\n QUESTION "),
}
CLEANING = CleaningConfig(max_instruction_chars=100, max_response_chars=50, drop_duplicates=True)


def rows_of(folder):
    return [
        row
        for path in find_files(folder).values()
        for batch in read_batches(path, RowProblems(strict=True))
        for row in batch
    ]


@pytest.mark.parametrize("kind", ["parquet", "jsonl"])
def test_every_reason_to_drop_a_row_is_counted_with_samples(tmp_path, kind):
    config = build(CleaningConfig, {
        "max_instruction_chars": 100, "max_response_chars": 50, "drop_duplicates": True,
        "format": kind,
    }, where="test")  # fmt: skip
    kept = [ROW, ROW._replace(condition=""), ROW._replace(response="tab\tand\nline")]
    stratum = SourceStratum(name="s", batches=[kept, list(BAD_ROWS.values())])
    prompts = frozenset([normalize_prompt("secret question")])
    report = clean([stratum], tmp_path / "out", config, held_out_prompts=prompts)
    assert report.kept == 3
    assert report.dropped == dict.fromkeys(sorted(BAD_ROWS), 1)
    assert set(report.strata["s"].samples) == set(BAD_ROWS)
    assert rows_of(tmp_path / "out") == kept
    stored = json.loads((tmp_path / "out" / "report.json").read_text())
    assert stored == report.to_mapping()


def test_duplicates_are_kept_where_asked_and_found_across_strata(tmp_path):
    strata = [SourceStratum(name=name, batches=[[ROW, ROW]]) for name in "ab"]
    assert clean(strata, tmp_path / "keep", CleaningConfig()).kept == 4
    report = clean(strata, tmp_path / "drop", CLEANING)
    assert report.kept == 1 and report.dropped == {"exact duplicate": 3}
    assert [path.name for path in (tmp_path / "drop").glob("*.parquet")] == ["a.parquet"]


def test_cleaning_to_nothing_and_equal_names_are_refused(tmp_path):
    with pytest.raises(DataError, match="no row is left after cleaning"):
        clean([SourceStratum(name="a", batches=[])], tmp_path / "x", CLEANING)
    twice = [SourceStratum(name="a", batches=[[ROW]])] * 2
    with pytest.raises(DataError, match="two sources give the stratum 'a'"):
        clean(twice, tmp_path / "x", CLEANING)
    assert not (tmp_path / "x").exists()


@pytest.fixture
def raw(tmp_path, texts):
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, part in (("a", texts[:150]), ("b", texts[100:300])):
        with (folder / f"{name}.jsonl").open("w") as stream:
            for i, text in enumerate(part):
                row = {"instruction": text, "response": text[: 1 + i % 50]}
                stream.write(json.dumps(row) + "\n")
            stream.write("{broken\n")
    return folder


def config_for(raw, **changes):
    values = {
        "local": [{"path": str(raw), "eval_size": 10, "prefix": "mine__"}],
        "reasoning_gym": {
            "families": [{"name": "gcd"}, {"name": "chain_sum"}],
            "num_rows": 60,
            "eval_size": 7,
            "num_workers": 1,
        },
        "tokenizer": {"vocab_size": 350, "max_rows_per_stratum": 50},
        "sampling": {"epochs": 2, "max_seq_len": 256},
    }
    return build(DataConfig, values | changes, where="test")


def test_prepare_makes_everything_once_and_skips_what_is_unchanged(raw, tmp_path):
    out = tmp_path / "out"
    seen = []
    prepared = prepare(config_for(raw), out, lambda *step: seen.append(step))
    assert prepared.skipped == ()
    assert {step[0] for step in seen} >= {"generating rows", "tokenizing bytes", "sampling epochs"}
    assert all(0 <= done <= total for _, done, total in seen)

    data = SampledData.open(prepared.sampled)
    assert data.strata() == [
        f"{name}.parquet" for name in ("chain_sum", "gcd", "mine__a", "mine__b")
    ]
    assert data.tokenizer().vocab_size == 350 and data.vocab_size == 512
    report = prepared.report
    assert report["clean"]["strata"]["mine__a"]["unreadable"] == {
        "malformed JSON": {"rows": 1, "first": [f"{raw / 'a.jsonl'}:151"]}
    }
    assert report["sources"]["train_rows_with_a_held_out_prompt"] == 0
    assert report["sources"]["train_rows_compared"] == report["clean"]["kept"]

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")}
    again = prepare(config_for(raw), out)
    assert again.skipped == ("clean", "heldout", "tokenizer", "tokenized", "sampled")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.npy")} == before
    assert load(DataConfig, out / "data.yaml") == config_for(raw)


def test_a_change_redoes_only_the_stages_behind_it(raw, tmp_path):
    out = tmp_path / "out"
    prepare(config_for(raw), out)
    changed = config_for(raw, sampling={"epochs": 1, "max_seq_len": 256})
    assert prepare(changed, out).skipped == ("clean", "heldout", "tokenizer", "tokenized")
    assert SampledData.open(out / "sampled").num_epochs == 1

    # A new row in one file: that stratum alone is tokenised anew, by the same tokenizer.
    fixed = {"path": str(out / "tokenizer")}
    prepare(config_for(raw, tokenizer=fixed), out)
    with (raw / "a.jsonl").open("a") as stream:
        stream.write('{"instruction": "one more", "response": "row"}\n')
    report = prepare(config_for(raw, tokenizer=fixed), out).report
    assert report["tokenized"]["num_redone"] == 1


def test_an_interrupted_preparation_goes_on(raw, tmp_path):
    out = tmp_path / "out"

    def stop(what, done, total):
        if what == "tokenizing bytes":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(config_for(raw), out, stop)
    assert not (out / "sampled").exists()
    resumed = prepare(config_for(raw), out)
    assert resumed.skipped == ("clean", "heldout", "tokenizer")
    whole = prepare(config_for(raw), tmp_path / "whole")
    names = {"report.json", "COMPLETE.json", "metadata.json"}
    for path in (tmp_path / "whole" / "sampled").rglob("*.npy"):
        twin = out / path.relative_to(tmp_path / "whole")
        assert path.read_bytes() == twin.read_bytes()
    assert names <= {path.name for path in out.rglob("*.json")}
    assert whole.report["sampled"]["fingerprint"] == resumed.report["sampled"]["fingerprint"]


def test_held_out_rows_are_whole_and_no_training_row_has_their_prompt(raw, tmp_path):
    prepared = prepare(config_for(raw), tmp_path / "out")
    rows = read_held_out(prepared.heldout)
    counts = {}
    for row in rows:
        counts[row.stratum] = counts.get(row.stratum, 0) + 1
    assert counts == {"gcd": 7, "chain_sum": 7, "mine__a": 10, "mine__b": 10}
    assert all(row.metadata for row in rows if row.family)
    prompts = {normalize_prompt(row.instruction) for row in rows}
    train = rows_of(prepared.clean)
    assert not prompts & {normalize_prompt(row.instruction) for row in train}
    # texts[100:150] are in both files: a prompt held out of one is dropped from the other.
    dropped = prepared.report["sources"]["train_rows_dropped_for_a_held_out_prompt"]
    assert dropped >= 20

    tokenizer = PromptTokenizer.load(prepared.tokenizer)
    encoded = load_rows(prepared.heldout_tokenized)
    assert {(tuple(r.prompt), r.stratum) for r in encoded} == {
        (tuple(tokenizer.encode_prompt(row.instruction, row.condition)), row.stratum)
        for row in rows
    }
    kept, left_out = fitting_rows(encoded, 20)
    assert len(kept) + left_out == len(encoded) and left_out > 0
    assert all(len(row.prompt) + len(row.response) <= 21 for row in kept)


def test_percentiles_from_counts_are_those_of_all_lengths(tmp_path):
    generator = random.Random(5)
    for size in (1, 2, 7, 500):
        lengths = [generator.choice([2, 3, 50, generator.randrange(2, 900)]) for _ in range(size)]
        rows = [{"instruction": "x" * (n - 1), "response": "y"} for n in lengths]
        path = tmp_path / f"{size}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        found = inspect(path)
        points = list(found.lengths)
        expected = np.percentile(lengths, points, method="nearest").tolist()
        assert list(found.lengths.values()) == expected
        assert (found.rows, found.units) == (size, sum(lengths))


def test_inspect_counts_every_kind_of_folder(raw, tmp_path):
    out = tmp_path / "out"
    prepare(config_for(raw), out)
    whole, sampled = inspect(out), inspect(out / "sampled")
    tokenized, rows = inspect(out / "tokenized"), inspect(out / "clean")
    assert whole.rows == sampled.rows == tokenized.rows == rows.rows
    assert sampled.units == tokenized.units
    assert set(sampled.strata) == set(rows.strata) == {"gcd", "chain_sum", "mine__a", "mine__b"}
    assert sampled.conditions == rows.conditions == {"direct": rows.rows}
    assert sampled.lengths[0] <= sampled.lengths[50] <= sampled.lengths[100]
    assert rows.unit == "characters"
    assert inspect(raw).problems == {"malformed JSON": 2}
    for summary in (whole, tokenized, rows):
        text = summary.text(max_strata=2)
        assert f"{summary.rows:,} rows" in text and "... and 2 more" in text
        json.dumps(summary.to_mapping())


def test_inspect_reads_composite_and_absent_conditions(tmp_path, tokenizer):
    rows = [("synth,cot", 3), ("", 2), ("noisy", 4)]
    with (tmp_path / "a.jsonl").open("w") as stream:
        for condition, count in rows:
            row = {"condition": condition, "instruction": "", "response": "x"}
            stream.write((json.dumps(row) + "\n") * count)
    tokenize_files(tmp_path / "a.jsonl", tmp_path / "t", tokenizer)
    assert inspect(tmp_path / "t").conditions == {"noisy": 4, "synth,cot": 3, "": 2}
    with pytest.raises(DataError, match="is one stratum"):
        inspect(tmp_path / "t" / "a.jsonl")


def test_configs_refuse_what_cannot_work():
    with pytest.raises(ConfigError, match="names no source"):
        build(DataConfig, {}, where="test")
    with pytest.raises(ConfigError, match="epochs is 0"):
        build(DataConfig, {"local": [{"path": "x"}], "sampling": {"epochs": 0}}, where="test")
    with pytest.raises(ConfigError, match=r"unknown key 'tokenizer\.vocabsize'; perhaps"):
        build(DataConfig, {"local": [{"path": "x"}], "tokenizer": {"vocabsize": 9}}, where="test")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None:
        pytest.skip("no mount command to make a small file system with")
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"may not mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_what_was_there(small_disk, tmp_path, tokenizer, texts):
    def write(path, count):
        with path.open("w") as stream:
            for i in range(count):
                text = texts[i % len(texts)]
                stream.write(json.dumps({"instruction": text, "response": text}) + "\n")

    source = tmp_path / "rows.jsonl"
    write(source, 50)
    out = small_disk / "tokenized"
    tokenize_files(source, out, tokenizer)
    small = {path: path.read_bytes() for path in out.rglob("*.npy")}
    write(source, 3000)
    with pytest.raises(StorageError, match="the disk is full"):
        tokenize_files(source, out, tokenizer)
    assert {path: path.read_bytes() for path in out.rglob("*.npy")} == small

    # Room enough elsewhere, but not for the sample; nothing half-written stays.
    tokenize_files(source, tmp_path / "roomy", tokenizer)
    with pytest.raises(StorageError, match="the disk is full"):
        sample(tmp_path / "roomy", small_disk / "s", SamplingConfig(epochs=2, max_seq_len=256))
    assert not list(small_disk.glob("*s*.tmp")) and not (small_disk / "s").exists()

    generator = random.Random(0)
    noise = [f"{generator.getrandbits(400):x}" for _ in range(12_000)]
    rows = [ROW._replace(instruction=text) for text in noise]
    for kind in ("jsonl", "parquet"):
        batches = [SourceStratum(name="a", batches=[rows])]
        config = build(CleaningConfig, {"format": kind}, where="test")
        with pytest.raises(StorageError, match="the disk is full"):
            clean(batches, small_disk / "clean", config)
        assert not (small_disk / "clean").exists()
