"""The data folder and the run folder: whole, and fitting the recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from hrmtext.artifacts.layout import RunFolder
from hrmtext.config.train import TrainConfig, run_differences
from hrmtext.data.tokenizer import PromptTokenizer
from hrmtext.doctor.finding import Finding
from hrmtext.errors import CheckpointError, ConfigError, DataError
from hrmtext.runtime.io import MARKER, require_complete
from hrmtext.train.checkpoint import read_training_record
from hrmtext.train.source import FolderSource, check_data

AGAIN = "run the same `hrm-text data prepare` again; it goes on where something is missing"


def check_data_folder(folder: Path, recipe: TrainConfig | None) -> list[Finding]:
    """Markers of all stages, every index of the sampled rows, the tokenizer, the recipe's shape."""
    try:
        source = FolderSource(folder)
    except DataError as error:
        return [Finding("data", "sampled", "problem", str(error), AGAIN)]
    findings = _markers(folder)
    rows, highest = 0, 0
    try:
        for epoch in range(source.data.num_epochs):
            rows += source.data.epoch(epoch).num_rows
        for start in range(0, len(source.data.tokens), 1 << 26):
            part = source.data.tokens[start : start + (1 << 26)]
            highest = max(highest, int(np.max(part)))
    except DataError as error:
        return [*findings, Finding("data", "sampled", "problem", str(error), AGAIN)]
    if highest >= source.vocab_size:
        text = f"token {highest} is there, the tokenizer has {source.vocab_size}"
        return [*findings, Finding("data", "tokens", "problem", text, AGAIN)]
    text = f"{rows:,} rows in {source.data.num_epochs} epochs, fingerprint {source.fingerprint}"
    findings.append(Finding("data", "sampled", "ok", text))
    findings += _tokenizer(source)
    if recipe is not None:
        try:
            check_data(recipe, source)
        except ConfigError as error:
            advice = "change the recipe or the sampling as the message says"
            findings.append(Finding("data", "recipe", "problem", str(error), advice))
        else:
            findings.append(Finding("data", "recipe", "ok", "rows and vocabulary fit the model"))
    return findings


def _markers(folder: Path) -> list[Finding]:
    """Every folder below that was marked complete: files as they were written."""
    findings, whole = [], 0
    for marker in sorted(folder.rglob(MARKER)):
        try:
            require_complete(marker.parent)
            whole += 1
        except CheckpointError as error:
            findings.append(Finding("data", marker.parent.name, "problem", str(error), AGAIN))
    if not findings:
        findings.append(Finding("data", "files", "ok", f"{whole} folders whole, by their markers"))
    return findings


def _tokenizer(source: FolderSource) -> list[Finding]:
    if source.tokenizer_folder is None:
        advice = (
            "checkpoints would hold no tokenizer; prepare the data with `hrm-text data prepare`"
        )
        return [Finding("data", "tokenizer", "warning", "none beside the rows", advice)]
    tokenizer = PromptTokenizer.load(source.tokenizer_folder)
    if tokenizer.vocab_size != source.vocab_size:
        text = f"{tokenizer.vocab_size} tokens, the rows were made with {source.vocab_size}"
        return [Finding("data", "tokenizer", "problem", text, AGAIN)]
    return [Finding("data", "tokenizer", "ok", f"{tokenizer.vocab_size:,} tokens")]


def check_run_folder(folder: Path, recipe: TrainConfig | None) -> list[Finding]:
    """Checkpoints whole or not, and whether the recipe would go on from the last."""
    run = RunFolder(folder)
    if not run.exists:
        return [Finding("run", folder.name, "ok", "not there yet: a new run would start")]
    whole = run.checkpoints()
    entries = [*run.checkpoints_folder.iterdir()] if run.checkpoints_folder.is_dir() else []
    broken = [path.name for path in entries if path not in whole and path.name[:1] != "."]
    findings = []
    if broken:
        advice = "they are passed over; remove them once no process writes to this run"
        text = f"incomplete: {', '.join(sorted(broken))}"
        findings.append(Finding("run", "checkpoints", "warning", text, advice))
    if not whole:
        return [*findings, Finding("run", "checkpoints", "ok", "none yet: step 0 comes next")]
    best = f"; best is {run.best().name}" if run.losses() else ""
    text = f"{len(whole)} whole, the last is {whole[-1].name}{best}"
    findings.append(Finding("run", "checkpoints", "ok", text))
    try:
        record = read_training_record(whole[-1])
    except CheckpointError as error:
        advice = "training can't go on from it; use another folder"
        return [*findings, Finding("run", "resume", "problem", str(error), advice)]
    if recipe is not None:
        differences = run_differences(record["config"], recipe)
        if differences:
            advice = "give the recipe of that run, or another run folder"
            text = f"the recipe differs: {'; '.join(differences)}"
            return [*findings, Finding("run", "resume", "problem", text, advice)]
        text = f"the recipe goes on at step {record['step']:,} of {record['total_steps']:,}"
        findings.append(Finding("run", "resume", "ok", text))
    return findings
