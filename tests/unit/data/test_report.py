"""The data report and the manifest: every figure against a slow count, the same bytes each time."""

from __future__ import annotations

import hashlib
import html.parser
import json
import random

import numpy as np
import pytest

from hrmtext.cli.main import main
from hrmtext.config import build
from hrmtext.config.data import DataConfig
from hrmtext.data.format import SampledData, read_stratum, row_tokens, stratum_folders
from hrmtext.data.prepare import prepare
from hrmtext.data.report import write_manifest, write_report
from hrmtext.data.report.collect import collect, count_drops, octaves
from hrmtext.data.report.vocabulary import KINDS, Vocabulary
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.errors import DataError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, texts, tokenizer):
    folder = tmp_path_factory.mktemp("report")
    (folder / "raw" / "web").mkdir(parents=True)
    generator = random.Random(0)
    parts = {"web/a": texts[:120], "web/b": texts[100:200], "math": texts[200:]}
    for name, part in parts.items():
        with (folder / "raw" / f"{name}.jsonl").open("w") as stream:
            for number, text in enumerate(part):
                row = {
                    "instruction": text,
                    "response": text[::-1] + " <b>bold</b> & so" * (number % 3),
                    "condition": generator.choice(["direct", "synth,cot", ""]),
                }
                if number % 25 == 0:
                    row["response"] = "<think><script>alert(1)</script> never ends"
                elif number % 10 == 0:
                    row["response"] = "<think>short</think> " + row["response"]
                stream.write(json.dumps(row) + "\n")
            stream.write("{broken\n")
    tokenizer.save(folder / "tokenizer")
    config = build(DataConfig, {
        "local": [{"path": str(folder / "raw"), "eval_size": 5, "licence": "CC0-1.0"}],
        "cleaning": {"remove_thinking": True, "drop_duplicates": True},
        "tokenizer": {"path": str(folder / "tokenizer")},
        "sampling": {
            "epochs": 3, "max_seq_len": 128, "total_tokens": 20_000,
            "rules": [{"prefix": "web__", "share": 0.6}, {"prefix": "math", "max_rows": 30,
                                                          "repeat": 2}],
        },
    }, where="test")  # fmt: skip
    prepare(config, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def report(prepared):
    return collect(prepared)


class Reader(html.parser.HTMLParser):
    """Checks that tags are closed in order; keeps the text and the addresses."""

    VOID = ("meta", "line", "rect", "circle", "polyline", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.text, self.links, self.tags = [], [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_needs_no_network_and_runs_nothing(prepared):
    page = write_report(prepared).read_text()
    reader = Reader(page)
    assert reader.links == [] and "script" not in reader.tags and "b" not in set(reader.text)
    text = " ".join(reader.text)
    headings = ["Mixture", "Rows left out", "Rows changed", "Strata", "Conditions", "Packing"]
    headings += ["Tokenizer", "Contamination", "Sources and licences", "Configuration"]
    assert [heading for heading in headings if heading not in reader.text] == []
    assert "<think><script>alert(1)</script> never ends" in text, "a sample, as text"
    assert "thinking does not end" in text and "thinking removed" in text
    assert "CC0-1.0" in text and "Not audited" in text
    assert SampledData.open(prepared / "sampled").fingerprint in text
    assert page.count("<svg") == 4


def test_the_same_folder_gives_the_same_bytes(prepared):
    paths = [write_report(prepared), write_manifest(prepared)]
    before = [path.read_bytes() for path in paths]
    assert main(["data", "report", str(prepared)]) == 0
    assert [path.read_bytes() for path in paths] == before


def test_the_manifest_states_checksums_licences_and_the_fingerprint_of_training(prepared):
    manifest = json.loads(write_manifest(prepared).read_text())
    assert manifest["fingerprint"] == SampledData.open(prepared / "sampled").fingerprint
    assert [source["licence"] for source in manifest["sources"]] == ["CC0-1.0"]
    listed = manifest["files"]
    assert "sampled/tokens.npy" in listed and "clean/web__a.parquet" in listed
    for name, value in listed.items():
        raw = (prepared / name).read_bytes()
        assert value == {"bytes": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    there = {
        path.relative_to(prepared).as_posix()
        for path in prepared.rglob("*")
        if path.is_file() and path.parent.name != "contamination"
    }
    assert there - set(listed) <= {"report.html", "manifest.json"}
    assert build(DataConfig, manifest["config"], where="manifest")


def test_lengths_conditions_and_drops_are_those_of_the_rows(prepared, report):
    prompts, responses = [], []
    for folder in stratum_folders(prepared / "tokenized"):
        index = read_stratum(folder).index
        prompts += index.inst_len.tolist()
        responses += index.resp_len.tolist()
    scan = report.scan
    for found, lengths in (
        (scan.prompt_lengths, prompts),
        (scan.response_lengths, responses),
    ):
        slow = [sum(2**k <= length < 2 ** (k + 1) for length in lengths) for k in range(32)]
        assert found.tolist() == slow
    assert sum(scan.prompt_tokens) == sum(prompts) and sum(scan.rows) == len(prompts)
    assert set(scan.conditions) == {"direct", "synth,cot", ""}
    assert sum(scan.conditions.values()) == len(prompts)
    drops = {(stage, reason): rows for stage, reason, rows in report.drops}
    assert drops["reading", "malformed JSON"] == 3
    assert drops["cleaning", "thinking does not end"] == 5 + 4 + 4
    assert drops["cleaning", "prompt is held out"] >= 15
    assert octaves(np.array([1, 2, 3, 4, 2**40])).tolist()[:3] == [1, 2, 1]


def test_drops_of_every_stage_are_counted():
    stages = {
        "sources": {
            "reasoning_gym": {"families": {"gcd": {"dropped": {"repeated": 2}}}},
            "hub": {"x": {"left_out": {"rule": {"rows": 5}}, "problems": {"bad": {"rows": 1}}}},
        },
        "clean": {"strata": {"a": {"dropped": {"late": 3}, "unreadable": {"bad": {"rows": 4}}}}},
        "tokenized": {"dropped": {"a": {"odd": {"rows": 6}}}},
        "sampled": {"strata": {"a": {"dropped": {"long": 7}}, "b": {"dropped": {"long": 1}}}},
    }
    assert count_drops(stages) == [
        ("generating", "repeated", 2), ("source's rule", "rule", 5), ("reading", "bad", 5),
        ("cleaning", "late", 3), ("tokenising", "odd", 6), ("sampling", "long", 8),
    ]  # fmt: skip


def test_the_mixture_planned_and_realised_is_that_of_the_epochs(prepared, report):
    data = SampledData.open(prepared / "sampled")
    names = [name.split("__")[0].removesuffix(".parquet") for name in data.strata()]
    tokens = {"web__": [], "math": []}
    rows, seen, drawn = {"web__": [], "math": []}, set(), 0
    for epoch in range(3):
        index, ids = data.epoch(epoch), data.stratum_ids(epoch)
        lengths = index.inst_len + index.resp_len
        for source in tokens:
            which = np.array([names[i] == source.rstrip("_") for i in ids])
            tokens[source].append(int(lengths[which].sum()))
            rows[source].append(int(which.sum()))
        seen |= set(zip(index.inst_start.tolist(), lengths.tolist(), strict=True))
        drawn += int(lengths.sum())
    found = {source["source"]: source for source in report.mixture}
    assert found["web__"]["planned"] == 20_000 and found["web__"]["unit"] == "tokens"
    assert found["web__"]["realised"] == found["web__"]["tokens"] == tokens["web__"]
    assert found["math"]["planned"] == 60 and found["math"]["unit"] == "rows"
    assert found["math"]["realised"] == rows["math"] == [60, 60, 60]
    assert found["math"]["tokens"] == tokens["math"]
    assert report.unique_tokens == sum(length for _, length in seen)
    assert 0.3 < report.unique_tokens / drawn < 0.99
    for tried in report.packing:
        assert 0.5 < tried["filled"] <= 1 and tried["batch_tokens"] % tried["bin_tokens"] == 0


def test_bytes_a_token_are_those_of_the_text(prepared, report):
    tokenizer = PromptTokenizer.load(prepared / "tokenizer")
    num_bytes = num_tokens = 0
    used = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    for folder in stratum_folders(prepared / "tokenized"):
        stratum = read_stratum(folder)
        ids = row_tokens(stratum.tokens, stratum.index).tolist()
        num_bytes += len(tokenizer.decode(ids).encode())
        num_tokens += sum(token > 30 for token in ids)
        np.add.at(used, ids, 1)
    total = np.sum(report.scan.kinds, axis=0)
    plain = [place for place, kind in enumerate(KINDS) if kind != "special"]
    assert total[0, plain].sum() == num_tokens and total[1, plain].sum() == num_bytes
    found = report.scan.vocabulary
    assert found["entries"] == 360 - 31 and found["unused"] == int((used[31:] == 0).sum()) > 0
    assert found["most_used"][0][1] == used[31:].max()


def test_entries_are_told_apart_by_what_they_stand_for(tokenizer):
    vocabulary = Vocabulary(tokenizer)
    kinds = {}
    for text in ("question", "the", "7", "?", " ", "\n"):
        ids = tokenizer.encode_texts([text])[0]
        kinds[text] = [KINDS[vocabulary.kinds[token]] for token in ids]
        assert sum(vocabulary.num_bytes[token] for token in ids) == len(text)
    assert set(kinds["question"]) == set(kinds["the"]) == {"words"}
    assert kinds["7"] == ["digits"] and kinds["?"] == ["marks"]
    assert kinds[" "] == kinds["\n"] == ["spaces"]
    umlaut = tokenizer.encode_texts(["ü"])[0]
    assert [KINDS[vocabulary.kinds[token]] for token in umlaut] == ["part of a character"] * 2
    assert KINDS[vocabulary.kinds[tokenizer.eos_id]] == "special"
    assert vocabulary.num_bytes[tokenizer.eos_id] == 0


def test_an_audit_lands_in_the_folder_and_on_the_page(prepared, texts, tmp_path, capsys):
    bench = tmp_path / "quiz.jsonl"
    rows = [{"question": text, "score": number % 2} for number, text in enumerate(texts[:40])]
    bench.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["data", "contamination", str(prepared), str(bench), "--sizes", "5", "13"]) == 0
    assert "of 40 questions overlap" in capsys.readouterr().out
    stored = json.loads((prepared / "contamination" / "quiz.json").read_text())
    assert set(stored["benchmarks"]["quiz"]["ngrams"]) == {"5", "13"}
    Reader((prepared / "contamination" / "quiz.html").read_text())
    text = " ".join(Reader(write_report(prepared).read_text()).text)
    assert "quiz, n = 13" in text and "Not audited" not in text


def test_a_folder_that_is_not_prepared_is_refused(tmp_path, capsys):
    with pytest.raises(DataError, match="is not a prepared folder"):
        write_report(tmp_path)
    assert main(["data", "report", str(tmp_path)]) == 2
    assert "hrm-text data prepare" in capsys.readouterr().err
