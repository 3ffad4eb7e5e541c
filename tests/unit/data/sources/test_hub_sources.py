"""Reading through `datasets`, offline: folders of the Hub's layout in place of its repositories."""

from __future__ import annotations

import dataclasses
import sys

import datasets
import huggingface_hub
import pytest
from layouts import write_jsonl, write_parquet

from hrmtext.config.data import HubSourceConfig
from hrmtext.data.sources import collect as collecting
from hrmtext.data.sources.collect import SourceReport, collect, convert
from hrmtext.data.sources.hub import hub_rows, hub_units
from hrmtext.data.sources.recipe.catalog import find_source
from hrmtext.errors import BackendError, DataError


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))


def read(name, folder):
    """Stratum and example of every row that `datasets` gives."""
    source = find_source(name)
    report = SourceReport(source=name)
    found = []
    for unit in hub_units(source, str(folder)):
        rows = hub_rows(source, unit, str(folder))
        found += [(s, tuple(e[:3])) for s, e in convert(source, unit.origin, rows, report)]
    return found, report


def test_a_config_and_a_split_are_read_as_the_hub_names_them(gsm8k_folder):
    found, report = read("gsm8k", gsm8k_folder)
    assert found == [
        ("gsm8k", ("direct", f"What is {i}+{i}?", str(2 * i))) for i in range(4)
    ]  # fmt: skip
    assert report.rows == 4


def test_all_splits_are_read_where_the_recipe_says_so(tmp_path):
    row = {"topic": "t", "answer": "a", "answer_type": "x"}
    for split in ("mathematical_object", "numerical"):
        write_parquet(
            tmp_path / "p" / "data" / f"{split}-00000-of-00001.parquet",
            [row | {"problem_statement": split}],
        )
    (tmp_path / "p" / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: mathematical_object\n    path: data/mathematical_object-*\n"
        "  - split: numerical\n    path: data/numerical-*\n---\n"
    )
    found, _ = read("principia", tmp_path / "p")
    assert [example[1] for _, example in found] == ["mathematical_object", "numerical"]


def test_sources_whose_files_are_strata_are_read_file_by_file(tmp_path):
    row = {"language": "en", "exercise": "mcq", "query": "q", "query_seed_url": None,
           "constraints": None, "synthetic_answer": "A", "words": 1}  # fmt: skip
    for number in (1, 2):
        write_parquet(tmp_path / "s" / f"synth_00{number}.parquet", [row])
    found, _ = read("synth", tmp_path / "s")
    assert [stratum for stratum, _ in found] == ["synth__synth_001", "synth__synth_002"]


def test_flans_folders_are_its_parts(tmp_path):
    row = {"inputs": "q", "targets": "a", "_task_name": "t"}
    for folder in ("cot_zsopt_data", "dialog_fsopt_data"):
        write_parquet(tmp_path / "f" / folder / "part.0.parquet", [row])
    found, _ = read("flan", tmp_path / "f")
    assert [(stratum, example[0]) for stratum, example in found] == [
        ("flan__cot_zsopt_data__t", "cot"), ("flan__dialog_fsopt_data__t", "direct"),
    ]  # fmt: skip


def test_nested_columns_arrive_as_the_rules_expect_them(tmp_path):
    row = {"id": "1", "question_stem": "q", "fact1": "f", "answerKey": "B",
           "choices": {"text": ["x", "y"], "label": ["A", "B"]}}  # fmt: skip
    for split in ("train", "validation"):
        write_parquet(tmp_path / "b" / "additional" / f"{split}-0.parquet", [row])
    (tmp_path / "b" / "README.md").write_text(
        "---\nconfigs:\n- config_name: additional\n  data_files:\n"
        "  - split: train\n    path: additional/train-*\n"
        "  - split: validation\n    path: additional/validation-*\n---\n"
    )
    found, _ = read("platypus_openbookqa", tmp_path / "b")
    assert found == [("platypus_openbookqa", ("direct", "q\nA. x\nB. y\nf", "B"))] * 2


def test_lines_of_json_are_read_too(tmp_path):
    write_jsonl(tmp_path / "o" / "test.jsonl", [{"problem": "p", "solution": "s", "answer": "a"}])
    found, _ = read("omni_math", tmp_path / "o")
    assert [example[0] for _, example in found] == ["cot", "direct"]


def test_a_column_that_the_hub_lacks_names_the_source(tmp_path):
    write_parquet(tmp_path / "w" / "data" / "train-0.parquet", [{"question": "q", "reply": "a"}])
    with pytest.raises(
        DataError, match=r"source webinstruct_verified: .* lacks answer; it has question, reply"
    ):
        read("webinstruct_verified", tmp_path / "w")


def test_collect_reads_the_hub_with_id_revision_and_limit(tmp_path, gsm8k_folder, monkeypatch):
    calls = []
    source = dataclasses.replace(find_source("gsm8k"), hub=str(gsm8k_folder))
    monkeypatch.setattr(collecting, "find_source", lambda name: source)
    real = collecting.hub_rows

    def spy(source, unit, repository, revision):
        calls.append((unit.config, unit.split, repository, revision))
        return real(source, unit, repository, revision)

    monkeypatch.setattr(collecting, "hub_rows", spy)
    config = HubSourceConfig(source="gsm8k", limit=3, revision="main")
    report = collect(config, tmp_path / "out")
    assert (report["rows"], report["examples"]) == (3, 3)
    assert calls == [("main", "train", str(gsm8k_folder), "main")]


def test_a_hub_that_cannot_be_read_says_so(tmp_path):
    source = find_source("gsm8k")
    missing = str(tmp_path / "missing")
    with pytest.raises(DataError, match=r"source gsm8k: could not read .*set path to a local copy"):
        list(hub_rows(source, hub_units(source, missing)[0], missing))


@pytest.mark.parametrize("name", ["synth", "gsm8k"])
def test_a_connection_that_fails_is_one_clear_error(monkeypatch, name):
    http = vars(huggingface_hub.utils._http)  # the library that the installed client uses
    library = http.get("httpx2") or http["httpx"]

    def fail(*arguments, **options):
        raise library.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", fail)
    monkeypatch.setattr(datasets, "load_dataset", fail)
    source = find_source(name)
    repository = str(source.hub)
    with pytest.raises(DataError, match=f"could not read {repository} .ConnectError: Name or"):
        for unit in hub_units(source, repository):
            next(iter(hub_rows(source, unit, repository)))


def test_without_datasets_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    source = find_source("gsm8k")
    with pytest.raises(BackendError, match=r"hrm-text\[data\]"):
        list(hub_rows(source, hub_units(source, str(tmp_path))[0], str(tmp_path)))
