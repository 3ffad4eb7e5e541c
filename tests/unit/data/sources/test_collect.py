"""Sources from copies of their files: every kind of file, archives, caches, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import zipfile

import pytest
from layouts import gsm8k_rows, write_jsonl, write_parquet

from hrmtext.config.data import HubSourceConfig
from hrmtext.data.sources.collect import collect, collect_inputs, even_share
from hrmtext.data.sources.local import RowProblems, find_files, read_batches, stratum_label
from hrmtext.errors import ConfigError, DataError

GSM8K = [["direct", f"What is {i}+{i}?", str(2 * i)] for i in range(4)]


def run(tmp_path, source, path=None, **options):
    """Stratum -> rows of the collected folder, and the report."""
    out = tmp_path / "out"
    config = HubSourceConfig(source=source, path=str(path) if path else None, **options)
    report = collect(config, out)
    rows = {
        stratum_label(name): [
            list(row[:3]) for batch in read_batches(file, RowProblems(strict=True)) for row in batch
        ]
        for name, file in find_files(out).items()
    }
    return rows, report


def tar_of(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as tar:
        for name, text in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(text.encode())
            tar.addfile(info, io.BytesIO(text.encode()))


def test_a_mirror_gives_the_config_and_split_of_the_recipe_only(tmp_path, gsm8k_folder):
    rows, report = run(tmp_path, "gsm8k", gsm8k_folder)
    assert rows == {"gsm8k": GSM8K}
    assert (report["rows"], report["examples"]) == (4, 4)
    assert report["left_out"] == report["problems"] == {}


def test_a_hub_cache_is_read_through_its_links_and_its_main_snapshot(tmp_path, gsm8k_folder):
    cache = tmp_path / "cache"
    repo = cache / "datasets--openai--gsm8k"
    for revision, name in (("aaa", "socratic"), ("bbb", "main")):
        snapshot = repo / "snapshots" / revision / "main"
        snapshot.mkdir(parents=True)
        blob = repo / "blobs" / f"hash{revision}"
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(gsm8k_folder / name / "train-00000-of-00001.parquet", blob)
        (snapshot / "train-00000-of-00001.parquet").symlink_to(f"../../../blobs/hash{revision}")
    with pytest.raises(DataError, match="2 snapshots and no main one"):
        run(tmp_path, "gsm8k", cache)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("bbb")
    for path in (cache, repo, repo / "snapshots" / "bbb"):
        rows, _ = run(tmp_path, "gsm8k", path)
        assert rows == {"gsm8k": GSM8K}


def test_a_link_out_of_the_folder_or_to_nothing_is_refused(tmp_path, gsm8k_folder):
    stray = tmp_path / "stray"
    (stray / "main").mkdir(parents=True)
    link = stray / "main" / "train-0.parquet"
    link.symlink_to(gsm8k_folder / "main" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match="outside"):
        run(tmp_path, "gsm8k", stray)
    link.unlink()
    link.symlink_to(stray / "gone")
    with pytest.raises(DataError, match="does not exist"):
        run(tmp_path, "gsm8k", stray)


def test_explicit_files_are_read_whatever_their_names(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", gsm8k_rows(2))
    write_jsonl(tmp_path / "b.json", gsm8k_rows(2, start=2))  # lines in a .json, as often seen
    files = (str(tmp_path / "a.jsonl"), str(tmp_path / "b.json"))
    rows, _ = run(tmp_path, "gsm8k", files=files)
    assert rows == {"gsm8k": GSM8K}


@pytest.mark.parametrize("form", ["parquet", "csv"])
def test_a_missing_column_names_the_source_and_the_columns(tmp_path, form):
    path = tmp_path / f"train.{form}"
    if form == "parquet":
        write_parquet(path, [{"question": "q", "solution": "s"}])
    else:
        path.write_text("question,solution\nq,s\n")
    with pytest.raises(
        DataError, match=r"source gsm8k: .* lacks answer; it has question, solution, expected "
        r"question, answer",
    ):  # fmt: skip
        run(tmp_path, "gsm8k", path)


def test_a_column_that_no_row_has_is_an_error_and_one_that_some_lack_is_counted(tmp_path):
    path = tmp_path / "train.jsonl"
    write_jsonl(path, [{"question": "q"}, {"question": "r"}])
    with pytest.raises(DataError, match="source gsm8k: none of 2 rows has answer"):
        run(tmp_path, "gsm8k", path)
    write_jsonl(path, [{"question": "q"}, *gsm8k_rows(1)])
    rows, report = run(tmp_path, "gsm8k", path)
    assert rows == {"gsm8k": GSM8K[:1]}
    assert report["problems"] == {"missing answer": {"rows": 1, "first": [f"{path}:1"]}}


def test_rows_that_are_wrong_or_left_out_are_counted_apart_with_their_places(tmp_path):
    path = tmp_path / "train.jsonl"
    good = json.dumps(gsm8k_rows(1)[0])
    lines = [
        good, '{"question": 5, "answer": "#### 1"}', "{", "[]", '{"question": "q", "answer": "1"}',
        '{"question": "q\\u0000", "answer": "#### 1"}', '{"question": "q", "answer": "#### "}',
        '{"question": null, "answer": "#### 1"}',
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    rows, report = run(tmp_path, "gsm8k", path)
    assert rows == {"gsm8k": GSM8K[:1]}
    counts = {reason: value["rows"] for reason, value in report["problems"].items()}
    assert counts == {
        "NUL character": 1, "empty response": 1, "malformed JSON": 1, "not a JSON object": 1,
        "question is int": 1, "question is null": 1,
    }  # fmt: skip
    assert report["left_out"] == {"no #### in the answer": {"rows": 1, "first": [f"{path}:5"]}}
    with pytest.raises(DataError, match="question is int"):
        run(tmp_path, "gsm8k", path, strict=True)


def test_the_parts_of_flan_come_from_its_folders_and_its_strata_from_the_tasks(tmp_path):
    root = tmp_path / "FLAN"
    row = {"inputs": "q", "targets": "a", "_template_idx": 1, "_task_source": "s",
           "_template_type": "fs"}  # fmt: skip
    for folder in ("cot_fsopt_data", "t0_zsnoopt_data"):
        write_parquet(
            root / folder / "part.0.parquet",
            [row | {"_task_name": "x/y:1.0"}, row | {"_task_name": "z"}],
        )
    write_parquet(root / "other" / "part.0.parquet", [row | {"_task_name": "z"}])
    rows, _ = run(tmp_path, "flan", root)
    assert rows == {
        "flan__cot_fsopt_data__x__y:1.0": [["cot", "q", "a"]],
        "flan__cot_fsopt_data__z": [["cot", "q", "a"]],
        "flan__t0_zsnoopt_data__x__y:1.0": [["direct", "q", "a"]],
        "flan__t0_zsnoopt_data__z": [["direct", "q", "a"]],
    }
    only, _ = run(tmp_path, "flan", root / "cot_fsopt_data")
    assert sorted(only) == ["flan__cot_fsopt_data__x__y:1.0", "flan__cot_fsopt_data__z"]
    with pytest.raises(DataError, match="does not tell which part it is"):
        run(tmp_path, "flan", root / "other" / "part.0.parquet")


def test_each_file_of_synth_is_a_stratum(tmp_path):
    row = {"language": "en", "exercise": "mcq", "query": "q", "query_seed_url": None,
           "constraints": None, "synthetic_answer": "A"}  # fmt: skip
    for number in (1, 2):
        write_parquet(tmp_path / "SYNTH" / f"synth_00{number}.parquet", [row | {"words": 1}] * 3)
    rows, _ = run(tmp_path, "synth", tmp_path / "SYNTH")
    one = ["synth,direct", "q", "A"]
    assert rows == {"synth__synth_001": [one] * 3, "synth__synth_002": [one] * 3}
    rows, report = run(tmp_path, "synth", tmp_path / "SYNTH", limit=4)
    assert rows == {"synth__synth_001": [one] * 2, "synth__synth_002": [one] * 2}
    assert report["rows"] == 4


def test_a_limit_is_spread_evenly_and_met_exactly():
    for count, limit in ((3, 7), (500, 20), (7, 8), (1, 5)):
        shares = [even_share(i, count, limit) for i in range(count)]
        assert sum(shares) == limit
        assert max(shares) - min(shares) <= 1
    assert [even_share(i, 4, 2) for i in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("form", ["folder", "mathematica.tar", "amps.tar.gz", "amps.zip"])
def test_amps_mathematica_is_read_from_a_folder_a_tar_or_a_zip(tmp_path, form):
    files = {
        "mathematica/algebra/roots_w_steps/1.txt": "Problem:\np1\nAnswer:\na1\n",
        "mathematica/algebra/roots_w_steps/2.txt": "Problem:\np2\nAnswer:\na2\n",
        "mathematica/calculus/limits/1.txt": "Problem:\np3\nAnswer:\na3\n",
        "mathematica/readme.md": "no row",
    }
    path = tmp_path / "amps" / form
    if form == "folder":
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text)
    elif form.endswith("zip"):
        path.parent.mkdir()
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        tar_of(path, files)
    rows, report = run(tmp_path, "amps_mathematica", path)
    assert rows == {
        "amps_mathematica__algebra_roots_w_steps": [
            ["noisy,cot", "p1", "a1"], ["noisy,cot", "p2", "a2"],
        ],
        "amps_mathematica__calculus_limits": [["noisy,direct", "p3", "a3"]],
    }  # fmt: skip
    assert report["rows"] == 3
    assert run(tmp_path, "amps_mathematica", path, limit=1)[1]["rows"] == 1


@pytest.mark.parametrize(("name", "kept"), [("m.tar.gz", -40), ("m.tar", 3 * 1024), ("m.tar", 700)])
def test_a_tar_cut_short_is_refused(tmp_path, name, kept):
    path = tmp_path / name
    tar_of(path, {f"m/a/b/{i}.txt": "Problem: p Answer: a" for i in range(50)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="not a whole archive"):
        run(tmp_path, "amps_mathematica", path)


def test_dm_mathematics_takes_alternate_lines_of_the_three_training_folders(tmp_path):
    root = tmp_path / "mathematics_dataset-v1.0"
    for folder in ("train-easy", "train-medium", "train-hard", "interpolate"):
        (root / folder).mkdir(parents=True)
        (root / folder / "arithmetic__add.txt").write_bytes(
            b"1+1?\r\n2\r\n2+2?\r\n4\r\nodd one\r\n"
        )
    rows, report = run(tmp_path, "dm_mathematics", root)
    pairs = [["direct", "1+1?", "2"], ["direct", "2+2?", "4"]]
    assert rows == {
        f"dm_mathematics__train-{level}__arithmetic__add": pairs
        for level in ("easy", "hard", "medium")
    }
    assert report["problems"]["question without an answer"]["rows"] == 3


def test_scibench_problems_without_the_key_solution_have_none(tmp_path):
    problem = {"problem_text": "How far?", "answer_latex": " 4.5", "answer_number": "4.5"}
    (tmp_path / "atkins.json").write_text(json.dumps([problem]))
    solved = problem | {"problem_text": "How long?", "solution": "Count."}
    (tmp_path / "atkins_sol.json").write_text(json.dumps([solved]))
    rows, report = run(tmp_path, "platypus_scibench", tmp_path)
    assert rows == {
        "platypus_scibench": [
            ["direct", "How far?", "4.5"],
            ["cot", "How long?", "Count."],
            ["direct", "How long?", "4.5"],
        ]
    }
    assert report["problems"] == {}
    with pytest.raises(DataError, match="none of 1 rows has solution"):
        run(tmp_path, "platypus_scibench", tmp_path / "atkins.json")


def test_sudoku_is_read_from_its_csv(tmp_path):
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "train.csv").write_text("source,question,answer,rating\np,.3,13,0\n")
    (tmp_path / "s" / "test.csv").write_text("source,question,answer,rating\np,.9,19,0\n")
    rows, _ = run(tmp_path, "sudoku_extreme", tmp_path / "s")
    assert rows == {"sudoku_extreme": [["direct", "Solve the Sudoku\n03", "13"]]}


def test_arb_and_khan_are_read_from_json_files(tmp_path):
    arb = tmp_path / "arb"
    arb.mkdir()
    (arb / "law.json").write_text(json.dumps([{"instruction": "q", "response": "B"}]))
    (arb / "math.json").write_text(json.dumps([{"instruction": "q", "response": "r"}]))
    rows, _ = run(tmp_path, "platypus_arb", arb)
    assert [row[0] for row in rows["platypus_arb"]] == ["direct", "cot"]
    khan = tmp_path / "khan" / "12"
    khan.mkdir(parents=True)
    (khan / "1.json").write_text(json.dumps({"problem": "p", "hints": ["h", "i"]}))
    (khan / "2.json").write_text(json.dumps({"problem": "p"}))
    rows, report = run(tmp_path, "amps_khan", tmp_path / "khan")
    assert rows == {"amps_khan": [["noisy,cot", "p", "h\ni"]]}
    assert report["problems"]["missing hints"]["rows"] == 1


def test_nested_columns_of_parquet_reach_the_rules(tmp_path):
    root = tmp_path / "b"
    row = {"id": "1", "question_stem": "q", "fact1": "f", "answerKey": "B", "clarity": 1.0,
           "choices": {"text": ["x", "y"], "label": ["A", "B"]}}  # fmt: skip
    write_parquet(root / "additional" / "train-00000-of-00001.parquet", [row])
    write_parquet(root / "additional" / "validation-00000-of-00001.parquet", [row])
    write_parquet(root / "additional" / "test-00000-of-00001.parquet", [row])
    write_parquet(root / "main" / "train-00000-of-00001.parquet", [row])
    rows, _ = run(tmp_path, "platypus_openbookqa", root)
    assert rows == {"platypus_openbookqa": [["direct", "q\nA. x\nB. y\nf", "B"]] * 2}


def test_the_cleaned_corpus_names_its_strata_by_path(tmp_path):
    root = tmp_path / "cleaned"
    write_parquet(
        root / "flan" / "cot.parquet", [{"condition": "cot", "instruction": "i", "response": "r"}]
    )
    pair = {"instruction": "i", "response": "r"}
    write_jsonl(root / "x.jsonl", [pair | {"condition": "odd"}, pair | {"condition": ""}])
    rows, report = run(tmp_path, "hrm_text_cleaned", root)
    assert rows == {"flan__cot": [["cot", "i", "r"]], "x": [["", "i", "r"]]}
    assert report["problems"]["unknown condition"]["rows"] == 1


def test_the_evals_wheel_gives_its_pairs_without_the_three_exceptions(tmp_path):
    wheel = tmp_path / "evals-3.0.1.post1-py3-none-any.whl"
    sets = {
        "sums": {"input": [{"role": "user", "content": "2+2?"}], "ideal": "4"},
        "steganography": {"input": "s", "ideal": "t"},
        "graded": {"input": "no ideal"},
    }
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, row in sets.items():
            archive.writestr(f"evals/registry/data/{name}/samples.jsonl", json.dumps(row) + "\n")
        archive.writestr("evals/eval.py", "pass")
    rows, report = run(tmp_path, "evals", wheel)
    assert rows == {"evals__sums": [["direct", "2+2?", "4"]]}
    assert report["left_out"]["set that is left out"]["rows"] == 1
    assert report["problems"]["missing ideal"]["rows"] == 1


def test_a_source_that_is_up_to_date_is_not_read_again(tmp_path, gsm8k_folder):
    run(tmp_path, "gsm8k", gsm8k_folder)
    written = (tmp_path / "out" / "gsm8k.jsonl").stat().st_mtime_ns
    config = HubSourceConfig(source="gsm8k", path=str(gsm8k_folder))
    before = collect_inputs(config)
    collect(config, tmp_path / "out")
    assert (tmp_path / "out" / "gsm8k.jsonl").stat().st_mtime_ns == written
    write_parquet(gsm8k_folder / "main" / "train-00001-of-00002.parquet", gsm8k_rows(1, start=7))
    assert collect_inputs(config) != before
    assert len(run(tmp_path, "gsm8k", gsm8k_folder)[0]["gsm8k"]) == 5


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"source": "gsm8"}, ConfigError, "perhaps you meant 'gsm8k'"),
        ({"source": "dm_mathematics"}, ConfigError, "not on the Hub; set path to mathematics_data"),
        ({"source": "gsm8k", "path": "no/such"}, DataError, "no such file or folder: no/such"),
    ],
)
def test_a_source_that_cannot_be_read_says_what_to_do(tmp_path, options, error, words):
    with pytest.raises(error, match=words):
        collect(HubSourceConfig(**options), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_the_files_of_the_source_says_which_they_are(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds none of its files: main/train-\*\.parquet"):
        collect(HubSourceConfig(source="gsm8k", path=str(tmp_path / "empty")), tmp_path / "out")


def test_a_failed_read_leaves_the_old_folder_as_it_was(tmp_path, gsm8k_folder):
    run(tmp_path, "gsm8k", gsm8k_folder)
    (gsm8k_folder / "main" / "train-00001-of-00002.parquet").write_bytes(b"PAR1 cut")
    with pytest.raises(DataError, match="not a whole Parquet file"):
        run(tmp_path, "gsm8k", gsm8k_folder)
    assert sorted(p.name for p in tmp_path.iterdir() if "tmp" in p.name) == []
    assert (tmp_path / "out" / "gsm8k.jsonl").is_file()
