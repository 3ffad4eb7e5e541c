"""The engines: the same bytes from every one, lost workers' tasks run again, clear refusals."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from snapshots import snapshot

from hrmtext.cli.main import main
from hrmtext.config.base import build, dump_yaml
from hrmtext.config.data import DataConfig
from hrmtext.config.engine import EngineConfig
from hrmtext.data.engine import LocalEngine
from hrmtext.data.prepare import prepare
from hrmtext.data.ray_engine import node_problem
from hrmtext.errors import ConfigError

PART_BYTES = 9_000
SOURCE = Path(__file__).parents[3] / "src"

# The command line's own path, but for parts so small that there are many.
ON_RAY = """
import sys
from hrmtext.cli.main import main
from hrmtext.data import prepare
prepare.prepare.__kwdefaults__["part_bytes"] = int(sys.argv[1])
if __name__ == "__main__":
    sys.exit(main(["data", "prepare", *sys.argv[2:], "--engine", "ray"]))
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory, texts) -> DataConfig:
    """Pairs, conversations, bad rows, exact and near duplicates across files, held-out prompts."""
    raw = tmp_path_factory.mktemp("engines") / "raw"
    raw.mkdir()
    generator = random.Random(0)
    rows = [{"instruction": t, "response": t[: 1 + i % 40]} for i, t in enumerate(texts)]
    chats = [
        {"messages": [
            {"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]},
            {"role": "user", "content": "and?"}, {"role": "assistant", "content": text[:9]},
        ]}
        for text in texts[:60]
    ]  # fmt: skip
    long = [
        {"instruction": " ".join(generator.choices(texts, k=9)), "response": "x"} for _ in "abc"
    ]
    long += [{**row, "instruction": row["instruction"] + " once more"} for row in long]
    files = {
        "a": [*rows, *rows[:50], *long[:4], {"instruction": "", "response": "a@b.org"}],
        "b": [*chats, *rows[100:], {"no": 1}, *long[4:]],
        "c": [{"instruction": f"write {i} to a@b.org", "response": f"{i}"} for i in range(300)],
    }
    for name, lines in files.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (raw / f"{name}.jsonl").write_text(text + "{broken\n")
    public = [raw.parent / f"train-{number}.jsonl" for number in range(3)]
    for number, path in enumerate(public):
        lines = [{"question": f"{number} + {i}?", "answer": f"So.\n#### {number + i}"}
                 for i in range(50)]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"question": "?"}]))
    values = {
        "local": [{"path": str(raw), "eval_size": 8, "prefix": "mine__"}],
        "hub": [{"source": "gsm8k", "files": [str(path) for path in public], "eval_size": 3}],
        "cleaning": {"drop_duplicates": True, "near_duplicates": 0.7, "pii": "mask"},
        "tokenizer": {"vocab_size": 340, "max_rows_per_stratum": 90, "seed": 3},
        "sampling": {"epochs": 2, "max_seq_len": 256},
    }
    return build(DataConfig, values, where="test")


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """What one process makes of whole files."""
    out = tmp_path_factory.mktemp("whole") / "out"
    with LocalEngine(1) as engine:
        report = prepare(config, out, engine=engine).report
    assert {"exact duplicate", "near duplicate", "malformed JSON", "missing instruction"} <= set(
        report["clean"]["dropped"]
    )
    assert report["clean"]["strata"]["mine__c"]["changed"]["email masked"] > 100
    return snapshot(out)


@pytest.mark.parametrize(("workers", "part_bytes"), [(1, 2_000), (2, PART_BYTES), (4, 5_000)])
def test_any_number_of_workers_and_any_cut_gives_the_same_bytes(
    config, whole, tmp_path, workers, part_bytes
):
    with LocalEngine(workers) as engine:
        prepare(config, tmp_path / "out", engine=engine, part_bytes=part_bytes)
    assert snapshot(tmp_path / "out") == whole


def ray_tasks(driver: psutil.Process) -> list[psutil.Process]:
    """Ray's worker processes that run a task of ours at this moment."""
    found = []
    for process in driver.children(recursive=True):
        try:
            if any("ray::_run" in part for part in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def start_on_ray(folder, config, *options):
    """A run on Ray in a process of its own, and the folder that it writes."""
    (folder / "recipe.yaml").write_text(dump_yaml(config))
    (folder / "on_ray.py").write_text(ON_RAY)
    out = folder / "out"
    process = subprocess.Popen(
        [sys.executable, "on_ray.py", str(PART_BYTES), "recipe.yaml", str(out), *options],
        env={**os.environ, "PYTHONPATH": str(SOURCE), "RAY_USAGE_STATS_ENABLED": "0"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=folder,
    )  # fmt: skip
    return process, out


def parts_done(out):
    return list(out.glob(".clean.parts/*/*/COMPLETE.json"))


def test_a_ray_cluster_gives_the_same_bytes_though_a_worker_is_killed(config, whole, tmp_path):
    process, out = start_on_ray(tmp_path, config, "--num-workers", "2")
    killed = []
    driver = psutil.Process(process.pid)
    while process.poll() is None and not killed:
        # Parts are there and not joined: some are done, others are being cleaned.
        if parts_done(out):
            for worker in ray_tasks(driver)[:1]:
                worker.kill()
                killed.append(worker.pid)
        time.sleep(0.002)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    assert killed, "no worker was caught at work"
    assert snapshot(out) == whole


@pytest.mark.skipif(
    int(os.environ.get("HRMTEXT_KILLS", "1")) < 2,
    reason="a second cluster takes half a minute; set HRMTEXT_KILLS",
)
def test_a_running_cluster_that_loses_one_of_its_two_nodes_gives_the_same_bytes(
    config, whole, tmp_path
):
    code = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(nodes[0], allow_graceful=False)
sys.stdin.readline()
cluster.shutdown()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(SOURCE)},
    ) as cluster:  # fmt: skip
        assert cluster.stdout is not None and cluster.stdin is not None
        address = cluster.stdout.readline().strip()
        process, out = start_on_ray(tmp_path, config, "--address", address)
        while process.poll() is None and len(parts_done(out)) < 2:
            time.sleep(0.005)
        running = process.poll() is None
        cluster.stdin.write("lose one\n")
        cluster.stdin.flush()
        said, _ = process.communicate(timeout=240)
        cluster.communicate("end\n")
    assert running and process.returncode == 0, said
    assert snapshot(out) == whole


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"num_workers": 0}, "num_workers is 0, expected at least 1"),
        ({"address": "auto"}, "address 'auto' is of a Ray cluster, but the engine is 'local'"),
        ({"name": "ray", "address": "auto", "num_workers": 2}, "leave num_workers out"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(values, words):
    with pytest.raises(ConfigError, match=words):
        build(EngineConfig, values, where="test")


def test_a_missing_engine_says_what_to_install(tmp_path, tokenizer, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    (tmp_path / "rows.jsonl").write_text('{"instruction": "a", "response": "b"}\n')
    tokenizer.save(tmp_path / "tokenizer")
    names = ["rows.jsonl", "tokenizer", "out"]
    command = ["data", "tokenize", *(str(tmp_path / name) for name in names)]
    assert main([*command, "--engine", "ray"]) == 2
    assert "pip install 'hrm-text[distributed]'" in capsys.readouterr().err


def test_a_node_of_another_version_or_without_the_folder_is_named(tmp_path):
    from hrmtext import __version__

    assert node_problem(__version__, [str(tmp_path)]) is None
    assert "install the same on all" in (node_problem("0.0.1", []) or "")
    problem = node_problem(__version__, [str(tmp_path / "gone" / ".probe.1.tmp")])
    assert problem is not None and f"does not see {tmp_path / 'gone'};" in problem


def test_an_address_of_object_storage_is_refused_by_name(config, tmp_path):
    with pytest.raises(ConfigError, match=r"s3://bucket/x, an address of s3; expected a path"):
        prepare(config, "s3://bucket/x")
    local = {"local": [{"path": "gs://bucket/rows"}]}
    with pytest.raises(ConfigError, match="an address of gs"):
        build(DataConfig, local, where="test")


def test_workers_start_without_torch():
    code = (
        "import sys, hrmtext.data.prepare, hrmtext.data.engine as engine, importlib\n"
        "for name in engine.TASKS.values(): assert callable(importlib.import_module(name).answer)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
