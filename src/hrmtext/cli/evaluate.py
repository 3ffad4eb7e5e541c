"""hrm-text eval"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

if TYPE_CHECKING:
    from rich.console import Console

    from hrmtext.config.evaluate import EvaluateConfig
    from hrmtext.evaluate.report import EvaluationReport


def evaluate(
    model: Annotated[Path, tyro.conf.Positional],
    overrides: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    *,
    data: Path | None = None,
    rows: Path | None = None,
    config: Path | None = None,
    out: Path | None = None,
    weights: Literal["auto", "ema", "raw"] = "auto",
    device: str = "auto",
    dtype: str = "auto",
) -> int:
    """Exact match on held-out rows, by family, with confidence intervals and a baseline.

    Writes evaluation.json and predictions.jsonl; in a run folder they also enter report.html.

    Args:
        model: run folder, checkpoint or Hugging Face folder.
        overrides: options as key=value: max_new_tokens=128 condition=synth,cot limit=100 ...
        data: folder made by `hrm-text data prepare`; its held-out rows are asked.
        rows: a JSONL file of held-out rows instead.
        config: a YAML file with the same options.
        out: folder of the results; the default is the run folder, else results are only printed.
        weights: averaged weights where present (auto), ema, or raw.
        device: auto, cpu, cuda or cuda:N.
        dtype: auto, fp32, bf16 or fp16.
    """
    from rich.console import Console

    from hrmtext.config.base import load
    from hrmtext.config.evaluate import EvaluateConfig
    from hrmtext.errors import ConfigError

    if (data is None) == (rows is None):
        raise ConfigError("say which rows to ask: --data FOLDER or --rows FILE, one of the two")
    evaluate_model(
        Console(highlight=False),
        model,
        rows=data / "heldout" if data is not None else rows,
        training_rows=data / "clean" if data is not None else None,
        config=load(EvaluateConfig, config, overrides),
        out=out,
        weights=weights,
        device=device,
        dtype=dtype,
    )
    return 0


def evaluate_model(
    console: Console,
    model: Path,
    *,
    rows: Path | None,
    training_rows: Path | None = None,
    config: EvaluateConfig | None = None,
    out: Path | None = None,
    weights: str = "auto",
    device: str = "auto",
    dtype: str = "auto",
) -> EvaluationReport:
    """Evaluate, print the table, write the results and renew the run's report."""
    from hrmtext.api import load
    from hrmtext.artifacts.layout import RunFolder
    from hrmtext.cli.progress import stage_progress
    from hrmtext.data.heldout import read_held_out
    from hrmtext.evaluate import run, score

    assert rows is not None, "the callers name the rows"
    held_out = read_held_out(rows)
    text_model = load(model, device=device, dtype=dtype, weights=weights)
    majority = score.majority_answers(training_rows) if training_rows is not None else None
    with stage_progress() as progress:
        report = run.evaluate(
            text_model,
            held_out,
            config,
            train_majority=majority,
            progress=lambda done, total: progress("answers", done, total),
        )
    report.show(console)
    folder = RunFolder(model)
    if out is None and folder.exists:
        out = folder.path
    if out is not None:
        console.print(f"written: {report.write(out, predictions=True)}")
        if folder.exists and out == folder.path:
            from hrmtext.train.report import write_report

            write_report(folder)
    return report
