"""From measured rates of one core to the time of the published corpus on 1, 8 and 64 nodes.

    python benchmarks/data_nodes.py --measure   # rates of this machine, on one core; 2 minutes
    python benchmarks/data_nodes.py             # times, from results/data_rates-cpu.json

Stages made of tasks (sources, cleaning, drawing texts, tokenising) are divided by the nodes' cores
in whole rounds of tasks; the others run on one machine, whatever the nodes. Every stage takes at
least as long as its reading and writing at bandwidths that are assumed and not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result
from data_sample import make_strata
from data_sample import run as run_sample
from data_tokenize import generated_rows

from hrmtext.config.data import CleaningConfig, HubSourceConfig
from hrmtext.data.clean import SourceFile, clean_files
from hrmtext.data.engine import LocalEngine
from hrmtext.data.parts import PART_BYTES
from hrmtext.data.report.manifest import sha256
from hrmtext.data.sources.collect import collect
from hrmtext.data.sources.local import find_files
from hrmtext.data.tokenize import tokenize_files
from hrmtext.data.tokenizer import PromptTokenizer, train_tokenizer
from hrmtext.data.tokenizer_texts import TextSample, training_texts

CORPUS_TOKENS = 176.5e9
"""Tokens of the corpus before sampling, in CORPUS_ROWS rows (the paper's table of sources)."""
CORPUS_ROWS = 593.7e6
EPOCH_TOKENS, EPOCHS = 15e9, 4
STRATA = 5_200
SAMPLE_ROWS = 1_000 * STRATA
"""Rows that the tokenizer of configs/data/paper.yaml is trained on."""
NODES = (1, 8, 64)
ROUNDS = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What one stage costs."""

    name: str
    rate: str
    """Key of the measured rate, a second and core (or machine)."""
    amount: float
    """How much of the rate's unit there is."""
    tasks: bool
    """Whether the engine divides it among nodes."""
    gigabytes: float
    """Read and written."""


def median_rate(amount: float, function: Callable[[], object]) -> float:
    """Amount a second of the median call."""
    seconds = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return round(amount / statistics.median(seconds))


def long_rows(count: int, mean_bytes: int) -> Iterator[tuple[str, str]]:
    """Generated questions and answers, several put together to rows of the corpus' mean size."""
    held: list[tuple[str, str]] = []
    size = 0
    for question, answer in generated_rows(count):
        held.append((question, answer))
        size += len(question) + len(answer)
        if size >= mean_bytes:
            yield "\n".join(q for q, _ in held), "\n".join(f"{q} {a}" for q, a in held[:1])
            held, size = [], 0


def measure(work: Path, num_rows: int) -> dict[str, Any]:
    """Rates of this machine, on one core."""
    import pyarrow
    from pyarrow import parquet

    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    rows = list(long_rows(num_rows, 1_000))
    raw = [
        {"inputs": q, "targets": a, "_template_idx": 1, "_task_source": "s", "_task_name": "t",
         "_template_type": "fs_opt"}
        for q, a in rows
    ]  # fmt: skip
    mirror = work / "flan" / "cot_fsopt_data" / "part-0.parquet"
    mirror.parent.mkdir(parents=True)
    parquet.write_table(pyarrow.Table.from_pylist(raw), mirror, row_group_size=2_000)
    source = HubSourceConfig(source="flan", path=str(work / "flan"))
    num_bytes = sum(len(q.encode()) + len(a.encode()) for q, a in rows)
    tokenizer = PromptTokenizer(
        train_tokenizer((t for row in rows for t in row), 4_096, allow_fewer=True)
    )
    rates: dict[str, Any] = {"rows": len(rows), "text_bytes": num_bytes}

    def fresh(name: str) -> Path:
        shutil.rmtree(work / name, ignore_errors=True)
        return work / name

    with LocalEngine(1) as engine:
        rates["sources_rows_per_s"] = median_rate(
            len(rows), lambda: collect(source, fresh("sources"), engine=engine)
        )
        files = {n: SourceFile(path=p) for n, p in find_files(work / "sources").items()}
        rates["clean_rows_per_s"] = median_rate(
            len(rows), lambda: clean_files(files, fresh("clean"), CleaningConfig(), engine)
        )
        tokens = tokenize_files(work / "clean", fresh("tokenized"), tokenizer).num_tokens
        rates["tokenize_tokens_per_s"] = median_rate(
            tokens, lambda: tokenize_files(work / "clean", fresh("tokenized"), tokenizer)
        )
    rates |= {"tokens": tokens, "tokens_per_row": round(tokens / len(rows), 1)}
    sample = TextSample(max_rows_per_stratum=1_000, max_chars=10_000)
    rates["draw_rows_per_s"] = median_rate(
        len(rows), lambda: list(training_texts(work / "clean", sample))
    )
    rates["train_tokenizer_rows_per_s"] = median_rate(
        len(rows),
        lambda: train_tokenizer((t for row in rows for t in row), 4_096, allow_fewer=True),
    )
    big = next((work / "tokenized").rglob("tokens.npy"))
    rates["checksum_bytes_per_s"] = median_rate(big.stat().st_size, lambda: sha256(big))
    strata = make_strata(work / "index", 200, 2_000_000, 8_192, 10)
    found = run_sample(work / "index", work / "epochs", {"epochs": 4})
    rates["sample_rows_per_s"] = round(4 * strata / float(str(found["seconds"])))
    make_strata(work / "tokens", 4, 4_000, 60_000_000, 1)
    found = run_sample(work / "tokens", work / "joined", {"epochs": 1})
    rates["join_tokens_per_s"] = round(240_000_000 / float(str(found["seconds"])))
    return rates


def stages(rates: dict[str, Any]) -> list[Stage]:
    """All stages of `hrm-text data run configs/data/paper.yaml`, in order."""
    text = CORPUS_TOKENS * rates["text_bytes"] / rates["tokens"] / 1e9  # GB
    ids = CORPUS_TOKENS * 4 / 1e9
    index = CORPUS_ROWS * 32 / 1e9
    epochs = EPOCHS * EPOCH_TOKENS / (CORPUS_TOKENS / CORPUS_ROWS)
    return [
        Stage(name="sources", rate="sources_rows_per_s", amount=CORPUS_ROWS, tasks=True,
              gigabytes=2 * text),
        Stage(name="cleaning", rate="clean_rows_per_s", amount=CORPUS_ROWS, tasks=True,
              gigabytes=4 * text),
        Stage(name="drawing texts", rate="draw_rows_per_s", amount=CORPUS_ROWS, tasks=True,
              gigabytes=2 * text),
        Stage(name="training the tokenizer", rate="train_tokenizer_rows_per_s", amount=SAMPLE_ROWS,
              tasks=False, gigabytes=0),
        Stage(name="tokenising", rate="tokenize_tokens_per_s", amount=CORPUS_TOKENS, tasks=True,
              gigabytes=text + 3 * ids),
        Stage(name="joining tokens", rate="join_tokens_per_s", amount=CORPUS_TOKENS, tasks=False,
              gigabytes=1.5 * ids),
        Stage(name="sampling epochs", rate="sample_rows_per_s", amount=epochs, tasks=False,
              gigabytes=2 * index),
        Stage(name="checksums", rate="checksum_bytes_per_s",
              amount=(2 * text + 1.5 * ids + index) * 1e9, tasks=False,
              gigabytes=2 * text + 1.5 * ids),
    ]  # fmt: skip


def hours(stage: Stage, rates: dict[str, Any], nodes: int, args: argparse.Namespace) -> float:
    """Time of a stage on so many nodes."""
    seconds = stage.amount / rates[stage.rate]
    if stage.tasks:
        workers = nodes * args.cores
        text = CORPUS_TOKENS * rates["text_bytes"] / rates["tokens"]
        count = max(STRATA, text / PART_BYTES)
        seconds = seconds / count * math.ceil(count / workers)
    bandwidth = min(args.store_gb_s, (nodes if stage.tasks else 1) * args.node_gb_s)
    return max(seconds, stage.gigabytes / bandwidth) / 3600


def main() -> None:
    """Measure, or compute the times; write the result, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--rows", type=int, default=48_000, help="generated rows to measure with")
    parser.add_argument("--rates", type=Path, default=RESULTS / "data_rates-cpu.json")
    parser.add_argument("--cores", type=int, default=64, help="cores of a node (assumed)")
    parser.add_argument("--node-gb-s", type=float, default=2.0, help="of a node's link (assumed)")
    parser.add_argument("--store-gb-s", type=float, default=40.0, help="of all storage (assumed)")
    args = parser.parse_args()
    device = torch.device("cpu")
    if args.measure:
        work = Path(tempfile.mkdtemp())
        try:
            write_result("data_rates", device, measure(work, args.rows))
        finally:
            shutil.rmtree(work)
        return
    if not args.rates.is_file():
        raise SystemExit(f"{args.rates} is not there; measure first: --measure")
    rates = json.loads(args.rates.read_text())
    table = [
        {"stage": stage.name, "rate": rates[stage.rate], "unit": stage.rate, "tasks": stage.tasks}
        | {f"{nodes}_nodes_h": round(hours(stage, rates, nodes, args), 3) for nodes in NODES}
        for stage in stages(rates)
    ]
    total = {f"{n}_nodes_h": round(sum(row[f"{n}_nodes_h"] for row in table), 2) for n in NODES}
    print("| stage | measured rate | divided | " + " | ".join(f"nodes: {n}" for n in NODES) + " |")
    print("|---|---|---|" + "---:|" * len(NODES))
    for row in table:
        unit = row["unit"].removesuffix("_per_s").rpartition("_")[2]
        times = " | ".join(f"{row[f'{n}_nodes_h']:.2f} h" for n in NODES)
        divided = "by cores" if row["tasks"] else "no"
        print(f"| {row['stage']} | {row['rate']:,} {unit}/s | {divided} | {times} |")
    print("| **all** | | | " + " | ".join(f"{total[f'{n}_nodes_h']:.1f} h" for n in NODES) + " |")
    values = {
        "rates_of": {key: rates[key] for key in ("commit", "machine")},
        "assumed": {
            "cores_per_node": args.cores, "node_gb_per_s": args.node_gb_s,
            "store_gb_per_s": args.store_gb_s,
        },
        "corpus": {"tokens": CORPUS_TOKENS, "rows": CORPUS_ROWS},
        "stages": table, "total": total,
    }  # fmt: skip
    write_result("data_nodes", device, values)


if __name__ == "__main__":
    main()
