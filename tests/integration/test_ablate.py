"""Comparisons: equal cost, every seed, a table that follows from the runs, and they go on."""

import json
import math

import pytest
import yaml

from hrmtext import ablate
from hrmtext.cli.main import main
from hrmtext.config.ablate import AblationConfig
from hrmtext.config.base import build
from hrmtext.errors import CheckpointError, ConfigError

COMPARISON = {
    "title": "Mask and loops",
    "train": {
        "model": {
            "vocab_size": 290, "hidden_size": 32, "num_layers_per_stack": 1, "num_heads": 2,
            "head_dim": 16, "intermediate_size": 64, "max_seq_len": 64,
        },
        "max_steps": 6, "batch_tokens": 256, "lr": 3e-3, "warmup_steps": 2, "ema_decay": 0.5,
        "precision": "fp32", "validate_every": 0, "validation_rows": 8, "tensorboard": False,
    },
    "seeds": [0, 1],
    "evaluate": {"max_new_tokens": 4},
    "variants": [
        {"name": "hrm"},
        {"name": "causal", "changes": {"model.prefix_lm": False, "objective": "all"}},
        {"name": "ut", "changes": {"model.architecture": "ut", "bp_first": 2, "bp_last": 2}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Prepared data, and the comparison run once by the command."""
    root = tmp_path_factory.mktemp("ablate")
    rows = [
        {"instruction": f"Add {a} and {b}, please", "response": str(a + b)}
        for a in range(12)
        for b in range(12)
    ]
    (root / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (root / "data.yaml").write_text(
        f"local: [{{path: {root / 'rows.jsonl'}, eval_size: 8}}]\n"
        "tokenizer: {vocab_size: 288}\nsampling: {epochs: 1, max_seq_len: 64}\n"
    )
    (root / "comparison.yaml").write_text(yaml.safe_dump(COMPARISON))
    assert main(["data", "prepare", str(root / "data.yaml"), str(root / "data")]) == 0
    command = ["ablate", str(root / "comparison.yaml"), "--data", str(root / "data")]
    assert main([*command, "--out", str(root / "out"), "--device", "cpu"]) == 0
    return root


def settings(**changes) -> AblationConfig:
    return build(AblationConfig, {**COMPARISON, **changes}, where="test")


def test_every_variant_is_trained_and_asked_once_a_seed_at_equal_operations(workspace):
    runs = ablate.plan(settings(), workspace / "out")
    assert [(run.variant, run.seed) for run in runs] == [
        (name, seed) for seed in (0, 1) for name in ("hrm", "causal", "ut")
    ]
    reference = runs[0].flops
    for run in runs:
        assert (run.folder / "evaluation.json").is_file()
        assert abs(run.flops / reference - 1) < 0.5 / run.recipe.max_steps + 0.01
    assert runs[2].recipe.max_steps > runs[0].recipe.max_steps, "four calls cost less than eight"
    steps = ablate.plan(settings(match="steps"), workspace / "out")
    assert {run.recipe.max_steps for run in steps} == {6}


def test_the_table_is_the_mean_and_interval_of_the_runs(workspace):
    found = json.loads((workspace / "out" / "table.json").read_text())
    assert [row["variant"] for row in found["rows"]] == ["hrm", "causal", "ut"]
    assert [row["mask"] for row in found["rows"]] == ["prefix", "causal", "prefix"]
    for row in found["rows"]:
        scores = [
            json.loads(
                (workspace / f"out/runs/{row['variant']}-seed{seed}/evaluation.json").read_text()
            )["mean"]["exact_match"]
            for seed in (0, 1)
        ]
        assert row["exact_match"] == pytest.approx(sum(scores) / 2)
        assert row["exact_match_by_seed"] == scores
        spread = abs(scores[0] - scores[1]) / 2  # two values: std / sqrt(2) is half their distance
        assert row["half_width"] == pytest.approx(12.706 * spread)
        assert 0 < row["validation_loss"] < 10
    text = (workspace / "out" / "table.md").read_text()
    assert text.startswith("# Mask and loops") and "2 seeds" in text
    assert "| architecture | mask | loss on | parameters | steps | exact match | by seed |" in text
    assert "| hrm | causal | all | " in text and "| ut | prefix | response | " in text


def test_differences_are_of_pairs_of_seeds(workspace):
    def runs(scores):
        found = []
        for run in ablate.plan(settings(seeds=[0, 1, 2]), workspace / "pairs"):
            run.folder.mkdir(parents=True, exist_ok=True)
            score = scores[run.variant][run.seed]
            report = {
                "mean": {"exact_match": score, "majority": 0.1},
                "families": [{"name": "sums", "exact_match": score}],
            }
            (run.folder / "evaluation.json").write_text(json.dumps(report))
            line = {"kind": "validation", "step": 6, "ema": {"loss": 2.0 - score}}
            (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
            found.append(run)
        return found

    # The seeds differ far more than the variants do: only the pairs tell them apart.
    scores = {"hrm": [0.1, 0.5, 0.9], "causal": [0.2, 0.6, 1.0], "ut": [0.1, 0.5, 0.6]}
    rows = {row.variant: row for row in ablate.tabulate(runs(scores))}
    assert rows["hrm"].difference == 0 and rows["hrm"].difference_half_width is None
    assert rows["causal"].difference == pytest.approx(0.1)
    assert rows["causal"].difference_half_width == pytest.approx(0, abs=1e-12)
    assert rows["causal"].half_width == pytest.approx(4.303 * 0.4 / math.sqrt(3))
    assert rows["ut"].difference == pytest.approx(-0.1)
    # Differences 0, 0 and -0.3: standard deviation 0.3 / sqrt(3).
    assert rows["ut"].difference_half_width == pytest.approx(4.303 * 0.1)
    ablate.write(settings(), list(rows.values()), workspace / "pairs")
    text = (workspace / "pairs" / "table.md").read_text()
    assert "| 60.0 ± 99.4 | 20 60 100 | +10.0 ± 0.0 |" in text


def test_many_families_are_shown_by_source(workspace):
    runs = ablate.plan(settings(), workspace / "many")
    for run in runs:
        run.folder.mkdir(parents=True, exist_ok=True)
        shares = {f"maths__{i}": i / 20 for i in range(20)} | {"words": 0.25}
        report = {
            "mean": {"exact_match": 0.5, "majority": 0.1},
            "families": [{"name": name, "exact_match": share} for name, share in shares.items()],
        }
        (run.folder / "evaluation.json").write_text(json.dumps(report))
        (run.folder / "metrics.jsonl").write_text("")
    ablate.write(settings(), ablate.tabulate(runs), workspace / "many")
    text = (workspace / "many" / "table.md").read_text()
    assert "| maths (20 families) | words |" in text
    assert "| 47.5 | 25.0 |" in text


def test_two_workers_give_the_results_of_one(workspace):
    two = {**COMPARISON, "seeds": [0], "variants": COMPARISON["variants"][::2]}
    two["train"] = {**COMPARISON["train"], "max_steps": 3}
    files = {}
    for workers in (1, 2):
        out = workspace / f"workers{workers}"
        told = []
        ablate.ablate(
            settings(**two), workspace / "data", out, device="cpu", workers=workers, threads=1,
            progress="none", tell=told.append,
        )  # fmt: skip
        assert sum("exact match" in line for line in told) == 2
        files[workers] = (out / "table.json").read_bytes()
        weights = out / "runs" / "ut-seed0" / "checkpoints"
        files[workers] += next(weights.glob("step_*/model.safetensors")).read_bytes()
    assert files[1] == files[2]


def test_the_same_command_goes_on_and_repeats_nothing(workspace, capsys):
    (workspace / "out/runs/ut-seed1/evaluation.json").unlink()
    told = []
    before = (workspace / "out" / "table.json").read_text()
    ablate.ablate(
        settings(), workspace / "data", workspace / "out", device="cpu", progress="none",
        tell=told.append,
    )  # fmt: skip
    assert "5 of 6 runs are done already" in told
    assert sum(line.startswith("training") for line in told) == 1
    assert (workspace / "out" / "table.json").read_text() == before


def test_runs_of_another_comparison_are_refused(workspace):
    other = settings(train={**COMPARISON["train"], "max_steps": 9})
    with pytest.raises(CheckpointError, match="name another output folder"):
        ablate.ablate(other, workspace / "data", workspace / "out", device="cpu", progress="none")


def test_a_dry_run_shows_the_cost(workspace, capsys):
    assert main(["ablate", str(workspace / "comparison.yaml"), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("FLOPs") == 7 and "ut, seed 1" in printed and "6 runs" in printed


def test_intervals_are_students():
    assert ablate.half_width([0.5]) is None
    assert ablate.half_width([1.0, 2.0, 3.0]) == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(ablate.half_width([1.0, math.nan]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"variants": [{"name": "a"}]}, "at least two"),
        ({"variants": [{"name": "a"}, {"name": "a"}]}, "different names"),
        ({"variants": [{"name": "a/b"}, {"name": "c"}]}, "letters, digits"),
        ({"seeds": [1, 1]}, "different ones"),
        ({"train": {"lr": 1e-3}}, "max_steps is missing"),
        ({"variants": [{"name": "a"}, {"name": "b", "changes": {"lrr": 1}}]}, "variant b.*'lr'"),
    ],
)
def test_wrong_comparisons_are_refused(changes, words):
    with pytest.raises(ConfigError, match=words):
        settings(**changes)
