"""The command line from raw rows to answers, in process, on a tiny model; and its errors."""

import json

import pytest

from hrmtext.cli.main import main

TINY = [
    "model.preset=null", "model.vocab_size=512", "model.hidden_size=32",
    "model.num_layers_per_stack=1", "model.num_heads=2", "model.head_dim=16",
    "model.intermediate_size=64", "model.max_seq_len=64", "epochs=1", "max_steps=4",
    "batch_tokens=256", "warmup_steps=2", "ema_decay=0.5", "precision=fp32", "validate_every=0",
    "validation_rows=20",
]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A data folder and a short run, made by the commands of the README."""
    root = tmp_path_factory.mktemp("cli")
    rows = [
        {"instruction": f"Add {a} and {b}, please", "response": str(a + b), "condition": "cot"}
        for a in range(12)
        for b in range(12)
    ]
    lines = [json.dumps(row) for row in rows] + ["{not json", json.dumps({"instruction": "x"})]
    (root / "rows.jsonl").write_text("\n".join(lines) + "\n")
    recipe = root / "data.yaml"
    recipe.write_text(
        f"local: [{{path: {root / 'rows.jsonl'}, eval_size: 8}}]\n"
        "tokenizer: {vocab_size: 290}\nsampling: {epochs: 1, max_seq_len: 64}\n"
    )
    (root / "train.yaml").write_text("seed: 3\n")
    assert main(["data", "prepare", str(recipe), str(root / "data")]) == 0
    train = ["train", str(root / "train.yaml"), *TINY, "--data", str(root / "data")]
    assert main([*train, "--run", str(root / "run"), "--device", "cpu"]) == 0
    return root


def test_preparing_reports_what_it_left_out_and_that_nothing_is_shared(workspace, capsys):
    assert main(["data", "prepare", str(workspace / "data.yaml"), str(workspace / "data")]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "prompts that training and held-out rows share: 0" in printed
    assert "up to date, not repeated: clean, heldout, tokenizer, tokenized, sampled" in printed
    assert "1 rows (malformed JSON" in printed or "1 rows (invalid JSON" in printed, printed


@pytest.mark.parametrize("folder", ["clean", "heldout", "tokenized", "sampled", ""])
def test_every_stage_can_be_inspected(workspace, capsys, folder):
    assert main(["data", "inspect", str(workspace / "data" / folder)]) == 0
    assert "rows" in capsys.readouterr().out


def test_the_stages_can_be_run_one_by_one(workspace, tmp_path, capsys):
    clean, out = str(workspace / "data" / "clean"), tmp_path
    assert main(["data", "tokenizer", clean, str(out / "tok"), "--vocab-size", "289"]) == 0
    assert main(["data", "tokenize", clean, str(out / "tok"), str(out / "ids")]) == 0
    sample = ["data", "sample", str(out / "ids"), str(out / "epochs"), "epochs=1"]
    assert main([*sample, "max_seq_len=64"]) == 0
    assert "289 entries written" in capsys.readouterr().out


def test_a_dry_run_prints_the_cost_and_starts_nothing(workspace, capsys):
    arguments = ["train", str(workspace / "train.yaml"), *TINY, "--dry-run"]
    assert main([*arguments, "--data", str(workspace / "data")]) == 0
    printed = capsys.readouterr().out
    assert "parameters" in printed
    assert "FLOPs" in printed
    assert "memory" in printed


def test_a_run_is_evaluated_and_its_report_renewed(workspace, capsys):
    before = (workspace / "run" / "report.html").read_text()
    arguments = ["eval", str(workspace / "run"), "max_new_tokens=4"]
    assert main([*arguments, "--data", str(workspace / "data"), "--device", "cpu"]) == 0
    found = json.loads((workspace / "run" / "evaluation.json").read_text())
    assert [family["rows"] for family in found["families"]] == [8]
    assert "majority" in capsys.readouterr().out
    assert (workspace / "run" / "report.html").read_text() != before


def test_an_export_answers_as_the_run_does(workspace, capsys):
    assert main(["export", str(workspace / "run"), str(workspace / "hf")]) == 0
    assert "checked against transformers" in capsys.readouterr().out
    answers = []
    for model in ("run", "hf"):
        arguments = ["generate", str(workspace / model), "Add 3 and 4, please"]
        assert main([*arguments, "--condition", "cot", "--max-new-tokens", "5"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_info_shows_a_preset_a_run_and_the_machine(workspace, capsys):
    for arguments in (["info"], ["info", "XL"], ["info", str(workspace / "run")]):
        assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "1,182,793,728" in printed
    assert "hidden_size: 32" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "absent.yaml", "--dry-run"], "no such configuration file"),
        (["eval", "run"], "--data FOLDER or --rows FILE"),
        (["generate", "absent", "hello"], "no such folder"),
        (["info", "XLL"], "XLL"),
        (["data", "prepare", "absent.yaml", "out"], "no such configuration file"),
    ],
)
def test_wrong_input_gives_one_clear_line_and_status_2(
    arguments, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert message in printed
    assert "Traceback" not in printed


def test_an_unknown_device_or_condition_is_refused(workspace, capsys):
    run = str(workspace / "run")
    assert main(["generate", run, "hi", "--device", "tpu"]) == 2
    assert main(["generate", run, "hi", "--condition", "cott"]) == 2
    printed = capsys.readouterr().err
    assert "unknown device 'tpu'" in printed
    assert "perhaps you meant 'cot'" in printed


def test_training_again_in_the_same_folder_goes_on_and_never_overwrites(workspace, capsys):
    arguments = ["train", str(workspace / "train.yaml"), *TINY, "--data", str(workspace / "data")]
    run = ["--run", str(workspace / "run"), "--device", "cpu"]
    assert main([*arguments, *run, "--resume", "never"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert main([*arguments, *run]) == 0
