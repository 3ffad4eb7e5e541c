"""hrm-text quickstart: the whole system on real instruction data, on a laptop, in minutes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from hrmtext.config.train import TrainConfig
    from hrmtext.evaluate.report import EvaluationReport
    from hrmtext.generate.runner import TextModel


SAFE_SHARE = 0.8
"""Share of the time limit that is planned for: a machine slows down when others use it too."""


def quickstart(
    *,
    out: Path = Path("runs/quickstart"),
    device: str = "auto",
    max_minutes: float = 8.0,
) -> int:
    """Data, tokenizer, packing, pretraining, held-out evaluation, export, answers: from nothing.

    Trains a small HRM on reasoning-gym families that a model of this size learns in minutes.
    Run it again to go on where it stopped; finished stages are not repeated.

    Args:
        out: folder of everything it writes.
        device: auto, cpu, cuda or cuda:N.
        max_minutes: most training time; a slow machine takes fewer steps.
    """
    from rich.console import Console

    console = Console(highlight=False)
    began = time.monotonic()

    def stage(number: int, title: str) -> None:
        elapsed = time.monotonic() - began
        console.print(f"\n[bold]{number}/5 {title}[/bold]  [dim]({elapsed:.0f} s so far)[/dim]")

    from hrmtext.cli.recipes import recipe
    from hrmtext.config.base import load
    from hrmtext.config.data import DataConfig

    stage(1, "data: generate, check, tokenise, sample")
    from hrmtext.cli.data import print_prepared
    from hrmtext.cli.progress import stage_progress
    from hrmtext.data.prepare import prepare

    data_config = load(DataConfig, recipe("data/quickstart.yaml"))
    data_folder = out / "data"
    with stage_progress() as progress:
        prepared = prepare(data_config, data_folder, progress)
    print_prepared(console, prepared)

    stage(2, "pretraining")
    from hrmtext.train.loop import train

    train_config = _train_config(console, data_folder, out / "run", device, max_minutes)
    result = train(train_config, data_folder=data_folder, run_folder=out / "run", device=device)
    console.print(
        f"{result.step:,} of {result.total_steps:,} steps, {result.tokens / 1e6:.1f} M tokens, "
        f"{result.elapsed_s / 60:.1f} minutes"
    )

    stage(3, "evaluation on held-out prompts")
    from hrmtext.cli.evaluate import evaluate_model
    from hrmtext.config.evaluate import EvaluateConfig

    report = evaluate_model(
        console,
        out / "run",
        rows=data_folder / "heldout",
        training_rows=data_folder / "clean",
        config=EvaluateConfig(max_new_tokens=48),
        device=device,
    )

    stage(4, "export to a Hugging Face folder")
    from hrmtext.api import load as load_model
    from hrmtext.cli.export import describe_export
    from hrmtext.convert import export_hf

    exported = out / "hf"
    if exported.exists():
        console.print(f"{exported} is there already")
    else:
        source = load_model(out / "run", device="cpu", dtype="fp32")
        console.print(describe_export(export_hf(source, exported)))

    stage(5, "answers of the exported model")
    _answers(console, load_model(exported, device=device), report)
    console.print(f"\nDone in {(time.monotonic() - began) / 60:.1f} minutes"
                  f"{_peak_memory()}. Next:")  # fmt: skip
    console.print(f"  open {out / 'run' / 'report.html'}")
    console.print(
        f'  hrm-text generate {exported} "Spell this word backward (example: sun -> nus): lamp"'
    )
    console.print("  hrm-text --help")
    return 0


def _train_config(
    console: Console, data_folder: Path, run_folder: Path, device: str, max_minutes: float
) -> TrainConfig:
    """The recipe, shortened where a short probe says that it would not fit the time."""
    from hrmtext.artifacts.layout import RunFolder
    from hrmtext.cli.recipes import recipe
    from hrmtext.config.base import load
    from hrmtext.config.train import TrainConfig
    from hrmtext.runtime.device import pick_device
    from hrmtext.train.estimate import estimate
    from hrmtext.train.source import FolderSource

    limit = f"max_minutes={max_minutes}"
    if RunFolder(run_folder).exists:
        return load(TrainConfig, run_folder / "config.yaml", [limit])
    config = load(TrainConfig, recipe("train/quickstart.yaml"), [limit])
    whole = load(TrainConfig, recipe("train/quickstart.yaml"))  # its time, not the limit's
    expected = estimate(
        whole, source=FolderSource(data_folder), device=pick_device(device), measure=True
    )
    assert expected.seconds and expected.total_steps, "measured, and the data is known"
    console.print(
        f"{expected.stored_parameters:,} parameters in {expected.precision}; this machine needs "
        f"about {expected.seconds / 60:.1f} minutes for all {expected.total_steps:,} steps"
    )
    share = SAFE_SHARE * max_minutes * 60 / expected.seconds
    if share >= 1:
        return config
    steps = max(100, int(share * expected.total_steps))
    console.print(f"shortened to {steps:,} steps, to stay within {max_minutes:g} minutes")
    return load(TrainConfig, recipe("train/quickstart.yaml"), [limit, f"max_steps={steps}"])


def _answers(console: Console, model: TextModel, report: EvaluationReport) -> None:
    """One held-out question of every family, answered, with the truth beside it."""
    firsts = {}
    for prediction in report.predictions:
        firsts.setdefault(prediction.family, prediction)
    questions = [prediction.instruction for prediction in firsts.values()]
    conditions = [prediction.condition for prediction in firsts.values()]
    answers = model.generate(questions, conditions, max_new_tokens=48)
    for (family, asked), answer in zip(firsts.items(), answers, strict=True):
        right = answer.strip() == asked.expected.strip()
        verdict = "right" if right else f"wrong, expected {asked.expected!r}"
        console.print(f"  {family}: {asked.instruction!r}", markup=False)
        console.print(f"    {answer!r}  ({verdict})", markup=False)


def _peak_memory() -> str:
    """Peak main memory of this process, where the system tells."""
    import torch

    from hrmtext.runtime.memory import peak_memory_bytes

    peak = peak_memory_bytes(torch.device("cpu"))
    return "" if peak is None else f", peak memory {peak / 2**30:.2f} GiB"
