"""kill -9 in the middle of every stage of a data run: the reruns end with the same bytes.

HRMTEXT_KILLS sets how many moments of each stage are tried; the default is one. With more than one
they are tried on a Ray cluster too.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from snapshots import snapshot

from hrmtext.config.base import build, dump_yaml
from hrmtext.config.data import DataConfig

KILLS = int(os.environ.get("HRMTEXT_KILLS", "1"))
SOURCE = Path(__file__).parents[3] / "src"
STAGES = {
    "sources": "collect",
    "held-out rows": "choose_held_out",
    "cleaning": "clean_files",
    "comparing": "count_shared_prompts",
    "tokenizer": "training_texts",
    "tokenising": "tokenize_files",
    "sampling": "sample",
    "report": None,
}
"""Stage -> the function of hrmtext.data.prepare that begins it."""

# A run that says when a stage begins. Small pieces, so that each stage has many.
RUN = """
import json, sys, time
from hrmtext.config.base import load
from hrmtext.config.data import DataConfig
from hrmtext.config.engine import EngineConfig
from hrmtext.data import gather, prepare
from hrmtext.data.engine import open_engine
from hrmtext.data.report import write_manifest, write_report

config, out, name, stages = sys.argv[1:]
said = set()

def say(stage):
    if stage not in said:
        print(f"{time.monotonic()} {stage}", flush=True)
    said.add(stage)

def announced(stage, function):
    def call(*arguments, **options):
        say(stage)
        return function(*arguments, **options)
    return call

for stage, function in json.loads(stages).items():
    if function is not None:
        setattr(prepare, function, announced(stage, getattr(prepare, function)))
gather.ROWS_PER_PIECE = 50
if __name__ == "__main__":
    with open_engine(EngineConfig(name=name, num_workers=2)) as engine:
        prepare.prepare(load(DataConfig, config), out, engine=engine, part_bytes=6_000)
    say("report")
    write_report(out)
    write_manifest(out)
    say("end")
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, texts):
    root = tmp_path_factory.mktemp("kill")
    (root / "raw").mkdir()
    for name, part in (("a", texts[:200]), ("b", texts[150:]), ("c", texts[:40])):
        with (root / "raw" / f"{name}.jsonl").open("w") as stream:
            for i, text in enumerate(part * (1 if name == "c" else 4)):
                row = {"instruction": text, "response": text[: 2 + i % 40]}
                stream.write(json.dumps(row) + "\n")
    for number in range(8):
        with (root / f"train-{number}.jsonl").open("w") as stream:
            for i in range(60):
                row = {"question": f"{number} and {i}?", "answer": f"So.\n#### {i}"}
                stream.write(json.dumps(row) + "\n")
    rules = [{"prefix": "a", "tokens": 4_000}, {"prefix": "b", "max_rows": 90}]
    values = {
        "local": [{"path": str(root / "raw"), "eval_size": 9}],
        "hub": [{"source": "gsm8k", "files": [str(p) for p in sorted(root.glob("train-*"))]}],
        "cleaning": {"drop_duplicates": True},
        "tokenizer": {"vocab_size": 340},
        "sampling": {"epochs": 3, "max_seq_len": 256, "rules": rules},
    }
    path = root / "recipe.yaml"
    path.write_text(dump_yaml(build(DataConfig, values, where="test")))
    return path


def start(recipe, out, engine):
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(recipe), str(out), engine, json.dumps(STAGES)],
        stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    )  # fmt: skip


def begins(process, stage):
    """When the stage begins; None if the process ends before."""
    for line in process.stdout:
        moment, _, name = line.strip().partition(" ")
        if name == stage:
            return float(moment)
    return None


@pytest.fixture(scope="module")
def whole(recipe, tmp_path_factory):
    """What an uninterrupted run makes, and how long each stage takes."""
    out = tmp_path_factory.mktemp("whole") / "data"
    with start(recipe, out, "local") as process:
        moments = [begins(process, stage) for stage in (*STAGES, "end")]
    assert process.returncode == 0
    took = [after - before for before, after in pairwise(moments)]
    return snapshot(out), dict(zip(STAGES, took, strict=True))


@pytest.mark.parametrize("moment", range(KILLS))
@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_run_killed_in_every_stage_ends_with_the_same_bytes(
    recipe, whole, tmp_path, engine, moment
):
    if engine == "ray" and KILLS == 1:
        pytest.skip("starting eight Ray clusters takes minutes; set HRMTEXT_KILLS")
    expected, took = whole
    generator = random.Random(f"{engine} {moment}")
    out = tmp_path / "data"
    killed = []
    for stage in STAGES:
        share = (moment + generator.random()) / KILLS
        with start(recipe, out, engine) as process:
            if begins(process, stage) is not None:
                time.sleep(share * took[stage])
                process.send_signal(signal.SIGKILL)
        if process.returncode == -signal.SIGKILL:
            killed.append(stage)
        else:
            assert process.returncode == 0
    with start(recipe, out, engine) as process:
        assert begins(process, "end") is not None
    assert process.returncode == 0
    assert snapshot(out) == expected
    left = [path.name for path in (*tmp_path.iterdir(), *out.iterdir())]
    assert not [name for name in left if name.startswith(".")], "no leftovers"
    assert len(killed) >= len(STAGES) // 2, f"killed only in {killed}"
