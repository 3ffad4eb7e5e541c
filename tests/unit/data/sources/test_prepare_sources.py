"""Public sources on the way to training data, and their listing."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from layouts import gsm8k_rows, write_parquet

from hrmtext.cli.main import main
from hrmtext.config.base import build
from hrmtext.config.data import DataConfig
from hrmtext.data.prepare import prepare
from hrmtext.data.sources.recipe.catalog import SOURCES
from hrmtext.errors import ConfigError


@pytest.fixture
def config(tmp_path) -> DataConfig:
    write_parquet(tmp_path / "gsm8k" / "main" / "train-0.parquet", gsm8k_rows(40))
    (tmp_path / "train.csv").write_text(
        "source,question,answer,rating\n" + "".join(f"p,{i}..,{i}12,0\n" for i in range(30))
    )
    values = {
        "hub": [
            {"source": "gsm8k", "path": str(tmp_path / "gsm8k"), "eval_size": 5},
            {"source": "sudoku_extreme", "path": str(tmp_path / "train.csv"), "limit": 20},
        ],
        "tokenizer": {"vocab_size": 300},
        "sampling": {
            "epochs": 1, "max_seq_len": 64, "rules": [{"prefix": "gsm8k", "repeat": 10}],
        },
    }  # fmt: skip
    return build(DataConfig, values, where="test")


def test_public_sources_become_training_data_with_held_out_prompts(tmp_path, config):
    done = prepare(config, tmp_path / "data")
    strata = done.report["clean"]["strata"]
    assert {name: stratum["kept"] for name, stratum in strata.items()} == {
        "gsm8k": 35, "sudoku_extreme": 20,
    }  # fmt: skip
    assert done.report["sources"]["held_out_rows"] == {"gsm8k": 5}
    assert done.report["sources"]["hub"]["sudoku_extreme"]["rows"] == 20
    assert done.report["sampled"]["rows_per_epoch"] == 10 * 35 + 20
    again = prepare(config, tmp_path / "data")
    assert set(again.skipped) == {"clean", "heldout", "tokenizer", "tokenized", "sampled"}
    fewer = dataclasses.replace(config.hub[0], eval_size=2)
    changed = prepare(dataclasses.replace(config, hub=(fewer, config.hub[1])), tmp_path / "data")
    assert changed.report["sources"]["held_out_rows"] == {"gsm8k": 2}


def test_what_a_source_left_out_is_shown_when_data_are_prepared(tmp_path, config, capsys):
    from rich.console import Console

    from hrmtext.cli.data import print_prepared

    rows = [*gsm8k_rows(40), {"question": "q", "answer": "no mark"}]
    write_parquet(tmp_path / "gsm8k" / "main" / "train-0.parquet", rows)
    print_prepared(Console(highlight=False, width=200), prepare(config, tmp_path / "data"))
    assert "left out of gsm8k: 1 rows (no #### in the answer)" in capsys.readouterr().out


def test_a_reason_that_many_strata_share_takes_one_line(capsys):
    from rich.console import Console

    from hrmtext.cli.data import _print_dropped

    many = {f"tasks__{i}": {"too long": i + 1} for i in range(9)}
    _print_dropped(Console(width=200), many | {"gsm8k": {"no ####": {"rows": 3, "first": []}}})
    assert capsys.readouterr().out.splitlines() == [
        "left out of 9 strata: 45 rows (too long)",
        "left out of gsm8k: 3 rows (no ####)",
    ]


def test_a_source_twice_is_refused():
    entry = {"source": "gsm8k", "path": "x"}
    with pytest.raises(ConfigError, match="hub lists 'gsm8k' twice"):
        build(DataConfig, {"hub": [entry, entry]}, where="test")


def test_a_revision_of_local_files_is_refused():
    entry = {"source": "gsm8k", "path": "x", "revision": "main"}
    with pytest.raises(ConfigError, match="the revision is of the Hub"):
        build(DataConfig, {"hub": [entry]}, where="test")


def test_the_listing_shows_every_source_and_one_in_full(capsys):
    assert main(["data", "sources"]) == 0
    shown = capsys.readouterr().out
    for source in SOURCES.values():
        assert source.name in shown
    assert main(["data", "sources", "synth"]) == 0
    shown = capsys.readouterr().out
    for words in ("PleIAs/SYNTH", "20,000 rows a stratum", "CC-BY-4.0", "Kept: English"):
        assert words in shown
    assert main(["data", "sources", "synht"]) == 2
    assert "perhaps you meant 'synth'" in capsys.readouterr().err


def test_the_listing_starts_without_heavy_packages():
    code = (
        "import sys\nfrom hrmtext.cli.main import main\nmain(['data', 'sources'])\n"
        "names = {'torch', 'transformers', 'tokenizers', 'pyarrow', 'datasets'}\n"
        "heavy = names & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, f"imported: {result.stderr}"
