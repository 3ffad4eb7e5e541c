"""kill -9 in the middle of tokenising and sampling: the rerun ends with the same bytes.

HRMTEXT_KILLS sets how many moments of each stage are tried; the default is one.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hrmtext.data.tokenize import tokenize_files

KILLS = int(os.environ.get("HRMTEXT_KILLS", "1"))

# Pauses at random places stretch the run, so that moments fall everywhere; they change no result.
STAGE = """
import json, random, sys, time
from pathlib import Path
from hrmtext.config.data import SamplingConfig, StratumRule
from hrmtext.data import gather
from hrmtext.data.sample import sample
from hrmtext.data.tokenize import tokenize_files
from hrmtext.data.tokenizer import PromptTokenizer

stage, source, out, workers = sys.argv[1:]
print("started", flush=True)
if stage == "tokenize":
    tokenizer = PromptTokenizer.load(Path(out).parent / "tokenizer")
    tokenize_files(source, out, tokenizer, num_workers=int(workers), part_bytes=6_000)
else:
    gather.ROWS_PER_PIECE = 50
    rules = (StratumRule(prefix="a", tokens=4_000), StratumRule(prefix="b", max_rows=90))
    sample(source, out, SamplingConfig(epochs=3, max_seq_len=256, rules=rules), replace=True)
print("ended", flush=True)
"""


def snapshot(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def start(stage, source, out, workers):
    source_folder = Path(__file__).parents[3] / "src"
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE, stage, str(source), str(out), str(workers)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(source_folder)},
    )
    assert process.stdout is not None and process.stdout.readline() == "started\n"
    return process


def end(process):
    rest = process.stdout.read()
    process.stdout.close()
    return process.wait(), rest


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, tokenizer, texts):
    root = tmp_path_factory.mktemp("kill")
    (root / "clean").mkdir()
    for name, part in (("a", texts[:200]), ("b", texts[150:]), ("c", texts[:40])):
        with (root / "clean" / f"{name}.jsonl").open("w") as stream:
            for i, text in enumerate(part * (1 if name == "c" else 4)):
                stream.write(
                    json.dumps({"instruction": text, "response": text[: 2 + i % 40]}) + "\n"
                )
    tokenizer.save(root / "tokenizer")
    tokenize_files(root / "clean", root / "tokenized", tokenizer)
    return root


@pytest.mark.parametrize(("stage", "workers"), [("tokenize", 1), ("tokenize", 2), ("sample", 1)])
def test_a_stage_killed_at_random_moments_ends_with_the_same_bytes(
    inputs, tmp_path, stage, workers
):
    source = inputs / ("clean" if stage == "tokenize" else "tokenized")
    (tmp_path / "tokenizer").symlink_to(inputs / "tokenizer")
    whole = tmp_path / "whole"
    process = start(stage, source, whole, workers)
    began = time.monotonic()
    assert end(process) == (0, "ended\n")
    took = time.monotonic() - began
    expected = snapshot(whole)

    generator = random.Random(f"{stage} {workers}")
    killed = 0
    for attempt in range(KILLS):
        out = tmp_path / f"killed{attempt}"
        moment = took * (attempt + generator.random()) / KILLS
        process = start(stage, source, out, workers)
        time.sleep(moment)
        process.send_signal(signal.SIGKILL)
        status, _ = end(process)
        killed += status == -signal.SIGKILL
        assert end(start(stage, source, out, workers)) == (0, "ended\n")
        assert snapshot(out) == expected
        left = {path.name for path in tmp_path.iterdir()}
        assert not [name for name in left if name.startswith(".")], "no leftovers"
    assert killed >= KILLS // 2, f"of {KILLS} runs only {killed} were killed before their end"
