"""`hrm-text data run` on every recipe of configs/data, small and offline, to the manifest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from layouts import write_jsonl, write_parquet
from test_recipe import CASES

from hrmtext.cli.main import main
from hrmtext.data.example import Example
from hrmtext.data.format import SampledData
from hrmtext.data.sources.recipe.catalog import find_source

CONFIGS = Path(__file__).parents[4] / "configs" / "data"
SMALL = ["tokenizer.vocab_size=300", "tokenizer.allow_fewer=true", "sampling.epochs=1"]


def good_row(name, part):
    """A raw row that the rule takes, of the part if there is one of it."""
    rows = [
        (origin, row) for source, row, origin, expected in CASES
        if source == name and any(isinstance(item, Example) for item in expected)
    ]  # fmt: skip
    return next((row for origin, row in rows if origin.part == part), rows[0][1])


def write_mirror(root: Path, name: str) -> Path:
    """A copy of a public source with a row in every part, in the form of its files."""
    source = find_source(name)
    for part in source.parts:
        path = root / name / part.files[0].replace("*", "a1")
        row = good_row(name, part.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            write_parquet(path, [row])
        elif path.suffix == ".jsonl":
            write_jsonl(path, [row])
        elif path.suffix == ".json":
            path.write_text(json.dumps(row if name == "amps_khan" else [row]))
        elif path.suffix == ".csv":
            path.write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
        else:
            path.write_text(row.get("text") or f"{row['question']}\n{row['answer']}\n")
    return root / name


def check(out: Path, strata: set[str], capsys) -> None:
    said = capsys.readouterr()
    assert f"written: {out / 'report.html'}" in said.out
    manifest = json.loads((out / "manifest.json").read_text())
    data = SampledData.open(out / "sampled")
    assert manifest["fingerprint"] == data.fingerprint
    found = {name.removesuffix(".parquet") for name in data.strata()}
    assert all(any(name.startswith(start) for name in found) for start in strata)
    assert {"clean/report.json", "sampled/tokens.npy", "tokenizer/tokenizer.json"} <= set(
        manifest["files"]
    )
    assert not list(out.glob(".*")), "no leftovers"


@pytest.mark.parametrize("recipe", ["mini", "paper"])
def test_the_mixtures_run_on_copies_of_all_public_sources(tmp_path, recipe, capsys):
    values = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    for entry in values["hub"]:
        entry["path"] = str(write_mirror(tmp_path / "mirror", entry["source"]))
        if "limit" in entry:
            entry["limit"] = 50
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    out = tmp_path / "out"
    assert main(["data", "run", str(tmp_path / "recipe.yaml"), str(out), *SMALL]) == 0
    check(
        out,
        {"gsm8k", "flan__cot_fsopt_data__", "flan__niv2_fsopt_data__", "sudoku_extreme"},
        capsys,
    )
    sources = json.loads((out / "manifest.json").read_text())["sources"]
    assert len(sources) == 25 and all(source["licence"] for source in sources)
    report = json.loads((out / "report.json").read_text())
    assert all(source["examples"] for source in report["sources"]["hub"].values())


@pytest.mark.parametrize("recipe", ["reasoning_gym", "quickstart"])
def test_generated_rows_run_and_go_on_without_generating_again(
    tmp_path, recipe, capsys, monkeypatch
):
    pytest.importorskip("reasoning_gym", reason="the data extra is not installed")
    values = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text())
    families = values["reasoning_gym"]["families"]
    for family in families:
        family.pop("size", None)
    values["reasoning_gym"] |= {"eval_size": 1, "num_workers": 1, "num_rows": 5 * len(families)}
    (tmp_path / f"{recipe}.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.chdir(tmp_path)
    command = ["data", "run", f"{recipe}.yaml", *SMALL]
    assert main(command) == 0
    out = Path("runs") / recipe / "data"
    check(out, {family.get("label", family["name"]) for family in families}, capsys)
    before = [path.stat().st_mtime_ns for path in (out / "sources").rglob("*.jsonl")]
    assert main([*command, "cleaning.drop_duplicates=true"]) == 0
    assert [path.stat().st_mtime_ns for path in (out / "sources").rglob("*.jsonl")] == before


@pytest.mark.parametrize("recipe", ["local", "chat"])
def test_a_folder_of_ones_own_rows_runs(tmp_path, recipe, capsys):
    rows = [
        {"instruction": f"What is {i} and {i}?", "response": f"It is {2 * i}."} for i in range(60)
    ]
    if recipe == "chat":
        rows = [
            {"messages": [
                {"role": "user", "content": row["instruction"]},
                {"role": "assistant", "content": row["response"]},
                {"role": "user", "content": "sure?"}, {"role": "assistant", "content": "Yes."},
            ]}
            for row in rows
        ]  # fmt: skip
    write_jsonl(tmp_path / "raw" / "mine.jsonl", rows)
    out = tmp_path / "out"
    source = f"local=[{{path: {tmp_path / 'raw'}, eval_size: 5}}]"
    assert main(["data", "run", str(CONFIGS / f"{recipe}.yaml"), str(out), source, *SMALL]) == 0
    check(out, {"mine"}, capsys)
